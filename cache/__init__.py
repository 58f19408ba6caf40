"""The cache: prefix index, replication, stored contexts and totals. `proxy` imports from this module only."""

from cache.contexts.access import ContextLimits, Trust
from cache.contexts.rows import ContextRow, ContextStatus, Draft, Tag
from cache.contexts.segments import Content
from cache.contexts.store import ContextStore
from cache.errors import (
    CacheError,
    EmbeddedError,
    ErrorKind,
    PastExpiry,
    PinRefused,
    QuotaFull,
    StoreCorrupt,
    UnknownContext,
)
from cache.index.fingerprint import Fingerprint
from cache.index.hashing import chain_root, cut, extend, grid_before
from cache.index.prefix_index import (
    UNLIMITED_TOKENS,
    Feedback,
    FeedbackKind,
    Held,
    IndexStats,
    Match,
    Placement,
    PrefixIndex,
    ReplicaStats,
)
from cache.replication.apply import Listeners
from cache.replication.cold_claims import PART_TAKEN, ColdClaims
from cache.replication.inflight import LoadBroadcast
from cache.replication.journal import Journal, JournalState
from cache.replication.owners import ObjectLocations
from cache.replication.stats import JournalStats
from cache.secret import SharedSecret, usable_key
from cache.store.breaker import BreakerState
from cache.store.embedded import EmbeddedValkey
from cache.store.private_folder import why_unsafe
from cache.store.redis_clients import check_url as check_store_url
from cache.store.store import Store, StoreState, open_store
from cache.totals import KEPT_DAYS, RowKey, Sums, Totals, read_totals

DISTRIBUTION = "cairn-proxy"  # `cairn` checks for this: other distributions have packages of the same names

__all__ = [
    "KEPT_DAYS",
    "PART_TAKEN",
    "UNLIMITED_TOKENS",
    "BreakerState",
    "CacheError",
    "ColdClaims",
    "Content",
    "ContextLimits",
    "ContextRow",
    "ContextStatus",
    "ContextStore",
    "Draft",
    "EmbeddedError",
    "EmbeddedValkey",
    "ErrorKind",
    "Feedback",
    "FeedbackKind",
    "Fingerprint",
    "Held",
    "IndexStats",
    "Journal",
    "JournalState",
    "JournalStats",
    "Listeners",
    "LoadBroadcast",
    "Match",
    "ObjectLocations",
    "PastExpiry",
    "PinRefused",
    "Placement",
    "PrefixIndex",
    "QuotaFull",
    "ReplicaStats",
    "RowKey",
    "SharedSecret",
    "Store",
    "StoreCorrupt",
    "StoreState",
    "Sums",
    "Tag",
    "Totals",
    "Trust",
    "UnknownContext",
    "chain_root",
    "check_store_url",
    "cut",
    "extend",
    "grid_before",
    "open_store",
    "read_totals",
    "usable_key",
    "why_unsafe",
]

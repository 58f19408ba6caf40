"""What Cairn remembers. `proxy` uses the names of this module and none below it; nothing here knows HTTP."""

from cache.breaker import BreakerState
from cache.context_access import ContextLimits
from cache.context_rows import ContextRow, ContextStatus, Draft, Tag
from cache.contexts import ContextStore
from cache.embedded import EmbeddedValkey
from cache.errors import (
    CacheError,
    EmbeddedError,
    ErrorKind,
    PastExpiry,
    QuotaFull,
    StoreCorrupt,
    UnknownContext,
)
from cache.fingerprint import Fingerprint
from cache.index import Feedback, Held, IndexStats, Learnt, Match, Placement, PrefixIndex, ReplicaStats
from cache.inflight import InflightBoard
from cache.journal import Journal, JournalState, JournalStats
from cache.owners import Owners
from cache.prefix import chain_root, cut, extend
from cache.secret import shared_secret
from cache.segments import Content
from cache.store import Store, StoreState, open_store
from cache.totals import KEPT_DAYS, RowKey, Sums, Totals, read_totals

DISTRIBUTION = "cairn-proxy"  # `cairn` looks for this, since other distributions have packages of this name

__all__ = [
    "KEPT_DAYS",
    "BreakerState",
    "CacheError",
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
    "Fingerprint",
    "Held",
    "IndexStats",
    "InflightBoard",
    "Journal",
    "JournalState",
    "JournalStats",
    "Learnt",
    "Match",
    "Owners",
    "PastExpiry",
    "Placement",
    "PrefixIndex",
    "QuotaFull",
    "ReplicaStats",
    "RowKey",
    "Store",
    "StoreCorrupt",
    "StoreState",
    "Sums",
    "Tag",
    "Totals",
    "UnknownContext",
    "chain_root",
    "cut",
    "extend",
    "open_store",
    "read_totals",
    "shared_secret",
]

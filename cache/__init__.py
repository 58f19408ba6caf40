"""What Cairn remembers. `proxy` uses the names of this module and none below it; nothing here knows HTTP."""

from cache.breaker import BreakerState
from cache.embedded import EmbeddedValkey
from cache.errors import CacheError, EmbeddedError, ErrorKind
from cache.index import Feedback, Held, IndexStats, Learnt, Match, Placement, PrefixIndex, ReplicaStats
from cache.inflight import InflightBoard
from cache.journal import Journal, JournalState, JournalStats
from cache.owners import Owners
from cache.prefix import Fingerprint, chain_root, cut
from cache.secret import shared_secret
from cache.store import Store, StoreState, open_store
from cache.totals import KEPT_DAYS, RowKey, Sums, Totals, read_totals

DISTRIBUTION = "cairn-proxy"  # `cairn` looks for this, since other distributions have packages of this name

__all__ = [
    "KEPT_DAYS",
    "BreakerState",
    "CacheError",
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
    "Placement",
    "PrefixIndex",
    "ReplicaStats",
    "RowKey",
    "Store",
    "StoreState",
    "Sums",
    "Totals",
    "chain_root",
    "cut",
    "open_store",
    "read_totals",
    "shared_secret",
]

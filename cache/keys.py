"""All Redis keys and channels of Cairn. Pure.

Every key begins with `cairn:`. Keys that one script uses share a hash tag, `{...}`, so that they are on one node of a
Cluster: the journal's keys under `{journal}`, each tenant's contexts under the tenant's keyed hash.
"""

from __future__ import annotations

PREFIX = "cairn:"

# The journal: a stream of batches. Snapshot and lease are in its slot, so that one script can check and trim.
JOURNAL = PREFIX + "{journal}:stream"
LEASE = PREFIX + "{journal}:lease"  # the writer that makes snapshots; expires
SNAPSHOT = PREFIX + "{journal}:snapshot"  # hash: id of the snapshot, its stream id, its number of parts
WRITERS = PREFIX + "{journal}:writers"  # sorted set: live writers, by the second of their last sign of life
GENERATION = PREFIX + "{journal}:generation"  # made once; a different value means that Redis lost everything
PROBE = PREFIX + "{journal}:probe"  # written to learn whether Redis accepts writes; expires

# Cold turns, for each pool in one slot for one script: a hash of each worker's oldest waiting turn, and a hash of the
# claims on replicas. Both contain the time at which they expire.
COLD = PREFIX + "cold"

# Pub/sub channel, not a key: every worker's work in flight.
INFLIGHT_CHANNEL = PREFIX + "inflight"

# Pub/sub channel: names each context or tag that changed, with its tenant.
CONTEXTS_CHANNEL = PREFIX + "contexts"

# Hash: tenant to `bytes:number` of its contexts, for the total budget. Updated at every change and sweep.
CONTEXTS_TOTALS = PREFIX + "{contexts}:totals"

# Hash: tenant to `bytes:pinned bytes:accepted:reserved until` of unlisted clients' contexts, for their common shares.
CONTEXTS_UNLISTED = PREFIX + "{contexts}:unlisted"

# Hash: reservation to `bytes:until` of contexts that are being stored, which the total budget counts too.
CONTEXTS_RESERVED = PREFIX + "{contexts}:reserved"

# Hash: the sums over both hashes of tenants, changed with them, and the time of their last count (`at`).
CONTEXTS_SUMS = PREFIX + "{contexts}:sums"

CONTEXTS_SWEEPER = PREFIX + "{contexts}:sweeper"  # the worker that sweeps now; expires

# The secret that keys the tenants' hash, set if absent.
SECRET = PREFIX + "secret"

# Totals of money and tokens: a hash per day, and the number of each writer's last batch, in one slot.
TOTALS = PREFIX + "{totals}"


def cold_heads(pool: str) -> str:
    """Return the key of each worker's oldest cold turn that waits for a pool."""
    return f"{COLD}:{{{pool}}}:heads"


def cold_claims(pool: str) -> str:
    """Return the key of the replicas of a pool that are claimed for cold turns."""
    return f"{COLD}:{{{pool}}}:claims"


def cold_last(pool: str) -> str:
    """Return the key of the times at which each replica of a pool was last claimed for a cold turn."""
    return f"{COLD}:{{{pool}}}:last"


def totals_day(day: str) -> str:
    """Return the key of one day's hash, by its ISO date; it expires."""
    return f"{TOTALS}:day:{day}"


def totals_writer(writer: str) -> str:
    """Return the key of the number of a writer's last batch; it expires."""
    return f"{TOTALS}:writer:{writer}"


def snapshot_chunk(snapshot: str, number: int) -> str:
    """Return the key of one part of a snapshot; it expires unless the snapshot is committed."""
    return f"{SNAPSHOT}:{snapshot}:{number}"


def tenant(keyed_hash: str, *parts: str) -> str:
    """Return a key of one tenant's content. All keys of a tenant are in one slot.

    >>> tenant("9f2c", "context", "cache-1")
    'cairn:{9f2c}:context:cache-1'
    """
    if not keyed_hash or "{" in keyed_hash or "}" in keyed_hash:
        raise ValueError("a tenant's keyed hash must not be empty or contain braces")
    return ":".join((f"{PREFIX}{{{keyed_hash}}}", *parts))

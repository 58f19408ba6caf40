"""The whole Redis keyspace on one page. Pure; knows names and nothing of what stands behind them.

Everything begins with `cairn:`. What one script touches together shares a hash tag, `{...}`, so that on a Cluster it
lies on one node: the journal's keys under `{journal}`, each tenant's contexts under the tenant's keyed hash.
"""

from __future__ import annotations

PREFIX = "cairn:"

# The journal: stream of batches; snapshot and lease in its slot, so that one script can fence and trim.
JOURNAL = PREFIX + "{journal}:stream"
LEASE = PREFIX + "{journal}:lease"  # who writes snapshots; expires by itself
SNAPSHOT = PREFIX + "{journal}:snapshot"  # hash: which snapshot holds, up to which stream id, in how many chunks
WRITERS = PREFIX + "{journal}:writers"  # sorted set: who lives, by the second it said so last
GENERATION = PREFIX + "{journal}:generation"  # made once; another value means that Redis lost everything

# Pub/sub channel, not a key: everyone's work in flight.
INFLIGHT_CHANNEL = PREFIX + "inflight"

# Pub/sub channel: which context or tag of which tenant is not what it was.
CONTEXTS_CHANNEL = PREFIX + "contexts"

# Hash: what each tenant's contexts take, `bytes:number`, for the budget over all; renewed at every change and sweep.
CONTEXTS_TOTALS = PREFIX + "{contexts}:totals"

CONTEXTS_SWEEPER = PREFIX + "{contexts}:sweeper"  # who sweeps now; expires by itself

# The secret of the tenants' keyed hash, set if absent.
SECRET = PREFIX + "secret"

# Totals of money and tokens: a hash for each day, and each writer's last batch, in one slot for one script.
TOTALS = PREFIX + "{totals}"


def totals_day(day: str) -> str:
    """The hash of one day, by its ISO date; expires."""
    return f"{TOTALS}:day:{day}"


def totals_writer(writer: str) -> str:
    """The number of a writer's last batch; expires."""
    return f"{TOTALS}:writer:{writer}"


def snapshot_chunk(snapshot: str, number: int) -> str:
    """One part of a snapshot; it expires unless the snapshot is committed."""
    return f"{SNAPSHOT}:{snapshot}:{number}"


def tenant(keyed_hash: str, *parts: str) -> str:
    """A key of one tenant's content: all of a tenant in one slot.

    >>> tenant("9f2c", "context", "cache-1")
    'cairn:{9f2c}:context:cache-1'
    """
    if not keyed_hash or "{" in keyed_hash or "}" in keyed_hash:
        raise ValueError("a tenant's keyed hash is not empty and holds no braces")
    return ":".join((f"{PREFIX}{{{keyed_hash}}}", *parts))

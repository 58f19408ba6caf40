"""Counters of the journal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class JournalStats:
    """Counts since the start."""

    written_entries: int = 0
    written_deltas: int = 0
    written_bytes: int = 0
    read_entries: int = 0
    own_entries: int = 0  # read entries of this writer, which are skipped
    applied_deltas: int = 0
    dropped_queued: int = 0  # deltas never sent, because the queue was full while Redis was away
    dropped_corrupt: int = 0  # entries, or parts of a snapshot, that could not be decoded
    dropped_invalid: int = 0  # deltas, or rows of a snapshot, with values that Cairn never writes
    dropped_unknown: int = 0  # deltas of replicas that this process does not have
    dropped_orphans: int = 0  # deltas of placements that are not remembered
    rebuilds: int = 0
    snapshots: int = 0
    failed_snapshots: int = 0
    lag_seconds: float = 0.0  # age of the last applied entry, by its stream id

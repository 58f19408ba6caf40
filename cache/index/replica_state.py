"""The state of one replica in the index: its entries, its epoch, its budget and what its answers have shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cache.index.nodes import ReplicaEntries
from cache.index.placement import Placement

UNLIMITED_TOKENS: Final = 2**31
"""The budget of a replica whose capacity nobody knows yet."""


@dataclass(slots=True, eq=False)
class ReplicaState:
    """One replica's state. `placed_tokens` are the tokens placed since the budget last shrank."""

    entries: ReplicaEntries
    epoch: int = 0
    budget_tokens: int = UNLIMITED_TOKENS
    ttl_seconds: float | None = None
    placed_tokens: int = 0
    evicted_blocks: int = 0
    suspect: Placement | None = None

"""The state of one replica in the index: its entries, epoch and room, and what its responses have shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cache.index.granularity import Granularity
from cache.index.nodes import ReplicaEntries
from cache.index.placement import Placement

UNLIMITED_TOKENS: Final = 2**31
"""The budget of a replica whose capacity is not known yet."""

MAX_SOURCES: Final = 2
"""Tenants remembered per replica and epoch: enough to know whether there are several."""


@dataclass(slots=True, eq=False)
class ReplicaState:
    """One replica's state.

    `capacity_tokens` is what the configuration or the engine states, None if neither does; the budget never exceeds
    it. `slots` is the number of prompts that it can hold, for engines that keep one prompt per slot, of which
    `taken_slots` are known to be taken. `placed_tokens` are the tokens placed since the budget last shrank,
    `shortest_hit_tokens` the shortest earlier prompt that was reused. `proven_tokens` is the most that the engine has
    shown to hold at one time. `suspects` and `evictions` are responses that may mean a restart, or a budget that is
    too large. `sources` are the tenants that were routed here in this epoch.
    """

    entries: ReplicaEntries
    epoch: int = 0
    budget_tokens: int = UNLIMITED_TOKENS
    ttl_seconds: float | None = None
    placed_tokens: int = 0
    shortest_hit_tokens: int = UNLIMITED_TOKENS
    evicted_blocks: int = 0
    capacity_tokens: int | None = None
    slots: int | None = None
    stated_slots: int = 0
    taken_slots: int = 0
    proven_tokens: int = 0
    granularity: Granularity = field(default_factory=Granularity)
    suspects: list[Placement] = field(default_factory=list)
    evictions: list[Placement] = field(default_factory=list)
    sources: set[int] = field(default_factory=set)

    @property
    def bound_tokens(self) -> int:
        """The upper bound of the budget."""
        return UNLIMITED_TOKENS if self.capacity_tokens is None else self.capacity_tokens

    @property
    def has_several_sources(self) -> bool:
        """True if more than one tenant was routed here in this epoch."""
        return len(self.sources) >= MAX_SOURCES

    def saw_source(self, source: int) -> None:
        """Remember the tenant of a placement."""
        if len(self.sources) < MAX_SOURCES:
            self.sources.add(source)

    def forget_answers(self) -> None:
        """Drop what the responses of an epoch have shown."""
        self.proven_tokens = 0
        self.shortest_hit_tokens = UNLIMITED_TOKENS
        self.granularity = Granularity()
        self.suspects = []
        self.evictions = []
        self.sources = set()

"""The state of one replica in the index: its entries, epoch and room, and what its responses have shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cache.index.granularity import Granularity
from cache.index.nodes import ReplicaEntries
from cache.index.placement import Placement

UNLIMITED_TOKENS: Final = 2**31
"""The budget of a replica whose capacity is not known yet."""

MIN_RESTART_MISSES: Final = 2
MAX_RESTART_MISSES: Final = 8
"""Bounds of the prompts in a row of which nothing is cached that mean a restart."""

RESTART_CHANCE: Final = 0.002
"""Chance of so many misses in a row without a restart that is small enough, by the share of prompts that is lost."""

HIT_STEP: Final = 0.1
"""Weight of the newest prompt in the share of prompts that hit: ten count."""

HIT_SHARE_KEPT: Final = 0.5
"""Factor of that share when a restart was concluded: the next one needs more evidence, until prompts hit again."""

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
    too large. `sources` are the tenants that were routed here in this epoch. `hit_share` is the recent share of whole
    earlier prompts of which anything was cached.
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
    hit_share: float = 1.0

    @property
    def bound_tokens(self) -> int:
        """The upper bound of the budget."""
        return UNLIMITED_TOKENS if self.capacity_tokens is None else self.capacity_tokens

    @property
    def has_several_sources(self) -> bool:
        """True if more than one tenant was routed here in this epoch."""
        return len(self.sources) >= MAX_SOURCES

    @property
    def restart_misses(self) -> int:
        """Prompts in a row of which nothing is cached that mean a restart: by chance they would be too rare."""
        lost_share = 1.0 - self.hit_share
        needed, chance = MIN_RESTART_MISSES, lost_share**MIN_RESTART_MISSES
        while chance > RESTART_CHANCE and needed < MAX_RESTART_MISSES:
            needed, chance = needed + 1, chance * lost_share
        return needed

    def is_restart(self, source: int, other_sources: Sequence[int]) -> bool:
        """Return True if a prompt of which nothing is cached means a restart, after such prompts of `other_sources`.

        If the replica serves several tenants, they must be of several.
        """
        if self.has_several_sources and not any(other != source for other in other_sources):
            return False
        return len(other_sources) + 1 >= self.restart_misses

    def saw_hit(self) -> None:
        """Note that something of a whole earlier prompt was cached: the suspects before it were evicted."""
        for _ in self.suspects:
            self.saw_loss()
        self.hit_share += HIT_STEP * (1.0 - self.hit_share)
        self.suspects = []

    def saw_loss(self) -> None:
        """Note that nothing of a whole earlier prompt was cached, since it was evicted."""
        self.hit_share -= HIT_STEP * self.hit_share

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
        self.hit_share *= HIT_SHARE_KEPT  # it may have been no restart

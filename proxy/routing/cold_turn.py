"""Data types of the cold gate: its questions and answers, its limits, and Protocols of the objects that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from proxy.records import ReplicaView
from proxy.routing.cold_admission import QUIET_SECONDS, REST_SECONDS, TurnKind
from proxy.routing.cold_pressure import MEMORY_SECONDS
from proxy.routing.fair_shares import Priority


class Claims(Protocol):
    """Claims that all workers respect: `cache.ColdClaims`."""

    async def take(
        self,
        pool: str,
        replicas: Sequence[str],
        *,
        order: tuple[str, float],
        tenant: str,
        claim_seconds: float,
        most: int,
        tokens: float,
        busy: Mapping[str, float] | None = None,
    ) -> str | None: ...
    def release(self, pool: str, replica: str) -> None: ...
    def withdraw(self, pool: str) -> None: ...


class Fleet(Protocol):
    """The part of `proxy.fleet.Fleet` that decides when a turn may go."""

    def snapshot(self, pool: str, now_seconds: float) -> Sequence[ReplicaView]: ...
    def sent_seconds(self, number: int, now_seconds: float) -> float: ...
    def is_used(self, number: int) -> bool: ...
    def measured_rate(self, number: int) -> float | None: ...


@dataclass(frozen=True, slots=True)
class GateLimits:
    """With `enabled` False everything passes. A new session waits at most `max_wait_seconds`, and the bodies of
    all waiting requests take at most `max_waiting_bytes`. The other times are those of `cold_admission`; a change
    of `memory_seconds` affects only pools seen after it.

    `pace` is a factor for the times that are no settings: they are in proportion to `rest_seconds`, because all of
    them are related to the time that an engine takes for a long prompt.
    """

    enabled: bool = True
    max_wait_seconds: float = 300.0
    max_waiting_bytes: int = 256 * 1024 * 1024
    quiet_seconds: float = QUIET_SECONDS
    rest_seconds: float = REST_SECONDS
    memory_seconds: float = MEMORY_SECONDS

    @property
    def pace(self) -> float:
        return self.rest_seconds / REST_SECONDS


@dataclass(frozen=True, slots=True)
class Turn:
    """A generation request, as the gate sees it.

    `prompt_end` is its last chained hash, `prefill_seconds` the time to compute it at each replica, by number.
    """

    pool: str
    prompt_tokens: float
    uncached_tokens: float  # at the best replica
    known_tokens: float  # tokens of the prompt that were served before
    prompt_end: int
    body_bytes: int
    tenant: str
    weight: float
    priority: Priority
    deadline_seconds: float | None  # of the first token, on the monotonic clock
    client: str = ""  # the tenant's name, if it is configured
    prefill_seconds: Mapping[int, float] = field(default_factory=dict)

    @property
    def is_new(self) -> bool:
        """True if no more of it was served before than some replica still holds."""
        return self.known_tokens <= self.prompt_tokens - self.uncached_tokens


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision whether a turn waits now, its reason, and about how long.

    `least_seconds` counts only what waits already. A deadline is refused by it alone, as it might be met otherwise.
    """

    kind: TurnKind
    waits: bool
    reason: str = ""
    seconds: float = 0.0
    least_seconds: float = 0.0

"""The virtual clock: a rule sends arrivals to engines, and the results are counted."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from typing import Protocol

import msgspec

from benchmarks.fleet.engine import PREFILL_TOKENS_PER_SECOND, Engine
from benchmarks.fleet.trace import Request

Send = Callable[[int, float, float], None]
"""Hands the request to a replica: its number, the predicted work there in seconds (or tokens: only its order
matters), and the time."""


class Router(Protocol):
    """Interface of a rule, which is notified of first tokens and ends."""

    def route(self, request: Request, now: float, send: Send) -> None:
        """Choose a replica, and call `send` once, now or later."""
        ...

    def started(self, request: Request, now: float) -> None:
        """Note that a request left the router's queue for its replica."""
        ...

    def first_token(self, request: Request, replica: int, cached_tokens: int, now: float) -> None: ...
    def ended(self, request: Request, replica: int, now: float) -> None: ...


class Setup(msgspec.Struct, frozen=True):
    """The fleet that is simulated.

    `rates` are tokens per second per replica; the figures leave out the first `skip` requests. With `pins` engines
    keep the blocks of running requests.
    """

    replicas: int
    capacity_tokens: int
    ordered: bool = False
    rates: tuple[float, ...] = ()
    skip: int = 0
    pins: bool = False

    def rate(self, replica: int) -> float:
        return self.rates[replica % len(self.rates)] if self.rates else PREFILL_TOKENS_PER_SECOND


class Result(msgspec.Struct, frozen=True):
    """Result of one rule. `hit_share` is cached over prompt tokens, `imbalance` the most loaded over the mean."""

    hit_share: float
    mean_ttft_seconds: float
    p50_ttft_seconds: float
    p99_ttft_seconds: float
    computed_tokens: int
    imbalance: float


class Calendar:
    """Events in order of time; at equal times in order of creation."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._made = 0

    def at(self, time: float, call: Callable[[float], None]) -> None:
        self._made += 1
        heappush(self._events, (time, self._made, call))

    def run(self, until: float = inf) -> None:
        """Call all events in order, up to the time `until`."""
        while self._events and self._events[0][0] <= until:
            time, _, call = heappop(self._events)
            call(time)


class _Count:
    """Listens to the engines: counts, and hands on to the rule."""

    rule: Router  # set once it is made: it needs the calendar, and the engines need this

    def __init__(self, replicas: int, skip: int) -> None:
        self._skip = skip
        self.ttft_seconds: list[float] = []
        self.computed = [0] * replicas
        self.cached_tokens = 0
        self.input_tokens = 0

    def started(self, request: Request, now: float) -> None:
        self.rule.started(request, now)

    def first_token(self, request: Request, replica: int, cached_tokens: int, now: float) -> None:
        if request.number >= self._skip:
            self._count(request, replica, cached_tokens, now)
        self.rule.first_token(request, replica, cached_tokens, now)

    def _count(self, request: Request, replica: int, cached_tokens: int, now: float) -> None:
        self.ttft_seconds.append(now - request.arrival_seconds)
        self.cached_tokens += cached_tokens
        self.input_tokens += request.input_tokens
        self.computed[replica] += request.input_tokens - cached_tokens

    def ended(self, request: Request, replica: int, now: float) -> None:
        self.rule.ended(request, replica, now)


def simulate(requests: list[Request], setup: Setup, make_rule: Callable[[Calendar], Router]) -> Result:
    """Run all `requests` through one rule."""
    calendar, count = Calendar(), _Count(setup.replicas, setup.skip)
    engines = [
        Engine(
            n, setup.capacity_tokens, calendar.at, count, rate=setup.rate(n), ordered=setup.ordered, pins=setup.pins
        )
        for n in range(setup.replicas)
    ]
    rule = count.rule = make_rule(calendar)

    def arrive(request: Request) -> Callable[[float], None]:
        def arrived(now: float) -> None:
            def send(replica: int, work_seconds: float, then: float) -> None:
                engines[replica].submit(request, work_seconds, then)

            rule.route(request, now, send)

        return arrived

    for request in requests:
        calendar.at(request.arrival_seconds, arrive(request))
    calendar.run()
    waits = sorted(count.ttft_seconds)
    return Result(
        hit_share=count.cached_tokens / max(count.input_tokens, 1),
        mean_ttft_seconds=sum(waits) / len(waits),
        p50_ttft_seconds=waits[len(waits) // 2],
        p99_ttft_seconds=waits[min(int(len(waits) * 0.99), len(waits) - 1)],
        computed_tokens=sum(count.computed),
        imbalance=max(count.computed) * setup.replicas / max(sum(count.computed), 1),
    )

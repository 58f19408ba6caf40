"""Cairn's rule on a virtual clock: the very index, fleet and plan of the proxy, with nothing re-stated.

Several proxies may share the fleet; each learns of the others' placements, answers and work `delay_seconds` later.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from benchmarks.fleet.trace import Request
from cache.index import Feedback, Placement, PrefixIndex
from proxy.fleet import Charge, Fleet, ReplicaSpec
from proxy.routing import Demand, plan

POOL = "pool"
HEARTBEAT_SECONDS = 0.25
"""A proxy with work under way says so this often, or the others take it for dead after a second."""

At = Callable[[float, Callable[[float], None]], None]


class Proxy:
    """One proxy's whole state that matters to routing."""

    def __init__(self, name: str, rates: list[float | None], capacity_tokens: int, origin: int) -> None:
        self.name = name
        self.index = PrefixIndex(origin=origin)
        self.fleet = Fleet(Random(origin).random)
        for replica, rate in enumerate(rates):
            self.fleet.add(ReplicaSpec(f"replica-{replica}", POOL, prefill_tokens_per_second=rate))
            self.index.set_budget(replica, capacity_tokens)
        self._under_way: dict[int, tuple[Placement, Charge]] = {}
        self._first_tokens: dict[int, float] = {}

    def route(self, request: Request, now: float, *, queued: bool) -> tuple[int, float, Placement]:
        match = self.index.match(request.fingerprint)
        hashes = request.fingerprint.hashes
        demand = Demand(
            request.fingerprint.size_bytes,
            float(request.input_tokens),
            hashes[min(match.known_blocks, len(hashes) - 1)],
        )
        best = plan(demand, match, self.fleet.snapshot(POOL, now)).chosen
        replica = best.replica.id
        charge = self.fleet.charge(replica, best.uncached_tokens, now, queued=queued)
        placement = self.index.place(replica, request.fingerprint, request.input_tokens, now)
        self._under_way[request.number] = (placement, charge)
        return replica, best.uncached_tokens / best.replica.rate_tokens_per_second, placement

    def started(self, request: Request, now: float) -> None:
        self.fleet.start(self._under_way[request.number][1], now)

    @property
    def is_busy(self) -> bool:
        return bool(self._under_way)

    def first_token(self, request: Request, cached_tokens: int, now: float) -> tuple[Placement, Feedback]:
        placement, charge = self._under_way[request.number]
        self.fleet.first_token(charge, now)
        self.fleet.observe_prefill(charge, request.input_tokens - cached_tokens)
        self._first_tokens[request.number] = now
        return placement, self.index.answered(placement, request.input_tokens, cached_tokens, 0, now)

    def ended(self, request: Request, replica: int, now: float) -> None:
        _, charge = self._under_way.pop(request.number)
        self.fleet.finish(charge, now)
        self.fleet.observe_decode(replica, now - self._first_tokens.pop(request.number))


class Cairn:
    """One or several proxies as one rule; requests go to them by turns."""

    def __init__(
        self,
        rates: list[float | None],
        capacity_tokens: int,
        at: At,
        *,
        proxies: int = 1,
        ordered: bool = False,
        delay_seconds: float | None = 0.0,
    ) -> None:
        self._proxies = [Proxy(f"proxy-{n}", rates, capacity_tokens, n + 1) for n in range(proxies)]
        self._at = at
        self._delay_seconds = delay_seconds
        self._ordered = ordered
        self._beating: list[Proxy] = []

    def route(self, request: Request, now: float) -> tuple[int, float]:
        proxy = self._proxy_of(request)
        replica, work_seconds, placement = proxy.route(request, now, queued=self._ordered)

        def placed(other: Proxy, then: float) -> None:
            other.index.apply_place(
                replica, request.fingerprint, request.input_tokens, placement.epoch, placement.id, then
            )

        self._tell(proxy, placed, now)
        if proxy not in self._beating and len(self._proxies) > 1:
            self._beating.append(proxy)
            self._at(now + HEARTBEAT_SECONDS, lambda then: self._beat(proxy, then))
        return replica, work_seconds

    def started(self, request: Request, now: float) -> None:
        self._proxy_of(request).started(request, now)

    def first_token(self, request: Request, replica: int, cached_tokens: int, now: float) -> None:
        proxy = self._proxy_of(request)
        placement, feedback = proxy.first_token(request, cached_tokens, now)

        def answered(other: Proxy, then: float) -> None:
            del then
            other.index.apply_answer(replica, request.fingerprint, request.input_tokens, 0, placement.epoch)
            if feedback.epoch is not None:
                other.index.new_epoch(replica, feedback.epoch)
            if feedback.budget_tokens is not None:
                other.index.set_budget(replica, feedback.budget_tokens)

        self._tell(proxy, answered, now)

    def ended(self, request: Request, replica: int, now: float) -> None:
        proxy = self._proxy_of(request)
        proxy.ended(request, replica, now)
        self._tell(proxy, None, now)

    def _proxy_of(self, request: Request) -> Proxy:
        return self._proxies[request.number % len(self._proxies)]

    def _beat(self, proxy: Proxy, now: float) -> None:
        self._tell(proxy, None, now)
        if proxy.is_busy:
            self._at(now + HEARTBEAT_SECONDS, lambda then: self._beat(proxy, then))
        else:
            self._beating.remove(proxy)

    def _tell(self, proxy: Proxy, news: Callable[[Proxy, float], None] | None, now: float) -> None:
        """Let the others know `news` and the proxy's whole vector, when the delay is over; None is never."""
        if len(self._proxies) == 1 or self._delay_seconds is None:
            return
        rows = proxy.fleet.share(now)
        others = [other for other in self._proxies if other is not proxy]

        def arrived(then: float) -> None:
            for other in others:
                other.fleet.absorb(proxy.name, rows, then)
                if news is not None:
                    news(other, then)

        self._at(now + self._delay_seconds, arrived)

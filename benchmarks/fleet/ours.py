"""Cairn's rule on a virtual clock, with the proxy's own index, fleet, plan and cold gate.

Usage is reported at the end of a stream, as by engines, so capacities and rates are learned then. Several proxies may
share the fleet; each learns of the others' placements, responses and work `delay_seconds` later, and has its own
gate, which does not know the others' prefills.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from random import Random

from benchmarks.fleet.simulation import Send
from benchmarks.fleet.trace import Request
from cache.index.prefix_index import Feedback, Placement, PrefixIndex
from proxy.fleet import Charge, Fleet, ReplicaSpec
from proxy.records import Demand
from proxy.routing.cost import plan
from proxy.routing.prefill_gate import Follower, Prefill, PrefillGate

POOL = "pool"
HEARTBEAT_SECONDS = 0.25
"""Interval at which a proxy with work in flight reports; otherwise the others drop it after a second."""

At = Callable[[float, Callable[[float], None]], None]


class _UnderWay:
    """A request from its routing to its end."""

    __slots__ = ("cached_tokens", "charge", "first_token_seconds", "placement", "prefill")

    def __init__(self, placement: Placement, charge: Charge, prefill: Prefill | None) -> None:
        self.placement = placement
        self.charge = charge
        self.prefill = prefill
        self.cached_tokens = 0
        self.first_token_seconds = 0.0


class Proxy:
    """One proxy's state for routing."""

    def __init__(
        self,
        name: str,
        rates: list[float | None],
        capacity_tokens: int,
        origin: int,
        at: At,
        *,
        is_stated: bool = False,
    ) -> None:
        self.name = name
        self.index = PrefixIndex(origin=origin)
        self.fleet = Fleet(Random(origin).random)
        for replica, rate in enumerate(rates):
            self.fleet.add(ReplicaSpec(f"replica-{replica}", POOL, prefill_tokens_per_second=rate))
            if is_stated:
                self.index.set_capacity(replica, capacity_tokens)
            self.index.set_budget(replica, capacity_tokens)
        self.gate = PrefillGate()
        self._at = at
        self._now = 0.0
        self._under_way: dict[int, _UnderWay] = {}

    def route(
        self,
        request: Request,
        now: float,
        send: Send,
        *,
        ordered: bool = False,
        among: Collection[int] | None = None,
    ) -> tuple[int, Placement]:
        """Choose a replica, of those in `among` if given, and send the request there, now or after its leader."""
        match = self.index.match(request.fingerprint)
        hashes = request.fingerprint.hashes
        demand = Demand(
            request.fingerprint.size_bytes,
            float(request.input_tokens),
            hashes[min(match.known_blocks, len(hashes) - 1)],
        )
        held_back = None if self.gate.is_open else partial(self.gate.holds_back, hashes)
        views = self.fleet.snapshot(POOL, now)
        if among is not None:
            views = tuple(view for view in views if view.id in among)
        best = plan(demand, match, views, held_back=held_back, room=self.index).chosen
        replica, rate = best.replica.id, best.replica.rate_tokens_per_second
        held = match.held.get(replica)
        gate = self.gate.enter(
            replica,
            hashes,
            matched_blocks=held.blocks if held else 0,
            matched_tokens=best.matched_tokens,
            prompt_tokens=request.input_tokens,
            prefill_seconds=(best.replica.pending_tokens + best.uncached_tokens) / rate,
        )
        waits = isinstance(gate, Follower)
        charge = self.fleet.charge(
            replica,
            best.uncached_tokens,
            now,
            gated=waits,
            queued=ordered and not waits,
            prompt_tokens=request.input_tokens,
        )
        placement = self.index.place(replica, request.fingerprint, request.input_tokens, now)
        prefill = gate.prefill if isinstance(gate, Follower) else gate
        self._under_way[request.number] = _UnderWay(placement, charge, prefill)
        if isinstance(gate, Follower):
            self._wait(gate, charge, partial(send, replica, best.uncached_tokens / rate), now, ordered=ordered)
        else:
            send(replica, best.uncached_tokens / rate, now)
        return replica, placement

    def _wait(
        self, follower: Follower, charge: Charge, send: Callable[[float], None], now: float, *, ordered: bool
    ) -> None:
        """Send the request when its leader's first token has arrived; `self._now` is then the time."""
        self._now = now

        def go() -> None:
            if not ordered:
                self.fleet.start(charge, self._now)
            send(self._now)

        def expire(then: float) -> None:
            self._now = then
            follower.expire()

        follower.then(go)
        self._at(now + follower.patience_seconds, expire)

    def started(self, request: Request, now: float) -> None:
        self.fleet.start(self._under_way[request.number].charge, now)

    @property
    def is_busy(self) -> bool:
        return bool(self._under_way)

    def first_token(self, request: Request, cached_tokens: int, now: float) -> None:
        under_way = self._under_way[request.number]
        under_way.cached_tokens, under_way.first_token_seconds = cached_tokens, now
        self.fleet.first_token(under_way.charge, now)
        self._now = now
        if under_way.prefill is not None:
            under_way.prefill.first_token()

    def ended(self, request: Request, replica: int, now: float) -> tuple[Placement, Feedback]:
        """Learn from the usage, which is reported at the end of a stream."""
        under_way = self._under_way.pop(request.number)
        self.fleet.finish(under_way.charge, now)
        self.fleet.observe_prefill(under_way.charge, request.input_tokens - under_way.cached_tokens)
        self.fleet.observe_decode(replica, now - under_way.first_token_seconds)
        placement = under_way.placement
        feedback = self.index.answered(
            placement, request.input_tokens, under_way.cached_tokens, request.output_tokens, now
        )
        return placement, feedback


class Cairn:
    """One or several proxies as one rule; requests go to them by turns.

    `capacity_tokens` is where learning begins; with `is_stated` the engines state it, and it is an upper bound.
    """

    def __init__(
        self,
        rates: list[float | None],
        capacity_tokens: int,
        at: At,
        *,
        proxies: int = 1,
        ordered: bool = False,
        delay_seconds: float | None = 0.0,
        is_stated: bool = False,
    ) -> None:
        self._proxies = [
            Proxy(f"proxy-{n}", rates, capacity_tokens, n + 1, at, is_stated=is_stated) for n in range(proxies)
        ]
        self._at = at
        self._delay_seconds = delay_seconds
        self._ordered = ordered
        self._beating: list[Proxy] = []

    def route(self, request: Request, now: float, send: Send) -> None:
        self.dispatch(request, now, send)

    def dispatch(self, request: Request, now: float, send: Send, among: Collection[int] | None = None) -> int:
        """Send the request to the cheapest replica, of those in `among` if given, and return its number."""
        proxy = self._proxy_of(request)
        replica, placement = proxy.route(request, now, send, ordered=self._ordered, among=among)

        def placed(other: Proxy, then: float) -> None:
            other.index.apply_place(
                replica, request.fingerprint, request.input_tokens, placement.epoch, placement.id, then
            )

        self._tell(proxy, placed, now)
        if proxy not in self._beating and len(self._proxies) > 1:
            self._beating.append(proxy)
            self._at(now + HEARTBEAT_SECONDS, lambda then: self._beat(proxy, then))
        return replica

    def started(self, request: Request, now: float) -> None:
        self._proxy_of(request).started(request, now)

    def first_token(self, request: Request, replica: int, cached_tokens: int, now: float) -> None:
        del replica
        proxy = self._proxy_of(request)
        proxy.first_token(request, cached_tokens, now)
        self._tell(proxy, None, now)

    def ended(self, request: Request, replica: int, now: float) -> None:
        proxy = self._proxy_of(request)
        placement, feedback = proxy.ended(request, replica, now)

        def answered(other: Proxy, then: float) -> None:
            del then
            other.index.apply_answer(
                replica,
                request.fingerprint,
                request.input_tokens,
                request.output_tokens,
                placement.epoch,
                placement_id=placement.id,
            )
            if feedback.epoch is not None:
                other.index.new_epoch(replica, feedback.epoch)
            if feedback.budget_tokens is not None:
                other.index.set_budget(replica, feedback.budget_tokens)

        self._tell(proxy, answered, now)

    def _proxy_of(self, request: Request) -> Proxy:
        return self._proxies[request.number % len(self._proxies)]

    def _beat(self, proxy: Proxy, now: float) -> None:
        self._tell(proxy, None, now)
        if proxy.is_busy:
            self._at(now + HEARTBEAT_SECONDS, lambda then: self._beat(proxy, then))
        else:
            self._beating.remove(proxy)

    def _tell(self, proxy: Proxy, news: Callable[[Proxy, float], None] | None, now: float) -> None:
        """Send `news` and the proxy's whole vector to the others after the delay; with None, never."""
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

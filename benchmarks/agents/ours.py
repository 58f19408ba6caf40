"""Cairn with its gate for cold turns, on the virtual clock: the proxy's own rule over the proxy's own parts.

Several proxies hold one queue each. A replica is claimed by one of them for a cold turn, until its first token; the
oldest turn that waits anywhere goes first. News of the others' work is `delay_seconds` old, claims are not.
"""

from __future__ import annotations

from functools import partial
from math import inf

from benchmarks.fleet.ours import POOL, At, Cairn, Proxy
from benchmarks.fleet.simulation import Send
from benchmarks.fleet.trace import Request
from proxy.routing.cold_admission import (
    BACKLOG_SECONDS,
    QUIET_SECONDS,
    ColdQueue,
    ColdTurn,
    ReplicaRoom,
    TurnKind,
    Waiting,
    about_as_good,
    classify,
    is_long,
    short_tokens,
)
from proxy.routing.cold_pressure import ColdPressure, ServedPrompts
from proxy.routing.shortest_job import ShortestJobQueue
from proxy.routing.warm_wait import AGEING, PATIENCE_SECONDS

LOOK_SECONDS = 0.5
"""Interval of looking for a turn that may go while turns wait, in addition to every first token and end."""


WARM_LOOK_SECONDS = 0.1
"""The same interval while warm turns wait."""


class Claims:
    """Agreement of the proxies: which one may send a cold turn to which replica, when each replica took its last one,
    and whose turn is the oldest."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}  # request numbers by replica
        self.heads: dict[int, float] = {}  # arrivals of the oldest waiting turn, by proxy
        self.last_cold_seconds: dict[int, float] = {}  # by replica

    def is_oldest(self, place: float) -> bool:
        return place <= min(self.heads.values())


class _Gate:
    """One proxy's part: its queue, and its knowledge of prompts and pressure."""

    def __init__(self, number: int, proxy: Proxy, claims: Claims) -> None:
        self.number = number
        self.proxy = proxy
        self.queue: ColdQueue[tuple[Request, Send]] = ColdQueue(last_cold_seconds=claims.last_cold_seconds)
        self.pressure = ColdPressure()
        self.served = ServedPrompts()
        self.looks = False
        self.warm: dict[int, ShortestJobQueue[tuple[Request, Send, float]]] = {}  # turns and arrivals, by replica

    @property
    def waiting(self) -> int:
        """The turns that wait, cold or warm."""
        return len(self.queue) + sum(map(len, self.warm.values()))


class Gated(Cairn):
    """One or several proxies with the gate. `always` holds cold turns back whether or not there is room."""

    def __init__(
        self,
        rates: list[float | None],
        capacity_tokens: int,
        at: At,
        *,
        proxies: int = 1,
        delay_seconds: float | None = 0.0,
        ordered: bool = False,
        is_stated: bool = False,
        always: bool = False,
    ) -> None:
        super().__init__(
            rates,
            capacity_tokens,
            at,
            proxies=proxies,
            ordered=ordered,
            delay_seconds=delay_seconds,
            is_stated=is_stated,
        )
        self._always = always
        self._short_tokens = short_tokens(capacity_tokens)
        self._claims = Claims()
        self._gates = [_Gate(number, proxy, self._claims) for number, proxy in enumerate(self._proxies)]
        self._known: dict[int, float] = {}  # tokens of each request under way that were served before
        self.held_back = 0

    def route(self, request: Request, now: float, send: Send) -> None:
        gate = self._gate_of(request)
        uncached = _uncached(request, gate.proxy)
        least = min(uncached.values())
        hashes, tokens = request.fingerprint.hashes, request.input_tokens
        depth = gate.served.depth(hashes)
        self._known[request.number] = depth / max(len(hashes), 1) * tokens
        for each in self._gates:  # as the journal does
            each.served.note(hashes, depth, tokens, tokens - least, now)
        kind = classify(request.input_tokens, least, self._short_tokens)
        if tokens <= self._short_tokens or not (self._always or self._is_on(gate, kind, least, now)):
            self._go(request, now, send, None)
        elif kind is TurnKind.COLD:
            self._hold(gate, request, send, uncached, now, now)
            self._look(gate, now)
        else:
            self._go_warm(gate, request, send, uncached, now)

    def _hold(
        self, gate: _Gate, request: Request, send: Send, uncached: dict[int, float], now: float, arrived: float
    ) -> None:
        self.held_back += 1
        least = min(uncached.values())
        is_new = self._known[request.number] <= request.input_tokens - least
        seconds = {
            view.id: uncached[view.id] / view.rate_tokens_per_second for view in gate.proxy.fleet.snapshot(POOL, now)
        }
        turn = ColdTurn((request, send), request.input_tokens, least, is_new, prefill_seconds=seconds)
        gate.queue.join(turn, arrived)

    def _go_warm(self, gate: _Gate, request: Request, send: Send, uncached: dict[int, float], now: float) -> None:
        """Send a warm turn to one of the best replicas that is quiet, or let it wait for the best of them."""
        good = about_as_good(uncached, self._short_tokens)
        pending = _pending_seconds(gate, now)
        free = frozenset(each for each in good if pending[each] <= QUIET_SECONDS and not len(gate.warm.get(each, ())))
        if free:
            self._go(request, now, send, free)
            return
        best = min(good, key=lambda each: (pending[each], each))
        line = gate.warm.setdefault(best, ShortestJobQueue(PATIENCE_SECONDS, AGEING))
        line.join((request, send, now), uncached[best] / max(_rates(gate, now)), now)
        self._plan_look(gate, now)

    def _look_warm(self, gate: _Gate, now: float) -> None:
        """Send the warm turns whose replica is quiet; those that were evicted meanwhile wait as cold ones."""
        for replica, line in list(gate.warm.items()):
            while len(line) and _pending_seconds(gate, now)[replica] <= QUIET_SECONDS:
                turn = line.next(now)
                assert turn is not None  # noqa: S101 - there is one
                request, send, arrived = turn
                uncached = _uncached(request, gate.proxy)
                least = min(uncached.values())
                if classify(request.input_tokens, least, self._short_tokens) is TurnKind.COLD:
                    self._hold(gate, request, send, uncached, now, arrived)
                else:
                    self._go(request, now, send, about_as_good(uncached, self._short_tokens))
            if not len(line):
                del gate.warm[replica]

    def _is_on(self, gate: _Gate, kind: TurnKind, uncached: float, now: float) -> bool:
        views = gate.proxy.fleet.snapshot(POOL, now)
        shortest = min(view.pending_tokens / view.rate_tokens_per_second for view in views)
        if gate.pressure.is_on(shortest, len(gate.queue)):
            return True
        long = kind is TurnKind.COLD and is_long(uncached, [view.rate_tokens_per_second for view in views])
        return long and (len(gate.queue) > 0 or shortest >= BACKLOG_SECONDS)

    def _gate_of(self, request: Request) -> _Gate:
        return self._gates[request.number % len(self._gates)]

    def _go(self, request: Request, now: float, send: Send, among: frozenset[int] | None) -> int:
        return self.dispatch(request, now, send, among=among)

    def _look(self, gate: _Gate, now: float) -> None:
        self._look_warm(gate, now)
        while (found := self._next_to_go(gate, now)) is not None:
            waiting, replicas = found
            self._claims.heads[gate.number] = waiting.arrived_seconds
            if not replicas or not self._claims.is_oldest(waiting.arrived_seconds):
                break
            request, send = waiting.item.item
            gate.queue.serve(waiting, replica := self._go(request, now, send, frozenset(replicas[:1])), now)
            self._claims.holders[replica] = request.number
        if found is None:
            self._claims.heads.pop(gate.number, None)
        self._plan_look(gate, now)

    def _next_to_go(self, gate: _Gate, now: float) -> tuple[Waiting[tuple[Request, Send]], tuple[int, ...]] | None:
        return gate.queue.next_to_go(
            _rooms(gate, self._claims, now),
            now,
            is_pressed=self._always or gate.pressure.is_holding,
            round_seconds=gate.served.recently_needed_tokens(now) / sum(_rates(gate, now)),
        )

    def _plan_look(self, gate: _Gate, now: float) -> None:
        if gate.waiting and not gate.looks:
            gate.looks = True
            interval = WARM_LOOK_SECONDS if gate.warm else LOOK_SECONDS
            self._at(now + interval, lambda then: self._look_again(gate, then))

    def _look_again(self, gate: _Gate, now: float) -> None:
        gate.looks = False
        self._look(gate, now)

    def first_token(self, request: Request, replica: int, cached_tokens: int, now: float) -> None:
        super().first_token(request, replica, cached_tokens, now)
        gate = self._gate_of(request)
        repeated = max(self._known.pop(request.number) - cached_tokens, 0.0)
        gate.pressure.observe(request.input_tokens - cached_tokens, repeated, now)
        if self._claims.holders.get(replica) == request.number:
            del self._claims.holders[replica]
        self._changed(gate, now)

    def ended(self, request: Request, replica: int, now: float) -> None:
        super().ended(request, replica, now)
        for each in self._gates:  # as the journal tells them
            each.served.ended(request.fingerprint.hashes[-1], replica, now)
        self._changed(self._gate_of(request), now)

    def _changed(self, gate: _Gate, now: float) -> None:
        """Look for turns that may go, since work ended at a replica; at the other proxies once they know."""
        self._look(gate, now)
        for other in self._gates:
            if other is not gate and other.waiting and self._delay_seconds is not None:
                self._at(now + self._delay_seconds, partial(self._look, other))


def _uncached(request: Request, proxy: Proxy) -> dict[int, float]:
    held = proxy.index.match(request.fingerprint).held
    return {
        replica: max(request.input_tokens - (held[replica].tokens if replica in held else 0.0), 1.0)
        for replica in proxy.index.replicas()
    }


def _pending_seconds(gate: _Gate, now: float) -> dict[int, float]:
    views = gate.proxy.fleet.snapshot(POOL, now)
    return {view.id: view.pending_tokens / view.rate_tokens_per_second for view in views}


def _rates(gate: _Gate, now: float) -> list[float]:
    return [view.rate_tokens_per_second for view in gate.proxy.fleet.snapshot(POOL, now)]


def _rooms(gate: _Gate, claims: Claims, now: float) -> list[ReplicaRoom]:
    proxy = gate.proxy
    budgets = proxy.index.replicas()
    return [
        ReplicaRoom(
            replica=view.id,
            pending_seconds=inf if view.id in gate.warm else view.pending_tokens / view.rate_tokens_per_second,
            running_tokens=view.running_tokens,
            cache_tokens=budgets[view.id].budget_tokens,
            own_share=gate.served.own_share,
            resting_tokens=gate.served.resting_tokens(view.id, now),
            is_taken=view.id in claims.holders,
        )
        for view in proxy.fleet.snapshot(POOL, now)
    ]

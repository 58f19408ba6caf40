"""The gate for cold turns: who waits, who goes, and what is given back on every path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cache import PART_TAKEN, CacheError
from proxy.errors import DeadlineUnreachable, RateLimited, TurnedAway
from proxy.records import ReplicaView
from proxy.routing.cold_admission import REST_SECONDS, SPARING_ROUNDS, TurnKind
from proxy.routing.cold_gate import ANY_NUMBER, UNKNOWN_SECONDS, ColdGate, Pass
from proxy.routing.cold_pressure import CROWDED_SECONDS, RESTING_SECONDS, ColdPressure
from proxy.routing.cold_turn import GateLimits, Turn
from proxy.routing.cold_wait import SENDS, pool_of
from proxy.routing.fair_shares import QUANTUM_TOKENS, Priority, TenantShares
from proxy.tasks import Tasks
from tests.support.clock import FakeClock
from tests.support.operations import operations

POOL = "engines"


class FakeFleet:
    """Replicas of 10,000 tokens a second, whose pending tokens a test sets."""

    def __init__(self, replicas: int) -> None:
        self.pending = [0.0] * replicas
        self.running = [0.0] * replicas
        self.down: set[int] = set()

    def snapshot(self, pool: str, now_seconds: float) -> Sequence[ReplicaView]:
        return tuple(
            ReplicaView(
                n, f"replica-{n}", n not in self.down, 10_000.0, pending, 0, None, 0.0, 0.1, running_tokens=running
            )
            for n, (pending, running) in enumerate(zip(self.pending, self.running, strict=True))
        )

    def sent_seconds(self, number: int, now_seconds: float) -> float:
        return self.pending[number] / 10_000.0

    def is_used(self, number: int) -> bool:
        return number not in self.down

    def measured_rate(self, number: int) -> float:
        return 10_000.0


class FakeClaims:
    """Claims without a Redis. `answer` is given to every request for one; CacheError is raised."""

    def __init__(self) -> None:
        self.answer: str | CacheError | None = None
        self.asked: list[dict[str, Any]] = []
        self.released: list[str] = []
        self.with_their_part: set[str] = set()
        self.withdrawn = 0
        self.slow: set[str] = set()  # tenants whose claims are answered once `go` is set
        self.go = asyncio.Event()

    async def take(self, pool: str, replicas: Sequence[str], **about: Any) -> str | None:
        self.asked.append({"replicas": list(replicas), **about})
        if about["tenant"] in self.slow:
            await self.go.wait()
        if about["tenant"] in self.with_their_part:
            return PART_TAKEN
        if isinstance(self.answer, CacheError):
            raise self.answer
        return self.answer

    def release(self, pool: str, replica: str) -> None:
        assert pool == POOL
        self.released.append(replica)

    def withdraw(self, pool: str) -> None:
        self.withdrawn += 1


class Bench:
    """A gate with everything around it under control. Cold turns wait: its pressure is on."""

    def __init__(
        self, replicas: int = 2, *, alone: bool = True, others: int = 1, capacity: float | None = 1e6
    ) -> None:
        self.fleet, self.claims, self.clock = FakeFleet(replicas), FakeClaims(), FakeClock()
        self.shares = TenantShares()
        self.reports = 0
        self.others = 0 if alone else 1
        self.capacity = capacity
        self.unknown: set[int] = set()  # replicas whose capacity is not known
        self.gate = ColdGate(
            self.fleet,
            lambda number: None if number in self.unknown else self.capacity,
            self.shares,
            self.claims,
            lambda: self.others,
            Tasks().start,
            self.clock,
            self.report,
        )
        self.gate.observe(POOL, 100_000, 90_000)
        self.tasks = Tasks()

    def report(self) -> None:
        self.reports += 1

    def turn(self, **more: Any) -> Turn:
        fields = {
            "pool": POOL,
            "prompt_tokens": 100_000.0,
            "uncached_tokens": 90_000.0,
            "known_tokens": 100_000.0,
            "prompt_end": 1,
            "body_bytes": 1_000,
            "tenant": "a",
            "weight": 1.0,
            "priority": Priority.NORMAL,
            "deadline_seconds": None,
        }
        return Turn(**{**fields, **more})

    def verdict(self, turn: Turn, kind: TurnKind = TurnKind.COLD):
        return self.gate.judge(turn, kind, self.fleet.snapshot(POOL, 0.0))

    def begin(self, **more: Any) -> asyncio.Task[Pass]:
        turn = self.turn(**more)
        return self.tasks.start(self.gate.wait(turn, self.verdict(turn)), "turn")


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


async def assert_goes_after(bench: Bench, turn: asyncio.Task[object], seconds: float) -> None:
    """Hold that a turn still waits just before this time has passed, and goes just after."""
    bench.clock.advance(seconds - 0.1)
    bench.gate.changed()
    await settle()
    assert not turn.done()
    bench.clock.advance(0.2)
    bench.gate.changed()
    await settle()
    assert turn.done()


async def test_a_cold_turn_goes_to_a_quiet_replica_and_holds_it_until_its_first_token():
    """The next one gets the other replica, and the third waits for the first to be over."""
    bench = Bench()
    first, second, third = bench.begin(), bench.begin(), bench.begin()
    await settle()
    assert (first.done(), second.done(), third.done()) == (True, True, False)
    given = first.result()
    assert {given.replica, second.result().replica} == {0, 1}
    over = False
    given.is_over = lambda: over
    bench.gate.changed()
    await settle()
    assert not third.done()
    over = True
    bench.gate.changed()
    await settle()
    assert third.result().replica == given.replica
    assert bench.gate.admitted == 3


async def test_a_turn_waits_until_a_replica_is_quiet():
    """Work that ends elsewhere is what wakes it."""
    bench = Bench(1)
    bench.fleet.pending[0] = 6_000.0
    waiting = bench.begin()
    await settle()
    assert not waiting.done()
    assert bench.gate.waiting()[Priority.NORMAL] == 1
    bench.fleet.pending[0] = 2_000.0
    bench.gate.changed()
    await settle()
    assert waiting.done()


async def test_a_busy_replica_takes_one_cold_turn_in_each_rest():
    """Counted from the last one that it took, although others wait since before."""
    bench = Bench(1)
    rest_seconds = bench.gate.limits.rest_seconds
    bench.fleet.pending[0] = 1e6
    first, second = bench.begin(), bench.begin()
    await settle()
    for waited_seconds, gone in (
        (rest_seconds - 0.5, 0), (0.5, 1), (0.0, 1), (rest_seconds - 0.5, 1), (0.5, 2)
    ):  # fmt: skip
        bench.clock.advance(waited_seconds)
        bench.gate.changed()
        await settle()
        assert first.done() + second.done() == gone
        if gone == 1:
            first.result().release()


@pytest.mark.parametrize("pressed", [True, False])
async def test_a_warm_turn_never_waits_behind_cold_ones(pressed: bool):
    """However long it takes to compute: it would be evicted meanwhile. It waits for the replica that holds it."""
    bench = Bench()
    if not pressed:
        bench.gate.observe(POOL, 1e9, 0.0)
    bench.fleet.pending = [1e6, 1e6]
    waiting = bench.begin()
    await settle()
    warm = bench.turn(uncached_tokens=25_000.0)
    assert not bench.verdict(warm, TurnKind.WARM).waits
    assert bench.verdict(warm, TurnKind.COLD).waits
    waiting.cancel()


@pytest.mark.parametrize("pace", [1.0, 0.2])
async def test_under_pressure_a_turn_spares_the_sessions_whose_turn_has_just_ended(pace: float):
    """It waits while they and what runs leave no room, and goes as soon as one of them rests no longer."""
    bench = Bench(replicas=1)
    bench.gate.limits = GateLimits(rest_seconds=pace * REST_SECONDS)
    bench.fleet.running[0] = 350_000.0
    bench.gate.served(POOL).note([1, 2], 0, 450_000.0, 0.0, bench.clock.monotonic())
    bench.gate.ended(POOL, 2, 0)
    turn = bench.begin(prompt_end=9, prompt_tokens=450_000.0, uncached_tokens=400_000.0)
    await settle()
    assert not turn.done()
    await assert_goes_after(bench, turn, pace * RESTING_SECONDS)


async def test_what_rests_is_remembered_for_as_long_as_the_pace_says():
    """Though other answers end meanwhile, at which what rests no longer is forgotten."""
    bench = Bench(replicas=1)
    bench.gate.limits = GateLimits(rest_seconds=5 * REST_SECONDS)
    served = bench.gate.served(POOL)
    for end in (2, 3):
        served.note([10 * end, end], 0, 1_000.0, 0.0, bench.clock.monotonic())
        bench.gate.ended(POOL, end, 0)
        bench.clock.advance(2 * RESTING_SECONDS)
    assert served.resting_tokens(0, bench.clock.monotonic(), 5 * RESTING_SECONDS) == 2_000.0


async def test_a_turn_spares_nobody_once_all_prompts_could_have_been_computed():
    """Two sessions of 30,000 tokens take one replica 6 s: without the gate turns would wait for about that long."""
    bench = Bench(replicas=1)
    bench.fleet.running[0] = 900_000.0
    for end in (2, 3):
        bench.gate.served(POOL).note([10 * end, end], 0, 30_000.0, 0.0, bench.clock.monotonic())
    turn = bench.begin(prompt_end=9)
    await settle()
    await assert_goes_after(bench, turn, SPARING_ROUNDS * 6.0)


async def test_a_client_that_leaves_is_gone_from_the_queue_at_once():
    """And what it held is free: bodies, its place, a pass that it was given in the same moment."""
    bench = Bench(1)
    bench.fleet.pending[0] = 1e6
    waiting, next_one = bench.begin(), bench.begin()
    await settle()
    assert bench.gate.waiting_bytes == 2_000
    waiting.cancel()
    await settle()
    assert (bench.gate.waiting()[Priority.NORMAL], bench.gate.waiting_bytes) == (1, 1_000)
    bench.fleet.pending[0] = 0.0
    bench.gate.changed()
    next_one.cancel()  # the pass is given, and it does not know yet
    last = bench.begin()
    await settle()
    assert last.done()


async def test_short_and_warm_turns_never_wait():
    """No turn waits if the capacity is unknown, while there is room, or if the gate is off."""
    bench = Bench()
    turn = bench.turn()
    assert bench.verdict(turn).waits
    assert not bench.verdict(turn, TurnKind.SHORT).waits
    assert not bench.verdict(turn, TurnKind.WARM).waits
    assert not Bench(capacity=None).verdict(turn).waits
    bench.gate.observe(POOL, 10_000_000, 0)
    assert not bench.verdict(turn).waits
    bench = Bench()
    bench.gate.limits = GateLimits(enabled=False)
    assert not bench.verdict(turn).waits


async def test_a_long_prefill_waits_where_another_tenant_is_active_or_everything_is_busy():
    """Though there is room: an engine would not let the other's short request through."""
    bench = Bench()
    bench.gate.observe(POOL, 10_000_000, 0)
    turn = bench.turn()
    bench.shares.seen("a", 1.0, bench.clock.monotonic())
    assert not bench.verdict(turn).waits
    bench.fleet.pending = [40_000.0, 40_000.0]
    assert bench.verdict(turn).waits
    bench.fleet.pending = [0.0, 0.0]
    bench.shares.seen("b", 1.0, bench.clock.monotonic())
    bench.clock.advance(1.0)
    assert bench.verdict(turn).waits
    assert not bench.verdict(bench.turn(uncached_tokens=9_000.0)).waits


async def test_a_verdict_gives_the_reason_for_the_wait():
    """It is what /explain shows."""
    bench = Bench()
    assert bench.verdict(bench.turn()).reason == "the sessions need more cache than the replicas have"
    bench.gate.observe(POOL, 10_000_000, 0)
    bench.fleet.pending = [40_000.0, 40_000.0]
    busy = "every replica has enough work, and only the proxy can keep the order"
    assert bench.verdict(bench.turn()).reason == busy
    for tenant in ("a", "b"):
        bench.shares.seen(tenant, 1.0, bench.clock.monotonic())
    others = "other tenants are active, and a long prefill would keep them waiting"
    assert bench.verdict(bench.turn()).reason == others
    assert bench.verdict(bench.turn(), TurnKind.SHORT).reason == ""


async def test_one_tenant_of_two_has_half_of_the_replicas_for_long_prefills():
    """The other's go past those that wait, and alone it has all."""
    bench = Bench(4)
    for tenant in ("flood", "other"):
        bench.shares.seen(tenant, 1.0, bench.clock.monotonic())
    flood = [bench.begin(tenant="flood") for _ in range(6)]
    await settle()
    assert sum(each.done() for each in flood) == 2
    other = bench.begin(tenant="other")
    await settle()
    assert other.done()
    bench.clock.advance(1.0)
    bench.gate.changed()
    bench.clock.advance(20.0)  # the other is gone
    bench.shares.seen("flood", 1.0, bench.clock.monotonic())
    bench.gate.changed()
    await settle()
    assert sum(each.done() for each in flood) == 3


async def test_a_new_session_beyond_the_longest_wait_is_told_when_to_come_back_and_is_taken_then():
    """At the rate at which turns are taken; a session that was served waits."""
    bench = Bench(1)
    bench.gate.limits = GateLimits(max_wait_seconds=20.0)
    bench.fleet.pending[0] = 1e6
    before = [bench.begin(), bench.begin(), bench.begin()]  # 27 s of work at 10,000 tokens a second
    await settle()
    new = bench.turn(known_tokens=0.0, prompt_end=9)
    with pytest.raises(RateLimited) as refused:
        await bench.gate.wait(new, bench.verdict(new))
    assert refused.value.retry_after_seconds == pytest.approx(7.0)
    assert refused.value.message == (
        "More sessions are active than the replicas have memory for; new ones are accepted again later."
    )
    bench.clock.advance(2.0)
    served = bench.begin(prompt_end=10)
    await settle()
    assert not served.done()
    bench.clock.advance(5.0)
    before[0].cancel()  # as if it had gone: 9 s of work less
    await settle()
    later = bench.begin(known_tokens=0.0, prompt_end=9)
    await settle()
    bench.fleet.pending[0] = 0.0
    order = []
    for _ in range(4):
        bench.gate.changed()
        await settle()
        for each in (*before[1:], served, later):
            if each.done() and not each.cancelled() and each not in order:
                order.append(each)
                each.result().release()
    assert order.index(later) < order.index(served)  # as old as its first try, which came before


async def test_a_flood_of_one_tenant_neither_refuses_nor_lengthens_the_waits_of_another():
    """Neither what waits nor what was turned away: by its share the other goes next, and then every second time."""
    bench = Bench(1)
    bench.fleet.pending[0] = 1e6
    for tenant in ("flood", "b"):
        bench.shares.seen(tenant, 1.0, bench.clock.monotonic())
    flood = []
    for number in range(100):
        flood.append(bench.begin(tenant="flood", prompt_end=number, known_tokens=0.0))
        await settle()
    assert any(each.done() and isinstance(each.exception(), RateLimited) for each in flood)
    bench.clock.advance(1.0)
    first = bench.turn(
        tenant="b", prompt_end=1_000, known_tokens=0.0, deadline_seconds=bench.clock.monotonic() + 20.0
    )
    assert bench.verdict(first).seconds == pytest.approx(QUANTUM_TOKENS / 10_000.0)
    waiting = bench.tasks.start(bench.gate.wait(first, bench.verdict(first)), "turn")
    await settle()
    assert not waiting.done()
    second = bench.turn(tenant="b", prompt_end=1_001, known_tokens=0.0)
    assert bench.verdict(second).seconds == pytest.approx((2 * 90_000.0 + QUANTUM_TOKENS) / 10_000.0)
    urgent = bench.turn(tenant="b", prompt_end=1_002, priority=Priority.HIGH)
    assert bench.verdict(urgent).seconds < 1.0
    await bench.tasks.close()


async def test_a_session_that_comes_back_when_it_was_told_to_waits_though_the_prediction_has_grown():
    """Before that time it is refused once more."""
    bench = Bench(1)
    bench.gate.limits = GateLimits(max_wait_seconds=20.0)
    bench.fleet.pending[0] = 1e6
    before = [bench.begin(), bench.begin(), bench.begin()]
    await settle()
    new = bench.turn(known_tokens=0.0, prompt_end=9)
    for seconds in (0.0, 6.0):
        bench.clock.advance(seconds)
        with pytest.raises(RateLimited):
            await bench.gate.wait(new, bench.verdict(new))
    bench.clock.advance(7.0)
    back = bench.begin(known_tokens=0.0, prompt_end=9)
    await settle()
    assert not back.done()
    for each in (*before, back):
        each.cancel()


async def test_a_session_that_was_told_to_come_back_may_do_so_at_another_worker():
    """It is reported at once. The second worker takes it although the prediction is too long, and reports that."""
    first, second = Bench(1), Bench(1)
    for bench in (first, second):
        bench.gate.limits = GateLimits(max_wait_seconds=20.0)
        bench.fleet.pending[0] = 1e6
    before = [bench.begin() for bench in (first, second) for _ in range(3)]
    await settle()
    new = first.turn(known_tokens=0.0, prompt_end=9)
    with pytest.raises(RateLimited):
        await first.gate.wait(new, first.verdict(new))
    assert first.reports == 1
    second.gate.absorb(first.gate.rows())
    second.clock.advance(7.0)
    back = second.begin(known_tokens=0.0, prompt_end=9)
    await settle()
    assert not back.done()
    first.gate.absorb(second.gate.rows())
    assert len(first.gate.pool(POOL).tickets) == 0
    for each in (*before, back):
        each.cancel()


async def test_a_refusal_is_told_to_other_workers_several_times():
    """A lost message does no harm; then there is nothing to tell."""
    bench = Bench(1)
    bench.gate.limits = GateLimits(max_wait_seconds=5.0)
    bench.fleet.pending[0] = 1e6
    before = bench.begin()
    await settle()
    while bench.gate.rows():
        pass
    refused = bench.turn(known_tokens=0.0, prompt_end=9)
    with pytest.raises(RateLimited):
        await bench.gate.wait(refused, bench.verdict(refused))
    assert [len(bench.gate.rows()) for _ in range(SENDS + 1)] == [1] * SENDS + [0]
    before.cancel()


def test_only_rows_of_refusals_name_a_pool():
    """Messages about work have rows of replicas and tenants too."""
    assert [pool_of(row) for row in ("replica-1", "\0tenant:a", "\0ticket:pool\x001f\0tenant")] == [
        None,
        None,
        "pool",
    ]


async def test_the_memory_of_waiting_bodies_is_bounded():
    """One more is refused, whoever it is."""
    bench = Bench(1)
    bench.gate.limits = GateLimits(max_waiting_bytes=2_500)
    bench.fleet.pending[0] = 1e6
    waiting = [bench.begin(), bench.begin()]
    await settle()
    assert (bench.gate.admitted, bench.gate.refused) == (0, 0)
    with pytest.raises(RateLimited) as caught:
        await bench.gate.wait(bench.turn(), bench.verdict(bench.turn()))
    assert caught.value.message == "The requests that wait for a replica take all the memory allowed for them."
    assert caught.value.retry_after_seconds == 5.0
    assert (bench.gate.admitted, bench.gate.refused) == (0, 1)
    assert not any(each.done() for each in waiting)


async def test_a_deadline_that_cannot_be_met_is_refused_at_once():
    """By what waits before it; and one that passes while it waits ends the wait."""
    bench = Bench(1)
    bench.fleet.pending[0] = 1e6
    before = bench.begin()
    await settle()
    hopeless = bench.turn(deadline_seconds=bench.clock.monotonic() + 5.0)
    with pytest.raises(DeadlineUnreachable) as caught:
        await bench.gate.wait(hopeless, bench.verdict(hopeless))
    assert caught.value.message == "The first token would come after about 9 s, which is past the deadline."
    assert caught.value.retry_after_seconds == pytest.approx(9.0)
    assert bench.gate.refused == 1
    tight = bench.turn(deadline_seconds=bench.clock.monotonic() + 0.01)
    with pytest.raises(DeadlineUnreachable, match=r"^The deadline passed while the request waited for a replica\.$"):
        await bench.gate.wait(tight, bench.gate.judge(tight, TurnKind.SHORT, ()))
    assert not before.done()


async def test_with_other_workers_a_replica_is_claimed_first_and_released_after():
    """Best replica first, with the turn's place among all; what is not given is waited for."""
    bench = Bench(alone=False)
    bench.fleet.pending = [1_000.0, 0.0]
    waiting = bench.begin()
    await settle()
    assert not waiting.done()
    assert bench.claims.asked[0]["replicas"] == ["replica-1", "replica-0"]
    assert bench.claims.asked[0]["busy"] == {}
    bench.claims.answer = "replica-0"
    bench.gate.changed()
    await settle()
    given = waiting.result()
    assert given.replica_name == "replica-0"
    given.release()
    given.release()
    assert bench.claims.released == ["replica-0"]


async def test_with_other_workers_one_tenant_of_two_claims_half_of_the_replicas_at_most():
    """The claim says how many, since the passes that other workers gave are known only there."""
    bench = Bench(4, alone=False)
    for seen, most in (("alone", ANY_NUMBER), ("other", 2)):
        bench.shares.seen(seen, 1.0, bench.clock.monotonic())
        bench.clock.advance(2.0)
        waiting = bench.begin(tenant="alone")
        await settle()
        assert (bench.claims.asked[-1]["tenant"], bench.claims.asked[-1]["most"]) == ("alone", most)
        waiting.cancel()
        await settle()


async def test_a_tenant_alone_names_its_next_turn_while_it_has_all_replicas():
    """Its lower priorities in other workers would pass it otherwise, as these hear first that a replica is free."""
    bench = Bench(1, alone=False)
    bench.claims.answer = "replica-0"
    first = bench.begin()
    await settle()
    assert first.done()
    bench.claims.answer, withdrawn = None, bench.claims.withdrawn
    second = bench.begin(prompt_end=2)
    await settle()
    assert len(bench.claims.asked) == 2
    assert bench.claims.asked[-1]["replicas"] == []
    assert bench.claims.withdrawn == withdrawn
    second.cancel()
    await settle()


async def test_a_tenant_that_has_its_part_in_other_workers_keeps_no_other_waiting():
    """Redis says that its turn may not go, and the next tenant's is asked for at once. Its own goes in its time."""
    bench = Bench(2, alone=False)
    bench.claims.with_their_part.add("a")
    first, second = bench.begin(tenant="a"), bench.begin(tenant="a")
    await settle()
    assert bench.claims.withdrawn == 0
    bench.claims.answer = "replica-0"
    other = bench.begin(tenant="b")
    await settle()
    assert (first.done(), second.done(), other.done()) == (False, False, True)
    bench.claims.with_their_part.clear()
    bench.claims.answer = "replica-1"
    bench.gate.changed()
    await settle()
    assert first.done()
    bench.claims.answer = None
    second.cancel()


async def test_a_tenant_s_part_is_one_of_the_replicas_that_are_available():
    """As within a worker: two of four are down, and each of two tenants has one."""
    bench = Bench(4, alone=False)
    bench.fleet.down = {2, 3}
    for seen in ("a", "other"):
        bench.shares.seen(seen, 1.0, bench.clock.monotonic())
    waiting = bench.begin()
    await settle()
    assert bench.claims.asked[-1]["most"] == 1
    waiting.cancel()


async def test_a_turn_whose_floor_is_due_has_the_place_of_those_that_it_goes_before():
    """Else these would wait here until no other worker had any of their priority."""
    bench = Bench(1, alone=False)
    bench.fleet.pending[0] = 1e6
    low = bench.begin(priority=Priority.LOW, uncached_tokens=50_000.0)
    turns = [bench.begin(prompt_end=9 + number) for number in range(20)]
    await settle()
    bench.fleet.pending[0] = 0.0
    bench.claims.answer = "replica-0"
    while not low.done():
        bench.gate.changed()
        await settle()
        for turn in [low, *turns]:
            if turn.done():
                turn.result().release()
    assert not all(turn.done() for turn in turns)
    assert {about["order"][0][0] for about in bench.claims.asked[1:]} == {"1"}  # it was alone at first
    for turn in turns:
        turn.cancel()


async def test_a_turn_has_its_own_place_if_all_of_a_higher_priority_have_their_part():
    """In other workers or in this one: they go neither before it nor here."""
    bench = Bench(2, alone=False)
    bench.claims.with_their_part.add("a")
    urgent, turn = bench.begin(tenant="a", priority=Priority.HIGH), bench.begin(tenant="b")
    await settle()
    assert [(each["tenant"], each["order"][0][0]) for each in bench.claims.asked[-2:]] == [("a", "0"), ("b", "1")]
    urgent.cancel()
    turn.cancel()


async def test_a_place_is_a_text_of_priority_and_round_and_the_time_for_which_a_turn_has_waited():
    """Padded, so that texts sort like numbers; no wall clock, which other machines need not share."""
    bench = Bench(1, alone=False)
    bench.fleet.pending[0] = 1e6
    bench.shares.serve("a", 5 * QUANTUM_TOKENS)
    for priority in (Priority.LOW, Priority.HIGH):
        waiting = bench.begin(priority=priority)
        await settle()
        bench.clock.advance(2.5)
        bench.gate.changed()
        await settle()
        assert bench.claims.asked[-1]["order"] == (f"{priority:d}:000000000000005", 2.5)
        waiting.cancel()
        await settle()


async def test_a_claim_says_which_replicas_are_busy_and_for_how_long_it_may_last():
    """Three times the longest prefill and half a minute; the half minute if none is open, and all by the pace."""
    for pace in (1.0, 0.2):
        bench = Bench(2, alone=False)
        bench.gate.limits = GateLimits(rest_seconds=pace * REST_SECONDS)
        bench.fleet.pending[1] = 1e6
        waiting = bench.begin()
        await settle()
        about = bench.claims.asked[-1]
        assert (about["replicas"], about["busy"]) == (["replica-0"], {})
        assert about["claim_seconds"] == pytest.approx(3 * 9.0 + pace * 30.0)
        bench.fleet.pending[0] = 20_000.0
        bench.gate.changed()
        await settle()
        assert (bench.claims.asked[-1]["replicas"], bench.claims.asked[-1]["claim_seconds"]) == ([], 30.0)
        bench.clock.advance(pace * REST_SECONDS)
        bench.gate.changed()
        await settle()
        about = bench.claims.asked[-1]
        rest = pace * REST_SECONDS
        assert (about["replicas"], about["busy"]) == (
            ["replica-0", "replica-1"],
            {"replica-0": rest, "replica-1": rest},
        )
        assert about["claim_seconds"] == pytest.approx(3 * (1e6 + 90_000.0) / 10_000.0 + pace * 30.0)
        waiting.cancel()
        await settle()


async def test_a_replica_is_busy_by_the_limit_of_what_counts_as_quiet():
    """Which is a setting."""
    for quiet_seconds, busy in ((0.5, ["replica-0"]), (50.0, [])):
        bench = Bench(1, alone=False)
        bench.gate.limits = GateLimits(quiet_seconds=quiet_seconds)
        bench.fleet.pending[0] = 10_000.0
        waiting = bench.begin()
        await settle()
        bench.clock.advance(REST_SECONDS)
        bench.gate.changed()
        await settle()
        assert (bench.claims.asked[-1]["replicas"], list(bench.claims.asked[-1]["busy"])) == (["replica-0"], busy)
        waiting.cancel()
        await settle()


async def test_a_pass_that_is_over_is_released_though_no_turn_waits_and_much_has_happened_since():
    """The replica is claimed for all workers until then."""
    bench = Bench(1, alone=False)
    bench.claims.answer = "replica-0"
    turn = bench.begin()
    await settle()
    is_over = False
    turn.result().is_over = lambda: is_over
    for _ in range(3):
        bench.gate.changed()
    assert not bench.claims.released
    is_over = True
    bench.gate.changed()
    assert bench.claims.released == ["replica-0"]


async def test_a_pass_ends_by_itself_after_three_times_its_prefill_and_half_a_minute():
    """Its request may hang."""
    bench = Bench(1)
    first, second = bench.begin(), bench.begin()
    await settle()
    for seconds, goes in ((3 * 9.0 + 30.0 - 0.01, False), (0.01, True)):
        bench.clock.advance(seconds)
        bench.gate.changed()
        await settle()
        assert second.done() is goes
    assert first.result().replica == second.result().replica


@pytest.mark.parametrize(
    ("replicas", "weights", "part"),
    [(1, (1.0, 1.0), 1), (2, (1.0, 99.0), 1), (2, (99.0, 1.0), 1), (3, (1.0, 1.0), 1), (4, (3.0, 1.0), 3)],
)
async def test_the_part_of_a_tenant_is_its_share_rounded_down_and_leaves_one_to_the_others(
    replicas: int, weights: tuple[float, float], part: int
):
    """It is at least one."""
    bench = Bench(replicas)
    for tenant, weight in zip(("own", "other"), weights, strict=True):
        bench.shares.seen(tenant, weight, bench.clock.monotonic())
    own = [bench.begin(tenant="own", weight=weights[0]) for _ in range(replicas + 1)]
    await settle()
    assert sum(each.done() for each in own) == part
    for each in own:
        each.cancel()
    await settle()


async def test_while_turns_wait_the_gate_looks_twice_a_second_by_the_pace(monkeypatch: pytest.MonkeyPatch):
    """One timer, however many wait; it is set again until none waits."""
    timers: list[tuple[float, Callable[[], object]]] = []
    loop = asyncio.get_running_loop()

    def noted(delay: float, call: Callable[..., object], *about: object) -> object:
        timers.append((delay, lambda: call(*about)))
        return timers

    monkeypatch.setattr(loop, "call_later", noted)
    for pace in (1.0, 0.2):
        timers.clear()
        bench = Bench(1)
        bench.gate.limits = GateLimits(rest_seconds=pace * REST_SECONDS)
        bench.fleet.pending[0] = 1e6
        first, second = bench.begin(), bench.begin()
        await settle()
        assert [delay for delay, _ in timers] == [0.5 * pace]
        timers.pop()[1]()
        assert [delay for delay, _ in timers] == [0.5 * pace]
        bench.fleet.pending[0] = 0.0
        timers.pop()[1]()
        await settle()
        assert (first.done(), second.done(), len(timers)) == (True, False, 1)
        second.cancel()
        await settle()
        timers.pop()[1]()
        assert timers == []


async def test_sessions_that_were_turned_away_count_in_the_wait_of_those_that_come_after_them():
    """They are expected back, with their place."""
    bench = Bench(1)
    bench.gate.limits = GateLimits(max_wait_seconds=5.0)
    bench.fleet.pending[0] = 1e6
    first = bench.begin()
    await settle()
    assert bench.verdict(bench.turn(prompt_end=7)).seconds == pytest.approx(9.0)
    refused = bench.turn(prompt_end=8, known_tokens=0.0, uncached_tokens=50_000.0)
    with pytest.raises(RateLimited):
        await bench.gate.wait(refused, bench.verdict(refused))
    bench.clock.advance(1.0)
    assert bench.verdict(bench.turn(prompt_end=7)).seconds == pytest.approx(9.0 + 5.0)
    first.cancel()
    await settle()


async def test_the_wait_counts_those_who_will_come_and_go_before_by_their_share():
    """As far as they did lately, while they are active. A deadline is refused only by what waits already."""
    bench = Bench(1)
    flood = [bench.begin(tenant="flood", prompt_end=number) for number in range(9)]
    other = bench.begin(tenant="other", prompt_end=100)
    for number in range(101, 109):
        for tenant in ("flood", "other"):
            bench.shares.seen(tenant, 1.0, bench.clock.monotonic())
        await settle()
        if other.done():  # it always has one turn that waits
            other = bench.begin(tenant="other", prompt_end=number)
            await settle()
        bench.clock.advance(9.0)  # the time of 90,000 tokens
        bench.gate.pool(POOL).passes[0].release()
    await settle()
    waiting = sum(not each.done() for each in flood)
    assert waiting == 4
    new = bench.turn(tenant="flood", prompt_end=9, known_tokens=0.0, deadline_seconds=bench.clock.monotonic() + 60.0)
    verdict = bench.verdict(new)
    assert verdict.seconds == pytest.approx(2 * 9.0 * waiting, rel=0.15)
    assert verdict.least_seconds == pytest.approx(9.0 * (waiting + 1), rel=0.15)
    assert bench.gate.refusal(new, verdict) is None
    other.cancel()
    await settle()
    for _ in range(2):  # the other is gone, and active for a while longer
        bench.clock.advance(20.0)
        bench.gate.changed()
    assert bench.verdict(new).seconds == pytest.approx(9.0 * waiting, rel=0.15)
    for each in flood:
        each.cancel()
    await settle()


async def refused(bench: Bench, **about: Any) -> float:
    """Hold that a new session is refused, and return its Retry-After."""
    turn = bench.turn(known_tokens=0.0, **about)
    with pytest.raises(RateLimited) as error:
        await bench.gate.wait(turn, bench.verdict(turn))
    assert error.value.retry_after_seconds is not None
    return error.value.retry_after_seconds


async def test_sessions_that_were_turned_away_refuse_nobody_who_would_go_before_they_are_back():
    """Nor those that did not come back: most clients give up, or come with a prompt that is not quite the same."""
    bench = Bench(1)
    bench.gate.limits = GateLimits(max_wait_seconds=20.0)
    bench.fleet.pending[0] = 1e6
    before = [bench.begin(prompt_end=number) for number in range(3)]  # 27 s of work
    await settle()
    for number in range(10):
        bench.clock.advance(0.001)
        after = await refused(bench, prompt_end=100 + number)
        assert after == pytest.approx(7.0 + 9.0 * number, abs=0.1), "each comes after those before"
    for each in before:
        each.cancel()
    await settle()
    for _ in range(20):
        assert bench.verdict(bench.turn(prompt_end=7)).seconds == 0.0, "nobody waits"
        bench.clock.advance(6.0)
    waits = bench.begin(prompt_end=200)
    await settle()
    assert bench.verdict(bench.turn(prompt_end=7)).seconds == pytest.approx(9.0), "nobody is expected any more"
    waits.cancel()
    await settle()


async def test_the_sessions_that_were_turned_away_come_back_to_any_worker():
    """Each predicts by the rate of its own turns, so each expects its part of them."""
    bench = Bench(1)
    bench.gate.limits = GateLimits(max_wait_seconds=5.0)
    bench.fleet.pending[0] = 1e6
    first = bench.begin()
    await settle()
    assert await refused(bench, prompt_end=8, uncached_tokens=60_000.0) == pytest.approx(4.0)
    for others, seconds in ((0, 15.0), (2, 11.0)):
        bench.others = others
        bench.clock.advance(0.1)
        assert bench.verdict(bench.turn(prompt_end=7)).seconds == pytest.approx(seconds)
    bench.others = 0
    first.cancel()
    await settle()


async def test_a_wait_is_predicted_in_a_few_looks_however_many_were_turned_away():
    """With each look it may be long enough for some more to come back; at last all of them count."""
    bench = Bench(1)
    bench.gate.limits = GateLimits(max_wait_seconds=5.0)
    bench.fleet.pending[0] = 1e6
    first = bench.begin()
    await settle()
    for number in range(100):
        await refused(bench, prompt_end=100 + number)
    bench.clock.advance(0.1)
    assert bench.verdict(bench.turn(prompt_end=7)).seconds == pytest.approx(101 * 9.0)
    few = operations(lambda: bench.verdict(bench.turn(prompt_end=7)))
    for number in range(100):
        await refused(bench, prompt_end=200 + number)
    assert operations(lambda: bench.verdict(bench.turn(prompt_end=7))) < 2.2 * few
    first.cancel()
    await settle()


async def test_all_turns_of_a_higher_priority_count_in_the_wait_though_they_came_later():
    """Those of a lower one do not."""
    bench = Bench(1)
    bench.fleet.pending[0] = 1e6
    turns = [bench.begin(priority=each) for each in (Priority.HIGH, Priority.HIGH, Priority.LOW)]
    await settle()
    assert bench.verdict(bench.turn(prompt_end=7)).seconds == pytest.approx(2 * 9.0)
    for turn in turns:
        turn.cancel()
    await settle()


async def test_what_a_cold_turn_computes_counts_for_its_tenant_by_its_weight():
    bench = Bench(1)
    turn = bench.begin(weight=2.0, uncached_tokens=6 * QUANTUM_TOKENS)
    await settle()
    turn.result().release()
    assert bench.shares.round_of("a") == 3


async def test_without_redis_and_without_a_replica_that_is_open_a_turn_waits_on(caplog: pytest.LogCaptureFixture):
    """It goes as soon as one is."""
    bench = Bench(1, alone=False)
    bench.claims.answer = CacheError("away")
    bench.fleet.pending[0] = 1e6
    waiting = bench.begin()
    await settle()
    assert not waiting.done()
    bench.fleet.pending[0] = 0.0
    bench.gate.changed()
    await settle()
    assert waiting.done()
    assert caplog.records == []


@pytest.mark.parametrize("alone", [True, False])
async def test_turns_that_wait_go_at_once_when_the_gate_is_switched_off(alone: bool):
    """Those that come then do not wait, keep the replicas busy, and would go before them for as long as they come."""
    bench = Bench(alone=alone)
    bench.fleet.pending = [1e6, 1e6]
    waiting = [bench.begin() for _ in range(3)]
    await settle()
    assert not any(each.done() for each in waiting)
    bench.gate.limits = GateLimits(enabled=False)
    bench.gate.changed()
    await settle()
    assert [type(each.exception()) for each in waiting] == 3 * [TurnedAway]
    assert (bench.gate.waiting()[Priority.NORMAL], bench.gate.waiting_bytes) == (0, 0)


@pytest.mark.parametrize("pace", [1.0, 0.5])
async def test_turns_that_wait_go_soon_when_the_capacity_of_a_replica_is_not_known_any_more(pace: float):
    """New ones do not wait then. A replica that joins has some seconds to tell its own."""
    bench = Bench()
    bench.gate.limits = GateLimits(rest_seconds=pace * REST_SECONDS)
    bench.fleet.pending = [1e6, 1e6]
    waiting = bench.begin()
    await settle()
    for _ in range(2):
        bench.capacity = None
        bench.gate.changed()
        bench.clock.advance(pace * UNKNOWN_SECONDS - 0.1)
        bench.gate.changed()
        bench.capacity = 1e6
        bench.gate.changed()
        await settle()
    bench.capacity = None
    bench.gate.changed()
    await assert_goes_after(bench, waiting, pace * UNKNOWN_SECONDS)
    assert isinstance(waiting.exception(), TurnedAway)


async def test_a_replica_of_unknown_capacity_lets_only_turns_go_that_it_can_serve():
    """Those of another model wait on, as new ones do, for the replicas that have it."""
    bench = Bench()
    bench.fleet.pending = [1e6, 1e6]
    one_model, any_model = bench.begin(prefill_seconds={1: 9.0}), bench.begin(prefill_seconds={0: 9.0, 1: 9.0})
    await settle()
    bench.unknown = {0}
    bench.gate.changed()
    await assert_goes_after(bench, any_model, UNKNOWN_SECONDS)
    assert isinstance(any_model.exception(), TurnedAway)
    bench.clock.advance(UNKNOWN_SECONDS)
    bench.fleet.pending[1] = 0.0
    bench.gate.changed()
    await settle()
    assert one_model.result().replica == 1


async def test_each_replica_that_joins_has_its_own_seconds_to_tell_its_capacity():
    """They may join one after the other, with always one of them that has just come."""
    bench = Bench(3)
    bench.fleet.pending = 3 * [1e6]
    waiting = bench.begin()
    await settle()
    for number in range(3):
        bench.unknown = {number}
        bench.gate.changed()
        bench.clock.advance(UNKNOWN_SECONDS - 0.1)
        bench.gate.changed()
    await settle()
    assert not waiting.done()
    waiting.cancel()


async def test_a_turn_goes_once_none_of_the_replicas_that_can_serve_it_is_left():
    """Those that others wait for are no use to it: it would wait for as long as they come."""
    bench = Bench()
    bench.fleet.pending = [1e6, 1e6]
    one_model, other_model = bench.begin(prefill_seconds={0: 9.0}), bench.begin(prefill_seconds={1: 9.0})
    await settle()
    bench.fleet.down = {0}
    bench.gate.changed()
    await settle()
    assert isinstance(one_model.exception(), TurnedAway)
    assert not other_model.done()
    bench.fleet.pending[1] = 0.0
    bench.gate.changed()
    await settle()
    assert other_model.result().replica == 1


async def test_a_claim_that_comes_for_a_turn_that_left_goes_to_no_turn_that_cannot_use_it():
    """The replica lacks what the next one needs; it is given back."""
    bench = Bench(alone=False)
    asked, answered = asyncio.Event(), asyncio.Event()

    async def take(pool: str, replicas: Sequence[str], **about: Any) -> str | None:
        asked.set()
        await answered.wait()
        bench.claims.take = FakeClaims.take.__get__(bench.claims)  # type: ignore[method-assign]
        return "replica-0"

    bench.claims.take = take  # type: ignore[method-assign]
    leaves = bench.begin(prefill_seconds={0: 9.0, 1: 9.0})
    await asked.wait()
    other = bench.begin(prefill_seconds={1: 9.0})
    await settle()
    leaves.cancel()
    await settle()
    answered.set()
    await settle()
    assert (other.done(), bench.claims.released) == (False, ["replica-0"])
    assert bench.claims.asked[-1]["replicas"] == ["replica-1"]
    other.cancel()
    await settle()


@pytest.mark.parametrize("answer", ["replica-0", CacheError("away")])
async def test_a_replica_that_took_a_turn_while_it_was_being_claimed_takes_no_second_one(answer: str | CacheError):
    """The last other worker ended meanwhile, so that this one went on alone."""
    bench = Bench(1, alone=False)
    asked, answered = asyncio.Event(), asyncio.Event()

    async def take(pool: str, replicas: Sequence[str], **about: Any) -> str | None:
        asked.set()
        await answered.wait()
        if isinstance(answer, CacheError):
            raise answer
        return answer

    bench.claims.take = take  # type: ignore[method-assign]
    first, second = bench.begin(), bench.begin()
    await asked.wait()
    bench.others = 0
    bench.gate.changed()
    await settle()
    assert (first.done(), second.done()) == (True, False)
    answered.set()
    await settle()
    assert not second.done()
    assert bench.claims.released == ([] if isinstance(answer, CacheError) else ["replica-0"])
    first.result().release()
    await settle()
    assert second.done()


async def test_every_refusal_and_every_turn_that_goes_is_counted():
    """The same holds for every reason."""
    bench = Bench(1)
    bench.gate.limits = GateLimits(max_waiting_bytes=1_500, max_wait_seconds=5.0)
    bench.fleet.pending[0] = 1e6
    before = bench.begin()
    await settle()
    refused = 0
    for _ in range(2):
        for error, about in (
            (DeadlineUnreachable, {"deadline_seconds": bench.clock.monotonic() + 5.0}),
            (RateLimited, {"body_bytes": 1_000}),
            (RateLimited, {"body_bytes": 1, "known_tokens": 0.0, "prompt_end": 7 + refused}),
        ):
            turn = bench.turn(**about)
            with pytest.raises(error):
                await bench.gate.wait(turn, bench.verdict(turn))
            refused += 1
            assert bench.gate.refused == refused
    bench.fleet.pending[0] = 0.0
    bench.gate.changed()
    await settle()
    before.result().release()
    for admitted in (2, 3):
        later = bench.begin()
        await settle()
        later.result().release()
        assert bench.gate.admitted == admitted


async def test_the_bound_of_waiting_bodies_and_that_of_the_wait_belong_to_what_is_allowed():
    """To the byte, for cold and for warm turns, and to the second."""
    bench = Bench(1)
    bench.gate.limits = GateLimits(max_waiting_bytes=2_000, max_wait_seconds=9.0)
    bench.fleet.pending[0] = 1e6
    first = bench.begin()
    await settle()
    new = bench.begin(known_tokens=0.0, prompt_end=2)
    await settle()
    assert (bench.gate.waiting_bytes, new.done()) == (2_000, False)
    new.cancel()
    await settle()
    warm = bench.tasks.start(bench.gate.wait_warm(bench.turn(client="red"), 0, 1.0), "warm")
    await settle()
    assert (bench.gate.waiting_bytes, warm.done()) == (2_000, False)
    assert bench.gate.warm_waiting_by_client() == {(Priority.NORMAL, "red"): 1}
    first.cancel()
    warm.cancel()
    await settle()
    assert bench.gate.warm_waiting_by_client() == {}


async def test_turns_that_wait_for_a_replica_that_holds_them_are_counted_each():
    bench = Bench(1)
    bench.fleet.pending[0] = 1e6
    warm = [bench.tasks.start(bench.gate.wait_warm(bench.turn(), 0, 1.0), "warm") for _ in range(3)]
    await settle()
    assert bench.gate.warm_waiting_by_client() == {(Priority.NORMAL, ""): 3}
    warm[0].cancel()
    await settle()
    assert bench.gate.warm_waiting_by_client() == {(Priority.NORMAL, ""): 2}
    for each in warm:
        each.cancel()
    await settle()


async def test_without_redis_each_goes_on_alone():
    """The best replica is taken, and nothing is released that nobody holds."""
    bench = Bench(alone=False)
    bench.claims.answer = CacheError("away")
    waiting = bench.begin()
    await settle()
    waiting.result().release()
    assert bench.claims.released == []


def test_how_long_queues_must_be_for_little_repeated_work_to_be_pressure_follows_the_pace():
    """Like all times of the gate."""
    bench = Bench(1)
    bench.gate.observe(POOL, 1_000_000, 90_000)
    for pace in (1.0, 0.2):
        bench.gate.limits = GateLimits(rest_seconds=pace * REST_SECONDS)
        for seconds, pressed in ((pace * CROWDED_SECONDS - 0.1, False), (pace * CROWDED_SECONDS, True)):
            bench.fleet.pending[0] = seconds * 10_000.0
            views = bench.fleet.snapshot(POOL, 0.0)
            assert bench.gate.is_pressed(POOL, views) is pressed
            bench.gate.pool(POOL).pressure._is_on = False  # noqa: SLF001 - it would last


async def test_a_claim_that_comes_for_a_client_that_left_is_given_back():
    """Or nobody could send a cold turn there until it expires."""
    bench = Bench(1, alone=False)
    waiting = bench.begin()
    bench.claims.answer = "replica-0"
    await asyncio.sleep(0)  # it has joined, and the claim is not asked for yet
    waiting.cancel()
    await settle()
    assert bench.claims.released == ["replica-0"]


async def test_a_claim_that_comes_for_a_client_that_left_is_not_for_a_tenant_that_has_its_part():
    """Though its turn is the first that waits: Redis counts the claim for the tenant that it was asked for."""
    bench = Bench(2, alone=False)
    bench.claims.with_their_part.add("a")
    bench.claims.slow.add("b")
    bench.claims.answer = "replica-0"
    first, other = bench.begin(tenant="a"), bench.begin(tenant="b")
    await settle()
    assert bench.claims.asked[-1]["tenant"] == "b"
    other.cancel()
    bench.claims.go.set()
    await settle()
    assert (first.done(), bench.claims.released) == (False, ["replica-0"])
    first.cancel()


async def test_the_last_turn_that_waits_withdraws_the_worker_s_claim():
    """So that others need not wait for a worker in which nobody waits; alone there is no claim."""
    for alone, withdrawn in ((False, 1), (True, 0)):
        bench = Bench(1, alone=alone)
        bench.fleet.pending[0] = 1e6
        first, second = bench.begin(), bench.begin(prompt_end=2)
        await settle()
        first.cancel()
        await settle()
        assert bench.claims.withdrawn == 0
        second.cancel()
        await settle()
        assert bench.claims.withdrawn == withdrawn


async def test_what_waits_is_counted_by_priority_and_by_the_name_of_its_client():
    """Clients without a name are counted together."""
    bench = Bench(1)
    bench.fleet.pending[0] = 1e6
    turns = [
        bench.begin(client="red"),
        bench.begin(client="red", prompt_end=2),
        bench.begin(prompt_end=3),
        bench.begin(client="red", prompt_end=4, priority=Priority.HIGH),
    ]
    await settle()
    assert bench.gate.waiting_by_client() == {
        (Priority.NORMAL, "red"): 2,
        (Priority.NORMAL, ""): 1,
        (Priority.HIGH, "red"): 1,
    }
    assert (bench.gate.waiting()[Priority.HIGH], bench.gate.waiting()[Priority.NORMAL]) == (1, 3)
    for turn in turns:
        turn.cancel()
    await settle()
    assert bench.gate.waiting_by_client() == {}


def test_the_need_of_the_sessions_is_told_as_a_share_of_what_all_caches_hold():
    """Also of those that other workers served; unknown if one does not say what it can hold."""
    bench = Bench(2, capacity=100_000.0)
    assert bench.gate.need(POOL) == 0.0
    bench.gate.placed_elsewhere(POOL, [1, 2], 50_000.0)
    bench.gate.served(POOL).note([5, 6], 0, 20_000.0, 0.0, bench.clock.monotonic())
    assert bench.gate.need(POOL) == pytest.approx(0.35)
    bench.gate.placed_elsewhere(POOL, [1, 2, 3], 60_000.0)
    assert bench.gate.need(POOL) == pytest.approx(0.40)
    assert Bench(2, capacity=None).gate.need(POOL) is None
    assert Bench(0).gate.need(POOL) is None


def test_it_holds_while_the_sessions_of_any_pool_need_more_than_there_is():
    """From the first turn on that must wait for it."""
    bench = Bench()
    holding = [bench.gate.is_holding]
    assert bench.verdict(bench.turn()).waits
    bench.gate.observe("other", 100_000, 0)
    holding.append(bench.gate.is_holding)
    bench.gate.observe(POOL, 10_000_000, 0)
    assert not bench.verdict(bench.turn()).waits
    holding.append(bench.gate.is_holding)
    assert holding == [False, True, False]


async def test_a_pool_that_gets_no_more_requests_holds_no_longer():
    """Else what others save would count for ever as saved from it; but it holds while a turn waits there."""
    bench = Bench()
    assert bench.verdict(bench.turn()).waits
    bench.fleet.pending[0] = bench.fleet.pending[1] = 1e6
    waiting = bench.begin()
    await settle()
    holding = []
    for _ in range(2):
        bench.clock.advance(bench.gate.limits.memory_seconds)
        holding.append(bench.gate.is_holding)
        waiting.cancel()
        await settle()
    assert holding == [True, False]


async def test_nothing_is_kept_of_a_pool_that_is_gone_unless_a_turn_waits_or_has_a_pass_there():
    """However often a reload renames one."""
    bench = Bench(1)
    bench.gate.placed_elsewhere(POOL, [1, 2], 50_000.0)
    going, waiting = bench.begin(), bench.begin()
    await settle()
    for done in (waiting.cancel, going.result().release):
        bench.gate.forget(POOL)
        assert len(bench.gate.served(POOL)) > 0
        done()
        await settle()
    bench.gate.forget("unknown")
    bench.gate.forget(POOL)
    assert not bench.gate.is_holding
    assert bench.gate.rows() == {}
    assert len(bench.gate.served(POOL)) == 0


async def test_a_session_that_was_served_goes_before_a_new_one_of_the_same_moment():
    """New is a prompt of which no more was served than some replica still holds."""
    bench = Bench(1)
    bench.fleet.pending[0] = 1e6
    new = bench.begin(known_tokens=10_000.0, prompt_end=1)
    served = bench.begin(known_tokens=100_000.0, prompt_end=2)
    await settle()
    bench.fleet.pending[0] = 0.0
    bench.gate.changed()
    await settle()
    assert (new.done(), served.done()) == (False, True)
    new.cancel()
    await settle()


async def test_a_replica_for_which_warm_turns_wait_takes_no_cold_one():
    """Even once it is quiet: the warm one goes first, and is sent before the cold one looks again."""
    bench = Bench(1)
    bench.fleet.pending[0] = 20_000.0
    warm = bench.tasks.start(bench.gate.wait_warm(bench.turn(), 0, 1.0), "warm")
    cold = bench.begin()
    await settle()
    assert (bench.gate.warm.waiting(0), bench.gate.waiting_bytes) == (1, 2_000)
    bench.fleet.pending[0] = 0.0
    bench.clock.advance(1.0)
    bench.gate.changed()
    await settle()
    assert (warm.done(), bench.gate.warm.waiting(0)) == (True, 0)
    bench.gate.changed()
    await settle()
    assert cold.done()


async def test_a_warm_turn_does_not_wait_if_the_bodies_that_wait_take_all_the_memory():
    """It is sent at once, as without pressure."""
    bench = Bench(1)
    bench.gate.limits = GateLimits(max_waiting_bytes=500)
    bench.fleet.pending[0] = 20_000.0
    await bench.gate.wait_warm(bench.turn(), 0, 1.0)
    assert bench.gate.waiting_bytes == 0


async def test_without_pressure_a_turn_waits_for_the_replica_that_holds_part_of_it():
    """One that no replica holds goes before it."""
    bench = Bench(2)
    bench.gate.pool(POOL).pressure = ColdPressure()
    bench.fleet.pending = [1e5, 1e5]
    held = bench.begin(prefill_seconds={0: 3.0, 1: 9.0})
    other = bench.begin(prefill_seconds={0: 9.0, 1: 9.0}, prompt_end=2)
    await settle()
    bench.fleet.pending[1] = 0.0
    bench.gate.changed()
    await settle()
    assert (held.done(), other.done()) == (False, True)
    assert other.result().replica == 1
    bench.fleet.pending[0] = 0.0
    bench.gate.changed()
    await settle()
    assert held.result().replica == 0


async def test_turns_that_wait_for_the_replicas_that_hold_them_keep_no_other_worker_s_turns_waiting():
    """The worker had named its first turn to the others while no replica was quiet; it withdraws that, once."""
    bench = Bench(2, alone=False)
    bench.gate.pool(POOL).pressure = ColdPressure()
    bench.fleet.pending = [1e5, 1e5]
    held = bench.begin(prefill_seconds={0: 3.0, 1: 9.0})
    await settle()
    assert ([asked["replicas"] for asked in bench.claims.asked], bench.claims.withdrawn) == ([[]], 0)
    bench.fleet.pending[1] = 0.0
    for _ in range(2):
        bench.gate.changed()
        await settle()
    assert (len(bench.claims.asked), bench.claims.withdrawn) == (1, 1)
    held.cancel()


async def test_neither_an_end_of_work_nor_a_message_costs_more_where_there_are_more_pools():
    """Two hundred messages a second come from each other worker, and one pool's turns are no matter of the others."""

    async def costs(pools: int) -> list[int]:
        bench = Bench(1)
        for number in range(pools):
            bench.gate.observe(f"pool {number}", 100_000, 90_000)
        bench.fleet.pending[0] = 1e6
        waiting = bench.begin()
        await settle()
        bench.gate.limits = GateLimits(max_wait_seconds=1.0)
        new = bench.turn(known_tokens=0.0, prompt_end=9)
        with pytest.raises(RateLimited):
            await bench.gate.wait(new, bench.verdict(new))
        told = bench.gate.rows()
        assert len(told) == 1
        rows = {**{f"replica {number}": (1.0,) * 9 for number in range(20)}, **told}
        found = [
            operations(bench.gate.changed),
            operations(lambda: bench.gate.absorb(rows)),
            operations(bench.gate.rows),
        ]
        waiting.cancel()
        await settle()
        return found

    assert await costs(200) == await costs(1)

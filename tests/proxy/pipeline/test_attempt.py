"""What an attempt claims is given back on every path, however often and in whatever order its ends are called."""

from __future__ import annotations

import asyncio
from math import inf
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.index.hashing import cut
from proxy.errors import DeadlineUnreachable, TurnedAway
from proxy.fleet import Failure, Fleet, ReplicaSpec
from proxy.fleet.fleet import DEFAULT_RATE_TOKENS_PER_SECOND
from proxy.model import CacheStatus, MissReason, RouteReason
from proxy.pipeline.attempt import Attempt, Attempts
from proxy.records import Candidate, Plan
from proxy.routing.prefill_gate import PrefillGate
from proxy.routing.replica_queue import QueueLimits, ReplicaQueue
from tests.proxy.pipeline.bench import POOL, Placements, turns
from tests.support.clock import FakeClock

CHAIN = cut(0, [b"x" * 40_000])


class Bench:
    """One replica with room for `limit` requests."""

    def __init__(self, limit: int | None = None) -> None:
        self.clock = FakeClock()
        self.fleet = Fleet(lambda: 0.5)
        self.fleet.add(ReplicaSpec("r", POOL, in_flight_limit=limit))
        self.placements = Placements()
        self.queue = ReplicaQueue(limit, QueueLimits(), self.clock)
        self.changes = 0
        self.gate = PrefillGate()
        self.attempts = Attempts(self.fleet, self.placements, self.gate, {0: self.queue}, self._changed, self.clock)

    def _changed(self) -> None:
        self.changes += 1

    def begin(self, fingerprint: Any = CHAIN, *, matched: bool = False, stream: bool = True, **more: Any) -> Attempt:
        """Begin an attempt; `matched` if the index says that the replica holds the prompt, or will."""
        view = self.fleet.snapshot(POOL, self.clock.monotonic())[0]
        matched_tokens = 9_999.0 if matched else 0.0
        candidate = Candidate(view, 0, matched_tokens, 10_000.0 - matched_tokens, 1.0)
        plan = Plan((candidate,), RouteReason.COLD, MissReason.COLD, CacheStatus.MISS, 10_000.0)
        matched_blocks = len(CHAIN) if matched else 0
        return self.attempts.begin(plan, candidate, fingerprint, matched_blocks, stream=stream, **more)

    def load(self) -> tuple[int, float]:
        view = self.fleet.snapshot(POOL, self.clock.monotonic())[0]
        return view.in_flight, view.pending_tokens


def test_without_a_fingerprint_only_the_charge_and_the_place_are_taken() -> None:
    bench = Bench()
    attempt = bench.begin(None)
    assert (bench.load(), bench.queue.running) == ((1, 10_000.0), 1)
    assert attempt.placement is None
    attempt.end(bench.clock.monotonic())
    assert (bench.load(), bench.queue.running, bench.placements.done) == ((0, 0.0), 0, {})


def test_the_charge_says_how_the_request_is_sent_and_whether_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind another prefill, in the replica's queue, or not at all."""
    bench = Bench(limit=1)
    charged: list[tuple[object, ...]] = []
    charge = bench.fleet.charge

    def noted(replica: int, tokens: float, now: float, **about: Any) -> Any:
        charged.append((replica, tokens, *(about[name] for name in ("plain", "gated", "queued", "prompt_tokens"))))
        return charge(replica, tokens, now, **about)

    monkeypatch.setattr(bench.fleet, "charge", noted)
    attempts = [bench.begin(), bench.begin(matched=True), bench.begin(None), bench.begin(None, stream=False)]
    assert charged == [
        (0, 10_000.0, False, False, False, 10_000.0),
        (0, 1.0, False, True, False, 10_000.0),
        (0, 10_000.0, False, False, True, 10_000.0),
        (0, 10_000.0, True, False, True, 10_000.0),
    ]
    for attempt in attempts:
        attempt.end(bench.clock.monotonic())


def test_the_second_with_a_cold_prefix_waits_for_the_first() -> None:
    """It is pending at the replica, but not in flight there, and holds no place."""
    bench = Bench()
    first, second = bench.begin(), bench.begin(matched=True)
    assert (first.must_wait, second.must_wait) == (False, True)
    assert bench.load()[0] == 1
    assert bench.queue.running == 1
    second.end(0.0)
    first.end(0.0)
    assert bench.load() == (0, 0.0)


def test_one_that_is_computed_anew_in_any_case_does_not_wait_for_the_first() -> None:
    bench = Bench()
    first, anew = bench.begin(), bench.begin(waits_for_prefix=False)
    assert not anew.must_wait
    assert anew.placement is not None, "the replica will hold it all the same"
    for attempt in (first, anew):
        attempt.end(bench.clock.monotonic())


async def test_it_goes_on_when_the_first_has_its_first_token() -> None:
    bench = Bench()
    first, second = bench.begin(), bench.begin(matched=True)
    first.first_token(bench.clock.monotonic())
    await second.wait(bench.clock)
    assert not second.must_wait
    assert bench.load()[0] == 2
    assert bench.placements.done["computed"] == 1
    for attempt in (first, second):
        attempt.end(bench.clock.monotonic())
    assert (bench.load()[0], bench.queue.running) == (0, 0)


async def test_it_waits_for_the_first_no_longer_than_its_own_deadline() -> None:
    """The request is refused then, and is not sent after it."""
    bench = Bench()
    first, second = bench.begin(), bench.begin(matched=True)
    second.waits_until = bench.clock.monotonic() - 0.01
    with pytest.raises(DeadlineUnreachable):
        await asyncio.wait_for(second.wait(bench.clock), 10.0)
    second.end(bench.clock.monotonic())
    third = bench.begin(matched=True)
    third.waits_until = bench.clock.monotonic() + 60.0
    first.first_token(bench.clock.monotonic())
    await third.wait(bench.clock)
    for attempt in (first, third):
        attempt.end(bench.clock.monotonic())
    assert bench.load() == (0, 0.0)


@pytest.mark.parametrize(
    ("until_seconds", "early_seconds", "passed"), [(None, 0.0, False), (60.0, 0.006, False), (60.0, 0.005, True)]
)
async def test_a_wait_for_the_first_that_ends_at_the_deadline_is_refused(
    until_seconds: float | None, early_seconds: float, passed: bool
) -> None:
    """Timers may fire a little too early."""
    bench = Bench()
    first, second = bench.begin(), bench.begin(matched=True)
    waited: list[float] = []

    class Follower:
        async def wait(self, most_seconds: float) -> None:
            waited.append(most_seconds)
            bench.clock.advance(60.0 - early_seconds)

        def leave(self) -> None:
            """Nothing is waited for any more."""

    second._waits_for = cast("Any", Follower())  # noqa: SLF001 - its own timers take real time
    if until_seconds is not None:
        second.waits_until = bench.clock.monotonic() + until_seconds
    if passed:
        with pytest.raises(DeadlineUnreachable) as refused:
            await second.wait(bench.clock)
        assert refused.value.retry_after_seconds == 1.0
        assert refused.value.message == (
            "The deadline passed while the request waited for another that computes the same prompt."
        )
    else:
        await second.wait(bench.clock)
    assert waited == [inf if until_seconds is None else until_seconds]
    for attempt in (first, second):
        attempt.end(bench.clock.monotonic())


async def test_it_goes_on_when_the_first_fails() -> None:
    """Then no replica has computed the prefix, and the second one does."""
    bench = Bench()
    first, second = bench.begin(), bench.begin(matched=True)
    first.take_back()
    first.end(bench.clock.monotonic())
    await second.wait(bench.clock)
    second.computed()
    assert bench.placements.done["taken back"] == 1
    second.end(bench.clock.monotonic())
    assert bench.load() == (0, 0.0)


def test_one_waits_for_the_first_about_as_long_as_its_own_prefill_is_predicted_to_take() -> None:
    """In seconds: what is pending and its own tokens over the replica's rate."""
    bench = Bench()
    waits: list[float] = []
    enter = bench.gate.enter

    def entered(*chain: Any, prefill_seconds: float, **match: Any) -> Any:
        waits.append(prefill_seconds)
        return enter(*chain, prefill_seconds=prefill_seconds, **match)

    bench.gate.enter = entered  # type: ignore[method-assign]
    attempts = [bench.begin(), bench.begin(matched=True)]
    assert waits == [10_000.0 / DEFAULT_RATE_TOKENS_PER_SECOND, 10_001.0 / DEFAULT_RATE_TOKENS_PER_SECOND]
    for attempt in attempts:
        attempt.end(bench.clock.monotonic())


GONE = r"^The replica that the request waited for is no longer used\.$"


async def test_one_that_waits_for_the_first_is_turned_away_when_the_replica_goes_down() -> None:
    """At once: the first may hang there for as long as it likes, and has the only place."""
    bench = Bench(limit=1)
    first, second = bench.begin(), bench.begin(matched=True)
    waits = asyncio.ensure_future(second.wait(bench.clock))  # noqa: TID251
    await turns()
    bench.fleet.unreachable(0, bench.clock.monotonic(), "frozen")
    bench.attempts.turn_away(0)
    with pytest.raises(TurnedAway, match=GONE):
        await asyncio.wait_for(waits, 30)
    for attempt in (first, second):
        attempt.end(bench.clock.monotonic())
    assert (bench.load()[0], bench.queue.running) == (0, 0)


async def test_one_that_gets_a_place_just_when_the_replica_goes_down_is_turned_away() -> None:
    """The place was given before, and goes to the next."""
    bench = Bench(limit=1)
    first, second = bench.begin(None), bench.begin(None)
    waits = asyncio.ensure_future(second.wait(bench.clock))  # noqa: TID251
    await turns()
    first.end(bench.clock.monotonic())
    bench.fleet.unreachable(0, bench.clock.monotonic(), "refused")
    with pytest.raises(TurnedAway, match=GONE):
        await waits
    second.end(bench.clock.monotonic())
    assert bench.queue.running == 0


async def test_one_that_queues_at_a_replica_is_turned_away_when_it_goes_down() -> None:
    """One for whose replica nothing waits changes nothing."""
    bench = Bench(limit=1)
    first, second = bench.begin(None), bench.begin(None)
    waits = asyncio.ensure_future(second.wait(bench.clock))  # noqa: TID251
    await turns()
    bench.attempts.turn_away(7)
    await turns()
    assert not waits.done()
    bench.attempts.turn_away(0)
    with pytest.raises(TurnedAway, match=GONE):
        await asyncio.wait_for(waits, 30)
    for attempt in (first, second):
        attempt.end(bench.clock.monotonic())
    assert bench.queue.running == 0


async def test_one_that_is_sent_to_a_replica_known_to_be_down_waits_for_its_turn() -> None:
    """There is no other, and its own answer is better than a refusal."""
    bench = Bench(limit=1)
    first = bench.begin(None)
    for prompt in range(3):
        bench.fleet.failed(0, Failure(prompt, 0, by_status=False), bench.clock.monotonic(), "reset")
    second = bench.begin(None)
    waits = asyncio.ensure_future(second.wait(bench.clock))  # noqa: TID251
    await turns()
    first.end(bench.clock.monotonic())
    await asyncio.wait_for(waits, 30)
    second.end(bench.clock.monotonic())


ENDS = ("first_token", "computed", "take_back", "end", "leave")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(ENDS), max_size=6), st.booleans())
def test_any_order_of_ends_gives_everything_back_once(script: list[str], shared: bool) -> None:
    bench = Bench(limit=1)
    attempt = bench.begin(CHAIN if shared else None)
    for step in script:
        bench.clock.advance(0.1)
        now = bench.clock.monotonic()
        if step == "first_token":
            attempt.first_token(now)
        elif step == "leave":
            attempt.end(now, client_left=True)
        elif step == "end":
            attempt.end(now)
        else:
            getattr(attempt, step)()
    attempt.end(bench.clock.monotonic())
    bench.clock.advance(1_000.0)
    assert bench.load() == (0, 0.0)
    assert bench.queue.running == 0
    assert bench.placements.done["taken back"] <= 1
    assert bench.placements.done["computed"] + bench.placements.done["left"] <= 1

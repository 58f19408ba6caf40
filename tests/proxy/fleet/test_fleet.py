"""The fleet: charges, running heads, lateness, learned rates, health and the others' work."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.index.prefix_index import Held, Match
from proxy.fleet import BreakerState, Cause, Change, Failure, Fleet, PrefillRate, ReplicaChange, ReplicaSpec, ShareRow
from proxy.fleet.peers import MAX_LOST
from proxy.records import Demand
from proxy.routing.cost import plan
from tests.support.operations import operations

RATE = 1_000.0  # tokens per second of every replica here, so that tokens read as milliseconds


def fleet_of(*names: str, limit: int | None = None) -> Fleet:
    fleet = Fleet(Random(1).random)
    for name in names:
        fleet.add(ReplicaSpec(name, "pool", prefill_tokens_per_second=RATE, in_flight_limit=limit))
    return fleet


def row(fleet: Fleet, number: int = 0, now: float = 0.0):
    return fleet.snapshot("pool", now)[number]


def test_a_charge_is_pending_until_the_first_token_and_in_flight_until_the_end():
    """The two parts of a charge are released at their own times."""
    fleet = fleet_of("a")
    charge = fleet.charge(0, 500.0, 0.0)
    assert (row(fleet).pending_tokens, row(fleet).in_flight) == (500.0, 1)
    fleet.first_token(charge, 0.4)
    assert (row(fleet, now=0.4).pending_tokens, row(fleet, now=0.4).in_flight) == (0.0, 1)
    fleet.finish(charge, 2.0)
    assert (row(fleet, now=2.0).pending_tokens, row(fleet, now=2.0).in_flight) == (0.0, 0)


def test_the_running_head_has_done_what_its_time_allows_and_no_more():
    """Elapsed time x rate comes off, at most the head's own tokens; the next head starts when it ends."""
    fleet = fleet_of("a")
    first = fleet.charge(0, 500.0, 0.0)
    fleet.charge(0, 300.0, 0.1)
    assert row(fleet, now=0.2).pending_tokens == pytest.approx(600.0)
    assert row(fleet, now=5.0).pending_tokens == pytest.approx(300.0)
    fleet.first_token(first, 5.0)
    assert row(fleet, now=5.1).pending_tokens == pytest.approx(200.0)


def test_a_plain_answer_releases_its_prefill_when_that_is_predicted_to_end():
    """Nobody sees its first token; what comes behind it starts then."""
    fleet = fleet_of("a")
    fleet.charge(0, 500.0, 0.0, plain=True)
    fleet.charge(0, 300.0, 0.0)
    assert row(fleet, now=0.6).pending_tokens == pytest.approx(200.0)
    assert row(fleet, now=0.6).in_flight == 2
    assert row(fleet, now=0.6).lateness_seconds == 0.0


def test_a_replica_that_stalls_grows_late():
    """Lateness is how far the oldest request is past its predicted first token, queue before it included."""
    fleet = fleet_of("a", "b")
    first = fleet.charge(0, 500.0, 0.0)
    fleet.charge(0, 300.0, 0.0)
    assert row(fleet, now=0.4).lateness_seconds == 0.0
    assert row(fleet, now=2.5).lateness_seconds == pytest.approx(2.0)
    fleet.first_token(first, 2.5)
    assert row(fleet, now=2.5).lateness_seconds == pytest.approx(1.7)
    demand, holds_a_quarter = Demand(8_000, 2_000.0), Match({0: Held(1, 2_000, 500)})
    assert plan(demand, holds_a_quarter, fleet.snapshot("pool", 9.0)).chosen.replica.name == "b"


def test_what_was_sent_is_told_from_what_waits_and_goes_down_as_time_passes():
    """A request in a queue is pending and not sent; one that was sent counts until its first token."""
    fleet = fleet_of("a")
    charge = fleet.charge(0, 500.0, 0.0)
    waits = fleet.charge(0, 500.0, 0.0, queued=True)
    rate = fleet.rate_of(0)
    assert (fleet.unanswered(0), fleet.own_in_flight(0)) == (1, 2)
    assert fleet.sent_seconds(0, 0.0) == pytest.approx(500.0 / rate)
    assert fleet.sent_seconds(0, 200.0 / rate) == pytest.approx(300.0 / rate)
    fleet.first_token(charge, 0.5)
    assert (fleet.unanswered(0), fleet.sent_seconds(0, 0.5)) == (0, 0.0)
    fleet.finish(charge, 0.6)
    fleet.finish(waits, 0.6)
    assert fleet.own_in_flight(0) == 0


def test_a_replica_that_is_not_there_is_not_probed_and_has_no_name():
    """So is one that was forgotten; its number is free again, and its name unknown."""
    fleet = fleet_of("a", "b")
    fleet.unreachable(0, 0.0, "refused")
    assert [fleet.is_probed(number) for number in (0, 1, 7)] == [True, False, False]
    assert fleet.forget(7)
    assert not fleet.forget(0)
    charge = fleet.charge(0, 10.0, 0.0)
    fleet.remove(0)
    assert not fleet.forget(0)
    fleet.finish(charge, 0.1)
    assert fleet.forget(0)
    assert (fleet.name_of(0), fleet.number_of("a"), fleet.is_probed(0)) == (None, None, False)
    assert fleet.add(ReplicaSpec("c", "pool")) == 0


def test_the_charge_of_a_client_that_left_decays_at_the_replicas_rate():
    """Engines often finish the prefill: it stays pending until that is predicted to end, and is not in flight."""
    fleet = fleet_of("a")
    charge = fleet.charge(0, 500.0, 0.0)
    fleet.client_left(charge)
    fleet.finish(charge, 0.1)
    assert row(fleet, now=0.1).in_flight == 0
    assert row(fleet, now=0.1).pending_tokens == pytest.approx(400.0)
    assert row(fleet, now=0.6).pending_tokens == 0.0
    assert row(fleet, now=0.6).lateness_seconds == 0.0


def test_what_was_left_is_done_when_a_later_prefill_is():
    """Prefills are done in order, whatever the rate is believed to be; so the next can be measured again."""
    fleet = fleet_of("a")
    for number in range(100):
        left = fleet.charge(0, 5_000.0, number / 100)
        fleet.client_left(left)
        fleet.finish(left, number / 100)
    first = fleet.charge(0, 1_000.0, 1.0)
    fleet.first_token(first, 1.25)
    assert row(fleet, now=1.25).pending_tokens == 0.0
    second = fleet.charge(0, 1_000.0, 1.3)
    fleet.first_token(second, 1.35)
    assert second.prefill_seconds == pytest.approx(0.05)


def test_what_waits_at_the_gate_is_not_in_flight_there():
    """Its tokens are pending, since they will be computed there; its presence counts once it goes."""
    fleet = fleet_of("a")
    charge = fleet.charge(0, 500.0, 0.0, gated=True)
    assert (row(fleet).in_flight, row(fleet).pending_tokens) == (0, 500.0)
    fleet.start(charge, 0.0)
    fleet.start(charge, 0.0)
    assert row(fleet).in_flight == 1
    fleet.finish(charge, 0.0)
    assert row(fleet).in_flight == 0


events = st.lists(
    st.tuples(
        st.sampled_from(["charge", "plain", "gated", "queued", "start", "token", "leave", "finish"]),
        st.integers(0, 1_000_000),
        st.floats(0, 3),
        st.floats(1, 5_000),
    ),
    max_size=60,
)


@given(events)
def test_charges_return_to_zero_on_every_ending(script):
    """For any events in any order and number: when all have ended and time has passed, nothing is left."""
    fleet = fleet_of("a", "b")
    now, charges = 0.0, []
    for verb, which, step, tokens in script:
        now += step
        if verb in ("charge", "plain", "gated", "queued"):
            flags = {} if verb == "charge" else {verb: True}
            charges.append(fleet.charge(which % 2, tokens, now, **flags))
        elif charges:
            charge = charges[which % len(charges)]
            if verb == "start":
                fleet.start(charge, now)
            elif verb == "token":
                fleet.first_token(charge, now)
            elif verb == "leave":
                fleet.client_left(charge)
            else:
                fleet.finish(charge, now)
        for view in fleet.snapshot("pool", now):
            assert view.pending_tokens >= 0.0
            assert view.lateness_seconds >= 0.0
            assert view.in_flight >= 0
    for charge in charges:
        fleet.finish(charge, now)
    for view in fleet.snapshot("pool", now + 60 * 5_000 / RATE):
        assert (view.pending_tokens, view.in_flight, view.lateness_seconds) == (0.0, 0, 0.0)
    assert fleet.share(now + 60 * 5_000 / RATE) == {}


def test_the_rate_is_a_high_percentile_of_the_last_64_from_8_on():
    """Waits in the engine's queue make most observations too low; fewer than eight say nothing."""
    rate = PrefillRate(configured=123.0)
    for _ in range(7):
        rate.observe(1_000, 1.0)
    assert (rate.learned, rate.own) == (None, 123.0)
    for _ in range(8):
        rate.observe(1_000, 0.125)
    assert rate.own == 8_000.0
    for _ in range(64):
        rate.observe(1_000, 0.5)
    assert rate.own == 2_000.0
    for _ in range(64):
        rate.observe(10, 0.5)  # the fixed cost of a request, not its rate
    assert rate.own == 2_000.0


def test_a_replica_that_is_not_known_has_the_pools_rate():
    """Until it has eight observations, the median of the others applies."""
    fleet = Fleet(Random(1).random)
    numbers = [fleet.add(ReplicaSpec(name, "pool")) for name in "abc"]
    charges = [fleet.charge(number, 1.0, 0.0) for number in numbers]
    for _ in range(8):
        fleet.observe_prefill(charges[0], 3_000, 1.0)
        fleet.observe_prefill(charges[1], 9_000, 1.0)
    assert [fleet.rate_of(number) for number in numbers] == [3_000.0, 9_000.0, 6_000.0]
    fleet.restarted(numbers[0])
    assert fleet.rate_of(numbers[0]) == 9_000.0


def test_a_prefill_is_measured_without_the_wait_for_what_was_charged_before():
    """Two sent together: the second's tokens are not spread over the first's time, here or in another process."""
    fleet = Fleet(Random(1).random)
    fleet.add(ReplicaSpec("a", "pool"))
    now = 0.0
    for _ in range(8):
        first, second = fleet.charge(0, 2_000.0, now), fleet.charge(0, 1_000.0, now)
        fleet.first_token(first, now + 1.0)
        fleet.first_token(second, now + 1.5)
        assert first.prefill_seconds == pytest.approx(1.0)
        assert second.prefill_seconds == pytest.approx(0.5)
        fleet.observe_prefill(first, 2_000)
        fleet.observe_prefill(second, 1_000)
        now += 10.0
    assert fleet.rate_of(0) == pytest.approx(2_000.0)
    charge = fleet.charge(0, 1_000.0, now)
    fleet.absorb("other", {"a": ShareRow(0, 0, 0, 0.0, 0.0, 0.0)}, now + 0.3)
    fleet.first_token(charge, now + 0.8)
    assert charge.prefill_seconds == pytest.approx(0.5)


def test_what_waits_in_the_queue_runs_from_its_start_on():
    """Pending and in flight at once, but nobody's head, and late only by its own prefill."""
    fleet = fleet_of("a", limit=1)
    running, waiting = fleet.charge(0, 5_000.0, 0.0), fleet.charge(0, 100.0, 0.0, queued=True)
    assert (row(fleet).pending_tokens, row(fleet).in_flight) == (5_100.0, 2)
    fleet.finish(running, 5.0)
    assert row(fleet, now=9.0).pending_tokens == 100.0
    fleet.start(waiting, 9.0)
    assert row(fleet, now=9.05).pending_tokens == pytest.approx(50.0)
    assert row(fleet, now=9.3).lateness_seconds == pytest.approx(0.2)


def test_long_decodes_raise_the_price_of_a_request_in_flight_within_bounds():
    """A 64th of the mean decode time, from 0.05 to 0.2 s; the dearest until the first is known."""
    fleet = fleet_of("a")
    fleet.charge(0, 1.0, 0.0)
    assert row(fleet).in_flight_seconds == 0.2
    fleet.observe_decode(0, 0.1)
    assert row(fleet).in_flight_seconds == 0.05
    for _ in range(2_000):
        fleet.observe_decode(0, 4.8)
    assert row(fleet).in_flight_seconds == pytest.approx(0.075, rel=0.01)
    for _ in range(500):
        fleet.observe_decode(0, 600.0)
    assert row(fleet).in_flight_seconds == 0.2


def broken(prompt: int, client: int = 1) -> Failure:
    """A request whose connection or response broke."""
    return Failure(prompt, client, by_status=False)


def refused(prompt: int, client: int) -> Failure:
    """A request that the engine answered with an error status."""
    return Failure(prompt, client, by_status=True)


def test_a_replica_that_cannot_be_reached_is_left_alone_then_tried_by_one():
    """After its back-off one request passes; the next waits for the result."""
    fleet = fleet_of("a")
    assert fleet.unreachable(0, 0.0, "refused")
    assert not row(fleet).available
    assert row(fleet).unavailable_because == "unreachable"
    assert 0.3 < row(fleet).retry_after_seconds < 0.7
    assert row(fleet, now=0.7).available
    trial = fleet.charge(0, 1.0, 0.7)
    assert not row(fleet, now=0.7).available
    fleet.finish(trial, 0.8)  # its client left, which shows nothing, so another may try
    assert row(fleet, now=0.8).available
    fleet.charge(0, 1.0, 0.8)
    fleet.responded(0)
    assert row(fleet, now=0.8).available
    assert fleet.breaker_state(0, 0.8) is BreakerState.CLOSED


def test_back_off_doubles_up_to_its_bound():
    """Half a second, one, two ... thirty, each off by up to a fifth."""
    fleet = fleet_of("a")
    now, pauses = 0.0, []
    for _ in range(9):
        fleet.unreachable(0, now, "refused")
        pauses.append(row(fleet, now=now).retry_after_seconds)
        now += pauses[-1]
    for pause, nominal in zip(pauses, [0.5, 1, 2, 4, 8, 16, 30, 30, 30], strict=True):
        assert 0.8 * nominal <= pause <= 1.2 * nominal


def test_broken_responses_open_the_breaker_after_three_prompts_in_a_row():
    """A success in between clears them; the same prompt again is no further evidence."""
    fleet = fleet_of("a", "b")
    for _ in range(3):
        fleet.failed(0, broken(1), 0.0, "reset")
        fleet.failed(0, broken(2), 0.0, "reset")
        fleet.responded(0)
    assert row(fleet).available
    opened = [fleet.failed(0, broken(prompt), 0.0, "reset") for prompt in (1, 1, 1, 2, 3)]
    assert opened == [False, False, False, False, True]
    assert not row(fleet).available
    assert row(fleet).unavailable_because == "failing"


def test_statuses_of_one_client_close_nothing_however_many_prompts_fail():
    """Those of two clients and three prompts do."""
    fleet = fleet_of("a", "b")
    assert not any(fleet.failed(0, refused(prompt, 1), 0.0, "500") for prompt in range(100))
    assert fleet.failed(0, refused(1, 2), 0.0, "500")
    assert not row(fleet).available


def test_a_request_that_succeeded_elsewhere_closes_the_replica_at_which_it_failed():
    """One is enough: the prompt cannot be at fault."""
    fleet = fleet_of("a", "b")
    assert fleet.proven(0, 0.0, "500")
    assert not row(fleet).available


def test_statuses_never_close_the_last_open_replica_of_a_pool():
    """This holds for any evidence; a connection that cannot be made does close it."""
    fleet = fleet_of("a", "b")
    fleet.proven(1, 0.0, "500")
    assert not fleet.proven(0, 0.0, "500")
    assert not any(fleet.failed(0, refused(n, n), 0.0, "500") for n in range(10))
    fleet.throttled(0, 0.0, 60.0, "503")
    assert row(fleet).available
    fleet.unreachable(0, 0.0, "refused")
    assert not row(fleet).available


def test_when_no_replica_is_open_the_least_bad_one_is_tried():
    """The one that is tried again first, of those that can be reached."""
    fleet = fleet_of("a", "b", "c")
    fleet.throttled(0, 0.0, 50.0, "503")
    fleet.throttled(1, 0.0, 10.0, "503")
    fleet.unreachable(2, 0.0, "refused")
    assert [view.available for view in fleet.snapshot("pool", 0.0)] == [False, True, False]
    alone = fleet_of("a")
    alone.unreachable(0, 0.0, "refused")
    assert [view.available for view in alone.snapshot("pool", 0.0)] == [False]


def test_a_request_that_can_go_to_one_replica_only_is_tried_there_if_it_can_be_reached():
    """Another open replica is no reason to refuse it, since that one cannot serve it."""
    fleet = fleet_of("a", "b", "c")
    fleet.proven(0, 0.0, "500")
    fleet.unreachable(1, 0.0, "refused")

    def rows(pinned: int | None) -> list[tuple[int, bool]]:
        return [(view.id, view.available) for view in fleet.snapshot("pool", 0.0, pinned=pinned)]

    assert rows(None) == [(0, False), (1, False), (2, True)]
    assert rows(0) == [(0, True)]
    assert rows(1) == [(1, False)]
    assert rows(2) == [(2, True)]


def test_requests_that_were_under_way_when_it_opened_do_not_lengthen_the_back_off():
    """Fifty that fail together are one failure."""
    fleet = fleet_of("a")
    for _ in range(50):
        fleet.unreachable(0, 0.0, "refused")
    assert row(fleet).retry_after_seconds < 0.7


def test_retry_after_is_honoured_within_bounds_and_is_no_failure():
    """A replica that is full says for how long; a longer time wins over a shorter one."""
    fleet = fleet_of("a", "b")
    fleet.throttled(0, 0.0, 7.0, "503")
    fleet.throttled(0, 0.0, None, "503")
    assert row(fleet).retry_after_seconds == 7.0
    assert row(fleet).unavailable_because == "full"
    assert row(fleet, now=7.0).available
    fleet.throttled(0, 7.0, 1e9, "503")
    assert row(fleet, now=7.0).retry_after_seconds == 120.0


def test_a_429_closes_a_replica_for_its_key_and_model_only():
    """Bounded in time and in number; others see no difference."""
    fleet = fleet_of("a", "b")
    fleet.rate_limited(0, ("one", "m"), 0.0, 1e9)

    def available(key: tuple[str, str] | None, now: float) -> bool:
        return fleet.snapshot("pool", now, key)[0].available

    assert not available(("one", "m"), 0.0)
    assert fleet.snapshot("pool", 0.0, ("one", "m"))[0].retry_after_seconds == 120.0
    assert available(("one", "other"), 0.0)
    assert available(("two", "m"), 0.0)
    assert available(None, 0.0)
    assert available(("one", "m"), 120.1)
    for number in range(3_000):
        fleet.rate_limited(0, (f"key {number}", "m"), 0.0, 60.0)
    assert len(fleet._replicas[0].throttles) <= 1024  # noqa: SLF001 - internal state that no public name shows
    assert not available(("key 2999", "m"), 0.0)


def test_a_replica_that_failed_requests_is_tried_by_a_request_and_not_by_a_probe():
    """Its model list proves nothing; one that was unreachable is brought back by a probe."""
    fleet = fleet_of("a", "b")
    fleet.proven(0, 0.0, "500")
    assert fleet.probes(1.0) == ()
    fleet.reached(0)
    assert fleet.breaker_state(0, 1.0) is BreakerState.HALF_OPEN
    fleet.responded(0)
    assert fleet.breaker_state(0, 1.0) is BreakerState.CLOSED


def test_a_silent_replica_is_tried_by_no_request():
    """This holds after its back-off and for the last one: a request would wait for as long as a prefill may take."""
    fleet = fleet_of("a")
    fleet.unreachable(0, 0.0, "no health check was answered", Cause.SILENT)
    assert (row(fleet, now=60.0).available, fleet.is_open(0, 60.0)) == (False, False)
    assert row(fleet, now=60.0).unavailable_because == "not responding"
    fleet.reached(0)
    assert row(fleet, now=60.0).available


def test_a_silent_replica_that_has_work_is_tried_only_if_no_other_is_left():
    """It may be computing; a request that tries it does not keep probes away."""
    fleet = fleet_of("a", "b")
    charge = fleet.charge(0, 100.0, 0.0)
    fleet.unreachable(0, 0.0, "no health check was answered", Cause.SILENT)
    assert [view.available for view in fleet.snapshot("pool", 60.0)] == [False, True]
    fleet.unreachable(1, 60.0, "refused")
    assert [view.available for view in fleet.snapshot("pool", 60.1)] == [True, False]
    tried = fleet.charge(0, 100.0, 60.1)
    assert 0 in fleet.probes(60.1)
    fleet.finish(charge, 60.2)
    fleet.finish(tried, 60.2)
    assert not row(fleet, 0, now=60.2).available


def test_the_progress_of_a_replica_counts_once_for_what_all_processes_have_sent():
    """It computes one prompt after another, so of two that were sent together one is left when the first is done."""
    one, other = fleet_of("a"), fleet_of("a")
    rate = row(one).rate_tokens_per_second
    for fleet in (one, other):
        fleet.charge(0, rate, 0.0)
    one.absorb("other", other.share(0.5), 0.5)
    assert one.sent_seconds(0, 0.5) == pytest.approx(1.5)
    assert one.sent_seconds(0, 1.0) == pytest.approx(1.0)
    assert one.own_sent_seconds(0, 0.5) == pytest.approx(0.5)
    assert (one.least_unanswered(0), other.least_unanswered(0), fleet_of("a").least_unanswered(0)) == (2, 1, 0)


def test_what_goes_before_all_others_may_have_every_free_place():
    fleet = fleet_of("a", limit=4)
    busy = ShareRow(0, 3, 0, 0.0, 0.0, 0.0, waiting=1)
    fleet.absorb("peer", {"a": tuple(busy)}, 0.0)
    places = [
        fleet.places(0, 4, 1, own_name="w", informed=informed, is_first=is_first)
        for informed, is_first in ((True, False), (True, True), (False, True))
    ]
    assert places == [1, 2, 1]


def test_work_of_another_process_may_be_why_a_replica_is_silent():
    fleet = fleet_of("a")
    row_of_peer = ShareRow(
        pending_tokens=0,
        in_flight=1,
        head_tokens=0,
        head_seconds=0.0,
        overdue_seconds=0.0,
        released_seconds=0.0,
        waiting=0,
        running_tokens=0,
        sent_tokens=0,
    )
    fleet.absorb("peer", {"a": tuple(row_of_peer)}, 0.0)
    fleet.unreachable(0, 0.0, "no health check was answered", Cause.SILENT)
    assert row(fleet, now=0.1).available
    fleet.forget_peer("peer")
    assert not row(fleet, now=0.1).available


def test_requests_that_time_out_leave_a_silent_replica_silent_and_a_status_brings_it_back():
    """As a failing one it would be tried by a request after each back-off."""
    fleet = fleet_of("a", "b")
    fleet.unreachable(0, 0.0, "no health check was answered", Cause.SILENT)
    for prompt in range(5):
        fleet.failed(0, Failure(prompt, 1, by_status=False), 60.0, "no first byte in time")
        fleet.proven(0, 60.0, "another replica succeeded")
    assert fleet.cause(0) is Cause.SILENT
    fleet.failed(0, Failure(9, 1, by_status=True), 60.0, "status 500")
    assert fleet.cause(0) is not Cause.SILENT


def test_probes_are_given_once_when_the_back_off_is_over():
    """A background probe takes the place of the request that tries."""
    fleet = fleet_of("a", "b")
    fleet.unreachable(1, 0.0, "refused")
    assert fleet.probes(0.0) == ()
    assert fleet.probes(1.0) == (1,)
    assert fleet.probes(1.0) == ()
    fleet.reached(1)
    assert row(fleet, 1, now=1.0).available


def test_every_change_of_a_replica_is_told_once_with_its_reason():
    """Repetitions of what is known are not."""
    told: list[ReplicaChange] = []
    fleet = Fleet(lambda: 0.5, changed=told.append)
    for name in ("a", "b"):
        fleet.add(ReplicaSpec(name, "pool"))
    fleet.unreachable(0, 0.0, "refused")
    fleet.unreachable(0, 1.0, "refused")
    fleet.reached(0)
    fleet.reached(0)
    fleet.proven(0, 5.0, "status 500, and another replica succeeded")
    fleet.responded(0)
    fleet.throttled(0, 6.0, 2.0, "status 503")
    fleet.rate_limited(1, ("key", "m"), 6.0, 2.0)
    fleet.rate_limited(1, ("key", "m"), 7.0, 2.0)
    fleet.restarted(1)
    charge = fleet.charge(1, 1.0, 8.0)
    fleet.remove(1)
    fleet.finish(charge, 9.0)
    fleet.forget(1)
    fleet.remove(0)
    fleet.forget(0)
    assert [(each.name, each.change, each.reason) for each in told] == [
        ("a", Change.DOWN, "refused"),
        ("a", Change.UP, "a health check was answered"),
        ("a", Change.DOWN, "status 500, and another replica succeeded"),
        ("a", Change.UP, "a request was answered"),
        ("a", Change.THROTTLED, "status 503"),
        ("b", Change.RATE_LIMITED, "429 for one key and model, for 2.0 s"),
        ("b", Change.RESTARTED, "its start time is newer"),
        ("b", Change.DRAINING, "1 requests under way"),
        ("b", Change.GONE, "its last request has ended"),
        ("a", Change.GONE, ""),
    ]


def test_a_removed_replica_is_forgotten_when_its_requests_have_ended_and_its_number_is_given_again():
    """Two thousand that come and go need one number more than there are at once."""
    fleet = fleet_of("stays")
    for number in range(2_000):
        assert fleet.add(ReplicaSpec(f"r{number}", "pool")) == 1
        charge = fleet.charge(1, 10.0, 0.0)
        fleet.absorb("peer", {f"r{number}": (5.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)}, 0.0)
        assert not fleet.forget(1)
        fleet.remove(1)
        assert not fleet.forget(1)
        fleet.finish(charge, 1.0)
        assert fleet.forget(1)
        assert fleet.number_of(f"r{number}") is None
        assert fleet.name_of(1) is None
    assert len(fleet._replicas) == 1  # noqa: SLF001 - internal state that no public name shows
    assert fleet.snapshot("pool", 0.0)[0].pending_tokens == 0.0


def test_a_name_keeps_its_number_when_it_comes_back():
    """Charges of before still end well, and the index's entries mean the same replica."""
    fleet = fleet_of("a", "b")
    charge = fleet.charge(0, 10.0, 0.0)
    fleet.remove(0)
    assert [view.name for view in fleet.snapshot("pool", 0.0)] == ["b"]
    assert fleet.add(ReplicaSpec("a", "pool")) == 0
    fleet.finish(charge, 1.0)
    assert sorted(view.name for view in fleet.snapshot("pool", 1.0)) == ["a", "b"]
    assert fleet.number_of("a") == 0


def test_two_processes_see_each_others_work():
    """One's charges cost the other the same; the progress of the head is counted once, by the reader's clock."""
    one, two = fleet_of("a", "b"), fleet_of("b", "a")
    one.charge(0, 500.0, 100.0)
    one.charge(0, 300.0, 100.0)
    two.absorb("one", one.share(100.2), 7.0)
    a = two.snapshot("pool", 7.1)[1]
    assert a.name == "a"
    assert a.pending_tokens == pytest.approx(500.0)
    assert a.in_flight == 2
    assert two.snapshot("pool", 7.9)[1].lateness_seconds == 0.0
    two.absorb("one", one.share(101.5), 8.3)
    assert two.snapshot("pool", 8.4)[1].lateness_seconds == pytest.approx(1.1)
    two.absorb("one", {}, 8.5)
    a = two.snapshot("pool", 8.5)[1]
    assert (a.pending_tokens, a.in_flight, a.lateness_seconds) == (0.0, 0, 0.0)


def test_a_peer_that_waits_behind_ours_does_not_restart_our_running_head():
    """Its head was sent later than ours, so ours is the one that runs; a release by anyone starts the next."""
    fleet = fleet_of("a")
    fleet.charge(0, 1_000.0, 0.0)
    fleet.absorb("other", {"a": ShareRow(500, 1, 500, 0.1, 0.0, 9.0)}, 0.5)
    assert row(fleet, now=0.6).pending_tokens == pytest.approx(1_500 - 600)
    fleet.absorb("other", {"a": ShareRow(0, 1, 0, 0.0, 0.0, 0.1)}, 0.7)
    assert row(fleet, now=0.9).pending_tokens == pytest.approx(1_000 - 300)


def test_the_work_of_a_process_that_falls_silent_dies_with_it():
    """After a second without a word."""
    fleet = fleet_of("a")
    fleet.absorb(
        "other", {"a": ShareRow(400, 3, 400, 0.0, 0.0, 9.0), "unknown": ShareRow(1, 1, 1, 0.0, 0.0, 9.0)}, 0.0
    )
    assert row(fleet, now=0.99).in_flight == 3
    assert row(fleet, now=1.0).in_flight == 0
    assert row(fleet, now=1.0).pending_tokens == 0.0


def test_a_process_that_falls_silent_with_work_is_lost_until_it_reports_again():
    """One without work says nothing either, and one that said goodbye is not lost. The last ones are remembered."""
    fleet = fleet_of("a")
    for name, row_of in (("busy", {"a": ShareRow(400, 3, 400, 0.0, 0.0, 9.0)}), ("idle", {})):
        fleet.absorb(name, row_of, 0.0)
    fleet.absorb("stopped", {"a": ShareRow(400, 3, 400, 0.0, 0.0, 9.0)}, 0.0)
    fleet.forget_peer("stopped")
    assert fleet.lost_peers(0.99) == ()
    assert fleet.lost_peers(1.0) == ("busy",)
    fleet.absorb("busy", {}, 1.1)
    assert fleet.lost_peers(9.0) == ()
    for number in range(MAX_LOST + 1):
        fleet.absorb(f"peer {number}", {"a": ShareRow(400, 3, 400, 0.0, 0.0, 9.0)}, 10.0)
    assert fleet.lost_peers(20.0)[0] == "peer 1"
    assert len(fleet.lost_peers(20.0)) == MAX_LOST


def test_what_waits_for_a_place_is_seen_as_queued():
    """Here and in all other processes, until it is sent or gone."""
    fleet, other = fleet_of("a", limit=2), fleet_of("a", limit=2)
    waits, leaves = fleet.charge(0, 1.0, 0.0, queued=True), fleet.charge(0, 1.0, 0.0, queued=True)
    other.charge(0, 1.0, 0.0, queued=True)
    fleet.absorb("other", other.share(0.0), 0.0)
    assert (row(fleet).queued, row(fleet).in_flight) == (3, 3)
    fleet.start(waits, 0.1)
    fleet.client_left(leaves)
    fleet.finish(waits, 0.2)
    assert (row(fleet, now=0.2).queued, row(fleet, now=0.2).in_flight) == (1, 1)
    fleet.set_limit(0, 100)  # a configured limit stays
    assert row(fleet).in_flight_limit == 2
    free = fleet_of("a")
    free.set_limit(0, 4)
    assert row(free).in_flight_limit == 4


def test_a_new_pool_knows_its_rate_after_eight_answers_of_all_its_replicas():
    """Before any of them has eight of its own; until then the default, or more where more was shown."""
    fleet = Fleet(Random(1).random)
    for name in "abcd":
        fleet.add(ReplicaSpec(name, "pool"))
    for turn, expected in enumerate([4_000.0, 4_000.0, 4_000.0, 5_000.0, 5_000.0, 5_000.0, 5_000.0, 5_000.0]):
        assert fleet.rate_of(turn % 4) == pytest.approx(expected)
        charge = fleet.charge(turn % 4, 1_000.0, turn)
        fleet.first_token(charge, turn + (1.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.125)[turn])
        fleet.observe_prefill(charge, 1_000.0)
        fleet.finish(charge, turn + 0.5)
    assert [fleet.rate_of(number) for number in range(4)] == pytest.approx([5_000.0] * 4)  # and not what one showed


def test_a_rate_is_guessed_until_the_first_answer_has_ended():
    """By first tokens and what was predicted, the slowest of them; an answer's usage comes a whole decode later."""
    fleet, slow = Fleet(Random(1).random), Fleet(Random(1).random)
    for name in "ab":
        fleet.add(ReplicaSpec(name, "pool"))
    seen = []
    for number, tokens, now in [(0, 100.0, 0.0), (0, 9_000.0, 5.0), (1, 12_000.0, 5.0), (1, 6_000.0, 9.0)]:
        charge = fleet.charge(number, tokens, now)
        fleet.first_token(charge, now + 1.0)
        fleet.finish(charge, now + 1.0)
        seen.append(fleet.rate_of(0))
    assert seen == [4_000.0, 9_000.0, 9_000.0, 6_000.0]
    fleet.observe_prefill(charge, 5_000)
    assert fleet.rate_of(0) == 5_000.0
    slow.add(ReplicaSpec("a", "pool"))
    slow.first_token(slow.charge(0, 1_000.0, 0.0), 1.0)
    assert slow.rate_of(0) == 4_000.0  # it may have waited for something unseen


def places(fleet: Fleet, processes: int, waiting: int = 0, *, name: str = "b", informed: bool = True) -> int | None:
    return fleet.places(0, processes, waiting, own_name=name, informed=informed)


def test_processes_share_a_limit_and_take_what_others_leave_only_when_they_must():
    """An equal share at once; the rest where requests wait here and in no other process."""
    fleet = fleet_of("a", limit=8)
    assert places(fleet, 1) == 8
    assert places(fleet, 2) == 4
    assert places(fleet, 2, waiting=3) == 8
    fleet.absorb("a", {"a": ShareRow(0, 3, 0, 0.0, 0.0, 9.0)}, 0.0)
    assert places(fleet, 2, waiting=3) == 5
    fleet.absorb("a", {"a": ShareRow(0, 9, 0, 0.0, 0.0, 9.0, 2)}, 0.0)
    assert places(fleet, 2) == 1  # the other borrowed seven before this one had anything
    fleet.absorb("a", {"a": ShareRow(0, 6, 0, 0.0, 0.0, 9.0, 2)}, 0.0)
    assert places(fleet, 2, waiting=3) == 4
    assert places(fleet_of("a"), 2) is None


def test_the_rest_of_a_division_is_somebodys():
    """By the order of names, once everyone is known."""
    fleet = fleet_of("a", limit=5)
    assert places(fleet, 2, name="b") == 2
    fleet.absorb("c", {"a": ShareRow(0, 1, 0, 0.0, 0.0, 9.0, 1)}, 0.0)
    assert (places(fleet, 2, name="b"), places(fleet, 2, name="d")) == (3, 2)


def test_without_news_of_the_others_it_is_the_share_alone():
    """And never nothing at all, or nobody would be served."""
    fleet = fleet_of("a", limit=2)
    assert places(fleet, 2, waiting=5, informed=False) == 1
    assert places(fleet, 4, waiting=5, informed=False) == 1
    fleet.absorb("a", {"a": ShareRow(0, 2, 0, 0.0, 0.0, 9.0)}, 0.0)
    assert places(fleet, 4) == 1
    assert places(fleet, 2) == 0


def test_a_replica_at_rest_costs_no_new_row():
    """The same frozen object comes again until something happens there."""
    fleet = fleet_of("a")
    assert row(fleet, now=0.0) is row(fleet, now=5.0)
    charge = fleet.charge(0, 1.0, 5.0)
    assert row(fleet, now=5.0).in_flight == 1
    fleet.finish(charge, 5.0)
    assert row(fleet, now=5.0).in_flight == 0


def test_the_wait_at_a_replica_is_what_is_pending_before_it_and_how_late_it_is():
    """With the prompt's own work."""
    fleet = fleet_of("a")
    assert fleet.wait_seconds(0, 500.0, 0.0) == pytest.approx(0.5)
    fleet.charge(0, 1_000.0, 0.0)
    assert fleet.wait_seconds(0, 500.0, 0.0) == pytest.approx(1.5)
    assert fleet.wait_seconds(0, 500.0, 3.0) == pytest.approx(0.5 + 2.0)


def test_a_replica_is_open_until_it_cannot_be_reached_and_again_after_its_back_off():
    fleet = fleet_of("a")
    assert fleet.is_open(0, 0.0)
    fleet.unreachable(0, 0.0, "refused")
    assert not fleet.is_open(0, 0.0)
    assert fleet.is_open(0, 100.0)


def test_a_rate_is_measured_once_it_was_shown_or_configured():
    """Until then the pool's is assumed; a response without a time for its prefill shows nothing."""
    fleet = Fleet(lambda: 0.5)
    fleet.add(ReplicaSpec("a", "pool"))
    fleet.add(ReplicaSpec("b", "pool", prefill_tokens_per_second=RATE))
    assert (fleet.measured_rate(0), fleet.measured_rate(1)) == (None, RATE)
    charge = fleet.charge(0, 4_000.0, 0.0)
    fleet.observe_prefill(charge, 4_000.0)
    assert fleet.measured_rate(0) is None
    for _ in range(50):
        fleet.observe_prefill(charge, 4_000.0, 2.0)
    assert fleet.measured_rate(0) == pytest.approx(2_000.0, rel=0.2)


def test_a_process_that_ends_leaves_no_work_behind_and_none_at_replicas_that_are_gone():
    fleet = fleet_of("a", "b")
    peer_row = ShareRow(400, 2, 400, 0.0, 0.0, 0.0)
    fleet.absorb("other", {"a": peer_row, "b": peer_row, "unknown": peer_row}, 0.0)
    assert [view.in_flight for view in fleet.snapshot("pool", 0.0)] == [2, 2]
    fleet.remove(1)
    assert fleet.forget(1)
    fleet.forget_peer("other")
    assert [(view.in_flight, view.pending_tokens) for view in fleet.snapshot("pool", 0.0)] == [(0, 0.0)]
    fleet.forget_peer("other")


@pytest.mark.parametrize("observations", [1, 8], ids=["few observations", "known rates"])
def test_a_response_costs_no_more_where_there_are_more_replicas(observations):
    """What it shows of one replica is no reason to look at the others."""

    def cost(replicas: int) -> int:
        fleet = Fleet(Random(1).random)
        numbers = [fleet.add(ReplicaSpec(f"r{number}", "pool")) for number in range(replicas)]
        charges = [fleet.charge(number, 1_000.0, 0.0) for number in numbers]
        for charge in charges:
            for _ in range(observations):
                fleet.observe_prefill(charge, 1_000 + charge.replica, 1.0)
        return operations(lambda: fleet.observe_prefill(charges[0], 5_000, 1.0))

    assert cost(200) <= cost(4) * 1.5


def test_what_is_told_to_the_others_costs_no_more_where_there_are_more_idle_replicas():
    """Only replicas that have had work are looked at, and those until their work is over."""

    def cost(replicas: int) -> int:
        fleet = Fleet(Random(1).random)
        numbers = [fleet.add(ReplicaSpec(f"r{number}", "pool")) for number in range(replicas)]
        for charge in [fleet.charge(number, 100.0, 0.0) for number in numbers]:
            fleet.first_token(charge, 0.1)
            fleet.finish(charge, 0.2)
        assert len(fleet.share(0.3)) == replicas
        assert fleet.share(10.0) == {}
        fleet.charge(numbers[0], 100.0, 10.0)
        assert fleet.share(10.0).keys() == {"r0"}
        return operations(lambda: fleet.share(10.0))

    assert cost(200) <= cost(4) * 1.5


def test_a_replica_that_is_added_again_keeps_what_was_learned_of_it():
    """Its limit, also while another one was configured, and what it lacks while it stays in its pool."""
    fleet = fleet_of("a", "b")
    need = ("key", "model", "")
    fleet.set_limit(0, 16)
    fleet.refused(0, need, 0.0)
    for configured, limit in ((None, 16), (4, 4), (None, 16)):
        fleet.add(ReplicaSpec("a", "pool", in_flight_limit=configured))
        assert fleet.limit_of(0) == limit
        assert fleet.lacking("pool", [need], 1.0) == {0}
    fleet.add(ReplicaSpec("a", "other pool"))
    assert fleet.limit_of(0) == 16
    assert fleet.lacking("pool", [need], 1.0) == fleet.lacking("other pool", [need], 1.0) == set()


def test_adding_a_replica_again_and_again_takes_as_long_each_time():
    """A reload adds all of them again, and discovery whatever has changed."""

    def cost(replicas: int) -> int:
        fleet = Fleet(Random(1).random)
        for number in range(replicas):
            fleet.add(ReplicaSpec(f"r{number}", "pool"))
        return operations(lambda: fleet.add(ReplicaSpec("r1", "pool")))

    assert cost(200) <= cost(4) * 1.5

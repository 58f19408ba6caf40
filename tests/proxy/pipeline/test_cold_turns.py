"""Cold turns between plan and relay: who waits, what is noted, and what becomes of the plan and the pass."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import nullcontext
from typing import Any, cast

import msgspec
import pytest

from cache import PrefixIndex
from proxy.errors import BadRequest, CairnError, DeadlineUnreachable, Overloaded, RateLimited, TooManySessions
from proxy.fleet import Fleet, ReplicaSpec
from proxy.fleet.pools import Pools
from proxy.model import Ending, Endpoint, TemplateFacts
from proxy.pipeline.cold_turns import ColdTurns
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.planner import Planner, PlanningRules
from proxy.records import Tenant, Usage
from proxy.routing.cold_admission import TurnKind
from proxy.routing.cold_gate import ColdGate
from proxy.routing.cold_turn import GateLimits
from proxy.routing.fair_shares import NEWCOMER_GROUPS, Priority, Share, TenantShares
from proxy.routing.prefill_gate import PrefillGate
from proxy.routing.replica_queue import QueueLimits, ReplicaQueue
from proxy.routing.token_estimate import TokenCounts
from proxy.tasks import Tasks
from tests.proxy.pipeline.bench import POOL, Bench, turns
from tests.support.clock import FakeClock

RATE = 1_000.0  # tokens a second
CAPACITY = 100_000.0  # tokens of a cache, so that up to 1,000 to compute are few
COLD_TOKENS = 2_250.0  # of a prompt of 9,000 bytes, about
BUSY_TOKENS = 50_000.0
HELD, HELD_TOKENS = "x" * 14_000, 3_500
OWN = 4_800  # bytes that a warm turn adds: over 1,000 tokens, and less than three tenths of its prompt


class Templates:
    """Renders every prompt as it comes."""

    def of(self, pool: str, model: str) -> TemplateFacts:
        return TemplateFacts()


class Gated:
    """Cold turns over real replicas, index, planner and gate, in one worker."""

    def __init__(self, replicas: int = 2, *, pressed: bool = True, rate: float | None = RATE) -> None:
        self.clock, self.fleet, self.index = FakeClock(), Fleet(lambda: 0.5), PrefixIndex()
        self.shares, self.tasks = TenantShares(), Tasks()
        for number in range(replicas):
            self.fleet.add(ReplicaSpec(f"r{number}", POOL, prefill_tokens_per_second=rate))
        self.gate = ColdGate(
            self.fleet,
            lambda number: CAPACITY,
            self.shares,
            cast("Any", None),  # no other worker, so nothing is claimed
            lambda: 0,
            self.tasks.start,
            self.clock,
            lambda: None,
        )
        if pressed:
            self.gate.observe(POOL, 100_000, 90_000)
        self.planner = Planner(
            self.fleet,
            self.index,
            TokenCounts(),
            PrefillGate(),
            cast("Any", Templates()),
            self.clock,
            PlanningRules(min_shareable_bytes=1_000),
            Pools([], None, {}),
        )
        self.queues = {
            number: ReplicaQueue(1, QueueLimits(), self.clock, shares=self.shares) for number in range(replicas)
        }
        self.cold_turns = ColdTurns(self.gate, self.planner, self.shares, self.queues, self.clock)

    def planned(
        self,
        prompt: str = "x" * 9_000,
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        tenant: Tenant | None = None,
        endpoint: Endpoint = Endpoint.CHAT,
    ) -> Exchange:
        """A request up to its plan."""
        made = Bench().exchange(prompt=prompt, endpoint=endpoint)
        made.call = dataclasses.replace(
            made.call,
            tenant=tenant or Tenant("tenant"),
            headers=headers,
            received_seconds=self.clock.monotonic(),
        )
        made.fingerprint = None
        self.planner.fingerprint(made)
        self.planner.look_up(made)
        self.planner.plan(made)
        return made

    def begin(self, exchange: Exchange) -> asyncio.Task[None]:
        """Let a request that has to wait do so beside the test."""
        waits = self.cold_turns.admit(exchange)
        assert waits is not None
        return self.tasks.start(cast("Any", waits), "waits")

    def make_busy(self, *replicas: int) -> list[Any]:
        """Give replicas much to compute. Return their charges."""
        return [self.fleet.charge(number, BUSY_TOKENS, self.clock.monotonic()) for number in replicas]

    def hold(self, replica: int, prompt: str, tokens: int) -> None:
        """Let a replica hold a prompt."""
        held = self.planned(prompt).fingerprint
        assert held is not None
        placement = self.index.place(replica, held, tokens, self.clock.monotonic())
        self.index.answered(placement, tokens, 0, 10, self.clock.monotonic())

    def waiting(self) -> int:
        return sum(self.gate.waiting().values())


def replicas_of(exchange: Exchange) -> list[int]:
    assert exchange.plan is not None
    return [candidate.replica.id for candidate in exchange.plan.candidates]


# -- who waits


async def test_a_cold_prompt_waits_while_its_replicas_are_busy_and_then_goes_to_the_one_it_was_given() -> None:
    """The wait is measured, and the plan has that replica alone."""
    gated = Gated()
    charges = gated.make_busy(0, 1)
    exchange = gated.planned()
    assert sorted(replicas_of(exchange)) == [0, 1]
    waits = gated.begin(exchange)
    await turns()
    assert (waits.done(), gated.waiting()) == (False, 1)
    gated.clock.advance(3.0)
    gated.fleet.finish(charges[1], gated.clock.monotonic())
    gated.gate.changed()
    await waits
    assert exchange.cold_pass is not None
    assert (exchange.cold_pass.replica, replicas_of(exchange)) == (1, [1])
    assert exchange.waited_seconds == pytest.approx(3.0)


async def test_a_cold_prompt_waits_for_a_replica_that_can_serve_it_and_others_go_where_it_cannot() -> None:
    """Replicas of one pool may have different models. One that is quiet is of no use to a prompt that it refuses."""
    gated = Gated()
    other = Tenant("other")
    gated.fleet.refused(0, gated.planned().need(), gated.clock.monotonic())
    charges = gated.make_busy(0, 1)
    exchange = gated.planned()
    waits = gated.begin(exchange)
    gated.clock.advance(1.0)  # so that it comes first
    everywhere = gated.planned("y" * 9_000, tenant=other)
    others = gated.begin(everywhere)
    assert (replicas_of(exchange), sorted(replicas_of(everywhere))) == ([1], [0, 1])
    await turns()
    gated.fleet.finish(charges[0], gated.clock.monotonic())
    gated.gate.changed()
    await turns()
    assert (waits.done(), others.done(), replicas_of(everywhere)) == (False, True, [0])
    gated.fleet.finish(charges[1], gated.clock.monotonic())
    gated.gate.changed()
    await waits
    assert (replicas_of(exchange), gated.gate.admitted) == ([1], 2)


async def test_what_came_into_the_caches_during_the_wait_is_in_the_plan_after_it() -> None:
    """The prompt is looked up again."""
    gated = Gated(1)
    charges = gated.make_busy(0)
    exchange = gated.planned()
    waits = gated.begin(exchange)
    await turns()
    gated.hold(0, "x" * 9_000, tokens=2_250)
    gated.fleet.finish(charges[0], gated.clock.monotonic())
    gated.gate.changed()
    await waits
    assert exchange.plan is not None
    assert exchange.plan.chosen.matched_tokens == 2_250


async def test_without_pressure_a_long_prompt_waits_for_the_busy_replica_that_holds_part_of_it() -> None:
    """Though another one is quiet: to compute the part again would take longer. What nobody holds goes before it."""
    gated = Gated(pressed=False)
    head = "x" * 60_000
    gated.hold(0, head, tokens=15_000)
    charges = gated.make_busy(0, 1)
    held, other = gated.planned(head + "y" * 60_000), gated.planned("z" * 60_000)
    waits, others = gated.begin(held), gated.begin(other)
    await turns()
    for charge in charges:
        gated.fleet.finish(charge, gated.clock.monotonic())
    charge = gated.fleet.charge(0, 5_000, gated.clock.monotonic())
    gated.gate.changed()
    await turns()
    assert (waits.done(), others.done(), replicas_of(other)) == (False, True, [1])
    gated.fleet.finish(charge, gated.clock.monotonic())
    gated.gate.changed()
    await turns()
    assert (waits.done(), replicas_of(held)) == (True, [0])


def without_fingerprint(exchange: Exchange) -> None:
    exchange.fingerprint = None


def pinned(exchange: Exchange) -> None:
    exchange.pinned_replica = 0


def at_a_provider(exchange: Exchange) -> None:
    exchange.pool = msgspec.structs.replace(cast("Any", exchange.pool), is_provider=True)


@pytest.mark.parametrize("change", [None, without_fingerprint, pinned, at_a_provider])
async def test_a_prompt_without_a_choice_of_caches_never_waits(change: Any) -> None:
    """Though any other of its size would."""
    gated = Gated()
    gated.make_busy(0, 1)
    exchange = gated.planned()
    if change is not None:
        change(exchange)
        assert gated.cold_turns.admit(exchange) is None
        return
    waits = gated.begin(exchange)
    await turns()
    assert gated.waiting() == 1
    waits.cancel()


async def test_a_session_that_is_refused_or_leaves_is_as_new_when_it_comes_again() -> None:
    """It goes behind the sessions that came before it, and its work is no repetition; what was sent is known."""
    gated = Gated()
    gated.make_busy(0, 1)
    waits, leaving = gated.begin(gated.planned("x" * 9_000)), gated.planned("y" * 9_000)
    leaves = gated.begin(leaving)
    await turns()
    leaves.cancel()
    await turns()
    gated.cold_turns.settle(leaving)
    gated.gate.limits = GateLimits(max_wait_seconds=0.0)
    refused = gated.planned("z" * 9_000)
    with pytest.raises(RateLimited):
        await cast("Any", gated.cold_turns.admit(refused))
    gated.cold_turns.settle(refused)
    gated.gate.limits = GateLimits()
    known = gated.gate.served(POOL)
    depths = [known.depth(cast("Any", each.fingerprint).hashes) for each in (leaving, refused)]
    assert (depths, len(known)) == ([0, 0], 2)
    sent = gated.planned("w" * 3_000)
    gated.cold_turns.admit(sent)
    sent.attempt = cast("Any", Attempt(None, cast("Any", sent.plan).chosen))
    gated.cold_turns.settle(sent)
    assert known.depth(cast("Any", sent.fingerprint).hashes) > 0
    waits.cancel()


async def test_what_runs_no_model_is_neither_held_back_nor_read() -> None:
    """Its headers may say what they like."""
    gated = Gated()
    exchange = gated.planned(endpoint=Endpoint.OTHER, headers=((b"x-cairn-priority", b"soon"),))
    assert gated.cold_turns.admit(exchange) is None


@pytest.mark.parametrize("endpoint", [Endpoint.EMBEDDINGS, Endpoint.INFERENCE])
async def test_what_generates_nothing_waits_for_its_place_with_its_priority_and_deadline(endpoint: Endpoint) -> None:
    """It is not held back otherwise, and not refused for the work of a replica that generates."""
    gated = Gated()
    gated.make_busy(0, 1)
    headers = ((b"x-cairn-priority", b"low"), (b"x-request-deadline", b"2.5"))
    exchange = gated.planned(endpoint=endpoint, headers=headers)
    assert gated.cold_turns.admit(exchange) is None
    assert exchange.plan is not None
    assert exchange.waiting_share_of(exchange.plan.chosen).priority is Priority.LOW
    assert exchange.deadline_seconds == gated.clock.monotonic() + 2.5
    with pytest.raises(BadRequest):
        gated.cold_turns.admit(gated.planned(endpoint=endpoint, headers=((b"x-cairn-priority", b"soon"),)))


async def test_a_few_tokens_or_a_prompt_without_pressure_do_not_wait() -> None:
    """They are noted all the same, as what a later prompt may continue."""
    for gated, prompt in ((Gated(), "x" * 3_000), (Gated(pressed=False), "x" * 9_000)):
        assert gated.cold_turns.admit(gated.planned(prompt)) is None
        assert len(gated.gate.served(POOL)) > 0


async def test_under_pressure_a_warm_prompt_goes_only_where_about_as_much_of_it_is_held() -> None:
    """Elsewhere it would evict what another session needs, so it waits; without pressure the load decides."""
    gated = Gated(pressed=False)
    gated.hold(1, HELD, tokens=HELD_TOKENS)
    gated.make_busy(1)
    exchange = gated.planned(HELD + "y" * OWN)
    assert gated.cold_turns.admit(exchange) is None
    assert replicas_of(exchange) == [0, 1]
    gated.gate.observe(POOL, 100_000, 90_000)
    exchange = gated.planned(HELD + "y" * OWN)
    waits = gated.begin(exchange)
    await turns()
    assert (waits.done(), gated.gate.warm.waiting(1), gated.waiting()) == (False, 1, 0)
    waits.cancel()
    await turns()
    assert (gated.gate.warm.waiting(1), gated.gate.waiting_bytes) == (0, 0)


@pytest.mark.parametrize("own", [OWN, 40], ids=["warm", "short"])
async def test_under_pressure_a_warm_prompt_goes_once_its_replica_is_quiet(own: int) -> None:
    """To that replica, and its work was counted while it waited."""
    gated = Gated()
    gated.hold(1, HELD, tokens=HELD_TOKENS)
    charges = gated.make_busy(1)
    gated.gate.is_pressed(POOL, gated.fleet.snapshot(POOL, gated.clock.monotonic()))
    exchange = gated.planned(HELD + "y" * own)
    waits = gated.begin(exchange)
    await turns()
    gated.clock.advance(3.0)
    gated.fleet.finish(charges[0], gated.clock.monotonic())
    gated.gate.changed()
    await waits
    assert replicas_of(exchange)[0] == 1
    assert exchange.plan is not None
    assert exchange.share_of(exchange.plan.chosen).tokens == 0.0
    assert exchange.waited_seconds == pytest.approx(3.0)


@pytest.mark.parametrize("own", [OWN, 40], ids=["warm", "short"])
async def test_under_pressure_a_warm_prompt_goes_to_a_free_replica_that_holds_it_though_others_cost_less(
    own: int,
) -> None:
    """Here the plan is first for one that holds nothing; of those that hold it, one computes something long."""
    gated = Gated(3)
    for replica in (1, 2):
        gated.hold(replica, HELD, tokens=HELD_TOKENS)
    gated.make_busy(1)
    gated.fleet.charge(2, 2 * BUSY_TOKENS, gated.clock.monotonic(), queued=True)  # waits for it, and was not sent
    gated.gate.is_pressed(POOL, gated.fleet.snapshot(POOL, gated.clock.monotonic()))
    exchange = gated.planned(HELD + "y" * own)
    assert replicas_of(exchange) == [0, 1, 2]
    assert gated.cold_turns.admit(exchange) is None
    assert replicas_of(exchange) == [2]


async def test_a_warm_prompt_that_would_wait_is_told_how_long() -> None:
    """For the work that was sent to its replica and the turns that wait there; without either it would not wait."""
    gated = Gated()
    gated.hold(1, HELD, tokens=HELD_TOKENS)
    prompts = [HELD + own * OWN for own in "yz"]
    gated.gate.is_pressed(POOL, gated.fleet.snapshot(POOL, gated.clock.monotonic()))
    idle = gated.cold_turns.judge(gated.planned(prompts[0]))
    assert idle is not None
    assert not idle.waits
    gated.make_busy(1)
    sent_only = gated.cold_turns.judge(gated.planned(prompts[0]))
    waits = gated.begin(gated.planned(prompts[1]))
    await turns()
    verdict = gated.cold_turns.judge(gated.planned(prompts[0]))
    assert sent_only is not None
    assert verdict is not None
    assert (verdict.kind, verdict.waits) == (TurnKind.WARM, True)
    assert verdict.reason == "every replica that holds the prompt is busy, and may evict it before it is computed"
    assert sent_only.seconds > 0.0
    assert verdict.seconds == pytest.approx(sent_only.seconds + OWN / 4 / RATE, rel=0.05)
    assert gated.gate.warm_waiting_by_client() == {(Priority.NORMAL, ""): 1}
    waits.cancel()
    await turns()
    assert gated.gate.warm_waiting_by_client() == {}
    assert gated.cold_turns.judge(gated.planned(prompts[0])) == sent_only


async def test_a_warm_prompt_that_was_evicted_while_it_waited_waits_as_a_cold_one() -> None:
    """In the place of its arrival: before a cold one that came after it."""
    gated = Gated()
    gated.hold(1, HELD, tokens=HELD_TOKENS)
    charges = gated.make_busy(0, 1)
    exchange = gated.planned(HELD + "y" * OWN)
    warm = gated.begin(exchange)
    await turns()
    gated.clock.advance(1.0)
    later = gated.begin(gated.planned("z" * 9_000))
    await turns()
    gated.index.new_epoch(1, 1)
    gated.gate.warm.look()
    for charge in charges[1:]:
        gated.fleet.finish(charge, gated.clock.monotonic())
    gated.clock.advance(1.0)
    gated.gate.changed()
    await turns()
    assert (warm.done(), later.done()) == (True, False)
    assert exchange.cold_pass is not None
    assert exchange.waited_seconds == pytest.approx(2.0)
    later.cancel()


# -- urgency and shares


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ((b"x-cairn-priority", b"soon"), BadRequest),
        ((b"x-request-deadline", b"tomorrow"), BadRequest),
        ((b"x-request-deadline", b"1"), DeadlineUnreachable),
        ((b"x-request-deadline", b"60"), None),
    ],
)
async def test_a_deadline_that_cannot_be_met_is_refused_at_once(
    header: tuple[bytes, bytes], error: type[CairnError] | None
) -> None:
    """By what the best replica needs until the first token, here about 2.3 s; so is a header without a meaning."""
    gated = Gated(pressed=False)
    exchange = gated.planned(headers=(header,))
    if error is None:
        assert gated.cold_turns.admit(exchange) is None
        assert exchange.deadline_seconds == gated.clock.monotonic() + 60.0
        return
    with pytest.raises(error) as refused:
        gated.cold_turns.admit(exchange)
    if error is DeadlineUnreachable:
        seconds = refused.value.retry_after_seconds
        assert seconds == pytest.approx(2.3, abs=0.2)
        message = f"The first token would come after {seconds:.1f} s, which is past the deadline."
        assert refused.value.message == message


async def test_a_deadline_is_not_refused_for_a_rate_that_is_only_guessed() -> None:
    """A new fleet would never show how fast it is, if every request with a deadline were refused."""
    gated = Gated(pressed=False, rate=None)
    assert gated.cold_turns.admit(gated.planned(headers=((b"x-request-deadline", b"0.1"),))) is None


@pytest.mark.parametrize(
    ("tenant", "priority", "is_met"),
    [
        ("flood", b"high", True),
        ("flood", b"normal", False),
        ("flood", b"low", False),
        ("other", b"normal", True),
        ("other", b"low", False),
    ],
)
async def test_a_deadline_is_not_refused_for_what_waits_behind_the_request(
    tenant: str, priority: bytes, *, is_met: bool
) -> None:
    """A batch of 50 s waits for the only replica: it does not delay a higher priority, nor another tenant's share."""
    gated = Gated(1, pressed=False, rate=10_000.0)
    now, tasks = gated.clock.monotonic(), []
    gated.queues[0].try_acquire()
    for _ in range(1_000):
        gated.fleet.charge(0, 500.0, now, queued=True)
        share = Share("flood", 1.0, Priority.NORMAL, 500.0)
        tasks.append(gated.tasks.start(cast("Any", gated.queues[0].acquire(0.05, share)), "waits"))
    await turns()
    exchange = gated.planned(
        "x" * 4_000,
        headers=((b"x-request-deadline", b"5"), (b"x-cairn-priority", priority)),
        tenant=Tenant(tenant, highest_priority=0),
    )
    with nullcontext() if is_met else pytest.raises(DeadlineUnreachable, match=r"after 50\.\d s"):
        assert gated.cold_turns.admit(exchange) is None
    for task in tasks:
        task.cancel()


async def test_a_deadline_shows_nobody_what_another_tenant_has_sent() -> None:
    """A prompt that only others have sent is refused, and with the same time, as one that was never sent."""
    gated, hurry = Gated(pressed=False), ((b"x-request-deadline", b"3"),)
    stranger = Tenant("stranger", b"stranger", sees_all=False)
    gated.hold(0, HELD, HELD_TOKENS)
    told: list[str] = []
    for prompt in (HELD, "y" * len(HELD)):
        with pytest.raises(DeadlineUnreachable) as refused:
            gated.cold_turns.admit(gated.planned(prompt, headers=hurry, tenant=stranger))
        told.append(refused.value.message)
    assert told[0] == told[1]
    assert gated.cold_turns.admit(gated.planned(HELD, headers=hurry)) is None
    answered = gated.planned(HELD, tenant=stranger)
    gated.planner.note_answered(answered)
    assert gated.cold_turns.admit(gated.planned(HELD, headers=hurry, tenant=stranger)) is None


async def test_the_time_that_a_request_took_to_arrive_is_part_of_its_deadline() -> None:
    """It counts from the arrival of its head."""
    gated = Gated(pressed=False)
    exchange = gated.planned(headers=((b"x-request-deadline", b"4"),))
    gated.clock.advance(2.0)
    with pytest.raises(DeadlineUnreachable):
        gated.cold_turns.admit(exchange)


@pytest.mark.parametrize(("highest", "expected"), [(0, Priority.HIGH), (1, Priority.NORMAL)])
async def test_a_prompt_waits_with_the_priority_that_its_client_asks_for_and_may_have(
    highest: int, expected: Priority
) -> None:
    """The queue orders by it."""
    gated = Gated()
    gated.make_busy(0, 1)
    waits = gated.begin(
        gated.planned(headers=((b"x-cairn-priority", b"high"),), tenant=Tenant("t", highest_priority=highest))
    )
    await turns()
    assert gated.gate.waiting()[expected] == 1
    waits.cancel()


async def test_each_tenant_that_generates_counts_among_those_that_share() -> None:
    """By its weight, also if nothing of it ever waits."""
    gated = Gated(pressed=False)
    for name, weight in (("a", 1.0), ("b", 3.0)):
        gated.cold_turns.admit(gated.planned("short", tenant=Tenant(name, weight=weight)))
    assert gated.shares.share_of("a", gated.clock.monotonic()) == 0.25


async def test_tenants_that_nobody_has_answered_share_together_and_listed_ones_are_not_among_them() -> None:
    """Made-up keys are newcomers, whatever they ask for; one that was answered is not, nor is a listed client."""
    gated = Gated(pressed=False)

    def share(name: str, endpoint: Endpoint = Endpoint.CHAT, **about: Any) -> str:
        exchange = gated.planned("short", tenant=Tenant(name, **about), endpoint=endpoint)
        gated.cold_turns.admit(exchange)
        assert exchange.plan is not None
        return exchange.share_of(exchange.plan.chosen).tenant

    def settled(name: str, ending: Ending, status: int) -> None:
        exchange = gated.planned("short", tenant=Tenant(name))
        exchange.attempt = cast("Any", Attempt(None, exchange.plan.chosen if exchange.plan else None))
        exchange.ending, exchange.status = ending, status
        gated.cold_turns.settle(exchange)

    assert share("a") == "a"  # nobody was answered, so all are equal
    settled("a", Ending.COMPLETE, 200)
    settled("refused", Ending.UPSTREAM_STATUS, 401)
    settled("broken", Ending.UPSTREAM_FAILED, 200)
    assert share("a") == "a"
    for name in ("refused", "broken", "new"):
        assert share(name) in NEWCOMER_GROUPS
        assert share(name, Endpoint.EMBEDDINGS) in NEWCOMER_GROUPS
    assert share("listed", is_listed=True) == "listed"


# -- the pass


async def test_a_pass_is_given_back_if_no_replica_is_left_after_the_wait() -> None:
    """The next turn gets it at once."""
    gated = Gated(1)
    charges = gated.make_busy(0)
    exchange = gated.planned()
    waits = gated.begin(exchange)
    await turns()
    gated.fleet.finish(charges[0], gated.clock.monotonic())
    exchange.avoid = frozenset(("r0",))
    gated.gate.changed()
    with pytest.raises(Overloaded):
        await waits
    following = gated.begin(gated.planned("y" * 9_000))
    await turns()
    assert following.done()


async def test_a_turn_whose_replica_goes_down_just_when_it_is_given_is_sent_to_another() -> None:
    """Its pass is given back."""
    gated = Gated()
    charges = gated.make_busy(0, 1)
    exchange = gated.planned()
    waits = gated.begin(exchange)
    await turns()
    gated.fleet.finish(charges[0], gated.clock.monotonic())
    gated.gate.changed()
    gated.fleet.unreachable(0, gated.clock.monotonic(), "refused")
    await waits
    assert replicas_of(exchange) == [1]
    assert not gated.gate.pool(POOL).passes


async def test_turns_that_wait_are_refused_with_the_reason_when_no_replica_is_left() -> None:
    """Also one that is just about to wait."""
    gated = Gated()
    gated.make_busy(0, 1)
    first, late = gated.planned(), gated.planned("y" * 9_000)
    waits = gated.begin(first)
    await turns()
    for replica in (0, 1):
        gated.fleet.unreachable(replica, gated.clock.monotonic(), "refused")
    gated.gate.changed()
    for each in (waits, gated.begin(late)):
        with pytest.raises(Overloaded, match="r0 is unreachable, r1 is unreachable"):
            await asyncio.wait_for(each, 30)
    assert gated.waiting() == 0


async def test_a_turn_whose_replica_goes_down_while_it_queues_there_is_planned_without_its_pass() -> None:
    """It has waited at the gate already."""
    gated = Gated()
    exchange = gated.planned()
    await gated.begin(exchange)
    assert exchange.cold_pass is not None
    given = exchange.cold_pass.replica
    gated.fleet.unreachable(given, gated.clock.monotonic(), "refused")
    gated.planner.plan_again(exchange)
    assert replicas_of(exchange) == [1 - given]
    assert not gated.gate.pool(POOL).passes


@pytest.mark.parametrize("end", ["first token", "settled", None])
async def test_a_pass_ends_with_the_first_token_or_with_the_request(end: str | None) -> None:
    """Until then the replica takes no other cold turn."""
    gated = Gated(1)
    exchange = gated.planned()
    await gated.begin(exchange)
    charge = gated.fleet.charge(0, 100.0, gated.clock.monotonic())
    exchange.attempt = cast("Any", Attempt(charge))
    following = gated.begin(gated.planned("y" * 9_000))
    await turns()
    gated.gate.changed()
    await turns()
    assert not following.done()
    if end == "first token":
        gated.fleet.first_token(charge, gated.clock.monotonic())
        gated.gate.changed()
    elif end == "settled":
        gated.cold_turns.settle(exchange)
    await turns()
    assert following.done() is (end is not None)
    following.cancel()


class Attempt:
    """An attempt whose prompt is placed, of which otherwise only the charge and the candidate count."""

    def __init__(self, charge: Any, candidate: Any = None) -> None:
        self.charge = charge
        self.candidate = candidate
        self.placement = "placed"


# -- what is learned


async def test_a_prompt_that_continues_another_is_known_up_to_there_though_no_replica_holds_it() -> None:
    """Of a new one nothing is known; of one that is held, that part is."""
    gated = Gated(pressed=False)
    known = []
    for text in ("x" * 9_000, "x" * 9_000, "x" * 9_000 + "y" * 9_000, "z" * 9_000):
        exchange = gated.planned(text)
        gated.cold_turns.admit(exchange)
        known.append(exchange.known_tokens)
    assert known == [0.0, pytest.approx(COLD_TOKENS, rel=0.01), pytest.approx(COLD_TOKENS, rel=0.1), 0.0]
    gated.hold(0, "v" * 9_000, tokens=2_250)
    held = gated.planned("v" * 9_000)
    gated.cold_turns.admit(held)
    assert held.known_tokens == pytest.approx(COLD_TOKENS, rel=0.01)


@pytest.mark.parametrize(
    ("known_tokens", "usage", "pressed"),
    [
        (55_000.0, Usage(60_000, 1, 0), True),
        (55_000.0, Usage(60_000, 1, 55_000), False),  # nothing was computed twice
        (0.0, Usage(60_000, 1, 0), False),  # all of it was new
        (120_000.0, Usage(200_000, 1, 100_000), False),  # a fifth of what was computed
        (55_000.0, Usage(60_000, 1), False),  # nobody knows
        (55_000.0, None, False),
    ],
)
async def test_what_is_computed_although_it_was_computed_before_makes_cold_turns_wait(
    known_tokens: float, usage: Usage | None, pressed: bool
) -> None:
    """Half of all that is computed is enough; unreported cached tokens say nothing."""
    gated = Gated(pressed=False)
    exchange = gated.planned()
    exchange.known_tokens, exchange.usage = known_tokens, usage
    gated.cold_turns.settle(exchange)
    assert gated.gate.is_pressed(POOL, gated.fleet.snapshot(POOL, gated.clock.monotonic())) is pressed


async def test_a_session_rests_at_the_replica_that_answered_it() -> None:
    """Until then it runs; another replica of the plan has nothing to do with it."""
    gated = Gated(pressed=False)
    exchange = gated.planned()
    assert gated.cold_turns.admit(exchange) is None
    assert exchange.plan is not None
    candidate = next(each for each in exchange.plan.candidates if each.replica.id == 1)
    attempt = Attempt(gated.fleet.charge(1, 100.0, gated.clock.monotonic()), candidate)
    exchange.attempt, exchange.usage = cast("Any", attempt), Usage(2_000, 1, 0)
    served, now = gated.gate.served(POOL), gated.clock.monotonic()
    assert [served.resting_tokens(number, now) for number in (0, 1)] == [0.0, 0.0]
    gated.cold_turns.settle(exchange)
    assert [served.resting_tokens(number, now) for number in (0, 1)] == [0.0, exchange.plan.prompt_tokens]


async def test_an_explanation_tells_whether_a_prompt_would_wait_and_changes_nothing() -> None:
    """The prompt does not join the queue, and later prompts do not continue it."""
    gated = Gated()
    gated.make_busy(0, 1)
    for _ in range(2):
        exchange = gated.planned()
        verdict = gated.cold_turns.judge(exchange)
        assert verdict is not None
        assert verdict.waits
        assert exchange.known_tokens == 0.0
    assert (gated.waiting(), len(gated.gate.served(POOL)), gated.shares.has_several) == (0, 0, False)
    at_a_provider(exchange)
    assert gated.cold_turns.judge(exchange) is None
    short = gated.cold_turns.judge(gated.planned("x" * 3_000))
    assert short is not None
    assert not short.waits


async def test_an_explanation_tells_of_the_wait_for_a_place_at_the_replica() -> None:
    """Also of one at a provider, which nothing else keeps waiting, and of a prompt with nothing to share; and that it
    would be refused while too many wait.
    """
    gated = Gated(1, pressed=False)
    permit = await gated.queues[0].acquire(1.0)
    waiting = gated.tasks.start(gated.queues[0].acquire(0.5, Share("tenant", tokens=500.0)), "waits")
    await turns()
    plain, provider, tiny = gated.planned(), gated.planned(), gated.planned("x")
    at_a_provider(provider)
    verdicts = [gated.cold_turns.judge(each) for each in (plain, provider, tiny)]
    for verdict in verdicts:
        assert verdict is not None
        assert verdict.waits
        assert verdict.reason == "its replica has as many requests, or as much work, as it is sent at a time"
    assert [round(each.seconds, 3) for each in verdicts if each is not None] == [0.5, 0.5, 0.0]
    assert len(gated.queues[0]) == 1
    gated.queues[0].set_limits(QueueLimits(max_waiting=1))
    with pytest.raises(RateLimited, match="Too many requests wait for a replica"):
        gated.cold_turns.judge(plain)
    gated.clock.advance(4.0)
    permit.done()
    (await waiting).done()
    free = gated.cold_turns.judge(plain)
    assert free is not None
    assert not free.waits
    assert gated.cold_turns.judge(provider) is None


async def test_an_explanation_counts_only_those_that_go_before_by_priority() -> None:
    """Those of a lower priority do not, and a client gets no higher one than its configuration allows."""
    gated = Gated()
    gated.make_busy(0, 1)
    vip = Tenant("vip", highest_priority=Priority.HIGH)
    for _ in range(2):
        gated.begin(gated.planned())
    await turns()
    high = ((b"x-cairn-priority", b"high"),)
    normal, as_normal = (gated.cold_turns.judge(gated.planned(headers=each)) for each in ((), high))
    first = gated.cold_turns.judge(gated.planned(headers=high, tenant=vip))
    assert normal is not None
    assert as_normal is not None
    assert first is not None
    assert normal.seconds == as_normal.seconds > 0.0
    assert (first.waits, first.seconds) == (True, 0.0)


async def test_an_explanation_counts_warm_turns_by_their_priority() -> None:
    """As those that wait for a quiet replica."""
    gated = Gated()
    gated.hold(1, HELD, tokens=HELD_TOKENS)
    gated.gate.is_pressed(POOL, gated.fleet.snapshot(POOL, gated.clock.monotonic()))
    gated.make_busy(1)
    alone = gated.cold_turns.judge(gated.planned(HELD + "y" * OWN))
    waits = gated.begin(gated.planned(HELD + "z" * OWN))
    await turns()
    vip, high = Tenant("vip", highest_priority=Priority.HIGH), ((b"x-cairn-priority", b"high"),)
    first = gated.cold_turns.judge(gated.planned(HELD + "y" * OWN, headers=high, tenant=vip))
    behind = gated.cold_turns.judge(gated.planned(HELD + "y" * OWN))
    assert first == alone
    assert behind is not None
    assert alone is not None
    assert behind.seconds > alone.seconds
    waits.cancel()


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ((b"x-request-deadline", b"0.5"), DeadlineUnreachable),  # less than the work that was sent
        ((b"x-request-deadline", b"soon"), BadRequest),
        ((b"x-cairn-priority", b"top"), BadRequest),
    ],
)
async def test_an_explanation_is_the_error_by_which_a_request_would_be_refused(
    header: tuple[bytes, bytes], error: type[CairnError]
) -> None:
    """A deadline that cannot be met, and an urgency that cannot be read."""
    gated = Gated()
    gated.make_busy(0, 1)
    with pytest.raises(error):
        gated.cold_turns.judge(gated.planned(headers=(header,)))


async def test_an_explanation_refuses_what_would_wait_for_too_long() -> None:
    """It counts as no refusal, and keeps no place: nothing was asked for."""
    gated = Gated()
    gated.make_busy(0, 1)
    gated.gate.limits = GateLimits(max_wait_seconds=0.5)
    waits = gated.begin(gated.planned("y" * 9_000))
    await turns()
    with pytest.raises(TooManySessions):
        gated.cold_turns.judge(gated.planned())
    assert (gated.gate.refused, len(gated.gate.pool(POOL).tickets)) == (0, 0)
    waits.cancel()


@pytest.mark.parametrize("waiting", ["flood", "tenant"])
async def test_a_tenant_that_goes_before_the_others_goes_where_the_engine_is_free_soonest(waiting: str) -> None:
    """Even if more requests of another wait for that replica; one whose own requests wait follows the plan."""
    gated = Gated(pressed=False)
    now = gated.clock.monotonic()
    gated.fleet.charge(0, 3_000.0, now)
    gated.fleet.charge(1, 1_000.0, now)
    gated.fleet.charge(1, 9_000.0, now, queued=True)
    gated.shares.seen("flood", 1.0, now)
    gated.shares.waits(waiting, 1)
    exchange = gated.planned("a short one")
    assert replicas_of(exchange) == [0, 1]
    gated.shares.seen("tenant", 1.0, now)
    assert gated.cold_turns.admit(exchange) is None
    assert replicas_of(exchange) == ([1, 0] if waiting == "flood" else [0, 1])


async def test_a_turn_that_waits_goes_at_once_when_the_gate_is_switched_off() -> None:
    """`never` sends them at once, those that came before it too."""
    gated = Gated()
    gated.make_busy(0, 1)
    exchange = gated.planned()
    waits = gated.begin(exchange)
    await turns()
    assert not waits.done()
    gated.gate.limits = GateLimits(enabled=False)
    gated.gate.changed()
    await waits
    assert replicas_of(exchange)
    assert exchange.cold_pass is None

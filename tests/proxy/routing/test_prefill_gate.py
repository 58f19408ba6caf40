"""The cold gate: who waits for whom, and what happens when the leader fails."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from cache.index.fingerprint import Fingerprint
from cache.index.hashing import chain_root, cut
from cache.index.prefix_index import Held, PrefixIndex
from proxy.fleet import Charge, Fleet, ReplicaSpec
from proxy.records import Demand
from proxy.routing.cost import plan
from proxy.routing.prefill_gate import Follower, Passage, Prefill, PrefillGate
from tests.support.operations import operations

RATE = 8_000.0
SHARED = list(range(1_000, 1_016))  # a chain of 16 blocks, say 4,096 tokens


def enter(
    gate: PrefillGate, own: int, matched_blocks: int = 16, matched_tokens: float = 4_096.0, more: float = 100.0
):
    chain = [*SHARED, own]
    return gate.enter(
        0,
        chain,
        matched_blocks=matched_blocks,
        matched_tokens=matched_tokens,
        prompt_tokens=4_096.0 + more,
        prefill_seconds=0.5,
    )


def lead(gate: PrefillGate, own: int = 1) -> Prefill:
    leader = enter(gate, own, 0, 0.0)
    assert isinstance(leader, Prefill)
    return leader


def follow(gate: PrefillGate, own: int) -> Follower:
    follower = enter(gate, own)
    assert isinstance(follower, Follower)
    return follower


async def test_siblings_wait_for_the_first_token_of_the_one_that_went_ahead():
    """All of them pass at once then, and nobody waits after that."""
    gate = PrefillGate()
    leader, followers = lead(gate), [follow(gate, own) for own in (2, 3, 4)]
    waits = [asyncio.get_running_loop().create_task(follower.wait()) for follower in followers]
    await asyncio.sleep(0)
    assert not any(wait.done() for wait in waits)
    leader.first_token()
    assert await asyncio.gather(*waits) == [Passage.OPENED] * 3
    leader.first_token()
    leader.failed()
    assert (enter(gate, 5), len(gate)) == (None, 0)


async def test_a_token_that_came_before_the_wait_is_not_missed():
    """The passage is kept."""
    gate = PrefillGate()
    leader, follower = lead(gate), follow(gate, 2)
    leader.first_token()
    assert await follower.wait() is Passage.OPENED


async def test_the_leaders_failure_promotes_the_next_who_leads_the_others():
    """And so on, until one gets through."""
    gate = PrefillGate()
    leader, (one, two, three) = lead(gate), (follow(gate, own) for own in (2, 3, 4))
    leader.failed()
    assert await one.wait() is Passage.PROMOTED
    one.prefill.failed()
    assert await two.wait() is Passage.PROMOTED
    assert isinstance(enter(gate, 5), Follower)
    two.prefill.first_token()
    assert await three.wait() is Passage.OPENED
    assert len(gate) == 0


async def test_a_follower_that_shares_too_little_with_the_promoted_one_passes():
    """It waited for more of the failed leader's prompt than the new one computes."""
    gate = PrefillGate()

    def entered(chain: list[int], matched_blocks: int) -> Prefill | Follower | None:
        matched_tokens = 256.0 * matched_blocks
        return gate.enter(
            0,
            chain,
            matched_blocks=matched_blocks,
            matched_tokens=matched_tokens,
            prompt_tokens=4_196.0,
            prefill_seconds=0.5,
        )

    leader = entered(SHARED, 0)
    branch = entered([*SHARED[:8], *range(8)], 8)
    whole = entered([*SHARED, 1], 16)
    assert isinstance(leader, Prefill)
    assert isinstance(branch, Follower)
    assert isinstance(whole, Follower)
    leader.failed()
    assert await branch.wait() is Passage.PROMOTED
    assert await whole.wait() is Passage.OPENED


async def test_one_that_left_is_never_promoted():
    """Its client is gone; the next who waits is taken."""
    gate = PrefillGate()
    leader, (gone, stays) = lead(gate), (follow(gate, own) for own in (2, 3))
    wait = asyncio.get_running_loop().create_task(gone.wait())
    await asyncio.sleep(0)
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait
    leader.failed()
    assert await stays.wait() is Passage.PROMOTED


async def test_nobody_waits_for_ever():
    """A leader that stalls is waited for twice its predicted time and a second; then each goes alone."""
    gate = PrefillGate()
    lead(gate)
    follower = follow(gate, 2)
    assert follower.patience_seconds == 2.0
    follower.patience_seconds = 0.001
    assert await follower.wait() is Passage.EXPIRED


def test_who_shares_little_or_nothing_that_is_under_way_does_not_wait():
    """Another replica, another chain, a warm prefix, or under 1,024 cold tokens in common: straight on."""
    gate = PrefillGate()
    lead(gate)
    assert (
        gate.enter(
            1, [*SHARED, 2], matched_blocks=16, matched_tokens=4_096.0, prompt_tokens=4_196.0, prefill_seconds=0.5
        )
        is None
    )
    assert (
        gate.enter(
            0, list(range(17)), matched_blocks=16, matched_tokens=4_096.0, prompt_tokens=4_196.0, prefill_seconds=0.5
        )
        is None
    )
    assert enter(gate, 2, matched_blocks=4, matched_tokens=1_024.0, more=-3_000.0) is None
    warm = PrefillGate()
    assert isinstance(enter(warm, 1, 16, 4_096.0, more=5_000.0), Prefill)  # leads its own part only
    assert enter(warm, 2) is None


def test_the_plan_can_ask_where_it_would_have_to_wait():
    """Asking changes nothing, and says no once the prefix is there."""
    gate, held = PrefillGate(), Held(16, 16_384, 4_096)
    leader = lead(gate)
    assert (gate.is_open, PrefillGate().is_open) == (False, True)
    assert gate.holds_back([*SHARED, 2], 0, held)
    assert not gate.holds_back([*SHARED, 2], 1, held)
    assert not gate.holds_back([*SHARED, 2], 0, Held(4, 4_096, 1_024))
    leader.first_token()
    assert gate.is_open
    assert not gate.holds_back([*SHARED, 2], 0, held)


def test_who_has_no_event_loop_is_called():
    """When it may go, at once where that is now, and once only."""
    gate, gone = PrefillGate(), []
    leader, one, two = lead(gate), follow(gate, 2), follow(gate, 3)
    one.then(lambda: gone.append(1))
    two.then(lambda: gone.append(2))
    two.expire()
    assert gone == [2]
    leader.first_token()
    assert gone == [2, 1]
    two.then(lambda: gone.append(3))
    assert gone == [2, 1, 3]


def test_a_siblings_own_long_part_has_followers_of_its_own():
    """Deeper siblings wait for it and not for the first leader."""
    gate = PrefillGate()
    leader = lead(gate)
    deeper = enter(gate, 2, more=5_000.0)
    assert isinstance(deeper, Follower)
    third = gate.enter(
        0, [*SHARED, 2, 3], matched_blocks=17, matched_tokens=9_096.0, prompt_tokens=9_196.0, prefill_seconds=0.5
    )
    assert isinstance(third, Follower)
    leader.first_token()
    assert third._passage is None  # noqa: SLF001 - internal state that no public name shows
    deeper.prefill.first_token()
    assert third._passage is Passage.OPENED  # noqa: SLF001 - internal state that no public name shows


def burst(
    fleet: Fleet, index: PrefixIndex, gate: PrefillGate, prompts: list[Fingerprint], tokens_per_byte: float
) -> int:
    """Route all prompts in one instant; returns how many compute the shared prefix (nobody's first token comes)."""
    prefills, now = 0, 0.0
    charges: list[Charge] = []
    for prompt in prompts:
        tokens = prompt.size_bytes * tokens_per_byte
        match = index.match(prompt)
        made = plan(Demand(prompt.size_bytes, tokens, prompt.hashes[-1]), match, fleet.snapshot("pool", now))
        best = made.chosen
        held = match.held.get(best.replica.id)
        passage = gate.enter(
            best.replica.id,
            prompt.hashes,
            matched_blocks=held.blocks if held else 0,
            matched_tokens=best.matched_tokens,
            prompt_tokens=tokens,
            prefill_seconds=1.0,
        )
        prefills += not isinstance(passage, Follower)
        charges.append(fleet.charge(best.replica.id, best.uncached_tokens, now, gated=isinstance(passage, Follower)))
        index.place(best.replica.id, prompt, tokens, now)
        now += 0.0001
    for charge in charges:
        fleet.finish(charge, now)
    return prefills


@pytest.mark.parametrize("replicas", [2, 8])
def test_a_burst_of_fifty_siblings_makes_at_most_two_prefills(replicas):
    """Of a shared prefix of 8,000 tokens with some 60 of one's own, on idle replicas."""
    fleet, index, gate = Fleet(Random(1).random), PrefixIndex(), PrefillGate()
    for number in range(replicas):
        fleet.add(ReplicaSpec(f"replica-{number}", "pool", prefill_tokens_per_second=RATE))
    root, shared = chain_root([b"model"]), b"x" * 32_000
    prompts = [cut(root, [shared, b"question %d " % number * 20]) for number in range(50)]
    assert burst(fleet, index, gate, prompts, 0.25) <= 2


@pytest.mark.parametrize("seed", range(20))
async def test_of_the_prefills_that_compute_what_was_matched_the_first_one_leads(seed: int) -> None:
    """Whatever they share, whichever end, fail or are taken over: as if each of them were compared."""
    random, gate = Random(seed), PrefillGate(cold_tokens=10)
    open_now: list[Prefill] = []  # in the order in which they opened
    waiting: dict[Prefill, Follower] = {}

    def chain() -> list[int]:
        """A chain in a tree that forks in two at each block: whose hash names the way to it."""
        way, hashes = 1, list[int]()
        for _ in range(random.randint(1, 6)):
            way = way * 2 + random.randrange(2)
            hashes.append(way)
        return hashes

    def first_of(hashes: list[int], blocks: int, tokens: int) -> Prefill | None:
        sharing = (each for each in open_now if tokens - each.warm_tokens > 10 and each.shares(hashes, blocks))
        return next(sharing, None)

    for _ in range(300):
        hashes = chain()
        blocks = random.randint(0, len(hashes))
        tokens = random.choice((0, 5, 11, 30))
        leader = first_of(hashes, blocks, tokens)
        assert gate.holds_back(hashes, 0, Held(blocks, 0, tokens)) is (leader is not None)
        entered = gate.enter(
            0, hashes, matched_blocks=blocks, matched_tokens=tokens, prompt_tokens=41.0, prefill_seconds=1.0
        )
        assert isinstance(entered, Follower) is (leader is not None)
        if isinstance(entered, Follower):
            assert leader is not None
            assert leader.followers[-1] is entered
            open_now.append(entered.prefill)
            waiting[entered.prefill] = entered
        elif entered is not None:
            open_now.append(entered)
        if random.random() < 0.3:
            ended = open_now.pop(random.randrange(len(open_now)))
            if ended in waiting:
                waiting[ended].leave()
            ended.first_token() if random.random() < 0.5 else ended.failed()
        assert len(gate) == len(open_now)


def test_a_look_takes_no_longer_among_many_prefills_of_other_prompts() -> None:
    """Of a thousand cold prompts that a replica computes or queues, those that share nothing cost nothing."""

    def cost(others: int) -> int:
        gate = PrefillGate()
        for number in range(1, others + 1):
            gate.lead(0, [-number, number], 0, 0.0)
        leader = lead(gate)

        def act() -> None:
            assert gate.holds_back([*SHARED, 2], 0, Held(16, 16_384, 4_096))
            leader.first_token()
            gate.open(leader)

        return operations(act)

    assert cost(1_000) == cost(1)

"""A tenant is told of its own prefixes only, and of another's as of nothing at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import Held, Match, chain_root, cut
from proxy.model import CacheStatus, MissReason, RouteReason
from proxy.pipeline.disclosure import OwnPrefixes, Told, limited, told, undisclosed_tokens
from proxy.records import Candidate, Plan, ReplicaView, Tenant

RED, BLUE = Tenant("red", b"r" * 16), Tenant("blue", b"b" * 16)
PROMPT = cut(chain_root((b"", b"m")), (b"a" * 20_000,))
LONGER = cut(chain_root((b"", b"m")), (b"a" * 20_000, b"b" * 5_000))
NOTHING = Told(CacheStatus.MISS, MissReason.COLD, RouteReason.COLD, 0.0)


def view(number: int = 0) -> ReplicaView:
    """A replica that is up."""
    return ReplicaView(
        id=number,
        name=f"r{number}",
        available=True,
        rate_tokens_per_second=1.0,
        pending_tokens=0.0,
        in_flight=0,
        in_flight_limit=None,
        lateness_seconds=0.0,
        in_flight_seconds=0.0,
    )


def planned(matched_bytes: int, cache: CacheStatus, miss: MissReason, reason: RouteReason) -> tuple[Plan, Candidate]:
    """A plan whose first replica holds this many bytes, at four bytes a token."""
    candidate = Candidate(view(), matched_bytes, matched_bytes / 4, 1.0, 1.0)
    return Plan((candidate,), reason, miss, cache, 5_000.0), candidate


def test_a_tenant_knows_what_it_has_had_answered_and_nothing_else() -> None:
    """The whole prompt, the part that a longer one shares with it, and not a block for another tenant."""
    own = OwnPrefixes()
    assert own.known_blocks(RED, PROMPT) == 0
    own.add(RED, PROMPT, 0)
    assert own.known_blocks(RED, PROMPT) == len(PROMPT)
    assert own.known_blocks(RED, LONGER) == len(PROMPT)
    assert own.known_blocks(BLUE, PROMPT) == 0


def test_memory_of_prefixes_is_bounded_and_keeps_the_newest() -> None:
    """A hundred thousand prompts leave no more than two generations."""
    own = OwnPrefixes(blocks_most=1000)
    for number in range(2000):
        own.add(RED, cut(chain_root((b"%d" % number,)), (b"x" * 3_000,)), 0)
    newest = cut(chain_root((b"1999",)), (b"x" * 3_000,))
    assert own.known_blocks(RED, newest) == len(newest)
    assert own.known_blocks(RED, cut(chain_root((b"0",)), (b"x" * 3_000,))) == 0
    assert len(own._young) + len(own._old) <= 2 * (1000 + len(newest))  # noqa: SLF001 - internal state that no public name shows


def test_what_only_others_sent_looks_like_what_nobody_sent() -> None:
    """This holds for whatever the index knows of it: held here, held elsewhere, evicted or continued differently."""
    match = Match({0: Held(len(PROMPT), PROMPT.size_bytes, 5_000)}, len(PROMPT), PROMPT.size_bytes, 5_000)
    for known, matched_bytes, cache, miss, reason in (
        (match, PROMPT.size_bytes, CacheStatus.HIT, MissReason.NONE, RouteReason.WARM),
        (match, 0, CacheStatus.MISS, MissReason.ELSEWHERE, RouteReason.SPREAD),
        (match, 0, CacheStatus.MISS, MissReason.DOWN, RouteReason.COLD),
        (Match({}, evicted_from=0), 0, CacheStatus.MISS, MissReason.EVICTED, RouteReason.COLD),
        (Match({}), 0, CacheStatus.MISS, MissReason.COLD, RouteReason.COLD),
    ):
        plan, candidate = planned(matched_bytes, cache, miss, reason)
        assert told(plan, candidate, known, PROMPT, 0) == NOTHING


def test_ones_own_part_of_a_longer_match_is_told_and_no_more() -> None:
    """Another tenant went on from the same beginning; the asking one is told of the beginning."""
    match = Match({0: Held(len(LONGER), LONGER.size_bytes, 6_250)}, len(LONGER), LONGER.size_bytes, 6_250)
    plan, candidate = planned(LONGER.size_bytes, CacheStatus.HIT, MissReason.NONE, RouteReason.WARM)
    shown = told(plan, candidate, match, LONGER, len(PROMPT))
    assert (shown.cache, shown.miss, shown.reason) == (CacheStatus.PARTIAL, MissReason.NONE, RouteReason.WARM)
    assert shown.matched_tokens == LONGER.ends[len(PROMPT) - 1] / 4


def test_the_tokens_that_a_tenant_may_not_know_of_are_those_behind_its_own_part() -> None:
    """None if it may know of all, or if nothing is held."""
    _, candidate = planned(LONGER.size_bytes, CacheStatus.HIT, MissReason.NONE, RouteReason.WARM)
    _, nothing = planned(0, CacheStatus.MISS, MissReason.COLD, RouteReason.COLD)
    behind = LONGER.size_bytes - LONGER.ends[len(PROMPT) - 1]
    assert undisclosed_tokens(candidate, LONGER, 0) == candidate.matched_tokens
    assert undisclosed_tokens(candidate, LONGER, len(PROMPT)) == pytest.approx(behind / 4)
    assert undisclosed_tokens(candidate, LONGER, len(LONGER)) == 0.0
    for each, fingerprint, own_blocks in ((candidate, LONGER, None), (candidate, None, 1), (nothing, LONGER, 1)):
        assert undisclosed_tokens(each, fingerprint, own_blocks) == 0.0


def test_what_is_all_ones_own_is_told_as_it_is() -> None:
    """A hit, a pinned replica, a holder that is down; but not that others went on from there."""
    match = Match({0: Held(len(PROMPT), PROMPT.size_bytes, 5_000)}, len(PROMPT), PROMPT.size_bytes, 5_000)
    plan, candidate = planned(PROMPT.size_bytes, CacheStatus.HIT, MissReason.NONE, RouteReason.PINNED)
    assert told(plan, candidate, match, PROMPT, len(PROMPT)) == Told(
        CacheStatus.HIT, MissReason.NONE, RouteReason.PINNED, PROMPT.size_bytes / 4
    )
    plan, candidate = planned(PROMPT.size_bytes, CacheStatus.PARTIAL, MissReason.CHANGED, RouteReason.WARM)
    assert told(plan, candidate, match, LONGER, len(PROMPT)).miss is MissReason.NONE
    plan, candidate = planned(0, CacheStatus.BYPASS, MissReason.SHORT, RouteReason.SHORT)
    assert told(plan, candidate, None, None, 0) == Told(CacheStatus.BYPASS, MissReason.SHORT, RouteReason.SHORT, 0.0)


@given(st.integers(0, len(LONGER)), st.integers(1, len(LONGER)), st.integers(1, len(LONGER)))
def test_a_limited_match_holds_no_more_than_ones_own_blocks(own_blocks: int, here: int, there: int) -> None:
    """No replica, and nothing known, is deeper than what the tenant sent."""
    held = {0: Held(here, LONGER.ends[here - 1], 7 * here), 1: Held(there, LONGER.ends[there - 1], 7 * there)}
    known = max(here, there)
    match = Match(held, known, LONGER.ends[known - 1], 7 * known, evicted_from=0, diverged=True)
    found = limited(match, LONGER, own_blocks)
    assert found.known_blocks == min(own_blocks, known)
    assert all(have.blocks <= own_blocks for have in found.held.values())
    assert not found.evicted
    assert not found.diverged


def test_a_limited_match_ends_at_the_end_of_ones_own_blocks() -> None:
    """Tokens in proportion to bytes; a replica that holds no more than that holds what it holds."""
    ends = LONGER.ends
    held = {0: Held(5, ends[4], 1_000), 1: Held(3, ends[2], 600)}
    found = limited(Match(held, 5, ends[4], 1_000), LONGER, 4)
    assert (found.known_blocks, found.known_bytes) == (4, ends[3])
    assert found.known_tokens == round(1_000 * ends[3] / ends[4])
    assert (found.held[0].blocks, found.held[0].size_bytes) == (4, ends[3])
    assert found.held[0].tokens == round(1_000 * ends[3] / ends[4])
    assert found.held[1] is held[1]
    assert limited(Match(held, 5, ends[4], 1_000), LONGER, 0).held == {}
    whole = limited(Match(held, 5, ends[4], 1_000), LONGER, 9)
    assert (whole.known_blocks, whole.held[0].tokens) == (5, 1_000)

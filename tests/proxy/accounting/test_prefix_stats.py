"""Which prefix an answer's cached tokens are put down to, and which misses are worth showing."""

from __future__ import annotations

from array import array

import pytest

from cache import Fingerprint, Placement
from proxy.accounting.prefix_stats import MISSES_AT_MOST, PREFIXES_AT_MOST, PrefixStats, PrefixTable
from proxy.model import CacheStatus, Ending, Endpoint, MissReason, RouteReason
from proxy.records import Outcome, Plan, ReplicaView, Times, Usage
from tests.support.clock import FakeClock

REPLICA = ReplicaView(0, "replica-1", True, 1000.0, 0.0, 0, None, 0.0, 0.05)


def chain(*names: str) -> list[int]:
    """The hashes of a prompt with a block for each name."""
    return [hash(names[: place + 1]) % 2**64 for place in range(len(names))]


def rows(table: PrefixTable) -> list[tuple[int, int, int]]:
    """Tokens, hits and saved tokens of each row, the best first."""
    return [(row.tokens, row.hits, row.saved_tokens) for row in table.best(10)]


def test_a_head_that_prompts_share_is_one_prefix() -> None:
    """However many different questions follow it."""
    table = PrefixTable()
    for question in "abc":
        table.hit("m", chain("doc", question), 1, 100, 90, 1.0)
    assert rows(table) == [(100, 3, 270)]


def test_a_conversation_is_one_prefix_that_grows() -> None:
    """Each turn finds the one before it cached; its row moves along."""
    table = PrefixTable()
    turns = chain("one", "two", "three", "four")
    for known in (1, 2, 3):
        table.hit("m", turns[: known + 1], known, 100 * known, 100 * known, float(known))
    assert rows(table) == [(300, 3, 600)]


def test_what_lies_below_a_shared_head_has_a_row_of_its_own() -> None:
    """Once two prompts went on differently the head stays where it is."""
    table = PrefixTable()
    table.hit("m", chain("doc", "a", "x"), 1, 100, 100, 1.0)
    table.hit("m", chain("doc", "b", "x"), 1, 100, 100, 2.0)
    table.hit("m", chain("doc", "a", "x", "y"), 3, 150, 150, 3.0)
    assert rows(table) == [(100, 2, 200), (150, 1, 150)]


def test_a_fork_is_noticed_from_below_as_well() -> None:
    """A deeper match that left the row's way shows that more than one goes through it."""
    table = PrefixTable()
    table.hit("m", chain("doc", "a"), 1, 100, 100, 1.0)
    table.hit("m", chain("doc", "b", "c"), 2, 150, 150, 2.0)
    assert sorted(rows(table)) == [(100, 1, 100), (150, 1, 150)]


def test_the_table_is_bounded_and_keeps_what_saved_most() -> None:
    """Ten thousand prompts that come once do not push the one out that counts."""
    table = PrefixTable()
    table.hit("m", chain("best"), 1, 5, 1_000_000, 0.0)
    for number in range(10_000):
        table.hit("m", chain(f"p{number}"), 1, 5, 5, float(number))
    assert rows(table)[0] == (5, 1, 1_000_000)
    assert len(table.best(10_000)) <= PREFIXES_AT_MOST


def outcome(miss: MissReason, model: str = "m") -> Outcome:
    """A finished chat."""
    plan = Plan((), RouteReason.WARM, miss, CacheStatus.PARTIAL, 10.0)
    return Outcome("id", Endpoint.CHAT, model, True, Ending.COMPLETE, 200, Times(0.0), REPLICA, plan)


def placement(held_blocks: int) -> Placement:
    """Of a prompt of two blocks."""
    fingerprint = Fingerprint(array("Q", chain("a", "b")), array("I", [512, 1024]))
    return Placement(1, 0, 0, fingerprint, 0.0, held_blocks=held_blocks, predicted_tokens=80)


def sightings() -> PrefixStats:
    """With model names as they are."""
    return PrefixStats(lambda model: model or "other", FakeClock().unix)


@pytest.mark.parametrize(("reason", "count"), [(MissReason.NONE, 0), (MissReason.SHORT, 0), (MissReason.EVICTED, 1)])
def test_only_what_could_have_been_found_counts_as_missed(reason: MissReason, count: int) -> None:
    """New text and short prompts are no misses to look at."""
    seen = sightings()
    seen.add(outcome(reason), placement(1), Usage(100, cached_tokens=80))
    report = seen.report()
    assert report is not None
    assert (len(report.prefixes), len(report.misses)) == (1, count)


def test_only_tokens_that_the_upstream_reported_count() -> None:
    """A prediction alone, or an answer that did not say, is no hit of a prefix."""
    for usage in (None, Usage(100), Usage(100, cached_tokens=0)):
        seen = sightings()
        seen.add(outcome(MissReason.NONE), placement(1), usage)
        assert seen.report() is None


def test_it_reports_only_what_is_new_and_not_more_than_its_bound() -> None:
    """A report that the supervisor did not take is made again."""
    seen = sightings()
    for _ in range(MISSES_AT_MOST + 5):
        seen.add(outcome(MissReason.COLD), placement(0), Usage(100, cached_tokens=0))
    report = seen.report()
    assert report is not None
    assert len(report.misses) == MISSES_AT_MOST
    assert seen.report() == report
    seen.report_sent()
    assert seen.report() is None

"""Settlement: what a finished request teaches index, fleet and token counts, and when it is counted."""

from __future__ import annotations

import dataclasses
from array import array
from typing import Any, cast

import pytest

from cache import Fingerprint, Match, Placement
from proxy.fleet import Fleet, ReplicaSpec
from proxy.model import Ending
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.settlement import COUNTED_TOGETHER, MAX_ADDED_TOKENS, Settlement
from proxy.records import Candidate, Media, Outcome, Usage
from proxy.routing.token_estimate import TokenCounts
from tests.proxy.pipeline.bench import POOL, Bench
from tests.support.clock import FakeClock

USAGE = Usage(4_000, 30, 1_000)
PROMPT_BYTES = 9_000


class Journal:
    """Keeps what it is taught: an answer's prompt, cached and output tokens, or None for a placement that ended."""

    def __init__(self) -> None:
        self.taught: list[tuple[int, int | None, int] | None] = []

    def answered(
        self, placement: Placement, prompt_tokens: int, cached_tokens: int | None, output_tokens: int
    ) -> None:
        self.taught.append((prompt_tokens, cached_tokens, output_tokens))

    def settled(self, placement: Placement) -> None:
        self.taught.append(None)


class Counters:
    """Keeps the order in which requests are counted. A status in `defects` raises."""

    def __init__(self) -> None:
        self.counted: list[tuple[int, Usage | None, int | None]] = []
        self.defects: set[int] = set()
        self.implausible = 0
        self.gains: list[int] = []
        self.forgotten: list[tuple[int, int, str]] = []
        self.omitted_cached_tokens: int | None = None

    def known_usage(self, outcome: Outcome) -> Usage | None:
        usage = outcome.usage
        if usage is not None and usage.cached_tokens is None:
            return dataclasses.replace(usage, cached_tokens=self.omitted_cached_tokens)
        return usage

    def count(self, outcome: Outcome, usage: Usage | None, predicted_tokens: int | None) -> None:
        if outcome.status in self.defects:
            raise ZeroDivisionError
        self.counted.append((outcome.status, usage, predicted_tokens))

    def count_implausible(self, outcome: Outcome) -> None:
        self.implausible += 1

    def label(self, outcome: Outcome) -> str:
        return outcome.model or "other"

    def count_routing_gain(self, outcome: Outcome, tokens: int) -> None:
        self.gains.append(tokens)

    def forget(self, replica: int, name: str) -> None:
        self.forgotten.append((len(self.counted), replica, name))


class PrefixStats:
    """Counts what it is given."""

    def __init__(self) -> None:
        self.added = 0

    def add(self, outcome: Outcome, placement: Placement | None, usage: Usage | None) -> None:
        self.added += 1


class Baseline:
    """Round robin would have had a hundred cached tokens fewer."""

    def answered(self, placement: Placement, prompt_tokens: int, cached_tokens: int | None) -> int | None:
        assert placement.replica == 0
        return None if cached_tokens is None else cached_tokens - 100

    def count(self, label: str, gain: int) -> int:
        assert label == "m"
        return gain


class AccessLog:
    """Keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def write(self, line: Any) -> None:
        self.lines.append(line)


class Learner(Fleet):
    """A fleet that keeps what it is taught."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.5)
        self.add(ReplicaSpec("r0", POOL))
        self.prefills: list[tuple[float, float | None]] = []
        self.decodes: list[tuple[int, float]] = []

    def observe_prefill(self, charge: Any, uncached_tokens: float, prefill_seconds: float | None = None) -> None:
        self.prefills.append((uncached_tokens, prefill_seconds))

    def observe_decode(self, number: int, decode_seconds: float) -> None:
        self.decodes.append((number, decode_seconds))


class Attempt:
    """An attempt at the first replica, with or without a placement."""

    def __init__(self, candidate: Candidate, placement: Placement | None) -> None:
        self.candidate, self.placement = candidate, placement
        self.replica, self.charge = candidate.replica.id, None


class Settling:
    """A settlement whose collaborators keep what they are told."""

    def __init__(self) -> None:
        self.clock, self.journal, self.fleet = FakeClock(), Journal(), Learner()
        self.tokens, self.counters, self.prefixes = TokenCounts(), Counters(), PrefixStats()
        self.access_log = AccessLog()
        self.settlement = Settlement(
            journal=cast("Any", self.journal),
            fleet=self.fleet,
            tokens=self.tokens,
            accounts=cast("Any", self.counters),
            prefix_stats=cast("Any", self.prefixes),
            baseline=cast("Any", Baseline()),
            access_log=cast("Any", self.access_log),
            clock=self.clock,
        )

    def exchange(
        self, usage: Usage | None = USAGE, *, placed: bool = True, status: int = 200, **prompt: Any
    ) -> Exchange:
        """A streamed request that the first replica answered, with its first token after half of two seconds."""
        made = Bench().exchange(stream=True, prompt="x" * PROMPT_BYTES)
        assert made.plan is not None
        assert made.prompt is not None
        made.prompt = dataclasses.replace(made.prompt, size_bytes=PROMPT_BYTES, **prompt)
        fingerprint = Fingerprint(array("Q", (1,)), array("I", (PROMPT_BYTES,)))
        placement = Placement(1, 0, 0, fingerprint, 0.0, predicted_tokens=70) if placed else None
        made.attempt = cast("Any", Attempt(made.plan.chosen, placement))
        made.usage, made.status, made.ending = usage, status, Ending.COMPLETE
        made.first_token_seconds = self.clock.monotonic() - 1.0
        return made

    def settle(self, usage: Usage | None = USAGE, **more: Any) -> Outcome:
        return self.settlement.settle(self.exchange(usage, **more))

    def learned_tokens_per_byte(self) -> bool:
        """True if the model's tokens per byte are no longer the first guess."""
        return self.tokens.tokens_per_byte("m") != TokenCounts().tokens_per_byte("m")


# -- the index


def test_the_index_learns_the_reported_tokens_of_a_prompt_that_was_placed() -> None:
    """Of a prompt that was not placed there is nothing to learn."""
    settling = Settling()
    settling.settle()
    settling.settle(placed=False)
    assert settling.journal.taught == [(4_000, 1_000, 30)]


@pytest.mark.parametrize("usage", [None, dataclasses.replace(USAGE, longest_call_tokens=3_000)])
def test_a_placement_ends_without_a_lesson_if_its_tokens_are_unknown_or_a_sum_of_calls(usage: Usage | None) -> None:
    """It must end all the same, or it counts as in flight for ever."""
    settling = Settling()
    settling.settle(usage)
    assert settling.journal.taught == [None]


def test_cached_tokens_teach_nothing_if_the_request_asked_not_to_use_the_cache() -> None:
    """Its zero does not mean that the prefix is gone."""
    settling = Settling()
    settling.settle(dataclasses.replace(USAGE, cached_tokens=0), skips_cache=True)
    assert settling.journal.taught == [(4_000, None, 30)]


def test_a_request_that_asked_not_to_use_the_cache_is_compared_with_no_prediction() -> None:
    """Nor with round robin, which could not have reused anything either."""
    settling = Settling()
    settling.settle(skips_cache=True)
    settling.settle()
    settling.settlement.count()
    assert [predicted for _, _, predicted in settling.counters.counted] == [None, 70]
    assert settling.counters.gains == [900]


def test_nothing_is_claimed_over_round_robin_for_a_request_that_only_some_replicas_can_serve() -> None:
    """Round robin over replicas of which some refuse a model would have had no choice either."""
    settling = Settling()
    exchange = settling.exchange()
    exchange.is_restricted = True
    settling.settlement.settle(exchange)
    settling.settle()
    settling.settlement.count()
    assert [predicted for _, _, predicted in settling.counters.counted] == [70, 70]
    assert settling.counters.gains == [900]


@pytest.mark.parametrize(("in_flight", "doubted"), [(0, 4), (1, 0)])
def test_cached_tokens_that_spare_no_time_are_not_believed(in_flight: int, doubted: int) -> None:
    """If the request had the replica to itself: others make it wait, however much is cached."""
    settling = Settling()
    for cached in [0] * 4 + [3_500] * 8:
        exchange = settling.exchange(Usage(4_000, 30, cached))
        exchange.match = Match({}, known_blocks=1, known_tokens=4_000)
        exchange.sent_seconds = settling.clock.monotonic() - 2.0
        attempt = cast("Any", exchange.attempt)
        view = dataclasses.replace(attempt.candidate.replica, in_flight=in_flight)
        attempt.candidate = dataclasses.replace(attempt.candidate, replica=view)
        settling.settlement.settle(exchange)
    assert settling.counters.implausible == doubted
    assert exchange.counted_usage == Usage(4_000, 30, None if doubted else 3_500)


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("cached", [0, 4_000])
def test_impossible_counts_are_no_savings_and_teach_nothing(cached: int, placed: bool) -> None:
    """A negative count is not a lost prefix, and one above the prompt's is not a prompt that was all cached."""
    settling = Settling()
    settling.settle(Usage(4_000, 30, cached, inconsistent=True), placed=placed)
    settling.settlement.count()
    assert settling.counters.implausible == 1
    assert settling.journal.taught == [(4_000, None, 30)] * placed
    assert [usage and usage.cached_tokens for _, usage, _ in settling.counters.counted] == [None]


@pytest.mark.parametrize(
    ("tokens", "cached", "lesson"),
    [
        (0, None, None),
        (0, 0, None),
        (1, 0, (1, 0, 30)),
        (1_900, None, None),
        (1_900, 0, (1_900, 0, 30)),
        (2_000, None, (2_000, None, 30)),
    ],
)
def test_counts_of_a_part_of_the_prompt_teach_nothing_about_it(
    tokens: int, cached: int | None, lesson: tuple[int, int, int] | None
) -> None:
    """Some engines report only what they computed, and nothing as cached."""
    settling = Settling()
    settling.settlement.settle(_held(settling, Usage(tokens, 30, cached)))
    assert settling.journal.taught == [lesson]
    assert settling.learned_tokens_per_byte() is (lesson is not None)
    assert settling.fleet.decodes == [(0, 1.0)]


@pytest.mark.parametrize(("tokens", "lesson"), [(1_900, None), (4_000, (4_000, 0, 30))])
def test_an_omitted_count_does_not_make_a_part_of_the_prompt_the_whole(
    tokens: int, lesson: tuple[int, int, int] | None
) -> None:
    """Although it counts as zero where other responses of the upstream have reported some."""
    settling = Settling()
    settling.counters.omitted_cached_tokens = 0
    settling.settlement.settle(_held(settling, Usage(tokens, 30)))
    assert settling.journal.taught == [lesson]


def _held(settling: Settling, usage: Usage) -> Exchange:
    """Return an exchange whose replica holds 4,000 tokens of the prompt."""
    exchange = settling.exchange(usage)
    assert exchange.attempt is not None
    assert exchange.attempt.placement is not None
    exchange.attempt.placement = dataclasses.replace(exchange.attempt.placement, held_tokens=4_000)
    return exchange


@pytest.mark.parametrize(
    ("tokens", "prompt", "learned"),
    [
        (PROMPT_BYTES + MAX_ADDED_TOKENS, {}, True),
        (PROMPT_BYTES + MAX_ADDED_TOKENS + 1, {}, False),
        (10**9, {}, False),
        (10**6, {"media": (Media("image", 0, 100),)}, True),
        (10**6, {"has_hidden_parts": True}, True),
        (10**6, {"pinned_to": "resp_1"}, True),
    ],
)
def test_more_tokens_than_a_prompt_can_have_teach_nothing(tokens: int, prompt: dict[str, Any], learned: bool) -> None:
    """They would fill the replica's budget, and everything else known of it would be evicted."""
    settling = Settling()
    settling.settle(Usage(tokens, 30, 16), **prompt)
    assert settling.journal.taught == [(tokens, 16, 30) if learned else None]


def test_cached_tokens_that_the_upstream_omits_count_as_the_counters_know_them() -> None:
    """For the index, the fleet and the totals alike."""
    settling = Settling()
    settling.counters.omitted_cached_tokens = 0
    settling.settle(Usage(4_000, 30))
    settling.settlement.count()
    assert settling.journal.taught == [(4_000, 0, 30)]
    assert settling.fleet.prefills == [(4_000, None)]
    assert settling.counters.counted == [(200, Usage(4_000, 30, 0), 70)]


@pytest.mark.parametrize(
    ("match", "doubted"),
    [
        (Match({}), 4),
        (Match({}, known_blocks=1, known_tokens=2_900), 4),
        (Match({}, known_blocks=1, known_tokens=3_500), 0),
        (Match({}, known_blocks=1, known_tokens=2_900, evicted_from=0), 0),
    ],
    ids=["unknown", "a long part unknown", "known", "known until it was evicted"],
)
def test_a_replica_that_reports_new_prompts_as_wholly_cached_is_not_believed(match: Match, doubted: int) -> None:
    """From the fifth on, though all begin with what is known; what is known somewhere may well be cached there."""
    settling = Settling()
    for _ in range(8):
        exchange = settling.exchange(Usage(4_000, 30, 4_000))
        exchange.match = match
        settling.settlement.settle(exchange)
    settling.settlement.count()
    assert settling.counters.implausible == doubted
    believed = 8 - doubted
    assert [taught and taught[1] for taught in settling.journal.taught] == [4_000] * believed + [None] * doubted
    assert len(settling.fleet.prefills) == believed
    assert [usage and usage.cached_tokens for _, usage, _ in settling.counters.counted][believed:] == [None] * doubted
    settling.settlement.forget(0, "r0")
    assert settling.settlement.settle(exchange).usage == Usage(4_000, 30, 4_000)
    assert settling.journal.taught[-1] == (4_000, 4_000, 30)  # another replica may have its number now


# -- fleet and token counts


def test_the_fleet_learns_what_was_computed_and_how_long_was_decoded() -> None:
    """With the engine's own time of the prefill, if it reports one."""
    settling = Settling()
    settling.settle()
    settling.settle(dataclasses.replace(USAGE, prefill_seconds=0.25))
    assert settling.fleet.prefills == [(3_000, None), (3_000, 0.25)]
    assert settling.fleet.decodes == [(0, 1.0), (0, 1.0)]
    assert settling.learned_tokens_per_byte()


@pytest.mark.parametrize("ending", [each for each in Ending if each is not Ending.COMPLETE])
def test_a_request_that_did_not_end_well_teaches_the_fleet_nothing(ending: Ending) -> None:
    """Its times and tokens are no measure."""
    settling = Settling()
    exchange = settling.exchange()
    exchange.ending = ending
    settling.settlement.settle(exchange)
    assert (settling.fleet.prefills, settling.fleet.decodes) == ([], [])
    assert not settling.learned_tokens_per_byte()


def test_without_cached_tokens_or_a_first_token_neither_rate_is_learned() -> None:
    """A plain response shows no first token."""
    settling = Settling()
    exchange = settling.exchange(Usage(4_000, 30))
    exchange.first_token_seconds = None
    settling.settlement.settle(exchange)
    assert (settling.fleet.prefills, settling.fleet.decodes) == ([], [])
    assert settling.learned_tokens_per_byte()


@pytest.mark.parametrize("kind", ["text", "sum of calls", "stored context", "hidden parts"])
def test_only_tokens_of_a_prompts_own_text_teach_how_many_a_byte_has(kind: str) -> None:
    """Others include what the body does not contain."""
    settling = Settling()
    usage = dataclasses.replace(USAGE, longest_call_tokens=3_000) if kind == "sum of calls" else USAGE
    exchange = settling.exchange(usage, has_hidden_parts=kind == "hidden parts")
    if kind == "stored context":
        exchange.stored = cast("Any", object())
    settling.settlement.settle(exchange)
    assert settling.learned_tokens_per_byte() is (kind == "text")


def test_what_a_picture_costs_is_learned_beside_the_text() -> None:
    """And teaches nothing about text."""
    settling = Settling()
    picture = Media("image", 1_000_000)
    exchange = settling.exchange(Usage(4_250, 1, 0), media=(picture,))
    assert exchange.prompt is not None
    exchange.prompt = dataclasses.replace(exchange.prompt, size_bytes=1_000_000 + PROMPT_BYTES)
    before = settling.tokens.predict("m", 1_000_000, [picture])
    settling.settlement.settle(exchange)
    assert settling.tokens.predict("m", 1_000_000, [picture]) != before
    assert not settling.learned_tokens_per_byte()


# -- counting


def test_requests_are_counted_several_at_a_time_in_their_order() -> None:
    """The remaining requests are counted before a report."""
    settling = Settling()
    for status in range(COUNTED_TOGETHER - 1):
        settling.settle(status=status)
    assert settling.counters.counted == []
    settling.settle(status=900)
    settling.settle(status=901)
    statuses = [*range(COUNTED_TOGETHER - 1), 900]
    assert [status for status, _, _ in settling.counters.counted] == statuses
    settling.settlement.count()
    settling.settlement.count()
    assert [status for status, _, _ in settling.counters.counted] == [*statuses, 901]
    assert settling.prefixes.added == COUNTED_TOGETHER + 1


def test_a_request_that_cannot_be_counted_does_not_keep_the_others() -> None:
    """It is not tried again either."""
    settling = Settling()
    settling.counters.defects = {500}
    for status in (200, 500, 201):
        settling.settle(status=status)
    with pytest.raises(ZeroDivisionError):
        settling.settlement.count()
    settling.settlement.count()
    assert [status for status, _, _ in settling.counters.counted] == [200, 201]


def test_the_requests_of_a_replica_are_counted_before_it_is_forgotten() -> None:
    """Its number may be given to another."""
    settling = Settling()
    settling.settle()
    settling.settle()
    settling.settlement.forget(0, "r0")
    assert settling.counters.forgotten == [(2, 0, "r0")]


def test_cached_tokens_due_to_routing_are_counted_of_prompts_that_were_placed() -> None:
    """If the upstream reports cached tokens."""
    settling = Settling()
    settling.settle()
    settling.settle(placed=False)
    settling.settle(None)
    settling.settle(Usage(4_000, 30))
    settling.settlement.count()
    assert settling.counters.gains == [900]
    assert [predicted for _, _, predicted in settling.counters.counted] == [70, None, 70, 70]


def test_each_request_is_logged_at_once() -> None:
    """Also one that no replica answered."""
    settling = Settling()
    settling.settle()
    refused = Bench().exchange()
    refused.status, refused.ending = 429, Ending.REFUSED
    outcome = settling.settlement.settle(refused)
    assert (outcome.status, outcome.replica) == (429, None)
    assert [line.status for line in settling.access_log.lines] == [200, 429]
    assert settling.journal.taught == [(4_000, 1_000, 30)]

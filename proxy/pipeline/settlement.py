"""Phase 8: learn from a finished request and count it. Runs on every path and waits for nothing.

The index learns what was really cached, the fleet how fast the replica was, and the token counts how long the prompt
was. This happens at once, because the next request is routed by it. Metrics are counted for several requests at a
time (`count`), at the latest before each report, while code and tables are in the processor's caches.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Final

from cache import Journal, Match, Placement
from proxy.accounting.access_log import AccessLog, access_line
from proxy.accounting.counters import RequestCounters
from proxy.accounting.plausibility import CachedCounts, SparedTime, is_impossible
from proxy.accounting.prefix_stats import PrefixStats
from proxy.accounting.round_robin import RoundRobinBaseline
from proxy.clock import Clock
from proxy.fleet import Fleet
from proxy.model import Ending
from proxy.pipeline.exchange import Exchange
from proxy.records import Outcome, Usage
from proxy.routing.token_estimate import TokenCounts
from proxy.wire.text_alone import TextAlone

COUNTED_TOGETHER: Final = 32  # requests

MAX_ADDED_TOKENS: Final = 32_768
MAX_MEDIA_TOKENS: Final = 1_048_576
"""A byte has at most one token; a template may add some, and a picture, sound or film has many."""

PART_SHARE: Final = 0.5
"""A prompt has at least this share of the tokens that an earlier prompt had with which it begins."""

_COMPLETE: Final = Ending.COMPLETE  # a constant: the member of an enum is looked up in Python

_Finished = tuple[Outcome, Usage | None, Placement | None, bool]


class Settlement:
    """Settles requests. One per worker. Without `access_log` no access lines are written."""

    def __init__(
        self,
        journal: Journal,
        fleet: Fleet,
        tokens: TokenCounts,
        accounts: RequestCounters,
        prefix_stats: PrefixStats,
        baseline: RoundRobinBaseline,
        access_log: AccessLog | None,
        clock: Clock,
    ) -> None:
        self._journal = journal
        self._fleet = fleet
        self._tokens = tokens
        self._counters = accounts
        self._prefix_stats = prefix_stats
        self._baseline = baseline
        self._access_log = access_log
        self._clock = clock
        self._text_alone = TextAlone()
        self._cached_counts = CachedCounts()
        self._spared_time = SparedTime()
        self._uncounted: deque[_Finished] = deque()

    def settle(self, exchange: Exchange) -> Outcome:
        """Learn from a finished request, count it and log it."""
        outcome = exchange.outcome(self._clock.monotonic())
        usage = self._counters.known_usage(outcome)
        placement = None if exchange.attempt is None else exchange.attempt.placement
        skips_cache = exchange.prompt is not None and exchange.prompt.skips_cache
        if usage is not None:
            usage = self._plausible(exchange, outcome, usage, placement)
        exchange.counted_usage = usage
        counts_prompt = usage is not None and _counts_prompt(exchange, usage, placement)
        if placement is not None:
            self._teach_index(placement, usage if counts_prompt else None, skips_cache=skips_cache)
        if usage is not None:
            self._teach_fleet(exchange, outcome, usage, counts_prompt=counts_prompt)
        if self._access_log is not None:
            self._access_log.write(access_line(exchange.call, outcome, self._clock.unix()))
        # of a request that must be computed anew, neither a prediction nor a baseline can be compared
        self._uncounted.append((outcome, usage, None if skips_cache else placement, exchange.is_restricted))
        if len(self._uncounted) >= COUNTED_TOGETHER:
            self.count()
        return outcome

    def _plausible(self, exchange: Exchange, outcome: Outcome, usage: Usage, placement: Placement | None) -> Usage:
        """Return the usage without an implausible count of cached tokens, of which nothing is learned or counted."""
        if not is_impossible(usage):
            if placement is None or (usage.cached_tokens is None and not _is_unknown(exchange.match)):
                return usage
            about = placement.replica, usage.prompt_tokens, usage.cached_tokens or 0
            new_tokens = _new_tokens(exchange.match, usage, placement)
            is_new_and_cached = self._cached_counts.is_doubtful(*about, new_tokens=new_tokens)
            spares_no_time = self._spared_time.is_doubtful(*about, _seconds_alone(exchange, outcome, usage))
            if not is_new_and_cached and not spares_no_time:
                return usage
        self._counters.count_implausible(outcome)
        return replace(usage, cached_tokens=None)

    def count(self) -> None:
        """Count the requests that were settled and not counted yet."""
        waiting = self._uncounted
        while waiting:
            # removed first, so that a defect in counting one does not keep the others
            outcome, usage, placement, is_restricted = waiting.popleft()
            self._counters.count(outcome, usage, None if placement is None else placement.predicted_tokens)
            self._prefix_stats.add(outcome, placement, usage)
            if placement is not None and usage is not None:
                self._count_routing_gain(outcome, usage, placement, is_restricted=is_restricted)

    def forget(self, replica: int, name: str) -> None:
        """Count the remaining requests, and drop what is kept for a replica that is gone for good."""
        self.count()
        self._counters.forget(replica, name)
        self._cached_counts.forget(replica)
        self._spared_time.forget(replica)

    def _count_routing_gain(
        self, outcome: Outcome, usage: Usage, placement: Placement, *, is_restricted: bool
    ) -> None:
        # where only some replicas can serve a request, round robin has no free choice either: nothing is claimed
        cached_tokens = None if is_restricted else usage.cached_tokens
        gain = self._baseline.answered(placement, usage.prompt_tokens, cached_tokens)
        if gain is not None:
            label = self._counters.label(outcome)
            self._counters.count_routing_gain(outcome, self._baseline.count(label, gain))

    def _teach_index(self, placement: Placement, usage: Usage | None, *, skips_cache: bool) -> None:
        if usage is None or usage.longest_call_tokens:  # sums of several calls show nothing about this prompt
            self._journal.settled(placement)
        else:
            cached_tokens = None if skips_cache else usage.cached_tokens
            self._journal.answered(placement, usage.prompt_tokens, cached_tokens, usage.output_tokens)

    def _teach_fleet(self, exchange: Exchange, outcome: Outcome, usage: Usage, *, counts_prompt: bool) -> None:
        prompt, attempt, times = exchange.prompt, exchange.attempt, outcome.times
        if prompt is None or attempt is None or outcome.ending is not _COMPLETE:
            return
        counts_prompt = counts_prompt and not usage.longest_call_tokens and exchange.stored is None
        if counts_prompt and self._text_alone.holds_for(prompt):
            self._tokens.observe(prompt.model, prompt.size_bytes, usage.prompt_tokens, prompt.media)
        computed_tokens = usage.prompt_tokens - (usage.cached_tokens or 0)
        if usage.cached_tokens is not None:
            self._fleet.observe_prefill(attempt.charge, computed_tokens, usage.prefill_seconds or None)
        if times.first_token_seconds is not None:
            self._fleet.observe_decode(attempt.replica, times.ended_seconds - times.first_token_seconds)


def _is_unknown(match: Match | None) -> bool:
    """Return True if no part of the prompt was known anywhere: if nothing is reported as cached, nothing was."""
    return match is not None and match.known_blocks == 0 and not match.evicted


def _new_tokens(match: Match | None, usage: Usage, placement: Placement) -> int:
    """Return how many tokens of a prompt were known nowhere before; 0 if that is uncertain."""
    if match is None or match.evicted:
        return 0
    return usage.prompt_tokens - match.known_tokens - placement.allowance_tokens


def _seconds_alone(exchange: Exchange, outcome: Outcome, usage: Usage) -> float | None:
    """Return the time until the first token if the request had its replica to itself, else None."""
    attempt, times = exchange.attempt, outcome.times
    if attempt is None or attempt.candidate.replica.in_flight or outcome.ending is not _COMPLETE:
        return None
    if usage.prefill_seconds:
        return usage.prefill_seconds
    if times.first_token_seconds is None or times.sent_seconds is None:
        return None
    return times.first_token_seconds - times.sent_seconds


def _counts_prompt(exchange: Exchange, usage: Usage, placement: Placement | None) -> bool:
    """Return False if the tokens cannot be those of this prompt: fewer than are known, or more than it can have.

    Some upstreams count only what they computed, and report no cached tokens in that response even if they do in
    others. Far too many would evict all others from the index.
    """
    if usage.prompt_tokens <= 0:
        return False
    reported = exchange.usage
    if usage.cached_tokens is None or (reported is not None and reported.cached_tokens is None):
        held_tokens = 0 if placement is None else placement.held_tokens
        if usage.prompt_tokens < PART_SHARE * held_tokens:
            return False
    prompt = exchange.prompt
    if prompt is None or prompt.has_hidden_parts or prompt.pinned_to is not None:  # it contains more than the body
        return True
    most = prompt.size_bytes + MAX_ADDED_TOKENS + MAX_MEDIA_TOKENS * len(prompt.media)
    return usage.prompt_tokens <= most

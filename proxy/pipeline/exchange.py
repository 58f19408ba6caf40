"""One request on its way: what the phases learn of it, gathered for the one `Outcome` at its end.

It is the only mutable thing of a request, and has one writer at a time. It must not decide anything.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from cache import Content, ContextRow, Fingerprint, Match
from proxy.fleet.pools import ServedPool
from proxy.metrics.definitions import INTER_TOKEN
from proxy.model import Call, Edit, Ending, Outcome, Plan, Prompt, RouteReason, Times, Usage
from proxy.pipeline.attempt import Attempt
from proxy.pipeline.disclosure import told
from proxy.wire.headers import cairn_headers


@dataclass(frozen=True, slots=True)
class StoredUse:
    """A stored context that goes before this prompt. Its end is in seconds since 1970 by Redis's clock."""

    row: ContextRow
    content: Content
    expires_unix_seconds: float
    reset_ttl_seconds: float | None = None


class Exchange:
    """What is known so far. `sent_seconds` and the stamps after it belong to the attempt that answered."""

    __slots__ = (
        "asked_usage",
        "attempt",
        "avoid",
        "background_id",
        "call",
        "context_notes",
        "context_result",
        "edits",
        "ending",
        "error_code",
        "fingerprint",
        "first_byte_seconds",
        "first_token_seconds",
        "inter_token_counts",
        "inter_token_seconds",
        "is_warming",
        "last_token_seconds",
        "match",
        "model",
        "only_checked",
        "only_explained",
        "own_blocks",
        "pinned_replica",
        "plan",
        "pool",
        "progress_seconds",
        "prompt",
        "response_bytes",
        "retries",
        "sent_seconds",
        "status",
        "stored",
        "usage",
        "waited_seconds",
    )

    def __init__(self, call: Call) -> None:
        self.call = call
        self.model: str | None = None
        self.prompt: Prompt | None = None
        self.fingerprint: Fingerprint | None = None
        self.match: Match | None = None
        self.pool: ServedPool | None = None
        self.own_blocks: int | None = None  # blocks that the tenant itself has sent before; None: all may be told
        self.only_explained = False  # nothing is sent, and the plan is told to the client
        self.pinned_replica: int | None = None  # the number of the replica where the object lies that is named
        self.plan: Plan | None = None
        self.background_id: str | None = None  # of a response that is computed in the background
        self.avoid: frozenset[str] = frozenset()  # names of replicas that are not to be chosen
        self.stored: StoredUse | None = None
        self.is_warming = False  # sent by Cairn itself, so that a context is computed before it is used
        self.only_checked = False  # the stored context was to be checked, and nothing else done
        self.context_notes: tuple[tuple[bytes, bytes], ...] = ()
        self.context_result = ""  # what became of the stored context that was named, in the words of the metric
        self.attempt: Attempt | None = None
        self.edits: tuple[Edit, ...] = ()
        self.asked_usage = False  # the stream reports usage because Cairn asked, so that chunk is withheld
        self.progress_seconds = 0.0
        self.retries = 0
        self.status = 0
        self.ending = Ending.INTERNAL  # until something better is known
        self.error_code: str | None = None
        self.sent_seconds: float | None = None
        self.first_byte_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.last_token_seconds = 0.0
        self.inter_token_counts: list[int] | None = None
        self.inter_token_seconds = 0.0
        self.waited_seconds = 0.0
        self.usage: Usage | None = None
        self.response_bytes = 0

    def token_came(self, now_seconds: float) -> bool:
        """Stamp a piece of the stream that carries tokens; True for the first."""
        if self.first_token_seconds is None:
            self.first_token_seconds = self.last_token_seconds = now_seconds
            return True
        counts = self.inter_token_counts
        if counts is None:
            counts = self.inter_token_counts = [0] * (len(INTER_TOKEN.buckets) + 1)
        gap = now_seconds - self.last_token_seconds
        counts[bisect_left(INTER_TOKEN.buckets, gap)] += 1
        self.inter_token_seconds += gap
        self.last_token_seconds = now_seconds
        return False

    @property
    def replica_name(self) -> str:
        """The replica of the present attempt, empty before there is one."""
        return "" if self.attempt is None else self.attempt.candidate.replica.name

    def notes(self) -> tuple[tuple[bytes, bytes], ...]:
        """What the client is told of the decision, as headers."""
        plan, attempt = self.plan, self.attempt
        if plan is None or attempt is None:
            return ()
        candidate, sent_seconds = attempt.candidate, self.sent_seconds or 0.0
        shown = (plan.cache, plan.miss, plan.reason, candidate.matched_tokens)
        if self.own_blocks is not None:
            shown = told(plan, candidate, self.match, self.fingerprint, self.own_blocks)
        cache, miss, reason, matched_tokens = shown
        own = cairn_headers(
            cache=cache,
            miss=miss,
            reason=reason if self.retries == 0 else RouteReason.RETRY,
            replica=candidate.replica.name,
            matched_tokens=matched_tokens,
            overhead_seconds=sent_seconds - self.call.read_seconds,
            upstream_seconds=(self.first_byte_seconds or sent_seconds) - sent_seconds,
            tells_times=self.own_blocks is None,
        )
        return own + self.context_notes if self.context_notes else own

    def saved_note(self) -> tuple[tuple[bytes, bytes], ...]:
        """What the upstream reported as cached, where a stored context was used and it said so."""
        if self.stored is None or self.usage is None or self.usage.cached_tokens is None:
            return ()
        return ((b"msh-context-cache-token-saved", b"%d" % self.usage.cached_tokens),)

    def outcome(self, now_seconds: float) -> Outcome:
        """The frozen end of it."""
        call, attempt = self.call, self.attempt
        return Outcome(
            call_id=call.request_id,
            endpoint=call.endpoint,
            model=self.model,
            stream=self.prompt is not None and self.prompt.stream,
            ending=self.ending,
            status=self.status,
            times=Times(
                call.received_seconds,
                call.read_seconds,
                self.sent_seconds,
                self.first_byte_seconds,
                self.first_token_seconds,
                now_seconds,
                self.waited_seconds,
            ),
            replica=None if attempt is None else attempt.candidate.replica,
            plan=self.plan,
            usage=self.usage,
            retries=self.retries,
            response_bytes=self.response_bytes,
            request_bytes=len(call.body),
            tenant_id=call.tenant.id,
            tenant_name=call.tenant.name,
            error_code=self.error_code,
            inter_token_counts=tuple(self.inter_token_counts or ()),
            inter_token_seconds=self.inter_token_seconds,
        )

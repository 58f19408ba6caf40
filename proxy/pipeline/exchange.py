"""One request on its way: what the phases learn about it, gathered for the one `Outcome` at its end.

It is the only mutable object of a request and has one writer at a time. It decides nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cache import Content, ContextRow, Fingerprint, Match
from proxy.fleet import Need, ThrottleKey
from proxy.fleet.pools import ServedPool
from proxy.metrics.definitions import INTER_TOKEN
from proxy.model import Edit, Ending, RouteReason
from proxy.pipeline.attempt import Attempt
from proxy.pipeline.disclosure import told
from proxy.pipeline.retries import AttemptFailure
from proxy.pipeline.silence import WaitingClient
from proxy.records import Call, Candidate, Outcome, Plan, Prompt, Times, Usage
from proxy.routing.cold_gate import Pass
from proxy.routing.cold_pressure import Noted
from proxy.routing.fair_shares import Priority, Share
from proxy.wire.headers import cairn_headers
from proxy.wire.urgency import priority_in

TOOLS: Final = "tools"
MEDIA: Final = "media"
"""Kinds of request that a replica may lack, besides paths."""

_MEDIA_WORDS: Final = (b"image", b"audio", b"video")  # in the types of such parts of a prompt; in a text, too
_PATH_CHARACTERS: Final = 128
_INTERNAL: Final = Ending.INTERNAL  # a constant: the member of an enum is looked up in Python
_GAPS: Final = INTER_TOKEN.buckets  # a constant: two attributes are looked up for every chunk of a stream otherwise


@dataclass(frozen=True, slots=True)
class StoredUse:
    """A stored context that precedes this prompt. It expires in seconds since 1970 by Redis's clock."""

    row: ContextRow
    content: Content
    expires_unix_seconds: float
    reset_ttl_seconds: float | None = None


class TakesLong(Exception):
    """The body is read for so long that it must be done in a thread; see `Exchange.is_read_aside`."""


class Exchange:
    """State of one request and response so far. `sent_seconds` and the times after it belong to the last attempt."""

    __slots__ = (
        "asked_usage",
        "attempt",
        "avoid",
        "background_id",
        "call",
        "cold_pass",
        "context_notes",
        "context_result",
        "counted_usage",
        "deadline_seconds",
        "edits",
        "ending",
        "error_code",
        "fingerprint",
        "first_byte_seconds",
        "first_token_seconds",
        "has_checked_lines",
        "inter_token_counts",
        "inter_token_seconds",
        "is_counted",
        "is_read_aside",
        "is_restricted",
        "is_warming",
        "known_tokens",
        "last_token_seconds",
        "match",
        "model",
        "noted",
        "only_checked",
        "only_explained",
        "own_blocks",
        "pinned_replica",
        "plan",
        "pool",
        "priority",
        "progress_seconds",
        "prompt",
        "response_bytes",
        "sent_seconds",
        "session",
        "share_name",
        "share_weight",
        "status",
        "stored",
        "tried",
        "usage",
        "waited_seconds",
        "waiting",
    )

    def __init__(self, call: Call) -> None:
        self.call = call
        self.model: str | None = None
        self.prompt: Prompt | None = None
        self.fingerprint: Fingerprint | None = None
        self.match: Match | None = None
        self.pool: ServedPool | None = None
        self.own_blocks: int | None = None  # blocks that the tenant itself has sent before; None: it may see all
        self.only_explained = False  # nothing is sent; the client gets the plan
        self.session: int | None = None  # a hash of the session that the client names
        self.has_checked_lines = False  # it uploaded a file that may be the input of a batch of this client
        self.is_read_aside = False  # its body is being read in a thread, and may take long
        self.is_restricted = False  # only some of its pool's replicas can serve it
        self.pinned_replica: int | None = None  # number of the replica that has the object which the request names
        self.plan: Plan | None = None
        self.priority: Priority | None = None  # as asked for and allowed; None until it is needed
        self.deadline_seconds: float | None = None  # of the first token, on the monotonic clock
        self.share_name = call.tenant.id  # whose share it uses: its tenant's, or newcomers'
        self.share_weight = call.tenant.weight
        self.known_tokens = 0.0  # tokens of the prompt that were served before
        self.noted: Noted | None = None  # as a prompt of its session, unless it is not sent after all
        self.cold_pass: Pass | None = None  # a cold turn's right to its replica
        self.is_counted = False  # its work was counted for its tenant while it waited
        self.background_id: str | None = None  # of a response that is computed in the background
        self.avoid: frozenset[str] = frozenset()  # names of replicas that must not be chosen
        self.stored: StoredUse | None = None
        self.is_warming = False  # sent by Cairn itself to compute a context before it is used
        self.only_checked = False  # the stored context was only to be checked
        self.context_notes: tuple[tuple[bytes, bytes], ...] = ()
        self.context_result = ""  # the result for the stored context that was named, as the metric's label
        self.attempt: Attempt | None = None
        self.edits: tuple[Edit, ...] = ()
        self.asked_usage = False  # the stream reports usage because Cairn asked for it: that chunk is withheld
        self.progress_seconds = 0.0  # time of the last event that is not a keep-alive
        self.waiting: WaitingClient | None = None  # waits for a stream; None if no comments are sent meanwhile
        self.tried: tuple[AttemptFailure, ...] = ()  # attempts that failed before the last one
        self.status = 0
        self.ending: Ending = _INTERNAL  # until another ending is known
        self.error_code: str | None = None
        self.sent_seconds: float | None = None
        self.first_byte_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.last_token_seconds = 0.0
        self.inter_token_counts: list[int] | None = None
        self.inter_token_seconds = 0.0
        self.waited_seconds = 0.0
        self.usage: Usage | None = None
        self.counted_usage: Usage | None = None  # at the end, without what cannot be believed
        self.response_bytes = 0

    def take_reading(self, draft: Exchange) -> None:
        """Take over all that reading the body has set in `draft`."""
        self.prompt, self.model, self.pool = draft.prompt, draft.model, draft.pool
        self.edits, self.pinned_replica = draft.edits, draft.pinned_replica

    def token_came(self, now_seconds: float) -> bool:
        """Record the time of a piece of the stream that carries tokens. Return True for the first one."""
        if self.first_token_seconds is None:
            self.first_token_seconds = self.last_token_seconds = now_seconds
            return True
        counts = self.inter_token_counts
        if counts is None:
            counts = self.inter_token_counts = [0] * (len(_GAPS) + 1)
        gap = now_seconds - self.last_token_seconds
        counts[bisect_left(_GAPS, gap)] += 1
        self.inter_token_seconds += gap
        self.last_token_seconds = now_seconds
        return False

    def set_priority(self, asked: int) -> None:
        """Set the priority that the client asks for, at most the highest that it may ask for."""
        self.priority = Priority(max(asked, self.call.tenant.highest_priority))

    def priority_to_wait_by(self) -> Priority:
        """Return the request's priority: from its header, else from its body."""
        if self.priority is None:
            said = None if self.prompt is None else self.prompt.priority
            endpoint = self.call.endpoint
            if endpoint.runs_model and not endpoint.is_generation:
                said = priority_in(self.call.body)  # only now: few of these wait
            self.set_priority(Priority.NORMAL if said is None else said)
        return self.priority or Priority.HIGH

    def share_of(self, candidate: Candidate) -> Share:
        """Return the share by which the request is served at `candidate`, if it need not wait there.

        A turn that waited before its placement was counted when it went.
        """
        tokens = 0.0 if self.is_counted else candidate.uncached_tokens
        return Share(self.share_name, self.share_weight, Priority.NORMAL, tokens)

    def waiting_share_of(self, candidate: Candidate) -> Share:
        """Return the share by which the request waits at `candidate`, with its priority."""
        return self.share_of(candidate)._replace(priority=self.priority_to_wait_by())

    @property
    def head_sent(self) -> bool:
        """True if the client was sent the head of a stream before any replica had responded."""
        return self.waiting is not None and self.waiting.head_sent

    @property
    def replica_name(self) -> str:
        """Name of the current attempt's replica, empty before the first attempt."""
        return "" if self.attempt is None else self.attempt.candidate.replica.name

    @property
    def throttle_key(self) -> ThrottleKey:
        """The key that the upstream sees and the model, to which a 429 applies."""
        pool = self.pool
        owner = "" if pool is None or pool.has_own_key else self.call.tenant.id
        return owner, self.model or ""

    def need(self, kind: str = "") -> Need:
        """Return the need for the model, or for this kind of request for it, at a replica."""
        owner, model = self.throttle_key
        return owner, model, kind

    def needs(self, is_refused: Callable[[Need], bool]) -> tuple[Need, ...]:
        """Return what the request needs at a replica, by which replicas of a pool may differ.

        `is_refused` returns whether anybody has lately refused that: what takes time to find is sought only then.
        """
        prompt = self.prompt
        needs: tuple[Need, ...] = (self.need(), self.need(self.path_kind))
        if prompt is not None and prompt.tool_spans:
            needs += (self.need(TOOLS),)
        if is_refused(media := self.need(MEDIA)) and any(word in self.call.body for word in _MEDIA_WORDS):
            needs += (media,)
        return needs

    @property
    def path_kind(self) -> str:
        """The kind of request that the path names."""
        return self.call.target.partition("?")[0][:_PATH_CHARACTERS]

    def notes(self) -> tuple[tuple[bytes, bytes], ...]:
        """Return the response headers that describe the decision."""
        plan, attempt = self.plan, self.attempt
        if plan is None or attempt is None:
            return ()
        candidate, sent_seconds = attempt.candidate, self.sent_seconds or 0.0
        shown = (plan.cache, plan.miss, plan.reason, candidate.matched_tokens)
        if self.own_blocks is not None:
            shown = told(plan, candidate, self.match, self.fingerprint, self.own_blocks)
        cache, miss, reason, matched_tokens = shown
        times = None
        if self.own_blocks is None:
            own_seconds = sent_seconds - self.call.read_seconds - self.waited_seconds
            times = (own_seconds, self.waited_seconds, (self.first_byte_seconds or sent_seconds) - sent_seconds)
        own = cairn_headers(
            cache=cache,
            miss=miss,
            reason=RouteReason.RETRY if self.tried else reason,
            replica=candidate.replica.name,
            matched_tokens=matched_tokens,
            times=times,
        )
        if self.tried:
            own += self.tried_note()
        return own + self.context_notes if self.context_notes else own

    def tried_note(self) -> tuple[tuple[bytes, bytes], ...]:
        """Return the header that lists the replicas that failed before, with the reasons; empty if none did."""
        if not self.tried:
            return ()
        return ((b"x-cairn-tried", ", ".join(f"{each.name};{each.reason}" for each in self.tried).encode()),)

    def saved_note(self) -> tuple[tuple[bytes, bytes], ...]:
        """Return the header with the tokens reported as cached, if a stored context was used; else nothing."""
        if self.stored is None or self.usage is None or self.usage.cached_tokens is None:
            return ()
        return ((b"msh-context-cache-token-saved", b"%d" % self.usage.cached_tokens),)

    def outcome(self, now_seconds: float) -> Outcome:
        """Return the outcome: a frozen copy of what is known."""
        call, attempt = self.call, self.attempt
        return Outcome(
            call_id=call.request_id,
            endpoint=call.endpoint,
            model=self.model,
            stream=self.prompt is not None and self.prompt.stream,
            ending=self.ending,
            status=self.status,
            times=Times(
                received_seconds=call.received_seconds,
                read_seconds=call.read_seconds,
                sent_seconds=self.sent_seconds,
                first_byte_seconds=self.first_byte_seconds,
                first_token_seconds=self.first_token_seconds,
                ended_seconds=now_seconds,
                waited_seconds=self.waited_seconds,
            ),
            replica=None if attempt is None else attempt.candidate.replica,
            plan=self.plan,
            usage=self.usage,
            retries=len(self.tried),
            tried=tuple([f"{each.name};{each.reason}" for each in self.tried]),
            response_bytes=self.response_bytes,
            request_bytes=len(call.body),
            tenant_id=call.tenant.id,
            tenant_name=call.tenant.name,
            error_code=self.error_code,
            inter_token_counts=tuple(self.inter_token_counts or ()),
            inter_token_seconds=self.inter_token_seconds,
            head_sent_early=self.head_sent,
            is_background=self.background_id is not None,
        )

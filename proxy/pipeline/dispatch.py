"""The first half of phase 7: send the request to a replica, and to the next one while nothing reached the client.

Everything an attempt claims is given back here if the attempt fails. What the failure shows about the replica is
reported to the fleet.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final, Protocol
from zlib import crc32

from proxy.clock import Clock
from proxy.errors import BadResponse, ConnectFailed, Overloaded, PoolTimeout, TurnedAway, UpstreamError
from proxy.fleet import Failure, Fleet, Need
from proxy.fleet.pools import Pools, ReplicaEndpoint
from proxy.metrics.definitions import HIDDEN_ERRORS, UPSTREAM_RETRIES
from proxy.metrics.recorder import Recorder
from proxy.model import Edit
from proxy.pipeline import retries
from proxy.pipeline.attempt import Attempt, Attempts
from proxy.pipeline.exchange import MEDIA, TOOLS, Exchange
from proxy.pipeline.opening import Opening, closed_inside, is_unfinished, judge_plain, wait_for_opening
from proxy.pipeline.retries import AttemptFailure, FailureKind, RetryBudget
from proxy.records import Candidate
from proxy.routing.replica_queue import ANYONE
from proxy.upstream import Body, Origin, UpstreamResponse
from proxy.wire import headers as wire_headers
from proxy.wire import splice
from proxy.wire.concealing import Concealer, concealed, concealed_headers
from proxy.wire.decode import ResponseDecoder, content_encoding
from proxy.wire.paths import without_credentials
from proxy.wire.refusals import REFUSALS_AT_MOST_BYTES, Refusal, read_refusal
from proxy.wire.refusals import STATUSES as REFUSAL_STATUSES

RANK_HEADER: Final = b"x-data-parallel-rank"
"""Header by which vLLM and SGLang choose the data-parallel rank that serves a request."""

HOLD_SECONDS: Final = 15.0
"""Longest time that a stream's head is held back for its first event. Until then another replica can be tried."""

REFUSAL_SECONDS: Final = 1.0
"""Longest time that an error is held back to see whether another replica can do better: they are short."""

_GATHERED_AT_MOST_BYTES: Final = 32 * 1024
"""A plain response up to this size is whole before any of it is written, so that another replica can be tried if it
breaks off or is an error. It must stay below `Limits.buffer_bytes`, above which a connection stops reading."""

_KEY_BYTES_LEAST: Final = 8  # a shorter one, such as EMPTY, is no secret and may be a word of the text

_REFUSAL_AT_MOST_BYTES = 64 * 1024  # a longer text is not just a message about an unknown field
_FULL_STATUSES = frozenset({503, 529})
_RATE_LIMITED: Final = 429
_FAILED_STATUSES = frozenset({408, 424})  # in addition to 500 to 599; the second one is of TGI, whose engine failed
_STREAMS = frozenset({Opening.STREAM, Opening.ERROR, Opening.NO_TOKENS})
_HIDDEN_ERRORS = {
    Opening.ERROR: ("error_event", "a stream that begins with an error"),
    Opening.EMPTY: ("empty", "a successful status with an empty body"),
    Opening.NO_TOKENS: ("empty", "a successful status with a stream without tokens"),
    Opening.ERROR_BODY: ("error_body", "a successful status with an error as its body"),
    Opening.HTML: ("html", "a successful status with an HTML page"),
}
"""The reason in metrics and in the header, and the one in the log, of a failure behind a status of success."""

_KINDS = {Refusal.MODEL: "", Refusal.TOOLS: TOOLS, Refusal.MEDIA: MEDIA}
"""Kinds of request that are refused, as in `Exchange.needs`."""

_MAY_REFUSE_STREAM_OPTIONS = frozenset({400, 415, 422})


class Room(Protocol):
    """Counts the bytes that are held of a body, besides those on their way."""

    def hold(self, nbytes: int) -> None:
        """Count `nbytes` in place of what was counted before. Raises Overloaded if there is no room for more."""
        ...


@dataclass(frozen=True, slots=True)
class Upload:
    """A body that is passed through: its pieces, its length in bytes if the client declared it, and its room."""

    pieces: AsyncIterator[bytes]
    length: int | None
    room: Room | None = None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits of sending a request to another replica: how often, upon which statuses, and how late."""

    max_retries: int = 2
    statuses: Collection[int] = frozenset({408, 424, 429, 500, 502, 503, 504, 529})
    hold_seconds: float = HOLD_SECONDS
    first_byte_seconds: float = 600.0  # from the head of a stream until its first event
    idle_seconds: float = 120.0


class Opened:
    """A response that has begun. `failure` is set if another attempt would have been preferred."""

    __slots__ = ("failure", "is_stream", "response")

    def __init__(self, response: UpstreamResponse, is_stream: bool, failure: AttemptFailure | None = None) -> None:
        self.response = response
        self.is_stream = is_stream
        self.failure = failure


class Client(Protocol):
    """Sends one request: `proxy.upstream.UpstreamClient`."""

    def request(
        self,
        origin: Origin,
        method: bytes,
        target: bytes,
        headers: Iterable[tuple[bytes, bytes]],
        body: Body,
        *,
        length: int | None = None,
        repeatable: bool | None = None,
    ) -> Awaitable[UpstreamResponse]:
        """Send a request; return when the head of the response has arrived. Raises UpstreamError."""
        ...


class Planning(Protocol):
    """Plans a request a second time: `proxy.pipeline.planner.Planner`."""

    def plan_again(self, exchange: Exchange) -> None:
        """Order the replicas as they are now. Raises Overloaded if none can take the request."""
        ...


class Dispatcher:
    """Sends requests to replicas. One per worker."""

    def __init__(
        self,
        client: Client,
        attempts: Attempts,
        planner: Planning,
        fleet: Fleet,
        pools: Pools,
        recorder: Recorder,
        clock: Clock,
        policy: RetryPolicy,
    ) -> None:
        self._client = client
        self._attempts = attempts
        self._planner = planner
        self._fleet = fleet
        self._pools = pools
        self._recorder = recorder
        self._clock = clock
        self._policy = policy
        self._budgets: defaultdict[str, RetryBudget] = defaultdict(RetryBudget)  # by pool
        self._usage_options = UsageOptions()

    async def first_response(self, exchange: Exchange, upload: Upload | None) -> Opened:
        """Return the response that the client gets, from the first replica that gives a usable one.

        A request whose replica goes down while it waits for it is planned again at once.

        Raises UpstreamError if no replica responded; Overloaded or RateLimited if the request waited without success.
        """
        assert exchange.plan is not None  # noqa: S101 - the pipeline's order
        candidate = exchange.plan.candidates[0]
        self._budget(exchange).note_request(self._clock.monotonic())
        while True:
            try:
                opened = await self._try(exchange, candidate, upload)
            except TurnedAway:
                candidate = self._planned_again(exchange)
                continue
            except UpstreamError as error:
                failure = retries.of_error(candidate, error)
                following = self._following(exchange, failure, upload)
                if following is None:
                    raise
            else:
                if opened.failure is None:
                    if exchange.tried:
                        self._hold_guilty(exchange)
                    return opened
                failure = opened.failure
                following = self._following(exchange, failure, upload)
                if following is None:
                    self._check_last(exchange, opened)
                    return opened
                self._discard(exchange, opened)
            exchange.tried = (*exchange.tried, failure)
            self._recorder.inc(UPSTREAM_RETRIES, (failure.name, failure.reason))
            candidate = following

    def always_reports_usage(self, replica: int) -> None:
        """Note that a replica reports usage on every stream, so that its requests need no edit."""
        self._usage_options.refuses(replica)

    def forget(self, replica: int) -> None:
        """Forget what was learned of a replica that is gone."""
        self._usage_options.forget(replica)

    # -- which replica is next

    def _planned_again(self, exchange: Exchange) -> Candidate:
        """Return the first candidate of a new plan. Nothing was sent, so this is no retry. Raises Overloaded."""
        self._planner.plan_again(exchange)
        assert exchange.plan is not None  # noqa: S101
        candidates = exchange.plan.candidates
        tried = {failure.replica for failure in exchange.tried}
        untried = [each for each in candidates if each.replica.id not in tried]
        return (untried or candidates)[0]

    def _following(self, exchange: Exchange, failure: AttemptFailure, upload: Upload | None) -> Candidate | None:
        """Return the candidate to try after `failure`; None if this was the last attempt."""
        assert exchange.plan is not None  # noqa: S101
        if not retries.may_try_again((*exchange.tried, failure), self._policy.max_retries):
            return None
        if not retries.may_repeat(failure, exchange.call, exchange.prompt, in_memory=upload is None):
            return None
        now_seconds = self._clock.monotonic()
        if failure.kind is FailureKind.LACKS:
            return self._other_that_has_it(exchange, failure, now_seconds)
        candidates = exchange.plan.candidates
        open_replicas = [self._fleet.is_open(each.replica.id, now_seconds) for each in candidates]
        following = retries.next_candidate((*exchange.tried, failure), candidates, open_replicas)
        return following if following is not None and self._budget(exchange).take(now_seconds) else None

    def _other_that_has_it(self, exchange: Exchange, failure: AttemptFailure, now_seconds: float) -> Candidate | None:
        """Return the best replica that has not refused this; None, with the plan as it was, if there is none.

        The refusal changed what is known of the replicas, so that the plan is made anew.
        """
        plan, pool, models = exchange.plan, exchange.pool, self._fleet.models
        if pool is None:
            return None
        needs = self._needs(exchange, pool.name)
        tried = {failure.replica, *[each.replica for each in exchange.tried]}
        rooms: Mapping[int, int] = {}
        if failure.reason == Refusal.CONTEXT.value:
            rooms = models.rooms(pool.name, exchange.model or "")
            if not rooms:
                return None  # as far as is known, all are equal
        try:
            self._planner.plan_again(exchange)
        except Overloaded:
            exchange.plan = plan
            return None
        assert exchange.plan is not None  # noqa: S101
        least = rooms.get(failure.replica, 0)
        for candidate in exchange.plan.candidates:
            number = candidate.replica.id
            if number in tried or (rooms and rooms.get(number, 0) <= least):
                continue
            if self._fleet.is_open(number, now_seconds) and not models.refuses(pool.name, number, needs, now_seconds):
                return candidate
        exchange.plan = plan
        return None

    def _needs(self, exchange: Exchange, pool: str) -> tuple[Need, ...]:
        return exchange.needs(partial(self._fleet.models.is_refused, pool))

    def _check_last(self, exchange: Exchange, opened: Opened) -> None:
        """Raise Overloaded, having ended the attempt, if the last replica lacks what one that failed may have.

        Its refusal would tell the client that there is no such model.
        """
        if opened.failure is None or opened.failure.kind is not FailureKind.LACKS:
            return
        failed = [each for each in exchange.tried if each.kind is not FailureKind.LACKS]
        if failed:
            self._discard(exchange, opened)
            exchange.tried = (*exchange.tried, opened.failure)
            names = ", ".join([f"{each.name} ({each.reason})" for each in failed])
            raise Overloaded(f"The replicas that may serve this request have failed: {names}.")

    def _budget(self, exchange: Exchange) -> RetryBudget:
        """Return the budget of the request's pool: an outage of one pool uses up no retries of another."""
        return self._budgets[exchange.pool.name if exchange.pool is not None else ""]

    def _hold_guilty(self, exchange: Exchange) -> None:
        """Report the replicas that failed a request which then succeeded at another."""
        now_seconds = self._clock.monotonic()
        for failure in exchange.tried:
            if retries.shows_the_replica_fails(failure):
                self._fleet.proven(failure.replica, now_seconds, f"{failure.reason}, and another replica succeeded")

    def _discard(self, exchange: Exchange, opened: Opened) -> None:
        opened.response.abort()
        if opened.failure is not None and opened.failure.kind is FailureKind.HIDDEN:
            self._recorder.inc(HIDDEN_ERRORS, (opened.failure.name, opened.failure.reason))
        if exchange.attempt is not None:
            exchange.attempt.end(self._clock.monotonic())

    # -- one attempt

    async def _try(self, exchange: Exchange, candidate: Candidate, upload: Upload | None) -> Opened:
        """Make one attempt. If it raises, its claims are released and the failure was reported to the fleet."""
        attempt = self._claim(exchange, candidate)
        if attempt.must_wait:
            await self._wait(exchange, attempt, candidate)
        try:
            response = await self._send(exchange, attempt, upload)
            exchange.sent_seconds, exchange.first_byte_seconds = response.sent_seconds, response.first_byte_seconds
            opening = Opening.PLAIN
            if self._may_be_stream(exchange, response):
                opening = await self._open(exchange, response)
            refusal: Refusal | None = None
            if response.status >= 400:
                refusal = await self._refusal(exchange, response)
            elif opening is Opening.PLAIN and response.status < 300 and exchange.call.endpoint.runs_model:
                opening = await self._plain_opening(exchange, response)
            if response.status >= 400:
                await self._conceal(response, _key_of(self._pools.backends[attempt.replica]))
            elif opening in _HIDDEN_ERRORS:  # all of it, or of a stream its first event, has arrived
                response.amend(concealed(response.peek(), _key_of(self._pools.backends[attempt.replica])))
        except UpstreamError as error:
            self._failed(exchange, attempt, error)
            raise
        failure = self._judge_refusal(exchange, candidate, response, refusal)
        if failure is None:
            failure = self._judge(exchange, candidate, response, opening)
        if failure is not None or response.status >= 400:
            attempt.take_back()
        return Opened(response, opening in _STREAMS, failure)

    def _claim(self, exchange: Exchange, candidate: Candidate) -> Attempt:
        """Claim the replica: charge it, and place the prompt in the index."""
        prompt, plan, match = exchange.prompt, exchange.plan, exchange.match
        assert plan is not None  # noqa: S101
        replica = candidate.replica.id
        held = None if match is None else match.held.get(replica)
        attempt = exchange.attempt = self._attempts.begin(
            plan,
            candidate,
            exchange.fingerprint,
            held.blocks if held else 0,
            stream=prompt is not None and prompt.stream,
            waits_for_prefix=prompt is None or not prompt.skips_cache,
            source=crc32(exchange.call.tenant.id.encode()),
            share=exchange.share_of(candidate) if self._attempts.needs_share(replica) else ANYONE,
        )
        return attempt

    async def _wait(self, exchange: Exchange, attempt: Attempt, candidate: Candidate) -> None:
        """Wait for a place at the replica."""
        attempt.share = exchange.waiting_share_of(candidate)
        attempt.waits_until = exchange.deadline_seconds
        before_seconds = self._clock.monotonic()
        try:
            await attempt.wait(self._clock)
        except BaseException:
            attempt.take_back()  # it was never sent, so no replica holds its prefix
            attempt.end(self._clock.monotonic())
            raise
        finally:
            exchange.waited_seconds += self._clock.monotonic() - before_seconds

    def _may_be_stream(self, exchange: Exchange, response: UpstreamResponse) -> bool:
        """Return True if the beginning of the response must be read to know whether it is a stream."""
        prompt = exchange.prompt
        wants_stream = (prompt is not None and prompt.stream) or response.is_event_stream
        return wants_stream and response.status < 400 and exchange.call.endpoint.runs_model

    async def _open(self, exchange: Exchange, response: UpstreamResponse) -> Opening:
        """Wait until the response shows whether it is a stream, and what its first event is."""
        named_so = response.is_event_stream or not response.header(b"content-type")
        response.allow_silence(self._policy.first_byte_seconds)
        opening = Opening.UNDECIDED  # and stays so if the body is compressed
        if not response.header(b"content-encoding"):
            opening = await wait_for_opening(response, exchange.call.endpoint, self._policy.hold_seconds)
        if opening is Opening.UNDECIDED:
            opening = Opening.STREAM if named_so else Opening.PLAIN
        if opening is Opening.PLAIN:
            response.allow_silence(self._policy.idle_seconds)
        return opening

    async def _plain_opening(self, exchange: Exchange, response: UpstreamResponse) -> Opening:
        """Wait until a short response is whole, or a long one has begun: until then another replica can be tried.

        Raises the error that ends the response before that.
        """
        if not response.complete:
            if not response.buffered_bytes:  # the head came before the prefill
                response.allow_silence(self._policy.first_byte_seconds)
                await response.begun()
                response.allow_silence(self._policy.idle_seconds)
            length = response.content_length
            if response.is_json_until_close or (length is not None and length <= _GATHERED_AT_MOST_BYTES):
                await response.fits(_GATHERED_AT_MOST_BYTES)
        if not response.complete or response.header(b"content-encoding"):
            return Opening.PLAIN
        body = response.peek()
        if response.is_json_until_close and is_unfinished(body):
            raise closed_inside()
        return judge_plain(body, exchange.call.endpoint)

    async def _refusal(self, exchange: Exchange, response: UpstreamResponse) -> Refusal | None:
        """Read from an error whether the server lacks something that another may have."""
        endpoint = exchange.call.endpoint
        if response.status not in REFUSAL_STATUSES or not (endpoint.runs_model or exchange.model):
            return None
        deadline = asyncio.get_running_loop().time() + REFUSAL_SECONDS
        while not response.complete:
            seen = response.buffered_bytes
            if seen > REFUSALS_AT_MOST_BYTES or not await response.arrived(seen, deadline):
                return None
        body = response.peek()
        encoding = content_encoding(response.headers)
        if encoding:
            decoder = ResponseDecoder(encoding, REFUSALS_AT_MOST_BYTES)
            body = decoder.feed(body)
            if not decoder.alive:
                return None  # it would look like an empty one
        return read_refusal(response.status, body, exchange.model)

    async def _conceal(self, response: UpstreamResponse, key: bytes) -> None:
        """Conceal the replica's key in an error: some servers repeat a key that they refuse, or all that was sent.

        A compressed error passes as it is if it is short, comes soon and does not repeat the key, or if its coding is
        unknown or not what its header says; else it passes decoded. Raises BadResponse if it is a decompression bomb.
        """
        if not key:
            return
        length, decoder = response.content_length, None
        if encoding := content_encoding(response.headers):
            deadline = asyncio.get_running_loop().time() + REFUSAL_SECONDS
            while not response.complete and response.buffered_bytes <= REFUSALS_AT_MOST_BYTES:
                if not await response.arrived(response.buffered_bytes, deadline):
                    break
            reader = ResponseDecoder(encoding)
            text = reader.feed(response.peek())
            if reader.is_too_large:
                response.abort()
                raise BadResponse("the upstream's error expands too much")
            if reader.alive and (key in text or not response.complete):
                length, decoder = None, ResponseDecoder(encoding)
        headers = concealed_headers(response.headers, key, is_decoded=decoder is not None)
        response.replace(headers, Concealer(key, decoder), length)

    # -- the request

    def _send(self, exchange: Exchange, attempt: Attempt, upload: Upload | None) -> Awaitable[UpstreamResponse]:
        endpoint = self._pools.backends[attempt.replica]
        exchange.asked_usage = False
        if upload is not None:
            return self._request(exchange, endpoint, upload.pieces, upload.length, identity=False)
        prompt = exchange.prompt
        if prompt is not None and self._usage_options.may_ask(attempt.replica):
            ask = splice.ask_usage(prompt)
            if ask is not None:
                return self._send_asking(exchange, attempt, endpoint, ask)
        return self._send_body(exchange, endpoint, exchange.edits, identity=False)

    async def _send_asking(
        self, exchange: Exchange, attempt: Attempt, endpoint: ReplicaEndpoint, ask: Edit
    ) -> UpstreamResponse:
        """Send the body with `ask`, so that the stream reports usage; without it if that may be why it is refused."""
        response = await self._send_body(exchange, endpoint, (*exchange.edits, ask), identity=True)
        exchange.asked_usage = True
        if response.status < 300:
            self._usage_options.accepts(attempt.replica)
        elif response.status in _MAY_REFUSE_STREAM_OPTIONS:
            return await self._without_usage(exchange, attempt, endpoint, response)
        return response

    async def _without_usage(
        self, exchange: Exchange, attempt: Attempt, endpoint: ReplicaEndpoint, refusal: UpstreamResponse
    ) -> UpstreamResponse:
        """Send again without `stream_options` if that may have caused `refusal`; a success proves that it did."""
        if not await refusal.fits(_REFUSAL_AT_MOST_BYTES):
            return refusal
        if not self._usage_options.may_have_caused(attempt.replica, refusal.peek()):
            return refusal
        exchange.asked_usage = False
        response = await self._send_body(exchange, endpoint, exchange.edits, identity=False)
        if response.status < 300:
            self._usage_options.refuses(attempt.replica)
        return response

    def _send_body(
        self, exchange: Exchange, endpoint: ReplicaEndpoint, edits: tuple[Edit, ...], *, identity: bool
    ) -> Awaitable[UpstreamResponse]:
        """Send the client's body: with `edits`, or exactly as it came, compressed or not."""
        call = exchange.call
        if call.encoded_body is not None and not edits:
            return self._request(exchange, endpoint, [call.encoded_body], len(call.encoded_body), identity=identity)
        buffers, length = splice.apply(call.body, edits)
        decoded = call.encoded_body is not None
        return self._request(exchange, endpoint, buffers, length, identity=identity, decoded=decoded)

    def _request(
        self,
        exchange: Exchange,
        endpoint: ReplicaEndpoint,
        body: Body,
        length: int | None,
        *,
        identity: bool,
        decoded: bool = False,
    ) -> Awaitable[UpstreamResponse]:
        call = exchange.call
        replaces_key = endpoint.credential is not None or endpoint.drops_credentials
        head = wire_headers.upstream_head(
            call.headers,
            request_id=call.request_id,
            credential=endpoint.credential,
            drop_credentials=endpoint.drops_credentials,
            identity=identity,
            decoded=decoded,
        )
        if endpoint.default_headers:
            names = {name for name, _ in head}
            head += tuple(pair for pair in endpoint.default_headers if pair[0] not in names)
        if endpoint.rank is not None:
            head = (*[pair for pair in head if pair[0] != RANK_HEADER], (RANK_HEADER, b"%d" % endpoint.rank))
        return self._client.request(
            endpoint.origin,
            call.method.encode(),
            (without_credentials(call.target) if replaces_key else call.target).encode(),
            head,
            body,
            length=length,
            repeatable=retries.is_repeatable(call, exchange.prompt),
        )

    # -- what the fleet learns

    def _failed(self, exchange: Exchange, attempt: Attempt, error: UpstreamError) -> None:
        """Give back a failed attempt and report it."""
        now_seconds = self._clock.monotonic()
        attempt.take_back()
        if isinstance(error, ConnectFailed):
            self._fleet.unreachable(attempt.replica, now_seconds, error.message)
        elif not isinstance(error, PoolTimeout):  # all connections in use show nothing about the replica
            self._fleet.failed(attempt.replica, evidence(exchange, by_status=False), now_seconds, error.message)
        attempt.end(now_seconds)

    def _judge_refusal(
        self, exchange: Exchange, candidate: Candidate, response: UpstreamResponse, refusal: Refusal | None
    ) -> AttemptFailure | None:
        """Report a refusal for what the replica lacks. Return None for any other response.

        It shows nothing against the replica, except if that refuses the operator's own key or has no memory left.
        """
        if refusal is None:
            return None
        number, name, now_seconds = candidate.replica.id, candidate.replica.name, self._clock.monotonic()
        if refusal is Refusal.KEY or refusal is Refusal.MEMORY:
            endpoint = self._pools.backends[number]
            if refusal is Refusal.KEY and endpoint.credential is None and not endpoint.drops_credentials:
                return None  # it is the client's own
            reason = f"status {response.status}: {refusal.value}"
            self._fleet.failed(number, evidence(exchange, by_status=True), now_seconds, reason)
            return AttemptFailure(number, name, FailureKind.STATUS, str(response.status))
        if refusal is Refusal.QUOTA:
            wait_seconds = wire_headers.pause_seconds(response.headers, self._clock.unix())
            if wait_seconds is None:
                wait_seconds = inf  # cut to the longest that is honoured
            self._fleet.rate_limited(number, exchange.throttle_key, now_seconds, wait_seconds)
        else:
            self._fleet.responded(number)
            if refusal is not Refusal.CONTEXT:  # which depends on the prompt
                kind = exchange.path_kind if refusal is Refusal.ENDPOINT else _KINDS[refusal]
                self._fleet.refused(number, exchange.need(kind), now_seconds)
        return AttemptFailure(number, name, FailureKind.LACKS, refusal.value)

    def _judge(
        self, exchange: Exchange, candidate: Candidate, response: UpstreamResponse, opening: Opening
    ) -> AttemptFailure | None:
        """Report a response to the fleet. Return a failure if another replica should be tried."""
        status, number, name = response.status, candidate.replica.id, candidate.replica.name
        now_seconds = self._clock.monotonic()
        if (hidden := _HIDDEN_ERRORS.get(opening)) is not None:
            self._fleet.failed(number, evidence(exchange, by_status=True), now_seconds, hidden[1])
            return AttemptFailure(number, name, FailureKind.HIDDEN, hidden[0])
        if status == _RATE_LIMITED or status in _FULL_STATUSES:
            wait_seconds = wire_headers.pause_seconds(response.headers, self._clock.unix())
            if status == _RATE_LIMITED:
                self._fleet.rate_limited(number, exchange.throttle_key, now_seconds, wait_seconds)
            else:
                self._fleet.throttled(number, now_seconds, wait_seconds, f"status {status}")
        elif status >= 500 or status in _FAILED_STATUSES:
            self._fleet.failed(number, evidence(exchange, by_status=True), now_seconds, f"status {status}")
        else:
            self._fleet.responded(number)
            pool = exchange.pool
            if status < 300 and pool is not None and self._fleet.models.is_uneven(pool.name):
                self._fleet.models.served(pool.name, number, self._needs(exchange, pool.name))
        return (
            AttemptFailure(number, name, FailureKind.STATUS, str(status))
            if self._asks_retry(exchange, status)
            else None
        )

    def _asks_retry(self, exchange: Exchange, status: int) -> bool:
        """Return whether another replica should be tried: engines do not redirect, but a page before one may."""
        return status in self._policy.statuses or (300 <= status < 400 and exchange.call.endpoint.runs_model)


def _key_of(endpoint: ReplicaEndpoint) -> bytes:
    """Return the replica's own key, b"" if it has none that is a secret."""
    key = b"" if endpoint.credential is None else endpoint.credential[1].removeprefix(b"Bearer ")
    return key if len(key) >= _KEY_BYTES_LEAST else b""


class UsageOptions:
    """Learns from responses which replicas accept `stream_options`."""

    def __init__(self) -> None:
        self._refuse: set[int] = set()
        self._accept: set[int] = set()

    def may_ask(self, replica: int) -> bool:
        """Return whether `stream_options` may be added for this replica."""
        return replica not in self._refuse

    def accepts(self, replica: int) -> None:
        """Note that a request with the added field succeeded."""
        self._accept.add(replica)

    def refuses(self, replica: int) -> None:
        """Note that the replica refuses the field."""
        self._refuse.add(replica)

    def may_have_caused(self, replica: int, refusal: bytes) -> bool:
        """Return whether a request that was refused with the text `refusal` may have failed for the added field."""
        return replica not in self._accept or b"stream_options" in refusal or b"include_usage" in refusal

    def forget(self, replica: int) -> None:
        """Forget a replica that is gone."""
        self._refuse.discard(replica)
        self._accept.discard(replica)


def evidence(exchange: Exchange, *, by_status: bool, after_head: bool = False) -> Failure:
    """Describe a failed request so that distinct prompts and clients can be counted. Called for failures only."""
    fingerprint = exchange.fingerprint
    prompt = fingerprint.hashes[-1] if fingerprint is not None else crc32(exchange.call.body)
    return Failure(prompt, hash(exchange.call.tenant.id), by_status, after_head)

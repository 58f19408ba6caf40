"""Phase 7: the request to a replica, its answer to the client, and every way in which either can end.

Bytes pass unchanged and as they come, with back-pressure; what the answer says about tokens is read beside them. A
generation of whose answer nothing came is tried at the next replica; nothing is tried again after that. Whatever was
claimed is given back here, on every path. It must not know how a replica was chosen or what a token costs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Final
from zlib import crc32

from cache import Journal
from proxy.clock import Clock
from proxy.downstream.response import Downstream
from proxy.errors import ConnectFailed, IdleTimeout, ResetBeforeResponse, UpstreamError
from proxy.fleet import Fleet
from proxy.fleet.pools import Pools, ReplicaEndpoint
from proxy.metrics.definitions import STREAM_ABORTS, UPSTREAM_RETRIES
from proxy.metrics.recorder import Recorder
from proxy.model import Candidate, Edit, Ending, Endpoint
from proxy.pipeline.attempt import Attempt, Attempts
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.objects import CreatedObjects
from proxy.upstream import Body, Framing, UpstreamClient, UpstreamResponse
from proxy.wire import headers as wire_headers
from proxy.wire import splice
from proxy.wire.decode import ResponseDecoder
from proxy.wire.errors import error_event
from proxy.wire.paths import without_credentials
from proxy.wire.sse import StreamTap
from proxy.wire.usage import read_response


@dataclass(frozen=True, slots=True)
class Upload:
    """A body that is passed through: its pieces, and its length in bytes where the client declared it."""

    pieces: AsyncIterator[bytes]
    length: int | None


WHOLE_AT_MOST_BYTES = 256 * 1024
"""A plain answer up to this size is gathered and written at once; a longer one is relayed piece by piece."""

_READ_AT_MOST_BYTES = 8 * 1024 * 1024
"""Of a longer plain answer, decoded or not, the usage is not read."""

_REFUSAL_AT_MOST_BYTES = 64 * 1024
_FULL_STATUS = frozenset({429, 503, 529})
_IDEMPOTENT_METHODS = frozenset({"GET", "HEAD"})
_OPENING_BYTES: Final = 2048  # of a stream of the responses surface, in which its id is looked for
_COMPLETE: Final = Ending.COMPLETE  # constants: the member of an enum is looked up in Python
_TRUNCATED: Final = Ending.TRUNCATED
_UPSTREAM_STATUS: Final = Ending.UPSTREAM_STATUS
_INTERNAL: Final = Ending.INTERNAL
_RESPONSES: Final = Endpoint.RESPONSES


class Relay:
    """One per worker."""

    def __init__(
        self,
        client: UpstreamClient,
        attempts: Attempts,
        fleet: Fleet,
        pools: Pools,
        journal: Journal,
        recorder: Recorder,
        clock: Clock,
        *,
        max_retries: int,
        idle_seconds: float,
    ) -> None:
        self._client = client
        self._attempts = attempts
        self._fleet = fleet
        self._objects = CreatedObjects(journal)
        self._recorder = recorder
        self._clock = clock
        self._max_retries = max_retries
        self._idle_seconds = idle_seconds
        self._never_ask: set[int] = set()
        self.pools = pools

    async def run(self, exchange: Exchange, downstream: Downstream, upload: Upload | None = None) -> None:
        """Have the request answered; `upload` is its body where that is passed through and not read.

        Raises UpstreamError, Overloaded or RateLimited while nothing was written to the client. A failure after that
        is told to the client by an answer that visibly breaks.
        """
        try:
            response = await self._first_response(exchange, upload)
            await self._pass_on(exchange, response, downstream)
        except (asyncio.CancelledError, ConnectionResetError):
            self._end(exchange, client_left=True)
            raise
        finally:
            self._end(exchange)

    def always_reports_usage(self, replica: int) -> None:
        """This replica tells its tokens on every stream: what it sends to whoever does not ask stays as it is."""
        self._never_ask.add(replica)

    # -- until an answer begins

    async def _first_response(self, exchange: Exchange, upload: Upload | None) -> UpstreamResponse:
        assert exchange.plan is not None  # noqa: S101 - the pipeline's order
        candidates = exchange.plan.candidates
        retries = self._max_retries if upload is None and exchange.call.endpoint.is_generation else 0
        for number in range(retries + 1):
            candidate = candidates[number % len(candidates)]
            try:
                return await self._try(exchange, candidate, upload)
            except UpstreamError as error:
                if number == retries or not _worth_another(error, number, len(candidates)):
                    raise
                exchange.retries += 1
                self._recorder.inc(UPSTREAM_RETRIES, (candidate.replica.name, error.reason))
        raise AssertionError("unreachable")

    async def _try(self, exchange: Exchange, candidate: Candidate, upload: Upload | None) -> UpstreamResponse:
        """One attempt. On failure it is ended, its placement taken back and the replica's breaker told."""
        prompt, plan, match = exchange.prompt, exchange.plan, exchange.match
        assert plan is not None  # noqa: S101
        held = None if match is None else match.held.get(candidate.replica.id)
        attempt = exchange.attempt = self._attempts.begin(
            plan,
            candidate,
            exchange.fingerprint,
            held.blocks if held else 0,
            stream=prompt is not None and prompt.stream,
            source=crc32(exchange.call.tenant.id.encode()),
        )
        if attempt.must_wait:
            before_seconds = self._clock.monotonic()
            try:
                await attempt.wait(self._clock)
            except BaseException:
                attempt.take_back()  # it was never sent, so nobody holds its prefix
                attempt.end(self._clock.monotonic())
                raise
            finally:
                exchange.waited_seconds += self._clock.monotonic() - before_seconds
        try:
            response = await self._send(exchange, attempt, upload)
        except UpstreamError as error:
            self._failed(attempt, error)
            raise
        exchange.sent_seconds, exchange.first_byte_seconds = response.sent_seconds, response.first_byte_seconds
        self._note_status(attempt, response)
        return response

    async def _send(self, exchange: Exchange, attempt: Attempt, upload: Upload | None) -> UpstreamResponse:
        backend = self.pools.backends[attempt.replica]
        if upload is not None:
            return await self._request(exchange, backend, upload.pieces, upload.length, identity=False)
        ask = self._usage_edit(exchange, attempt.replica)
        edits = exchange.edits if ask is None else (*exchange.edits, ask)
        response = await self._send_body(exchange, backend, edits, identity=ask is not None)
        exchange.asked_usage = ask is not None
        if response.status == 400 and ask is not None:
            return await self._without_usage(exchange, attempt, backend, response)
        return response

    async def _without_usage(
        self, exchange: Exchange, attempt: Attempt, backend: ReplicaEndpoint, refusal: UpstreamResponse
    ) -> UpstreamResponse:
        """A 400 to what we added: if it names the field, send what the client sent, now and from now on."""
        text = await refusal.read(_REFUSAL_AT_MOST_BYTES)
        if b"stream_options" not in text and b"include_usage" not in text:
            refusal.put_back(text)
            return refusal
        self._never_ask.add(attempt.replica)
        exchange.asked_usage = False
        return await self._send_body(exchange, backend, exchange.edits, identity=False)

    def _send_body(
        self, exchange: Exchange, backend: ReplicaEndpoint, edits: tuple[Edit, ...], *, identity: bool
    ) -> Awaitable[UpstreamResponse]:
        """Send the client's body: with `edits`, or exactly as it came, compressed or not."""
        call = exchange.call
        if call.encoded_body is not None and not edits:
            return self._request(exchange, backend, [call.encoded_body], len(call.encoded_body), identity=identity)
        buffers, length = splice.apply(call.body, edits)
        decoded = call.encoded_body is not None
        return self._request(exchange, backend, buffers, length, identity=identity, decoded=decoded)

    def _request(
        self,
        exchange: Exchange,
        backend: ReplicaEndpoint,
        body: Body,
        length: int | None,
        *,
        identity: bool,
        decoded: bool = False,
    ) -> Awaitable[UpstreamResponse]:
        call = exchange.call
        replaces_key = backend.credential is not None or backend.drops_credentials
        head = wire_headers.upstream_head(
            call.headers,
            request_id=call.request_id,
            credential=backend.credential,
            drop_credentials=backend.drops_credentials,
            identity=identity,
            decoded=decoded,
        )
        return self._client.request(
            backend.origin,
            call.method.encode(),
            (without_credentials(call.target) if replaces_key else call.target).encode(),
            head,
            body,
            length=length,
            retry_reused=call.endpoint.is_generation or call.method in _IDEMPOTENT_METHODS,
        )

    def _usage_edit(self, exchange: Exchange, replica: int) -> Edit | None:
        prompt = exchange.prompt
        return None if prompt is None or replica in self._never_ask else splice.ask_usage(prompt)

    def _failed(self, attempt: Attempt, error: UpstreamError) -> None:
        now_seconds = self._clock.monotonic()
        attempt.take_back()
        attempt.end(now_seconds)
        if self._fleet.failed(attempt.replica, now_seconds, unreachable=isinstance(error, ConnectFailed)):
            self._attempts.turn_away(attempt.replica, error)

    def _note_status(self, attempt: Attempt, response: UpstreamResponse) -> None:
        status = response.status
        if status < 500 and status != 429:
            self._fleet.answered(attempt.replica)
        elif status in _FULL_STATUS:
            now_seconds = self._clock.monotonic()
            wait_seconds = wire_headers.retry_after_seconds(response.header(b"retry-after"), self._clock.unix())
            self._fleet.throttled(attempt.replica, now_seconds, wait_seconds)
        else:
            self._fleet.failed(attempt.replica, self._clock.monotonic(), unreachable=False)
        if status >= 400:
            attempt.take_back()

    # -- the answer

    async def _pass_on(self, exchange: Exchange, response: UpstreamResponse, downstream: Downstream) -> None:
        exchange.status = response.status
        streamed = response.is_event_stream and exchange.call.endpoint.is_generation
        try:
            await (self._stream if streamed else self._plain)(exchange, response, downstream)
        except UpstreamError as error:
            if not downstream.begun:
                raise
            self._broke(exchange, downstream, error)
        finally:
            response.abort()

    async def _plain(self, exchange: Exchange, response: UpstreamResponse, downstream: Downstream) -> None:
        if response.status < 300 and exchange.attempt is not None:
            exchange.attempt.computed()
        head = self._response_head(exchange, response)
        length = response.content_length
        kept: list[bytes] = []
        if response.framing is Framing.NONE:
            downstream.begin(response.status, response.reason, head, length)
            downstream.end()
        elif response.complete or (length is not None and length <= WHOLE_AT_MOST_BYTES):
            kept.append(response.body_now() if response.complete else await response.read(WHOLE_AT_MOST_BYTES))
            exchange.response_bytes = len(kept[0])
            if exchange.stored is not None and response.status < 300:
                self._read_plain(exchange, response, kept[0])
                head += exchange.saved_note()
            downstream.send(response.status, response.reason, head, kept[0])
        else:
            downstream.begin(response.status, response.reason, head, length)
            while piece := await response.next_chunk():
                exchange.response_bytes += len(piece)
                if exchange.response_bytes <= _READ_AT_MOST_BYTES:
                    kept.append(piece)
                await downstream.write(piece)
            downstream.end()
        exchange.ending = _COMPLETE if response.status < 400 else _UPSTREAM_STATUS
        if response.status < 300 and exchange.usage is None and exchange.response_bytes <= _READ_AT_MOST_BYTES:
            self._read_plain(exchange, response, b"".join(kept))

    def _read_plain(self, exchange: Exchange, response: UpstreamResponse, body: bytes) -> None:
        """Usage and the ids that live on this replica, out of a whole plain answer."""
        endpoint = exchange.call.endpoint
        may_tell = self._objects.may_tell(exchange.call)
        if not (endpoint.runs_model or may_tell):
            return
        if encoding := response.header(b"content-encoding"):
            body = ResponseDecoder(encoding, _READ_AT_MOST_BYTES).feed(body)
        if endpoint.runs_model:
            exchange.usage = read_response(body, endpoint).usage
        if may_tell:
            self._objects.note(exchange, body)

    async def _stream(self, exchange: Exchange, response: UpstreamResponse, downstream: Downstream) -> None:
        tap = StreamTap(exchange.call.endpoint, withhold_usage=exchange.asked_usage)
        head = self._response_head(exchange, response)
        downstream.begin(
            response.status, response.reason, head, None if exchange.asked_usage else response.content_length
        )
        try:
            await self._relay_events(exchange, response, downstream, tap)
            if rest := tap.close():
                await downstream.write(rest)
            downstream.end()
            exchange.ending = _COMPLETE if tap.finished and not tap.error_seen else _TRUNCATED
        except UpstreamError as error:
            event = error_event(error, exchange.call.endpoint, mid_event=tap.mid_event)
            downstream.write_last(event)
            raise
        finally:
            exchange.usage = tap.usage
            self._objects.note_end(exchange)
        if response.status >= 400:
            exchange.ending = _UPSTREAM_STATUS

    async def _relay_events(
        self, exchange: Exchange, response: UpstreamResponse, downstream: Downstream, tap: StreamTap
    ) -> None:
        encoding = response.header(b"content-encoding")
        decoder = ResponseDecoder(encoding) if encoding else None
        wants_id = exchange.call.endpoint is _RESPONSES
        opening = b""

        def pass_on(piece: bytes, framed: bytes | None) -> bool:
            nonlocal opening, wants_id
            exchange.response_bytes += len(piece)
            if decoder is None:
                passed = tap.feed(piece)
            else:
                tap.feed(decoder.feed(piece))
                passed = piece
            keeps_up = downstream.offer(passed, framed if passed is piece else None) if passed else True
            if tap.progress and exchange.first_token_seconds is not None:  # nearly every piece of a stream
                exchange.progress_seconds = response.seen_seconds
                exchange.token_came(response.seen_seconds)
            else:
                self._note_progress(exchange, tap, response.seen_seconds)
            if wants_id and len(opening) < _OPENING_BYTES:
                opening += piece
                wants_id = not self._objects.note_opening(exchange, opening)
            return keeps_up

        while not await response.pour(pass_on):
            await downstream.drained()

    def _response_head(self, exchange: Exchange, response: UpstreamResponse) -> list[tuple[bytes, bytes]]:
        return wire_headers.response_head(
            response.headers, request_id=exchange.call.request_id, own=exchange.notes(), keep_length=False
        )

    def _note_progress(self, exchange: Exchange, tap: StreamTap, now_seconds: float) -> None:
        """Stamp tokens; raise IdleTimeout where for too long nothing but keep-alive comments came."""
        if tap.progress:
            exchange.progress_seconds = now_seconds
            if tap.first_token_seen and exchange.token_came(now_seconds) and exchange.attempt is not None:
                exchange.attempt.first_token(now_seconds)
        elif now_seconds - (exchange.progress_seconds or now_seconds) > self._idle_seconds:
            raise IdleTimeout("the upstream sent nothing but keep-alives")

    def _broke(self, exchange: Exchange, downstream: Downstream, error: UpstreamError) -> None:
        """The answer broke off after its head had gone out: the client must see that it is not whole."""
        exchange.ending = Ending.UPSTREAM_BROKE
        exchange.error_code = error.code
        phase = "before_first_token" if exchange.first_token_seconds is None else "after_first_token"
        self._recorder.inc(STREAM_ABORTS, ("upstream", phase))
        if exchange.attempt is not None:
            self._fleet.failed(exchange.attempt.replica, self._clock.monotonic(), unreachable=False)
            if exchange.first_token_seconds is None:
                exchange.attempt.take_back()
        downstream.break_off()

    def _end(self, exchange: Exchange, *, client_left: bool = False) -> None:
        """Give back what the attempt claimed. Comes twice where a client leaves."""
        if client_left and exchange.ending is _INTERNAL:
            exchange.ending = Ending.CLIENT_LEFT
            phase = "before_first_token" if exchange.first_token_seconds is None else "after_first_token"
            self._recorder.inc(STREAM_ABORTS, ("client", phase))
        if exchange.attempt is not None:
            exchange.attempt.end(self._clock.monotonic(), client_left=client_left)


def _worth_another(error: UpstreamError, number: int, replicas: int) -> bool:
    """Another replica is worth a try; the same one only where a connection died before a byte came, and once."""
    return replicas > 1 or (number == 0 and isinstance(error, ResetBeforeResponse))

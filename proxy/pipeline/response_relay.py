"""The second half of phase 7: pass a response to the client, and note the tokens that it reports.

Bytes are passed on unchanged as they arrive, with back-pressure. A response that breaks off after its head was
written is ended so that the client can see that it is incomplete.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from proxy.clock import Clock
from proxy.downstream.response import Downstream
from proxy.errors import IdleTimeout, UpstreamError
from proxy.fleet import Fleet
from proxy.fleet.model_list import read_models
from proxy.metrics.definitions import HIDDEN_ERRORS, STREAM_ABORTS
from proxy.metrics.recorder import Recorder
from proxy.model import Ending, Endpoint
from proxy.pipeline.dispatch import Opened, evidence
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.objects import CreatedObjects
from proxy.pipeline.opening import closed_inside, is_cut_off, is_unfinished
from proxy.pipeline.silence import COMMENT, PassedStream, SilenceWatch, WaitingClient
from proxy.upstream import Framing, UpstreamResponse
from proxy.wire import headers as wire_headers
from proxy.wire.decode import ResponseDecoder, content_encoding
from proxy.wire.errors import error_event
from proxy.wire.item_ids import StreamedItemIds
from proxy.wire.late import events_of_plain
from proxy.wire.refusals import HTML
from proxy.wire.schemas import LONG_RESPONSE_BYTES
from proxy.wire.sse import StreamTap
from proxy.wire.usage import PassedBody, read_response

WHOLE_AT_MOST_BYTES = 256 * 1024
"""A plain response up to this size is gathered and written at once; a longer one is relayed piece by piece."""

_READ_AT_MOST_BYTES = 8 * 1024 * 1024
"""Largest plain response that is read as a whole; the limit holds for its compressed and its decoded size. Of a
longer one only the usage near its beginning or its end is read."""

_TURN_BYTES: Final = 8 * 1024
"""Bytes of a stream that are read at once. Other connections have a turn before the next ones: in events of a few
bytes each, these take 10 ms, and a few compressed bytes can hold megabytes of them. A stream that keeps its own pace
has far shorter pieces."""

_OPENING_BYTES: Final = 2048  # of a stream of the Responses API, searched for its id
_COMPLETE: Final = Ending.COMPLETE  # constants: the member of an enum is looked up in Python
_TRUNCATED: Final = Ending.TRUNCATED
_UPSTREAM_STATUS: Final = Ending.UPSTREAM_STATUS
_UPSTREAM_ERROR: Final = Ending.UPSTREAM_ERROR
_RESPONSES: Final = Endpoint.RESPONSES
_EMBEDDINGS: Final = Endpoint.EMBEDDINGS
_MODELS: Final = Endpoint.MODELS


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Longest silences of a stream, in seconds."""

    idle_seconds: float = 120.0  # without a byte, after the first event
    thinking_seconds: float = 900.0  # with nothing but comments and pings


class ModelNames(Protocol):
    """Model names that may become metric labels."""

    def add(self, names: Iterable[str]) -> None: ...


class ResponseRelay:
    """Passes responses to clients. One per worker."""

    def __init__(
        self,
        objects: CreatedObjects,
        fleet: Fleet,
        model_names: ModelNames,
        recorder: Recorder,
        clock: Clock,
        limits: StreamLimits,
        silence: SilenceWatch,
    ) -> None:
        self.objects = objects
        self._fleet = fleet
        self._model_names = model_names
        self._recorder = recorder
        self.clock = clock
        self.limits = limits
        self.silence = silence

    def accompany(self, exchange: Exchange, downstream: Downstream) -> None:
        """Send comments to the client from now on, if it waits for a stream; `release` ends that."""
        prompt = exchange.prompt
        if prompt is not None and prompt.stream and self.silence.fills_before_head:
            call = exchange.call
            headers = ((b"x-request-id", call.request_id.encode()), *exchange.context_notes)
            waiting = exchange.waiting = WaitingClient(downstream, headers, call.read_seconds)
            self.silence.enter(waiting)

    def release(self, exchange: Exchange) -> None:
        """Send no more comments in place of a response."""
        if exchange.waiting is not None:
            self.silence.leave(exchange.waiting)

    async def pass_on(self, exchange: Exchange, opened: Opened, downstream: Downstream) -> None:
        """Write a response to the client. Raises UpstreamError only while nothing of a response was written."""
        exchange.status = opened.response.status
        is_late = not opened.is_stream and exchange.head_sent
        try:
            if opened.is_stream:
                await self._stream(exchange, opened.response, downstream)
                if opened.failure is not None and exchange.ending is _COMPLETE:  # it was found to have no tokens
                    self._hidden_error(exchange, opened.failure.reason)
            elif is_late:
                await self._as_events(exchange, opened.response)
            else:
                self.release(exchange)
                rest = self._plain(exchange, opened.response, downstream)
                if rest is not None:
                    await rest
        except UpstreamError as error:
            if is_late or not downstream.begun:
                raise
            self._broke(exchange, downstream, error)
        finally:
            opened.response.abort()
        if exchange.ending is _COMPLETE and exchange.attempt is not None and exchange.call.endpoint.runs_model:
            self._fleet.completed(exchange.attempt.replica)
        pool, model = exchange.pool, exchange.model
        if exchange.usage is not None and model is not None and pool is not None and pool.is_provider:
            self._model_names.add((model,))  # providers may list their models only with a key, unlike engines

    # -- plain responses

    def _plain(
        self, exchange: Exchange, response: UpstreamResponse, downstream: Downstream
    ) -> Awaitable[None] | None:
        """Write a response that has arrived whole; return what to await if it has not."""
        succeeded = response.status < 300
        if succeeded and exchange.attempt is not None:
            exchange.attempt.computed()
        head = self._response_head(exchange, response)
        if response.framing is Framing.NONE:
            downstream.begin(response.status, response.reason, head, response.content_length)
            downstream.end()
            exchange.ending = _ending_of(response)
        elif response.complete:
            body = response.body_now()
            if succeeded and response.is_json_until_close and is_unfinished(body):
                raise closed_inside()
            self._whole(exchange, response, downstream, head, body)
        else:
            return self._arriving(exchange, response, downstream, head)
        return None

    async def _arriving(
        self,
        exchange: Exchange,
        response: UpstreamResponse,
        downstream: Downstream,
        head: list[tuple[bytes, bytes]],
    ) -> None:
        """Gather a short response and write it at once; relay a long one as it arrives."""
        length = response.content_length
        if length is not None and length <= WHOLE_AT_MOST_BYTES:
            body = await response.read(WHOLE_AT_MOST_BYTES)
            self._whole(exchange, response, downstream, head, body)
            return
        passed = await self._in_pieces(exchange, response, downstream, head)
        exchange.ending = _ending_of(response)
        if passed is not None and (whole := passed.whole()) is not None:
            self._read_plain(exchange, response, whole)
        if passed is not None and exchange.usage is None and exchange.call.endpoint.runs_model:
            exchange.usage = passed.usage()

    def _whole(
        self,
        exchange: Exchange,
        response: UpstreamResponse,
        downstream: Downstream,
        head: list[tuple[bytes, bytes]],
        body: bytes,
    ) -> None:
        """Write a whole response, and read its body: before, if a header depends on that."""
        succeeded = response.status < 300
        exchange.response_bytes = len(body)
        exchange.ending = _ending_of(response)
        if exchange.stored is not None and succeeded:
            self._read_plain(exchange, response, body)
            head += exchange.saved_note()
            downstream.send(response.status, response.reason, head, body)
        else:
            downstream.send(response.status, response.reason, head, body)
            if succeeded:
                self._read_plain(exchange, response, body)

    async def _in_pieces(
        self,
        exchange: Exchange,
        response: UpstreamResponse,
        downstream: Downstream,
        head: list[tuple[bytes, bytes]],
    ) -> PassedBody | None:
        """Relay a long plain response as it arrives. Return its body if it is to be read."""
        body: PassedBody | None = None
        if response.status < 300 and self._is_read(exchange):
            encoding = content_encoding(response.headers)
            body = PassedBody(encoding, exchange.call.endpoint, _READ_AT_MOST_BYTES)
        stream = self._passed_stream(response, downstream)
        downstream.begin(response.status, response.reason, head, response.content_length)
        may_be_cut = response.status < 300 and response.is_json_until_close
        begin = end = b""
        try:
            while piece := await response.next_chunk():
                exchange.response_bytes += len(piece)
                if body is not None:
                    body.feed(piece)
                await downstream.write(piece)
                if may_be_cut and (visible := piece.strip()):
                    begin, end = begin or visible[:1], visible[-1:]
                if stream is not None:
                    stream.passed(piece, response.seen_seconds)
        finally:
            if stream is not None:
                self.silence.leave(stream)
        whole = body.whole() if body is not None and may_be_cut else None
        if may_be_cut and (is_cut_off(begin, end) if whole is None else is_unfinished(whole)):
            raise closed_inside()
        downstream.end()
        return body

    def _passed_stream(self, response: UpstreamResponse, downstream: Downstream) -> PassedStream | None:
        """Watch a stream that answers no prompt, such as that of a background response; None for any other body.

        Its client gets comments, too, and it may be silent for as long as a model thinks.
        """
        if not response.is_event_stream or response.status >= 300:
            return None
        response.allow_silence(self.limits.thinking_seconds)
        if not self.silence.is_on or response.content_length is not None or response.header(b"content-encoding"):
            return None
        stream = PassedStream(downstream, response.first_byte_seconds)
        self.silence.enter(stream)
        return stream

    async def _as_events(self, exchange: Exchange, response: UpstreamResponse) -> None:
        """Pass a plain response on as events, because the head of a stream was sent already."""
        assert exchange.waiting is not None  # noqa: S101 - the caller looked
        succeeded = response.status < 300
        if succeeded and exchange.attempt is not None:
            exchange.attempt.computed()
        body = await response.read(_READ_AT_MOST_BYTES)
        exchange.response_bytes = len(body)
        exchange.ending = _ending_of(response)
        if succeeded:
            self._read_plain(exchange, response, body)
        if encoding := content_encoding(response.headers):
            body = ResponseDecoder(encoding, _READ_AT_MOST_BYTES).feed(body)
        self.release(exchange)
        call = exchange.call
        about = (response.status, body, call.endpoint)
        if len(body) < LONG_RESPONSE_BYTES:
            events = events_of_plain(*about, request_id=call.request_id)
        else:
            events = await asyncio.to_thread(events_of_plain, *about, request_id=call.request_id)
        exchange.waiting.end_with(events)

    def _read_plain(self, exchange: Exchange, response: UpstreamResponse, body: bytes) -> None:
        """Read usage, errors and the id of a created object from a whole plain response."""
        if not self._is_read(exchange):
            return
        endpoint = exchange.call.endpoint
        if encoding := content_encoding(response.headers):
            decoder = ResponseDecoder(encoding, _READ_AT_MOST_BYTES)
            body = decoder.feed(body)
            if not decoder.alive:
                return  # it may be understood by the client
        if endpoint.runs_model:
            self._read_usage(exchange, body)
        if self.objects.may_tell(exchange.call, exchange.prompt):
            self.objects.note(exchange, body)
        if endpoint is _MODELS:
            self._model_names.add(str(model.get("id")) for model in read_models(body) or ())

    def _read_usage(self, exchange: Exchange, body: bytes) -> None:
        endpoint = exchange.call.endpoint
        is_json = body.startswith(b"{") or body.lstrip()[:1] == b"{"
        if not is_json and HTML.match(body):
            self._hidden_error(exchange, "html")
        elif is_json or endpoint.is_generation or endpoint is _EMBEDDINGS:
            read = read_response(body, endpoint)
            exchange.usage = read.usage
            if read.error_seen:
                self._hidden_error(exchange, "error_body")

    # -- streams

    async def _stream(self, exchange: Exchange, response: UpstreamResponse, downstream: Downstream) -> None:
        tap = StreamTap(exchange.call.endpoint, withhold_usage=exchange.asked_usage)
        if not exchange.head_sent:
            head = self._response_head(exchange, response)
            length = None if exchange.asked_usage or self.silence.is_on else response.content_length
            downstream.begin(response.status, response.reason, head, length)
        self.release(exchange)
        stream = StreamRelay(self, exchange, response, downstream, tap)
        rest = b""
        try:
            await stream.run()
            rest = tap.close()
            if rest:
                await downstream.write(rest)
            if response.framing is Framing.CLOSE and (rest or tap.mid_event) and not tap.finished:
                raise closed_inside()  # no other framing can end within an event unnoticed
            downstream.end()
            exchange.ending = _COMPLETE if tap.finished else _TRUNCATED
        except UpstreamError as error:
            mid_event = bool(rest) or tap.mid_event
            downstream.write_last(error_event(error, exchange.call.endpoint, mid_event=mid_event))
            raise
        finally:
            exchange.usage = tap.usage
            self.objects.note_end(exchange)
        if tap.error_seen:
            self._hidden_error(exchange, "error_event")

    # -- both

    def _response_head(self, exchange: Exchange, response: UpstreamResponse) -> list[tuple[bytes, bytes]]:
        return wire_headers.response_head(
            response.headers, request_id=exchange.call.request_id, own=exchange.notes(), keep_length=False
        )

    def _is_read(self, exchange: Exchange) -> bool:
        """Return whether the body of a successful response is read: for its usage, models or what it created."""
        endpoint = exchange.call.endpoint
        if endpoint is _MODELS:
            return exchange.call.method == "GET"
        return endpoint.runs_model or self.objects.may_tell(exchange.call)

    def _hidden_error(self, exchange: Exchange, kind: str) -> None:
        """Count a response that failed in spite of a 2xx status; its prompt may not have been computed."""
        exchange.ending = _UPSTREAM_ERROR
        self._recorder.inc(HIDDEN_ERRORS, (exchange.replica_name, kind))
        if exchange.attempt is not None:
            failure = evidence(exchange, by_status=True, after_head=True)
            now_seconds = self.clock.monotonic()
            self._fleet.failed(exchange.attempt.replica, failure, now_seconds, f"a successful status with {kind}")
            if exchange.first_token_seconds is None:
                exchange.attempt.take_back()

    def _broke(self, exchange: Exchange, downstream: Downstream, error: UpstreamError) -> None:
        """End a response that broke off after its head was written, so that the client sees that it is incomplete."""
        exchange.ending = Ending.UPSTREAM_BROKE
        exchange.error_code = error.code
        phase = "before_first_token" if exchange.first_token_seconds is None else "after_first_token"
        self._recorder.inc(STREAM_ABORTS, ("upstream", phase))
        if exchange.attempt is not None:
            now_seconds = self.clock.monotonic()
            failure = evidence(exchange, by_status=False, after_head=True)
            self._fleet.failed(exchange.attempt.replica, failure, now_seconds, error.message)
            if exchange.first_token_seconds is None:
                exchange.attempt.take_back()
        downstream.break_off()


class StreamRelay:
    """One stream on its way to the client: each piece is written in the event that brings it."""

    __slots__ = (
        "_behind",
        "_decoder",
        "_downstream",
        "_exchange",
        "_items",
        "_limits",
        "_opening",
        "_passes_decoded",
        "_relay",
        "_response",
        "_tap",
        "_unread",
        "_wants_id",
        "given_seconds",
    )

    def __init__(
        self,
        relay: ResponseRelay,
        exchange: Exchange,
        response: UpstreamResponse,
        downstream: Downstream,
        tap: StreamTap,
    ) -> None:
        encoding = content_encoding(response.headers)
        self._relay = relay
        self._exchange = exchange
        self._response = response
        self._downstream = downstream
        self._tap = tap
        self._limits = relay.limits
        self._decoder = ResponseDecoder(encoding) if encoding else None
        self._passes_decoded = exchange.head_sent  # that head named no encoding
        is_response = exchange.call.endpoint is _RESPONSES
        self._wants_id = is_response or (exchange.prompt is not None and exchange.prompt.is_stored)
        self._items = StreamedItemIds() if is_response and relay.objects.wants_items(exchange) else None
        self._opening = b""
        self._unread: memoryview | None = None  # the rest of a long piece
        self._behind = False  # the client has not read what was written
        self.given_seconds = response.first_byte_seconds
        if exchange.waiting is not None:
            self.given_seconds = exchange.waiting.given_seconds

    async def run(self) -> None:
        """Relay until the end of the body. Raises UpstreamError, and ConnectionResetError if the client left."""
        silence = self._relay.silence
        if silence.is_on and (self._decoder is None or self._passes_decoded):
            silence.enter(self)
        try:
            while not await self._response.pour(self.take):
                if self._behind or self._unread is None:
                    await self._catch_up()
                while self._unread is not None:
                    await asyncio.sleep(0)  # a turn for other connections
                    if not self._take_part(self._unread):
                        await self._catch_up()
        finally:
            silence.leave(self)

    def take(self, piece: bytes, framed: bytes | None) -> bool:
        """Write a piece to the client. Return False if the client is behind, or if a part of it remains unread."""
        if self._decoder is not None or len(piece) > _TURN_BYTES:
            return self._take_long(piece, framed)
        self._exchange.response_bytes += len(piece)
        return self._pass(piece, framed)

    async def _catch_up(self) -> None:
        """Wait until the client has read most of what was written."""
        self._behind = True
        await self._downstream.drained()
        self._behind = False

    def _take_long(self, piece: bytes, framed: bytes | None) -> bool:
        """Do the same with a piece that is compressed, or too long to be read at once."""
        self._exchange.response_bytes += len(piece)
        text, keeps_up = piece, True
        if self._decoder is not None:
            text = self._decoder.feed(piece)
            if not self._passes_decoded:
                keeps_up = self._downstream.offer(piece, framed)
        if len(text) <= _TURN_BYTES:
            return self._pass(text, None) and keeps_up
        self._behind = not keeps_up
        self._unread = memoryview(text)
        return False

    def _take_part(self, unread: memoryview) -> bool:
        """Read the next bytes of a long piece. Return False if the client is behind."""
        self._unread = unread[_TURN_BYTES:] if len(unread) > _TURN_BYTES else None
        return self._pass(bytes(unread[:_TURN_BYTES]), None)

    def _pass(self, text: bytes, framed: bytes | None) -> bool:
        """Read the next bytes of the stream, and write them to the client unless it has them in compressed form."""
        exchange, tap = self._exchange, self._tap
        passed = tap.feed(text)
        keeps_up = True
        if passed and (self._decoder is None or self._passes_decoded):
            keeps_up = self._downstream.offer(passed, framed if passed is text else None)
        seen_seconds = self.given_seconds = self._response.seen_seconds
        if tap.progress and exchange.first_token_seconds is not None:  # nearly every piece of a stream
            exchange.progress_seconds = seen_seconds
            exchange.token_came(seen_seconds)
        else:
            self._note_progress(seen_seconds)
        if self._wants_id and len(self._opening) < _OPENING_BYTES:
            self._opening += text
            self._wants_id = not self._relay.objects.note_opening(exchange, self._opening)
        if self._items is not None and (ids := self._items.feed(text)):
            self._relay.objects.note_items(exchange, ids)
        return keeps_up

    def _note_progress(self, now_seconds: float) -> None:
        """Record the time of tokens. Raise IdleTimeout if only comments and pings have arrived for too long."""
        exchange, tap = self._exchange, self._tap
        if tap.progress:
            if not exchange.progress_seconds:  # the first event: from now on, silence is not due to the prefill
                self._response.allow_silence(self._limits.idle_seconds)
            exchange.progress_seconds = now_seconds
            if tap.first_token_seen and exchange.token_came(now_seconds) and exchange.attempt is not None:
                exchange.attempt.first_token(now_seconds)
            return
        since = exchange.progress_seconds or self._response.first_byte_seconds
        if now_seconds - since > self._limits.thinking_seconds:
            raise IdleTimeout("the upstream sent nothing but keep-alives")

    def fill(self) -> None:
        """Write a comment, unless an event is incomplete or the client has not read what was written."""
        if not self._tap.mid_event and not self._behind:
            self._downstream.write_last(COMMENT)


def _ending_of(response: UpstreamResponse) -> Ending:
    return _COMPLETE if response.status < 400 else _UPSTREAM_STATUS

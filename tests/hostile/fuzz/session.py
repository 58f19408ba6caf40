"""One client's session: it sends requests over a connection, reads the answers strictly, and judges each."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from tests.hostile.client.inputs import CASES
from tests.hostile.fuzz.mutations import mutate, mutate_wire
from tests.hostile.fuzz.requests import Known, Must, Request, mark, well_formed
from tests.hostile.fuzz.upstream import ANSWER, NUMBERS_PER_SESSION, Record, Recorder

HANG_SECONDS = 30.0
QUIET_SECONDS = 0.05  # after which a connection whose framing was changed is taken to wait for more
_KEYS = 40  # few, so that whatever is kept for each is complete after some thousand requests
_MUTATED_SHARE = 0.75
_WIRE_SHARE = 0.12  # of sessions
_LEAVING_SHARE = 0.04
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3}) [ -~]*")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9a-zA-Z-]+):[ \t]*([^\r\n\0]*)")
_SEEDS = [b"".join(case.pieces) for case in CASES.values() if case.pieces and len(b"".join(case.pieces)) < 20_000]
_EDIT_BYTES_MOST = 80  # of the member that asks for usage, and of a value that it replaces


class Broken(Exception):
    """Something that must not happen: what, and to which request."""

    def __init__(self, what: str, request: Request | None = None) -> None:
        super().__init__(what)
        self.request = request


@dataclass(slots=True)
class Answer:
    """One answer as it came."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    ends: bool


@dataclass(slots=True)
class Tally:
    """Findings of all sessions. `outcomes` counts requests by kind and outcome."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    requests: int = 0


class Session:
    """Requests of one seed, over one connection at a time."""

    def __init__(self, seed: int, number: int, ports: tuple[int, int], recorder: Recorder, tally: Tally) -> None:
        self._name = f"{seed}:{number}"
        self._random = Random(self._name)
        self._number = number
        self._first = number * NUMBERS_PER_SESSION
        self._ports = ports
        self._recorder = recorder
        self._tally = tally
        self._known = Known(key=b"key-%d" % self._random.randrange(_KEYS) if self._random.random() < 0.8 else b"")
        self._connections: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def run(self, requests: int) -> None:
        """Send a number of requests, some of them ahead of their turn; note what is wrong."""
        self._recorder.begin(self._number)
        try:
            if self._random.random() < _WIRE_SHARE:
                for turn in range(requests):
                    await self._send_changed_wire(self._first + turn)
            else:
                await self._send_valid(requests)
        finally:
            for _, writer in self._connections.values():
                writer.close()
            self._recorder.end(self._number)

    # -- requests whose framing is valid

    async def _send_valid(self, requests: int) -> None:
        random, turn = self._random, 0
        while turn < requests:
            ahead = min(random.choice((1, 1, 1, 1, 2, 5)), requests - turn)
            batch = [self._make(self._first + turn + at) for at in range(ahead)]
            turn += ahead
            batch = [request for request in batch if request.is_admin == batch[0].is_admin]
            leaves = random.random() < _LEAVING_SHARE
            with self._noting(batch):
                await self._exchange(batch, leaves=leaves)

    def _make(self, number: int) -> Request:
        request = well_formed(self._random, number, self._known)
        if self._random.random() < _MUTATED_SHARE:
            mutate(self._random, request)
        return request

    async def _exchange(self, batch: list[Request], *, leaves: bool) -> None:
        port = self._ports[batch[0].is_admin]
        reader, writer = await self._connection(port)
        message = b"".join(framed(self._random, request) for request in batch)
        if leaves:
            writer.write(message[: self._random.randrange(len(message) + 1)])
            await asyncio.sleep(self._random.choice((0, 0, 0.01)))
            self._drop(port)
            writer.transport.abort()
            for request in batch:
                self._count(request, "client left")
            return
        sending = asyncio.get_running_loop().create_task(self._write(writer, message))
        current = batch[0]
        try:
            for at, request in enumerate(batch):
                current = request
                async with asyncio.timeout(HANG_SECONDS):
                    answer = await read_answer(reader, request.method)
                if answer is None:
                    raise Broken("no answer")
                self._judge(request, answer)
                if answer.ends:
                    self._drop(port)
                    for later in batch[at + 1 :]:
                        self._not_answered(later)
                    break
        except TimeoutError:
            raise Broken(f"no answer within {HANG_SECONDS:.0f} s", current) from None
        except (Broken, ConnectionError, ValueError) as error:
            raise Broken(f"{type(error).__name__}: {error}", current) from None
        finally:
            await sending
            for request in batch:
                self._recorder.records.pop(request.number, None)

    async def _connection(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if port not in self._connections:
            self._connections[port] = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        return self._connections[port]

    def _drop(self, port: int) -> None:
        if port in self._connections:
            self._connections.pop(port)[1].close()

    async def _write(self, writer: asyncio.StreamWriter, message: bytes) -> None:
        cut = self._random.randrange(len(message) + 1) if self._random.random() < 0.3 else len(message)
        try:
            writer.write(message[:cut])
            await writer.drain()
            if cut < len(message):
                await asyncio.sleep(0)
                writer.write(message[cut:])
                await writer.drain()
        except ConnectionError:
            pass  # the server may answer and close before all was sent

    # -- verdicts

    def _judge(self, request: Request, answer: Answer) -> None:
        record = self._recorder.records.get(request.number)
        answered = answer.headers.get(ANSWER)
        if record is not None and record.times > 1:
            raise Broken(f"sent to the upstream {record.times} times")
        if answered is None:
            self._judge_own(request, answer, record)
            return
        if answered != b"%d" % request.number:
            raise Broken(f"got the answer to request {answered.decode()}")
        if record is None:
            raise Broken("got an answer that the upstream has not sent")
        if request.must is Must.ANSWER:
            raise Broken("was relayed")
        self._judge_relayed(request, answer, record)
        self._learn(request, answer)
        self._count(request, "relayed")

    def _judge_own(self, request: Request, answer: Answer, record: Record | None) -> None:
        if record is not None:
            raise Broken(f"the upstream's answer was lost: {answer.status} {answer.body[:300]!r}")
        if request.must is Must.PASS:
            raise Broken(f"was not relayed: {answer.status} {answer.body[:300]!r}")
        is_about_contexts = "context" in request.kind or b"cache" in request.body
        if answer.status >= 500 and not (answer.status == 501 or (answer.status == 503 and is_about_contexts)):
            raise Broken(f"{answer.status} {answer.body[:300]!r}")
        if request.kind == "context" and answer.status == 200:
            self._learn(request, answer)
        self._count(request, f"{answer.status // 100}xx of Cairn")

    def _judge_relayed(self, request: Request, answer: Answer, record: Record) -> None:
        if answer.status != record.status:
            raise Broken(f"status {answer.status} in place of {record.status}")
        if record.method != request.method:
            raise Broken(f"method {record.method} in place of {request.method}")
        expected = record.answer
        if not request.splices and record.body not in (request.body, request.plain_body):
            if not _asks_for_usage_only(request.plain_body, record.body):
                raise Broken(f"another body reached the upstream: {_difference(record.body, request.plain_body)}")
            expected = record.without_usage
        if answer.body != expected and not (request.splices and answer.body == record.without_usage):
            raise Broken(f"another answer: {_difference(answer.body, expected)}")

    def _learn(self, request: Request, answer: Answer) -> None:
        try:
            tree = json.loads(answer.body)
            name = tree.get("id") if isinstance(tree, dict) else None
        except (ValueError, RecursionError):
            return
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,100}", name):
            return
        if request.kind.startswith("context"):
            self._known.contexts = [*self._known.contexts[-5:], name]
        elif request.kind.startswith("created"):
            collection = request.target.decode("latin-1").partition("/v1/")[2].partition("/")[0]
            self._known.objects = [*self._known.objects[-5:], (collection, name)]

    def _not_answered(self, request: Request) -> None:
        """Judge a request behind one after which the connection ended."""
        if request.number in self._recorder.records:
            raise Broken("was relayed behind a request after which the connection ended")
        self._count(request, "behind the end")

    # -- requests whose framing was changed

    async def _send_changed_wire(self, number: int) -> None:
        random = self._random
        request = well_formed(random, number, Known(key=self._known.key))
        message = framed(random, request) if random.random() < 0.7 else random.choice(_SEEDS)
        request.kind = "bytes on the wire"
        message = mutate_wire(random, message)
        with self._noting([request], message):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._ports[request.is_admin], limit=1 << 20)
            try:
                await self._write(writer, message)
                await self._read_until_quiet(reader, writer, request, message)
            finally:
                writer.close()
                self._recorder.records.pop(number, None)

    async def _read_until_quiet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request, message: bytes
    ) -> None:
        received = b""
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                while piece := await reader.read(1 << 20):
                    received += piece
        except TimeoutError:
            received += await _read_after_close(reader, writer)
        except ConnectionError:
            pass
        if b"HTTP/1.1 500 " in received:
            raise Broken(f"500: {received[:500]!r}")
        for found in re.findall(ANSWER + rb": (\d+)", received):
            if found != b"%d" % request.number:
                raise Broken(f"got the answer to request {found.decode()}")
        record = self._recorder.records.get(request.number)
        if record is not None and record.times > message.count(mark(request.number)):
            raise Broken(f"sent to the upstream {record.times} times")
        statuses = re.findall(rb"HTTP/1\.1 (\d)", received)
        self._count(request, f"{statuses[0].decode()}xx" if statuses else "no answer")

    # -- the tally

    def _count(self, request: Request, outcome: str) -> None:
        self._tally.requests += 1
        self._tally.outcomes[request.kind, outcome] += 1

    @contextmanager
    def _noting(self, batch: list[Request], message: bytes = b"") -> Iterator[None]:
        """Note what breaks in the block, with the requests that led to it."""
        try:
            yield
        except (Broken, OSError) as error:
            culprit = getattr(error, "request", None) or batch[0]
            shown = f"{message[:3000]!r}" if message else shown_request(culprit)
            self._tally.findings.append(f"session {self._name}, {culprit.kind}: {error}\n    {shown}")
            for port in tuple(self._connections):
                self._drop(port)
            for request in batch:
                self._count(request, "FOUND")


def shown_request(request: Request) -> str:
    """Show a request in a line, its long parts shortened."""
    parts = (request.method, request.target, request.headers[:12], request.plain_body)
    return " ".join(repr(part)[:1200] for part in parts)


def framed(random: Random, request: Request) -> bytes:
    """Serialise a request, its body declared by its length or in chunks."""
    lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.target)]
    lines += [b"%b: %b" % pair for pair in request.headers]
    body = request.body
    if body and random.random() < 0.2:
        lines.append(b"transfer-encoding: chunked")
        pieces = []
        while body:
            cut = len(body) if random.random() < 0.5 else random.randrange(1, len(body) + 1)
            pieces.append(b"%x\r\n%b\r\n" % (cut, body[:cut]))
            body = body[cut:]
        body = b"".join(pieces) + b"0\r\n\r\n"
    elif body or random.random() < 0.5:
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def read_answer(reader: asyncio.StreamReader, method: str) -> Answer | None:
    """Read one final answer; None if the connection ended before it. Raises Broken if it is malformed or cut."""
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise Broken(f"half a head: {error.partial[:200]!r}") from None
            return None
        status_line, *lines = head[:-4].split(b"\r\n")
        found = _STATUS_LINE.fullmatch(status_line)
        pairs = [_HEADER.fullmatch(line) for line in lines]
        if found is None or not all(pairs):
            raise Broken(f"a malformed head: {head[:500]!r}")
        status = int(found[1])
        if status >= 200:
            break
    headers = {pair[1].lower(): pair[2] for pair in pairs if pair is not None}
    ends = headers.get(b"connection", b"").lower() == b"close" or status_line.startswith(b"HTTP/1.0")
    if method == "HEAD" or status in (204, 304):
        return Answer(status, headers, b"", ends)
    try:
        body = await _read_body(reader, headers)
    except asyncio.IncompleteReadError:
        raise Broken("a body that is cut short") from None
    return Answer(status, headers, body, ends)


async def _read_body(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> bytes:
    if headers.get(b"transfer-encoding") == b"chunked":
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            piece = await reader.readexactly(size + 2)
            if not piece.endswith(b"\r\n"):
                raise Broken("a chunk without its end")
            body += piece[:-2]
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return body
    if b"content-length" not in headers:
        raise Broken("a body without a length")
    return await reader.readexactly(int(headers[b"content-length"]))


def _asks_for_usage_only(sent: bytes, received: bytes) -> bool:
    """Return whether `received` is `sent` with a member that asks for usage put in, or changed to ask for it."""
    before = 0
    limit = min(len(sent), len(received))
    while before < limit and sent[before] == received[before]:
        before += 1
    after = 0
    while after < limit - before and sent[-1 - after] == received[-1 - after]:
        after += 1
    put_in = received[before : len(received) - after]
    taken = len(sent) - after - before
    is_put_in = b"usage" in received[max(0, before - 40) :] and len(put_in) <= _EDIT_BYTES_MOST
    if is_put_in and taken <= _EDIT_BYTES_MOST:
        return True
    try:  # options that were given are written anew, without the white space between their members
        tree = json.loads(sent)
        tree["stream_options"] = {**(tree.get("stream_options") or {}), "include_usage": True}
        return bool(tree == json.loads(received))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False


def _difference(got: bytes, wanted: bytes) -> str:
    at = next((at for at, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    begin = max(0, at - 60)
    return (
        f"{len(got)} bytes in place of {len(wanted)}, from {at}: {got[begin : at + 200]!r} "
        f"in place of {wanted[begin : at + 200]!r}"
    )


async def _read_after_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Close this side and return what still comes. Raises Broken if the other side does not close then."""
    received = b""
    try:
        writer.write_eof()
        async with asyncio.timeout(HANG_SECONDS):
            while piece := await reader.read(1 << 20):
                received += piece
    except TimeoutError:
        raise Broken("the connection stays after its client has closed it") from None
    except (ConnectionError, RuntimeError):  # the second is uvloop's, if it was closed in this moment
        pass
    return received

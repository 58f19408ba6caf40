"""A load generator: keep-alive connections on asyncio protocols and httptools, in a separate process.

Reads jobs as JSON lines on stdin. For each it connects, warms, says "ready", waits for a line, runs, and writes the
result as one JSON line, so that the caller can read CPU clocks exactly before and after the counted requests. The
status and size of each response are checked; with `capture` the bodies are kept as digests.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import subprocess
import sys
from array import array
from collections import Counter
from typing import cast

import httptools
import msgspec
import uvloop

from benchmarks.common import bodies
from benchmarks.common.figures import percentile
from benchmarks.common.processes import ROOT, environment
from proxy.clock import SystemClock

_CLOCK = SystemClock()
_RECONNECT_SECONDS = 0.01
_HANG_SECONDS = 60.0  # an answer that takes longer is a hang: the job fails
_STAMPS_PER_PROCESS = 10**12  # so that two generators never send equal bodies


class Job(msgspec.Struct, frozen=True):
    """One measurement. It ends after `seconds`, or `max_requests` answers, whichever is first."""

    port: int
    size_bytes: int = 1024
    shared_share: float = 0.5
    stream: bool = False
    include_usage: bool = False
    wish: str = bodies.PLAIN
    model: str = "bench"
    path: str = "/v1/chat/completions"
    connections: int = 16
    seconds: float = 2.0
    max_requests: int = 1_000_000
    interval_seconds: float = 0.0  # between the starts of two requests of a connection; 0: at once
    warm_requests: int = 32
    capture: bool = False

    def shape(self) -> bodies.Shape:
        """Return the shape of the bodies."""
        return bodies.Shape(
            self.size_bytes,
            self.shared_share,
            self.stream,
            self.include_usage,
            self.wish,
            verify=self.capture,
            model=self.model,
        )


class Result(msgspec.Struct, frozen=True):
    """Result of one job. Seconds of latency run from the first byte written to the last byte read."""

    requests: int
    seconds: float
    p50_seconds: float
    p99_seconds: float
    max_seconds: float
    first_byte_p50_seconds: float
    answer_bytes: int
    reads: int  # pieces in which the bodies came
    answer_sizes: dict[int, int]
    failures: dict[str, int]
    answer_digest: str = ""
    body_digest: str = ""


class Run:
    """The state of one job that its connections share."""

    def __init__(self, job: Job, stamp: int) -> None:
        self.job = job
        self.stamp = stamp
        self.latencies = array("d")
        self.first_bytes = array("d")
        self.failures: Counter[str] = Counter()
        self.answer_sizes: Counter[int] = Counter()
        self.reads = 0
        self.answer_digest = ""
        self.body_digest = ""
        self._left = 0
        self._busy = 0
        self._deadline = math.inf
        self._finished: asyncio.Future[None] | None = None
        self._connections: list[Connection] = []

    async def connect(self) -> None:
        """Open all connections."""
        content, offset = bodies.body(self.job.shape())
        loop = asyncio.get_running_loop()
        for _ in range(self.job.connections):
            _, connection = await loop.create_connection(
                lambda: Connection(self, content, offset), "127.0.0.1", self.job.port
            )
            self._connections.append(connection)

    async def go(self, seconds: float, max_requests: int) -> float:
        """Send until one of the limits is reached and the last answer has arrived; return the seconds taken."""
        self._left = max_requests
        start = _CLOCK.monotonic()
        self._deadline = start + seconds
        self._finished = asyncio.get_running_loop().create_future()
        for connection in self._connections:
            self._busy += 1
            connection.next(start)
        async with asyncio.timeout(seconds + _HANG_SECONDS):
            await self._finished
        return _CLOCK.monotonic() - start

    def may_send(self) -> bool:
        """Take one of the remaining requests; return False when the run is over."""
        if self._left <= 0 or _CLOCK.monotonic() >= self._deadline:
            return False
        self._left -= 1
        self.stamp += 1
        return True

    def rest(self) -> None:
        """Note that one connection has finished."""
        self._busy -= 1
        if not self._busy and self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    def forget(self) -> None:
        """Drop the counts of the warm-up."""
        self.latencies, self.first_bytes = array("d"), array("d")
        self.answer_sizes.clear()
        self.reads = 0

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            connection.close()

    def result(self, seconds: float) -> Result:
        """Return the figures so far."""
        ordered = sorted(self.latencies)
        return Result(
            requests=len(ordered),
            seconds=seconds,
            p50_seconds=percentile(ordered, 0.5),
            p99_seconds=percentile(ordered, 0.99),
            max_seconds=ordered[-1] if ordered else math.nan,
            first_byte_p50_seconds=percentile(sorted(self.first_bytes), 0.5),
            answer_bytes=sum(size * count for size, count in self.answer_sizes.items()),
            reads=self.reads,
            answer_sizes=dict(self.answer_sizes),
            failures=dict(self.failures),
            answer_digest=self.answer_digest,
            body_digest=self.body_digest,
        )


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request at a time."""

    def __init__(self, run: Run, content: bytearray, offset: int) -> None:
        head = bodies.request_head(run.job.path, len(content))
        self._run = run
        self._head_bytes = len(head)
        self._buffer = bytearray(head) + content
        self._offset = offset + len(head)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._asked = 0.0  # when the request in flight was written; 0 without one
        self._due = 0.0
        self._size = 0
        self._captured: list[bytes] = []
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._closing = False
        self._transport.set_write_buffer_limits(high=1 << 26)

    def next(self, now: float) -> None:
        """Send the next request, now or when it is due."""
        interval = self._run.job.interval_seconds
        if interval:
            self._due = max(self._due + interval, now) if self._due else now
            if self._due > now:
                self._loop.call_later(self._due - now, self._send)
                return
        self._send()

    def _send(self) -> None:
        if self._transport is None:
            self._loop.call_later(_RECONNECT_SECONDS, self._reconnect)
            return
        if not self._run.may_send():
            self._run.rest()
            return
        bodies.stamp(self._buffer, self._offset, self._run.stamp)
        self._size = 0
        self._asked = _CLOCK.monotonic()
        self._transport.write(self._buffer)

    def _reconnect(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        task = self._loop.create_task(self._loop.create_connection(lambda: self, "127.0.0.1", self._run.job.port))
        task.add_done_callback(self._reconnected)

    def _reconnected(self, task: asyncio.Task[object]) -> None:
        if task.exception() is not None:
            self._run.failures["connect"] += 1
            self._loop.call_later(_RECONNECT_SECONDS, self._reconnect)
            return
        self._send()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._run.failures["not HTTP"] += 1
            self.close()

    def on_body(self, piece: bytes) -> None:
        if not self._size:
            self._run.first_bytes.append(_CLOCK.monotonic() - self._asked)
        self._size += len(piece)
        self._run.reads += 1
        if self._run.job.capture:
            self._captured.append(piece)

    def on_message_complete(self) -> None:
        run = self._run
        now = _CLOCK.monotonic()
        status = self._parser.get_status_code()
        if status == 200:
            run.latencies.append(now - self._asked)
        else:
            run.failures[f"status {status}"] += 1
        run.answer_sizes[self._size] += 1
        self._asked = 0.0
        if run.job.capture:
            run.answer_digest = hashlib.blake2b(b"".join(self._captured), digest_size=16).hexdigest()
            sent = memoryview(self._buffer)[self._head_bytes :]
            run.body_digest = hashlib.blake2b(sent, digest_size=16).hexdigest()
            self._captured.clear()
        if not self._parser.should_keep_alive():
            self._loop.call_soon(self._after_close)
            return
        self.next(now)

    def _after_close(self) -> None:
        self.close()
        self._transport = None
        self.next(_CLOCK.monotonic())

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self._closing and not self._asked:
            return
        self._transport = None
        if self._asked:
            self._asked = 0.0
            self._run.failures["connection lost"] += 1
            if not self._closing:
                self._send()
            else:
                self._run.rest()

    def close(self) -> None:
        """Close the connection, if it is open."""
        if self._transport is not None:
            self._closing = True
            self._transport.close()


async def _prepare(job: Job, stamp: int) -> Run:
    run = Run(job, stamp)
    await run.connect()
    if job.warm_requests:
        await run.go(_HANG_SECONDS, job.warm_requests)
        run.forget()
    return run


async def _settle(run: Run) -> None:
    run.close()
    await asyncio.sleep(0.01)


def main() -> None:
    stamp = int(sys.argv[1]) * _STAMPS_PER_PROCESS if len(sys.argv) > 1 else 0
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        while line := sys.stdin.readline():
            job = msgspec.json.decode(line, type=Job)
            run = runner.run(_prepare(job, stamp))
            print("ready", flush=True)
            sys.stdin.readline()
            seconds = runner.run(run.go(job.seconds, job.max_requests))
            print(msgspec.json.encode(run.result(seconds)).decode(), flush=True)
            stamp = run.stamp
            runner.run(_settle(run))


class GeneratorFailed(Exception):
    """The generator ended or sent something unexpected."""


class Generator:
    """A generator process and the conversation with it."""

    def __init__(self, number: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.common.load", str(number)],
            cwd=ROOT,
            env=environment({}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def prepare(self, job: Job) -> None:
        """Connect and warm up; return when the generator is ready to be started."""
        self._say(msgspec.json.encode(job).decode())
        if (line := self._hear()) != "ready":
            raise GeneratorFailed(line)

    def start(self) -> None:
        """Start the prepared job."""
        self._say("go")

    def finish(self) -> Result:
        """Wait for the job's end."""
        return msgspec.json.decode(self._hear(), type=Result)

    def run(self, job: Job) -> Result:
        """Run a whole job."""
        self.prepare(job)
        self.start()
        return self.finish()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None  # noqa: S101 - narrows the type
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - narrows the type
        line = self._process.stdout.readline().strip()
        if not line:
            raise GeneratorFailed("the load generator ended; its error is above")
        return line


if __name__ == "__main__":
    main()

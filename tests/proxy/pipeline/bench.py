"""The relay on its own: a client, an upstream, a journal and a clock that do what the test says."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, cast

import msgspec

from cache import Fingerprint, ObjectLocations, Placement
from cache.index.hashing import cut
from proxy.errors import CairnError, ConnectFailed, Overloaded
from proxy.fleet import Fleet, ReplicaSpec
from proxy.fleet.pools import Pools, ReplicaEndpoint, ServedPool
from proxy.metrics.recorder import Recorder
from proxy.model import CacheStatus, Endpoint, MissReason, RouteReason
from proxy.pipeline.attempt import Attempts
from proxy.pipeline.dispatch import Dispatcher, RetryPolicy, Upload
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.objects import CreatedObjects
from proxy.pipeline.relay import Relay
from proxy.pipeline.response_relay import ResponseRelay, StreamLimits
from proxy.pipeline.silence import SilenceWatch
from proxy.records import Call, Candidate, Plan, Tenant
from proxy.routing.prefill_gate import PrefillGate
from proxy.routing.replica_queue import QueueLimits, ReplicaQueue
from proxy.upstream import Framing, Origin, UpstreamResponse
from proxy.wire import request as wire_request
from tests.support.clock import FakeClock

POOL = "pool"
SSE = ((b"content-type", b"text/event-stream"),)
TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


class Source:
    """The connection of a response: what is asked of it."""

    def __init__(self) -> None:
        self.closed = False
        self.allowed_silences: list[float] = []

    def taken(self) -> None:
        pass

    def allow_silence(self, seconds: float) -> None:
        self.allowed_silences.append(seconds)

    def close(self, error: CairnError | None = None) -> None:
        self.closed = True


class Upstream:
    """One response, as the test lets it come."""

    def __init__(
        self,
        clock: FakeClock,
        status: int = 200,
        headers: Sequence[tuple[bytes, bytes]] = (),
        body: bytes | None = None,
    ) -> None:
        self.clock = clock
        self.source = Source()
        response = UpstreamResponse(asyncio.get_running_loop(), self.source, clock.monotonic(), reused=False)
        response.status, response.headers, response.framing = status, tuple(headers), Framing.CHUNKED
        response.is_event_stream = any(b"event-stream" in value for _, value in headers)
        response.first_byte_seconds = response.seen_seconds = clock.monotonic()
        self.response = response
        if body is not None:
            self.send(body)
            response.ended()

    def send(self, piece: bytes) -> None:
        """Let a piece of the body come."""
        self.response.seen_seconds = self.clock.monotonic()
        self.response.chunks.append(piece)
        self.response.wake()

    def end(self) -> None:
        self.response.ended()

    def fail(self, error: CairnError) -> None:
        self.response.fail(error)


class Client:
    """Gives each request the next of `script`: a response, an error, or nothing until it is cancelled.

    Nothing comes while `hold` is cleared.
    """

    def __init__(self, *script: Upstream | CairnError | None) -> None:
        self.script = list(script)
        self.sent: list[tuple[Origin, bytes, dict[bytes, bytes]]] = []
        self.targets: list[bytes] = []
        self.lengths: list[int | None] = []
        self.repeatable: list[bool | None] = []
        self.asked = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()

    async def request(
        self,
        origin: Origin,
        method: bytes,
        target: bytes,
        headers: Iterable[tuple[bytes, bytes]] = (),
        body: Any = b"",
        *,
        length: int | None = None,
        repeatable: bool | None = None,
    ) -> UpstreamResponse:
        if isinstance(body, AsyncIterator):
            is_read = not (self.script and isinstance(self.script[0], ConnectFailed))  # nothing is read before that
            body = [piece async for piece in body] if is_read else b""
        whole = b"".join(body) if isinstance(body, list) else body
        self.sent.append((origin, whole, dict(headers)))
        self.targets.append(target)
        self.lengths.append(length)
        self.repeatable.append(repeatable)
        self.asked.set()
        await self.hold.wait()
        step = self.script.pop(0)
        if step is None:
            await asyncio.Event().wait()
        if isinstance(step, CairnError):
            raise step
        assert step is not None
        return step.response


class Downstream:
    """The client's side: keeps what it gets; `full` means that it reads nothing until `read` is set."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.length: int | None = None
        self.body = b""
        self.ended = self.broken = self.gone = self.full = False
        self.read = asyncio.Event()
        self.waiting = asyncio.Event()

    @property
    def begun(self) -> bool:
        return self.status != 0

    def send(self, status: int, reason: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        self.begin(status, reason, headers, len(body))
        self.body, self.ended = body, True

    def begin(self, status: int, reason: bytes, headers: Iterable[tuple[bytes, bytes]], length: int | None) -> None:
        self.status, self.headers, self.length = status, dict(headers), length

    async def write(self, piece: bytes | memoryview) -> None:
        if not self.offer(bytes(piece)):
            await self.drained()

    def offer(self, piece: bytes, framed: bytes | None = None) -> bool:
        if self.gone:
            raise ConnectionResetError("the client left")
        self.body += piece
        return not self.full

    async def drained(self) -> None:
        self.waiting.set()
        await self.read.wait()

    def end(self) -> None:
        self.ended = True

    def write_last(self, piece: bytes) -> None:
        self.body += piece

    def break_off(self) -> None:
        self.broken = True


class Placements:
    """A journal that counts what is done with placements."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.locations = ObjectLocations()

    def place(self, replica: int, fingerprint: Fingerprint, tokens: float, *, source: int = 0) -> Placement:
        self.done["placed"] += 1
        return Placement(self.done["placed"], replica, 0, fingerprint, 0.0)

    def computed(self, placement: Placement) -> None:
        self.done["computed"] += 1

    def take_back(self, placement: Placement) -> None:
        self.done["taken back"] += 1

    def left(self, placement: Placement) -> None:
        self.done["left"] += 1

    def own(self, made_id: str, replica: int) -> None:
        self.locations.learn(made_id, str(replica))


class Bench:
    """A relay over `replicas` replicas, of which each request has the plan "first 0, then 1, ..."."""

    def __init__(
        self, *script: Upstream | CairnError | None, replicas: int = 2, limit: int | None = None, **policy: Any
    ) -> None:
        self.clock = FakeClock()
        self.client = Client(*script)
        self.placements = Placements()
        self.recorder = Recorder()
        self.fleet = Fleet(lambda: 0.5)
        endpoints = {}
        for number in range(replicas):
            self.fleet.add(ReplicaSpec(f"r{number}", POOL, in_flight_limit=limit))
            url = f"http://10.0.0.{number}:80"
            endpoints[number] = ReplicaEndpoint(f"r{number}", POOL, url, Origin.parse(url))
        self.pool = ServedPool(POOL, ("*",))
        self.pools = Pools([self.pool], POOL, endpoints)
        limits = QueueLimits()
        self.queues = {number: ReplicaQueue(limit, limits, self.clock) for number in endpoints}
        self.load_changes = 0
        self.attempts = Attempts(
            self.fleet, self.placements, PrefillGate(), self.queues, self._load_changed, self.clock
        )
        self.dispatcher = Dispatcher(
            self.client,
            self.attempts,
            self,
            self.fleet,
            self.pools,
            self.recorder,
            self.clock,
            RetryPolicy(**policy),
        )
        self.limits = StreamLimits(idle_seconds=120.0, thinking_seconds=900.0)
        self.silence = SilenceWatch(0.0, self.clock)
        self.names: set[str] = set()
        self.downstream = Downstream()

    def plan_again(self, exchange: Exchange) -> None:
        """Plan again with the replicas that are available now."""
        views = self.fleet.snapshot(POOL, self.clock.monotonic())
        candidates = tuple(Candidate(view, 0, 0.0, 9_000.0, 1.0) for view in views if view.available)
        if not candidates:
            raise Overloaded("no replica is left")
        exchange.plan = Plan(candidates, RouteReason.COLD, MissReason.COLD, CacheStatus.MISS, 9_000.0)

    def _load_changed(self) -> None:
        self.load_changes += 1

    def responses(self) -> ResponseRelay:
        objects = CreatedObjects(cast("Any", self.placements))
        names = cast("Any", self)
        return ResponseRelay(objects, self.fleet, names, self.recorder, self.clock, self.limits, self.silence)

    def add(self, names: Iterable[str]) -> None:
        """Take model names."""
        self.names.update(names)

    def exchange(
        self, *, stream: bool = False, endpoint: Endpoint = Endpoint.CHAT, prompt: str = "x" * 9_000
    ) -> Exchange:
        """A request that was read and planned."""
        content = {"model": "m", "messages": [{"role": "user", "content": prompt}], "input": prompt}
        body = msgspec.json.encode({**content, "stream": stream})
        call = Call(
            request_id="id",
            tenant=Tenant("tenant"),
            endpoint=endpoint,
            method="POST",
            target="/v1/chat/completions",
            headers=(),
            body=body,
            received_seconds=self.clock.monotonic(),
            read_seconds=self.clock.monotonic(),
        )
        exchange = Exchange(call)
        exchange.pool = self.pool
        if endpoint.is_generation or endpoint is Endpoint.EMBEDDINGS:
            exchange.prompt = wire_request.read(body, endpoint)
            exchange.model = exchange.prompt.model
            exchange.fingerprint = cut(0, exchange.prompt.spans)
        self.plan_again(exchange)
        return exchange

    async def run(self, exchange: Exchange, upload: Upload | None = None) -> Downstream:
        """Relay it to the end; `upload` is a body that is passed through."""
        relay = Relay(self.dispatcher, self.responses(), self.recorder, self.clock)
        relay.accompany(exchange, self.downstream)
        try:
            await relay.run(exchange, self.downstream, upload)
        finally:
            relay.release(exchange)
        return self.downstream

    def start(self, exchange: Exchange) -> asyncio.Task[Downstream]:
        """Relay it beside the test."""
        return asyncio.get_running_loop().create_task(self.run(exchange))

    def nothing_is_claimed(self) -> bool:
        """True if every charge, permit and prefill was given back."""
        views = self.fleet.snapshot(POOL, self.clock.monotonic())
        permits = sum(queue.running for queue in self.queues.values())
        return permits == 0 and all(view.in_flight == 0 for view in views)


async def turns(count: int = 20) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)

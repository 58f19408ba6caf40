"""The private socket between the supervisor and one worker: typed messages both ways, and the worker's end of it.

A message is msgpack behind four bytes of length, at most `MESSAGE_BYTES_AT_MOST`. The configuration goes to a worker
here and nowhere else, so that no secret stands in an argument list or an environment. It must not know HTTP, and not
what a worker does with what it is told.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec

from proxy.config.schema import Config, make_secret, reveal
from proxy.errors import ConfigError
from proxy.metrics.definitions import MetricsDelta
from proxy.tasks import Tasks

MESSAGE_BYTES_AT_MOST = 64 * 1024 * 1024  # the largest is a body to explain: max_body_bytes, 32 MiB by default
_LENGTH = struct.Struct(">I")
_REPORT_BACKLOG_BYTES = 1024 * 1024  # unread by the supervisor; beyond it a worker keeps its counts for later

log = logging.getLogger("cairn.control")


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """To a worker, first of all and again after each reload: what to work by."""

    config: Config


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """To a worker: accept no more, finish what runs within `seconds`, then end."""

    seconds: float


class Explain(msgspec.Struct, frozen=True, tag="explain"):
    """To a worker: how would you route this body? `credential` is the asking client's key, if any."""

    id: int
    path: str
    body: bytes
    credential: bytes = b""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """From a worker: it accepts requests."""


class WorkerReport(msgspec.Struct, frozen=True, tag="report"):
    """From a worker, about every second: what it counted since the last one, and how it sees the world.

    `redis` is `REDIS_UP`, or another word for how it is, or None before it is known, `upstreams` which
    replicas take requests. `page` is more of it for the status page, opaque here.
    """

    counts: MetricsDelta
    in_flight: int = 0
    redis: str | None = None
    upstreams: dict[str, bool] = {}
    page: dict[str, Any] = {}


class Explained(msgspec.Struct, frozen=True, tag="explained"):
    """From a worker: the answer to an `Explain`, a JSON text and the HTTP status that goes with it."""

    id: int
    status: int
    body: bytes


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """From a worker: it could not take over a new configuration and goes on with the old one."""

    why: str


ToWorker = Configure | Drain | Explain
FromWorker = Ready | WorkerReport | Explained | Refused
_Message = TypeVar("_Message")
REDIS_UP = "up"


class ControlBroken(Exception):
    """What came is no message of this protocol."""


class Channel(Generic[_Message]):
    """One end of the socket; `receive` gives messages of the other end's kind."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incoming: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder(enc_hook=reveal)
        self._decoder: msgspec.msgpack.Decoder[_Message] = msgspec.msgpack.Decoder(incoming, dec_hook=make_secret)

    @classmethod
    async def open(cls, end: socket.socket, incoming: Any) -> Channel[_Message]:
        """Take over one end of a socket pair; `incoming` is the union of messages that the other end sends."""
        reader, writer = await asyncio.open_connection(sock=end)
        return cls(reader, writer, incoming)

    @property
    def unsent_bytes(self) -> int:
        """What the other end has not taken yet."""
        transport = self._writer.transport
        return 0 if transport.is_closing() else transport.get_write_buffer_size()

    def post(self, message: ToWorker | FromWorker) -> None:
        """Send without waiting; to a closed end it goes nowhere."""
        encoded = self._encoder.encode(message)
        if len(encoded) > MESSAGE_BYTES_AT_MOST:
            raise ControlBroken(f"a message of {len(encoded)} bytes is over the bound")
        if not self._writer.transport.is_closing():
            self._writer.write(_LENGTH.pack(len(encoded)) + encoded)

    async def send(self, message: ToWorker | FromWorker) -> None:
        """Send, and wait while the other end does not read."""
        self.post(message)
        await self._writer.drain()

    async def receive(self) -> _Message | None:
        """The next message, or None where the other end is gone.

        Raises:
            ControlBroken: the length is over the bound or the message is none of the expected.
        """
        try:
            (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if size > MESSAGE_BYTES_AT_MOST:
                raise ControlBroken(f"a message of {size} bytes is over the bound")
            return self._decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError):
            return None
        except msgspec.MsgspecError as error:
            raise ControlBroken(str(error)) from None

    def close(self) -> None:
        """Close this end."""
        self._writer.close()


Explainer = Callable[[Explain], Awaitable[tuple[int, bytes]]]
Reconfigure = Callable[[Config], Awaitable[None]]


class WorkerControl:
    """What a worker says to its supervisor and hears from it.

    `on_explain` and `on_reload` may be set by whoever runs the worker; without them a reload is refused and nothing
    is explained. `on_reload` raises `ConfigError` where the new configuration cannot be used.
    """

    def __init__(self, channel: Channel[ToWorker], tasks: Tasks) -> None:
        self._channel = channel
        self._tasks = tasks
        self._drain: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.orphaned = asyncio.Event()
        self.on_explain: Explainer | None = None
        self.on_reload: Reconfigure | None = None

    @classmethod
    async def open(cls, end: socket.socket, tasks: Tasks) -> tuple[WorkerControl, Config]:
        """Take over the worker's end, and wait for the configuration that comes first.

        Raises:
            ControlBroken: the supervisor went before it sent one.
        """
        channel: Channel[ToWorker] = await Channel.open(end, ToWorker)
        first = await channel.receive()
        if not isinstance(first, Configure):
            raise ControlBroken("no configuration came")
        control = cls(channel, tasks)
        tasks.start(control._listen(), "control")
        return control, first.config

    async def ready(self) -> None:
        """Tell the supervisor that requests are accepted."""
        await self._channel.send(Ready())

    def report(self, report: WorkerReport) -> bool:
        """Hand over counts and state; never waits. False where the supervisor reads nothing: keep the counts."""
        if self._channel.unsent_bytes > _REPORT_BACKLOG_BYTES:
            return False
        self._channel.post(report)
        return True

    async def drained(self) -> float:
        """Wait until told to end; gives the seconds in which what runs may finish."""
        return await asyncio.shield(self._drain)

    @property
    def draining(self) -> bool:
        """True once told to end."""
        return self._drain.done()

    async def _listen(self) -> None:
        try:
            while (message := await self._channel.receive()) is not None:
                if isinstance(message, Drain):
                    self._set_drain(message.seconds)
                elif isinstance(message, Explain):
                    self._tasks.start(self._explain(message), "explain")
                else:
                    await self._reload(message.config)
        finally:
            self.orphaned.set()  # no supervisor: nobody could end or watch this process
            self._set_drain(0.0)

    def _set_drain(self, seconds: float) -> None:
        if not self._drain.done():
            self._drain.set_result(seconds)

    async def _explain(self, question: Explain) -> None:
        if self.on_explain is None:
            status, body = 501, b'{"error": "this worker explains nothing"}'
        else:
            status, body = await self.on_explain(question)
        await self._channel.send(Explained(question.id, status, body))

    async def _reload(self, config: Config) -> None:
        if self.on_reload is None:
            self._channel.post(Refused("this worker takes no new configuration"))
            return
        try:
            await self.on_reload(config)
        except ConfigError as error:
            self._channel.post(Refused(error.message))

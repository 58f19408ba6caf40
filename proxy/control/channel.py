"""The private socket between the supervisor and one worker, and the worker's end of it.

A message is msgpack after four bytes of length, at most `MESSAGE_BYTES_AT_MOST`.
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
from proxy.control.handover import Handover
from proxy.control.messages import (
    Announced,
    Configure,
    Drain,
    Explain,
    Explained,
    FromWorker,
    Heartbeat,
    NameModels,
    Ready,
    ReloadRefused,
    ToWorker,
    WorkerReport,
)
from proxy.errors import ConfigError
from proxy.tasks import Tasks

MESSAGE_BYTES_AT_MOST = 64 * 1024 * 1024  # the largest is a body to explain: max_body_bytes, 32 MiB by default
_LENGTH = struct.Struct(">I")
_READ_AT_ONCE_BYTES = 64 * 1024
_REPORT_BACKLOG_BYTES = 1024 * 1024  # unread by the supervisor; above this a worker keeps its counts for later
HEARTBEAT_SECONDS = 0.5

log = logging.getLogger("cairn.control")

_Message = TypeVar("_Message")


class ControlBroken(Exception):
    """The other end sent something that is not a message of this protocol."""


class Channel(Generic[_Message]):
    """One end of the socket. `receive` returns messages of the kind that the other end sends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incoming: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder(enc_hook=reveal)
        self._decoder: msgspec.msgpack.Decoder[_Message] = msgspec.msgpack.Decoder(incoming, dec_hook=make_secret)

    @classmethod
    async def open(cls, end: socket.socket, incoming: Any) -> Channel[_Message]:
        """Take ownership of one end of a socket pair; `incoming` is the union of messages from the other end."""
        reader, writer = await asyncio.open_connection(sock=end)
        return cls(reader, writer, incoming)

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the other end has not read yet."""
        transport = self._writer.transport
        return 0 if transport.is_closing() else transport.get_write_buffer_size()

    def post(self, message: ToWorker | FromWorker) -> None:
        """Send without waiting. If the other end is closed, nothing is sent."""
        encoded = self._encoder.encode(message)
        if len(encoded) > MESSAGE_BYTES_AT_MOST:
            raise ControlBroken(f"a message of {len(encoded)} bytes exceeds the limit")
        if not self._writer.transport.is_closing():
            self._writer.writelines((_LENGTH.pack(len(encoded)), encoded))  # not joined: a body may be 32 MB

    async def send(self, message: ToWorker | FromWorker) -> None:
        """Send, and wait while the other end does not read."""
        self.post(message)
        await self._writer.drain()

    async def receive(self) -> _Message | None:
        """Return the next message, or None when the other end has closed.

        Raises:
            ControlBroken: the length exceeds the limit, or the message is none of the expected ones.
        """
        try:
            (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if size > MESSAGE_BYTES_AT_MOST:
                raise ControlBroken(f"a message of {size} bytes exceeds the limit")
            return self._decoder.decode(await self._read(size))
        except (asyncio.IncompleteReadError, OSError):
            return None
        except msgspec.MsgspecError as error:
            raise ControlBroken(str(error)) from None

    async def _read(self, size: int) -> bytes | bytearray:
        """Return the next `size` bytes. Raises asyncio.IncompleteReadError."""
        if size <= _READ_AT_ONCE_BYTES:
            return await self._reader.readexactly(size)
        content, filled = bytearray(size), 0  # the reader would collect all of a long message, and then copy it
        while filled < size:
            piece = await self._reader.read(size - filled)
            if not piece:
                raise asyncio.IncompleteReadError(bytes(content[:filled]), size)
            content[filled : filled + len(piece)] = piece
            filled += len(piece)
        return content

    def close(self) -> None:
        """Close this end."""
        self._writer.close()


Explainer = Callable[[Explain], Awaitable[tuple[int, bytes]]]
Reconfigure = Callable[[Config], Awaitable[None]]


class WorkerControl:
    """The worker's end: sends reports to the supervisor, and calls back when the supervisor asks for something.

    Set `on_explain` and `on_reload` to support them. `on_reload` raises `ConfigError` if it cannot use the new
    configuration; one that comes before it is set waits for it. `before_reload` is called first. `on_models` takes
    the models that are counted under their own names. `handover` brings connections that other workers should have
    served.
    """

    def __init__(self, channel: Channel[ToWorker], tasks: Tasks) -> None:
        self._channel = channel
        self._tasks = tasks
        self._drain: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.orphaned = asyncio.Event()
        self.handover: Handover | None = None
        self.on_explain: Explainer | None = None
        self.before_reload: Callable[[Config], None] | None = None
        self._on_reload: Reconfigure | None = None
        self._on_models: Callable[[tuple[str, ...]], None] | None = None
        self._models: tuple[str, ...] = ()
        self._waiting: Config | None = None  # the newest that is not applied yet
        self._is_applying = False

    @classmethod
    async def open(cls, end: socket.socket, tasks: Tasks) -> tuple[WorkerControl, Config]:
        """Take ownership of the worker's end, and wait for the configuration, which comes first.

        Raises:
            ControlBroken: the supervisor closed the socket before it sent one.
        """
        channel: Channel[ToWorker] = await Channel.open(end, ToWorker)
        first = await channel.receive()
        if not isinstance(first, Configure):
            raise ControlBroken("no configuration was sent")
        control = cls(channel, tasks)
        tasks.start(control._receive(), "control")
        tasks.keep(control._beat, "heartbeat")
        return control, first.config

    @property
    def on_reload(self) -> Reconfigure | None:
        """Return the function that applies a new configuration."""
        return self._on_reload

    @on_reload.setter
    def on_reload(self, reconfigure: Reconfigure) -> None:
        self._on_reload = reconfigure
        self._apply_newest()  # which came while this worker was starting

    @property
    def on_models(self) -> Callable[[tuple[str, ...]], None] | None:
        """Return the function that takes the models with a label."""
        return self._on_models

    @on_models.setter
    def on_models(self, name_models: Callable[[tuple[str, ...]], None]) -> None:
        self._on_models = name_models
        self._name_models()

    def _name_models(self) -> None:
        if self._on_models is not None and self._models:
            self._on_models(self._models)

    async def send_ready(self) -> None:
        """Report that requests are accepted."""
        await self._channel.send(Ready())

    def report(self, report: WorkerReport) -> bool:
        """Send a report without waiting. Returns False if the supervisor does not read: keep the counts then."""
        if self._channel.unsent_bytes > _REPORT_BACKLOG_BYTES:
            return False
        self._channel.post(report)
        return True

    def announce(self, level: int, text: str) -> None:
        """Have the supervisor log a line, once only if other workers announce the same."""
        if self._channel.unsent_bytes <= _REPORT_BACKLOG_BYTES:
            self._channel.post(Announced(level, text))

    async def wait_for_drain(self) -> float:
        """Wait until told to drain; returns the seconds within which running requests may finish."""
        return await asyncio.shield(self._drain)

    @property
    def draining(self) -> bool:
        """True if this worker was told to drain."""
        return self._drain.done()

    def close(self) -> None:
        """Close the worker's end."""
        self._channel.close()

    async def _beat(self) -> None:
        while True:
            if self._channel.unsent_bytes <= _REPORT_BACKLOG_BYTES:
                self._channel.post(Heartbeat())
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _receive(self) -> None:
        try:
            while (message := await self._channel.receive()) is not None:
                if isinstance(message, Drain):
                    self._set_drain(message.seconds)
                elif isinstance(message, Explain):
                    self._tasks.start(self._explain(message), "explain")
                elif isinstance(message, NameModels):
                    self._models = message.models
                    self._name_models()
                else:
                    self._reload(message.config)
        finally:
            self.orphaned.set()  # without a supervisor nobody can stop or watch this process
            self._set_drain(0.0)

    def _set_drain(self, seconds: float) -> None:
        if not self._drain.done():
            self._drain.set_result(seconds)

    async def _explain(self, question: Explain) -> None:
        if self.on_explain is None:
            status, body = 501, b'{"error": "this worker cannot explain routing"}'
        else:
            status, body = await self.on_explain(question)
        await self._channel.send(Explained(question.id, status, body))

    def _reload(self, config: Config) -> None:
        if self.before_reload is not None:
            self.before_reload(config)
        self._waiting = config
        self._apply_newest()

    def _apply_newest(self) -> None:
        """Apply what waits, beside other messages: it may take seconds, and a drain cannot wait for them."""
        if self._on_reload is not None and self._waiting is not None and not self._is_applying:
            self._is_applying = True
            self._tasks.start(self._apply(self._on_reload), "reload")

    async def _apply(self, reconfigure: Reconfigure) -> None:
        try:
            while self._waiting is not None:
                config, self._waiting = self._waiting, None
                try:
                    await reconfigure(config)
                except ConfigError as error:
                    self._channel.post(ReloadRefused(error.message))
            self._is_applying = False
        finally:
            if self._is_applying:  # it failed: a new process will have the whole configuration, and not half of it
                self.orphaned.set()

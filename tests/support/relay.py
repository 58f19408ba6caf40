"""A relay between two TCP ports of the loopback: it can be slow, and lead new connections to another port."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

_READ_BYTES = 65_536


class Relay:
    """Passes bytes to `target_port`; use it as an asynchronous context.

    What comes back is passed on `delay_seconds` later. `target_port` may change: connections that are open stay.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.delay_seconds = 0.0
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there: asyncio.StreamWriter | None = None
        try:
            answers, there = await asyncio.open_connection("127.0.0.1", self.target_port)
            await asyncio.gather(self._pass(reader, there, slow=False), self._pass(answers, writer, slow=True))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for end in (writer, there):
                if end is not None:
                    end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, slow: bool) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(_READ_BYTES):
            if slow and self.delay_seconds:
                loop.call_later(self.delay_seconds, writer.write, data)
            else:
                writer.write(data)
        with suppress(OSError):
            writer.close()

"""Phase 7: the request to a replica and its response to the client, with every way in which either can end.

`Dispatcher` gets a response, `ResponseRelay` passes it on. Everything that the attempt claimed is released here, on
every path.
"""

from __future__ import annotations

import asyncio
from typing import Final

from proxy.clock import Clock
from proxy.downstream.response import Downstream
from proxy.metrics.definitions import STREAM_ABORTS
from proxy.metrics.recorder import Recorder
from proxy.model import Ending
from proxy.pipeline.dispatch import Dispatcher, Upload
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.response_relay import ResponseRelay

_INTERNAL: Final = Ending.INTERNAL  # a constant: the member of an enum is looked up in Python


class Relay:
    """Relays requests and responses. One per worker."""

    def __init__(self, dispatcher: Dispatcher, responses: ResponseRelay, recorder: Recorder, clock: Clock) -> None:
        self._dispatcher = dispatcher
        self._responses = responses
        self._recorder = recorder
        self._clock = clock

    def accompany(self, exchange: Exchange, downstream: Downstream) -> None:
        """Send comments to the client from now on, if it waits for a stream; `release` ends that."""
        self._responses.accompany(exchange, downstream)

    def release(self, exchange: Exchange) -> None:
        """Send no more comments in place of a response."""
        self._responses.release(exchange)

    async def run(self, exchange: Exchange, downstream: Downstream, upload: Upload | None = None) -> None:
        """Get a response and pass it on; `upload` is the request's body if it is passed through unread.

        Raises UpstreamError, Overloaded or RateLimited while nothing of a response was written to the client. After
        that a failure shows as a response that visibly breaks off.
        """
        try:
            opened = await self._dispatcher.first_response(exchange, upload)
            await self._responses.pass_on(exchange, opened, downstream)
        except (asyncio.CancelledError, ConnectionResetError):
            self._end(exchange, client_left=True)
            raise
        finally:
            self._end(exchange)

    def _end(self, exchange: Exchange, *, client_left: bool = False) -> None:
        """Release what the attempt claimed. Called twice if the client left."""
        if client_left and exchange.ending is _INTERNAL:
            exchange.ending = Ending.CLIENT_LEFT
            phase = "before_first_token" if exchange.first_token_seconds is None else "after_first_token"
            self._recorder.inc(STREAM_ABORTS, ("client", phase))
        if exchange.attempt is not None:
            exchange.attempt.end(self._clock.monotonic(), client_left=client_left)

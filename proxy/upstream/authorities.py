"""The authorities by which upstreams are verified: one TLS context for all, made anew when their file changes."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from typing import Final

from proxy.clock import Clock

log = logging.getLogger("cairn.upstream")

LOOK_SECONDS: Final = 10.0  # between two looks at the file

_State = tuple[int, int, int]
"""Numbers that differ once a file was written or replaced."""

_NO_FILE: Final[_State] = (0, 0, 0)


class Authorities:
    """Trusts the machine's authorities and those of `ca_file`, or with `only_file` those of the file alone.

    A context takes 20 ms to make and 0.8 MB, so all connections share one.
    """

    def __init__(self, clock: Clock, ca_file: str | None = None, *, only_file: bool = False) -> None:
        self._clock = clock
        self._ca_file = ca_file
        self._only_file = only_file
        self._context: ssl.SSLContext | None = None
        self._made_of = _NO_FILE
        self._unusable: _State | None = None  # the file as it was when it could not be used
        self._look_at_seconds = 0.0
        self._looking = asyncio.Lock()

    async def tls_context(self) -> ssl.SSLContext:
        """Return the context for a new connection: it checks host names and offers HTTP/1.1.

        It stays as it is while a file that has changed cannot be used. Raises OSError, which ssl.SSLError is too, if
        there is none yet.
        """
        async with self._looking:
            context = self._context
            if context is None or self._clock.monotonic() >= self._look_at_seconds:
                found = await asyncio.to_thread(self._current, context, self._made_of)
                context, _ = self._context, self._made_of = found  # neither if the request was cancelled
                self._look_at_seconds = self._clock.monotonic() + LOOK_SECONDS
        return context

    def _current(self, context: ssl.SSLContext | None, made_of: _State) -> tuple[ssl.SSLContext, _State]:
        """Return the context to use, and the state of the file that it was made of. Raises OSError without any."""
        file = _state(self._ca_file)
        if context is not None and file == made_of:
            return context, made_of
        try:
            return self._make(), file
        except OSError as error:
            if context is None:
                raise
            if file != self._unusable:  # it is tried again: there may just have been no descriptor
                self._unusable = file
                reason = error.strerror or "no certificates"
                log.warning("%s has changed and cannot be used: %s", self._ca_file, reason)
            return context, made_of

    def _make(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._ca_file if self._only_file else None)
        if self._ca_file is not None and not self._only_file:
            context.load_verify_locations(self._ca_file)
        context.set_alpn_protocols(["http/1.1"])
        return context


def _state(path: str | None) -> _State:
    if path is None:
        return _NO_FILE
    try:
        found = os.stat(path)
    except OSError:
        return _NO_FILE
    return found.st_ino, found.st_mtime_ns, found.st_size

"""Write one access line per request, in batches, on a thread.

The event loop never waits for a disk or a pipe. If nobody reads the log, lines are lost and counted, and no request
waits. An access line has no field for a prompt, a key or a hash of either.
"""

from __future__ import annotations

import os
import re
import select
import stat
import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from proxy.model import AccessLine, Endpoint
from proxy.records import Call, Outcome

FLUSH_SECONDS: Final = 0.1  # how long lines are collected before they are written together
PENDING_LINES_AT_MOST = 32_768  # about 8 MB while nobody reads; further lines are lost
CLOSE_SECONDS = 2.0  # how long the end of the process waits for the last batch
_BATCH_LINES: Final = 128  # encoded in one call, 48 KB: the call holds the interpreter's lock for 0.1 ms
_PIPE_LINES: Final = 8  # in one write to a pipe: beyond PIPE_BUF bytes, lines of several workers would mix
_MODEL_CHARACTERS: Final = 128  # a client may send any name
_ROUTE_CHARACTERS: Final = 128
_CACHING: Final = Endpoint.CACHING  # a constant: the member of an enum is looked up in Python
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PLAIN_SIGNS = frozenset("!#$%&'()*+,-./:;<>?@[]^_`{|}~")
_CONTROLS = re.compile(rb"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]|\xe2\x81[\xa6-\xa9]")
"""DEL, C1 controls, line separators and marks of direction, in UTF-8. JSON escapes only the controls below 0x20."""


def access_line(call: Call, outcome: Outcome, unix_seconds: float) -> AccessLine:
    """Make the line of a request that ended at `unix_seconds`."""
    times, plan, usage, model, replica = outcome.times, outcome.plan, outcome.usage, outcome.model, outcome.replica
    received, first_token = times.received_seconds, times.first_token_seconds
    cache = reason = miss = predicted = None
    matched_bytes = 0
    if plan is not None:
        cache, reason, miss = plan.cache, plan.reason, plan.miss
        if plan.candidates:
            chosen = plan.candidates[0]
            matched_bytes, predicted = chosen.matched_bytes, int(chosen.matched_tokens)
    prompt, output, cached = (
        (None, None, None) if usage is None else (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens)
    )
    # by position, in the order of the fields: keywords would cost 2.6 us more, half of the whole line
    return AccessLine(
        _EPOCH + timedelta(0, int(unix_seconds), 0, int(unix_seconds * 1e3) % 1000),
        outcome.call_id,
        call.method,
        route_of(call),
        outcome.endpoint,
        outcome.status,
        outcome.ending,
        int((times.ended_seconds - received) * 1e6) / 1e6,
        call.tenant.client or None,
        call.peer or None,
        model[:_MODEL_CHARACTERS] if model else None,
        outcome.stream,
        None if replica is None else replica.name,
        cache,
        reason,
        miss,
        outcome.error_code,
        None if first_token is None else int((first_token - received) * 1e6) / 1e6,
        prompt,
        output,
        cached,
        matched_bytes,
        predicted,
        outcome.retries,
        outcome.request_bytes,
        outcome.response_bytes,
        outcome.tried,
        outcome.head_sent_early,
    )


def route_of(call: Call) -> str:
    """Return the path of a request without its query, and with `{id}` in place of an object's id."""
    path = call.target
    if "?" in path:
        path = path[: path.index("?")]
    if call.object_id:
        path = path.replace(call.object_id, "{id}", 1)
    elif call.endpoint is _CACHING:  # its paths contain ids and tags, which are the tenant's own
        return "/v1/caching"
    return path if len(path) <= _ROUTE_CHARACTERS else path[:_ROUTE_CHARACTERS]


def json_lines(lines: Sequence[AccessLine]) -> bytes:
    """Encode lines as JSON objects."""
    return _without_controls(msgspec.json.Encoder().encode_lines(lines))


def logfmt_lines(lines: Sequence[AccessLine]) -> bytes:
    """Encode lines as `name=value` pairs, values with spaces or quotes in quotes; unknown fields are omitted."""
    return _without_controls("".join(f"{_logfmt(msgspec.to_builtins(line))}\n" for line in lines).encode())


def _without_controls(encoded: bytes) -> bytes:
    """Escape what would control a terminal that shows the log. It can only be within a JSON string."""
    if encoded.isascii() and b"\x7f" not in encoded:
        return encoded
    return _CONTROLS.sub(_escape, encoded)


def _escape(found: re.Match[bytes]) -> bytes:
    return b"\\u%04x" % ord(found[0].decode())


def _logfmt(fields: dict[str, Any]) -> str:
    return " ".join(f"{name}={_logfmt_value(value)}" for name, value in fields.items())


def _logfmt_value(value: Any) -> str:
    if not isinstance(value, str):
        return "true" if value is True else "false" if value is False else str(value)
    if value and all(sign.isalnum() or sign in _PLAIN_SIGNS for sign in value):
        return value
    return msgspec.json.encode(value).decode()


FORMATS: dict[str, Callable[[Sequence[AccessLine]], bytes]] = {"json": json_lines, "logfmt": logfmt_lines}
"""The encoders by the value of `log.format`."""


class AccessLog:
    """Writes access lines to a file descriptor, in batches, on its own thread.

    `write` is one append. `dropped` counts lines that were lost because there was no room or no reader.
    """

    def __init__(
        self,
        descriptor: int = 1,
        encode: Callable[[Sequence[AccessLine]], bytes] = json_lines,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._encode = encode
        self._is_pipe = not stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._may_be_torn = False  # the last line of the file may have no end
        self._flush_seconds = flush_seconds
        self._lines: deque[AccessLine] = deque()  # filled by the loop, emptied by the thread: both are atomic
        self._is_awake = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._writer.start()

    def write(self, line: AccessLine) -> None:
        """Add `line` to the next batch."""
        if len(self._lines) >= PENDING_LINES_AT_MOST:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._is_awake:
            self._is_awake = True
            self._wake.set()

    def close(self) -> None:
        """Write the remaining lines, for at most `CLOSE_SECONDS`."""
        self._closing.set()
        self._wake.set()
        self._writer.join(CLOSE_SECONDS)

    def _run(self) -> None:
        batch_lines = _PIPE_LINES if self._is_pipe else _BATCH_LINES
        while not self._closing.is_set():
            self._wake.wait()
            self._closing.wait(self._flush_seconds)
            self._wake.clear()
            self._is_awake = False  # before lines are taken: one that is added meanwhile must wake the thread
            while self._lines:
                lines = [self._lines.popleft() for _ in range(min(len(self._lines), batch_lines))]
                content = self._encode(lines)
                if self._is_pipe and len(content) > select.PIPE_BUF:
                    for line in lines:
                        self._write(self._encode([line]), 1)
                else:
                    self._write(content, len(lines))

    def _write(self, content: bytes, lines: int) -> None:
        """Write whole lines, and count those that could not be written as a whole.

        A disk that becomes full takes a part of a line, perhaps of another worker. What is written next begins on a
        line of its own: an empty line does less harm than two that are one.
        """
        view = memoryview(b"\n" + content if self._may_be_torn else content)
        try:
            while view:
                written = os.write(self._descriptor, view)
                view = view[written:]
        except OSError:  # the reader is gone, or the disk is full: requests are served all the same
            self.dropped += min(lines, bytes(view).count(b"\n"))
            self._may_be_torn = not self._is_pipe or len(view) < len(content)
        else:
            self._may_be_torn = False

"""Write one access line per request, in batches, on a thread.

The event loop never waits for a disk or a pipe. A reader that stops reading costs lines, which are counted as
dropped, and never a request. An access line has no field for a prompt, a key, a tenant or a hash.
"""

from __future__ import annotations

import os
import select
import stat
import threading
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from proxy.model import AccessLine, Outcome

FLUSH_SECONDS: Final = 0.1  # how long lines are collected before they are written together
PENDING_LINES_AT_MOST = 32_768  # some 8 MB that a stopped reader may cost; beyond it lines are dropped
CLOSE_SECONDS = 2.0  # how long the end of the process waits for the last batch
_BATCH_LINES: Final = 128  # encoded in one call, some 48 KB: the call holds the interpreter's lock for 0.1 ms
_PIPE_LINES: Final = 8  # the same into a pipe, where a write is whole among several workers' up to PIPE_BUF only
_MODEL_CHARACTERS: Final = 128  # a client may send any name
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def access_line(outcome: Outcome, unix_seconds: float) -> AccessLine:
    """The line of one request that ended at `unix_seconds`; some 3 us, so it is written out and not looped."""
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
    return AccessLine(
        _EPOCH + timedelta(0, int(unix_seconds), 0, int(unix_seconds * 1e3) % 1000),
        outcome.call_id,
        outcome.endpoint,
        outcome.status,
        outcome.ending,
        int((times.ended_seconds - received) * 1e6) / 1e6,
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
    )


class AccessLog:
    """Writes access lines to a file descriptor; a thread of its own does it, a batch at a time.

    `write` is one append. `dropped` counts lines for which there was no room or no reader.
    """

    def __init__(self, descriptor: int = 1, flush_seconds: float = FLUSH_SECONDS) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._is_pipe = not stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._flush_seconds = flush_seconds
        self._lines: deque[AccessLine] = deque()  # appended to by the loop, emptied by the thread: both are atomic
        self._awake = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._writer.start()

    def write(self, line: AccessLine) -> None:
        """Keep `line` for the next batch."""
        if len(self._lines) >= PENDING_LINES_AT_MOST:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._awake:
            self._awake = True
            self._wake.set()

    def close(self) -> None:
        """Write what is left, and wait for it for at most `CLOSE_SECONDS`."""
        self._closing.set()
        self._wake.set()
        self._writer.join(CLOSE_SECONDS)

    def _run(self) -> None:
        encode = msgspec.json.Encoder().encode_lines
        at_once = _PIPE_LINES if self._is_pipe else _BATCH_LINES
        while not self._closing.is_set():
            self._wake.wait()
            self._closing.wait(self._flush_seconds)
            self._wake.clear()
            self._awake = False  # before the lines are taken, so that one that comes meanwhile wakes again
            while self._lines:
                lines = [self._lines.popleft() for _ in range(min(len(self._lines), at_once))]
                content = encode(lines)
                if self._is_pipe and len(content) > select.PIPE_BUF:
                    for line in lines:
                        self._write(encode([line]), 1)
                else:
                    self._write(content, len(lines))

    def _write(self, content: bytes, lines: int) -> None:
        view = memoryview(content)
        try:
            while view:
                written = os.write(self._descriptor, view)
                view = view[written:]
        except OSError:  # the reader is gone, or the disk is full: serving goes on
            self.dropped += lines

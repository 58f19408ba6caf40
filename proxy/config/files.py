"""Read a small file that a configuration names, or the configuration itself."""

from __future__ import annotations

import errno
import os
import select
import stat
from pathlib import Path
from typing import Final

PIPE_SECONDS: Final = 10.0
"""Longest pause of the writer of a pipe. Without a limit, a pipe to which nothing is written would stop a reload, and
with it the supervisor, for ever."""


def read_at_most(file: Path, size_bytes: int, pipe_seconds: float = PIPE_SECONDS) -> bytes:
    """Return the first `size_bytes` of a file, or of a pipe such as the shell's `<(command)`.

    Raises:
        OSError: it cannot be read, or is a pipe whose writer pauses for longer than `pipe_seconds`.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would block
    with open(descriptor, "rb", buffering=0) as stream:
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.set_blocking(descriptor, True)
        content = bytearray()
        while len(content) < size_bytes:
            piece = stream.read(size_bytes - len(content))
            if piece is None:  # a pipe that is empty for now
                if not select.select([stream], [], [], pipe_seconds)[0]:
                    raise TimeoutError(errno.ETIMEDOUT, "nothing was written to this pipe")
            elif not piece:
                break
            else:
                content += piece
    return bytes(content)

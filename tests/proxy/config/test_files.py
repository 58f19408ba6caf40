"""Files that a configuration names are read whole or refused, and never waited for without end."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from proxy.config.files import read_at_most


def test_a_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    """A caller that asks for one byte more than it accepts sees that there is more."""
    (tmp_path / "file").write_bytes(b"abcdef")
    assert read_at_most(tmp_path / "file", 10) == b"abcdef"
    assert read_at_most(tmp_path / "file", 4) == b"abcd"


def test_a_pipe_is_read_until_its_writer_closes_it(tmp_path: Path) -> None:
    """So that `--config <(command)` works, however long the command takes to begin."""
    read_end, write_end = os.pipe()
    started = threading.Event()

    def write() -> None:
        started.wait()
        os.write(write_end, b"server: ")
        os.write(write_end, b"{port: 1}")
        os.close(write_end)

    writer = threading.Thread(target=write)
    writer.start()
    started.set()
    try:
        assert read_at_most(Path(f"/dev/fd/{read_end}"), 100) == b"server: {port: 1}"
    finally:
        writer.join()
        os.close(read_end)


def test_a_pipe_without_a_writer_is_empty(tmp_path: Path) -> None:
    """Opening it in the usual way would block a reload, and the supervisor with it."""
    os.mkfifo(tmp_path / "pipe")
    assert read_at_most(tmp_path / "pipe", 100) == b""


def test_a_pipe_whose_writer_is_silent_is_an_error() -> None:
    """After a limited time."""
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(TimeoutError, match="nothing was written"):
            read_at_most(Path(f"/dev/fd/{read_end}"), 100, pipe_seconds=0.01)
    finally:
        os.close(read_end)
        os.close(write_end)

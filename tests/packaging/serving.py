"""A Cairn under test that was started from what a user installs: waiting for its start, and its clean end."""

from __future__ import annotations

from asyncio.subprocess import Process


async def read_until(process: Process, mark: bytes) -> bytes:
    """Return what the process writes to its standard error up to the line that contains `mark`."""
    assert process.stderr is not None
    written = b""
    while mark not in written:
        written += (line := await process.stderr.readline())
        assert line, f"it ended before it served: {written.decode()}"
    return written


async def ends_cleanly(process: Process) -> bool:
    """Send SIGTERM; return True if the process then ends with exit code 0."""
    assert process.stderr is not None
    process.terminate()
    await process.stderr.read()
    return await process.wait() == 0

"""The whole of Cairn as its users start it, `cairn serve` with its workers, before upstreams of the test itself."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0


class Serving(NamedTuple):
    """Its addresses; `url` is the base URL for an SDK."""

    url: str
    admin: str


@asynccontextmanager
async def serving(folder: Path, tree: Mapping[str, Any], *flags: str) -> AsyncIterator[Serving]:
    """Run it on free ports with the configuration `tree` until the block ends; files go to `folder`."""
    file = folder / "cairn.yaml"
    server = {"port": 0, "drain_accept_seconds": 0, "drain_seconds": 1, **tree.get("server", {})}
    admin = {"port": 0, **tree.get("admin", {})}
    redis = {"folder": str(folder / "valkey"), **tree.get("redis", {})}
    sections = {"log": {"access": False}, **tree, "server": server, "admin": admin, "redis": redis}
    file.write_text(yaml.safe_dump(sections))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "proxy", "serve", "--config", str(file), *flags),
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **os.environ},  # noqa: TID251
        stdin=DEVNULL,
        stdout=DEVNULL,
        stderr=PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            found = await _addresses(process.stderr)
        reading = asyncio.get_running_loop().create_task(process.stderr.read())  # or a full pipe would hold it up
        yield found
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(START_SECONDS):
            await process.wait()
    await reading


async def _addresses(lines: asyncio.StreamReader) -> Serving:
    seen: Sequence[bytes] = []
    async for line in lines:
        seen = [*seen, line]
        if found := re.search(rb"serving on (\S+), admin on (\S+)", line):
            return Serving(found[1].decode(), found[2].decode())
    raise AssertionError(f"it did not start: {seen}")

"""A client run as its user would run it: a program, before a running Cairn with two simulated engines.

The client gets a home and a working folder, which holds a text with a word that only the client's tools can read. It
reaches nothing but Cairn: everything else is sent to a proxy that refuses it and notes the host.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.clients.engine import AgentEngine, ToolCall
from tests.support.served import ROOT, Served, served
from tests.support.valkey import eventually

CLIENTS = ROOT / ".build" / "clients"
MODEL = "stone-1"
KEY = "sk-clients-test"
WORD = "cairn-0123456789ab"
NOTES = f"The word is {WORD}.\n" + "".join(f"Line {n} of the notes says nothing of it.\n" for n in range(60))
CLIENT_SECONDS = 90.0
_NEAR = 200  # tokens between what was predicted and what was reported as cached: an answer and a block


def installed(path: str) -> Path:
    """Return an installed program, or skip the test."""
    program = CLIENTS / path
    if not program.exists():
        pytest.skip(f"{program.name} is not installed; `make clients` installs it")
    return program


@dataclass
class Trial:
    """Two engines, a Cairn in front of them, and a place in which a client runs."""

    cairn: Served
    engines: tuple[AgentEngine, AgentEngine]
    home: Path
    work: Path
    outside: str
    hosts: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The base URL that ends in /v1."""
        return self.cairn.url

    @property
    def origin(self) -> str:
        """The base URL without /v1."""
        return self.cairn.url.removesuffix("/v1")

    @property
    def notes(self) -> Path:
        """The file that has the word."""
        return self.work / "notes.txt"

    def offers(self, tool: str, **arguments: Any) -> None:
        """Let the engines call this tool of the client once in a conversation."""
        for engine in self.engines:
            engine.tool_call = ToolCall(tool, arguments)

    async def run(self, *command: str | Path, env: Mapping[str, str] | None = None) -> str:
        """Run a client to its end, which must be a good one; return what it printed on standard output."""
        process = await asyncio.create_subprocess_exec(
            *map(str, command),
            cwd=self.work,
            env=self._environment(command[0]) | dict(env or {}),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(CLIENT_SECONDS):
                output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, (output[-2000:], errors[-2000:])
        return output.decode()

    def _environment(self, program: str | Path) -> dict[str, str]:
        outside = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), self.outside)
        inside = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
        path = f"{Path(program).parent}:/usr/local/bin:/usr/bin:/bin"
        return {"PATH": path, "HOME": str(self.home), "TERM": "dumb", "LANG": "C.UTF-8", **outside, **inside}

    async def is_counted(self, *, requests: int, refused: int = 0) -> list[dict[str, Any]]:
        """Hold that Cairn served and counted what the engines did, no request or token more or less.

        Args:
            requests: the least number of requests with a prompt.
            refused: requests that Cairn is to have refused, such as WebSockets.

        Returns the access lines of the requests with a prompt, in order.
        """
        reported = Counter[str]()
        for engine in self.engines:
            reported["requests"] += len(engine.generations)
            reported["prompt_tokens"] += sum(engine.prompt_tokens)
            reported["cached_tokens"] += sum(engine.cached_tokens)
            reported["output_tokens"] += engine.output_tokens
        assert reported["requests"] >= requests

        def answered() -> list[dict[str, Any]]:
            return [line for line in self.cairn.access_lines() if "prompt_tokens" in line]

        await eventually(lambda: len(answered()) >= reported["requests"])  # a line is written after its answer ended
        lines = answered()
        others = [line for line in self.cairn.access_lines() if "prompt_tokens" not in line]
        assert all(line["status"] == 200 and line["ending"] == "complete" for line in lines), lines
        assert sum(line["status"] != 200 for line in others) == refused, others
        for name in ("prompt_tokens", "cached_tokens", "output_tokens"):
            assert sum(line[name] for line in lines) == reported[name], name
        assert len(lines) == reported["requests"]
        await self._is_on_the_metrics_page(reported)
        return lines

    async def _is_on_the_metrics_page(self, reported: Counter[str]) -> None:
        async with aiohttp.ClientSession() as http:

            async def tokens(kind: str) -> float:
                return await self.cairn.metric(http, "cairn_tokens_total", type=kind)

            async def is_whole() -> bool:
                return await tokens("output") >= reported["output_tokens"]

            await eventually(is_whole)
            assert await tokens("output") == reported["output_tokens"]
            assert await tokens("input_cached") == reported["cached_tokens"]
            assert await tokens("input_fresh") == reported["prompt_tokens"] - reported["cached_tokens"]
            assert await self.cairn.metric(http, "cairn_usage_missing_total") == 0


def recognised(lines: list[dict[str, Any]], *, least_share: float = 0.8) -> None:
    """Hold that each request after the first went where its prefix is, and that Cairn knew how much is cached.

    `least_share` of each prompt's tokens was cached, at the least.
    """
    assert lines[1:]
    for line in lines[1:]:
        assert line["reason"] == "warm", line
        assert line["replica"] == lines[0]["replica"]
        assert abs(line["predicted_tokens"] - line["cached_tokens"]) <= _NEAR, line
        assert line["cached_tokens"] > line["prompt_tokens"] * least_share, line


@asynccontextmanager
async def trial(folder: Path) -> AsyncIterator[Trial]:
    """A Cairn with two engines, and a client's folders, under `folder`."""
    for name in ("home", "work", "data"):
        (folder / name).mkdir()
    (folder / "work" / "notes.txt").write_text(NOTES)
    hosts: list[str] = []
    async with (
        _nothing_outside(hosts) as outside,
        AgentEngine(models=(MODEL,)) as one,
        AgentEngine(models=(MODEL,)) as other,
        served(["--upstream", one.url, "--upstream", other.url], folder / "data") as cairn,
    ):
        yield Trial(cairn, (one, other), folder / "home", folder / "work", outside, hosts)


@asynccontextmanager
async def _nothing_outside(hosts: list[str]) -> AsyncIterator[str]:
    """A proxy that refuses every host and notes it; yields its URL."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        words = (await reader.readline()).decode("latin-1").split()
        if len(words) > 1:
            hosts.append(words[1])
        writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

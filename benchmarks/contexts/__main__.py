"""Compare a question on a stored context with a bare aiohttp pass-through that sends the same bytes upstream.

python -m benchmarks.contexts [--size 2m] [--requests 200] [--rounds 3]

CPU is read from the proxies' own clocks, exactly around the counted requests, in turns within each round. The
pass-through is sent the whole prompt by its client, Cairn the question alone; both send the same upstream. Added
latency is beside a client that sends the whole prompt straight to the upstream. For the first use the worker is
killed, so that its successor has nothing in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.common.bodies import words
from benchmarks.common.figures import parse_size, percentile
from benchmarks.common.processes import Running, StartFailed, end_on_signals, free_port, scratch_folder
from benchmarks.common.tables import print_table
from benchmarks.datapath.contestants import BARE, CAIRN, Started, contestants, start
from benchmarks.datapath.measure import cpu_by_role
from proxy.clock import SystemClock

CPU_AT_MOST, ADDED_MS_AT_MOST, FIRST_MS_AT_MOST = 1.15, 5.0, 30.0
_CLOCK = SystemClock()
_READY_SECONDS = 20.0
_TAG = "bench"
_SETTLE_SECONDS = 1.0  # a worker that has just begun reads the index and probes the replicas


class Sample(msgspec.Struct, frozen=True):
    """One round of one contestant."""

    cpu_microseconds: float
    p50_ms: float
    p99_ms: float
    sent_bytes: int


class Wrong(Exception):
    """An answer was wrong."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exit with 2 if they are wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.contexts", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", default="2m", help="of the stored context")
    parser.add_argument("--requests", type=int, default=200, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the best is shown")
    parser.add_argument("--first-uses", type=int, default=3, help="workers killed to see their successor's first use")
    options = parser.parse_args(arguments)
    options.size = parse_size(options.size)
    return options


def question(number: int, size_bytes: int, head: bytes) -> bytes:
    """Return a chat request of about 300 bytes after `head`, the messages before it (without a trailing comma)."""
    text = f"{number:08d} What do the stones say about the third path, and which of them stands where it begins? " * 2
    asked = json.dumps({"role": "user", "content": f"{text}[[bench {size_bytes}]]"}).encode()
    return b'{"model":"bench","max_tokens":8,"messages":[%b,%b]}' % (head, asked)


async def post(http: aiohttp.ClientSession, url: str, body: bytes) -> float:
    """Return the seconds until the whole answer has arrived. Raises Wrong."""
    before = _CLOCK.monotonic()
    async with http.post(url, data=body, headers={"content-type": "application/json"}) as answer:
        text = await answer.read()
        if answer.status != 200:
            raise Wrong(f"{url}: {answer.status} {text[:200]!r}")
    return _CLOCK.monotonic() - before


async def upload(http: aiohttp.ClientSession, url: str, message: bytes) -> None:
    """Store the context under the tag, and wait until it is warm."""
    body = b'{"model":"bench","ttl":3600,"tags":["%b"],"messages":[%b]}' % (_TAG.encode(), message)
    async with http.post(f"{url}/v1/caching", data=body) as answer:
        made: dict[str, Any] = await answer.json()
        if answer.status != 200:
            raise Wrong(f"upload: {made}")
    async with asyncio.timeout(_READY_SECONDS):
        while made["status"] == "pending":
            await asyncio.sleep(0.05)
            async with http.get(f"{url}/v1/caching/{made['id']}") as answer:
                made = await answer.json()
    if made["status"] != "ready":
        raise Wrong(f"warming: {made.get('error')}")


async def measure(
    ask: Callable[[bytes], Awaitable[float]], make: Callable[[int], bytes], requests: int, started: Started | None
) -> Sample:
    """Ask `requests` questions, one after the other, so that none waits for another."""
    bodies = [make(number) for number in range(requests)]
    before = cpu_by_role(started.roles()) if started is not None else {}
    seconds = [await ask(body) for body in bodies]
    after = cpu_by_role(started.roles()) if started is not None else {}
    spent = after.get("proxy", 0.0) - before.get("proxy", 0.0)
    seconds.sort()
    return Sample(
        spent / requests * 1e6, percentile(seconds, 0.5) * 1e3, percentile(seconds, 0.99) * 1e3, len(bodies[0])
    )


async def first_use_ms(http: aiohttp.ClientSession, cairn: Started, body: bytes, plain: bytes) -> float:
    """Kill the worker; return the time of the first question at its successor, after some plain requests."""
    url = f"http://127.0.0.1:{cairn.port}/v1/chat/completions"
    for pid in cairn.roles()["proxy"]:
        os.kill(pid, signal.SIGKILL)
    deadline = _CLOCK.monotonic() + _READY_SECONDS
    answered = 0
    while answered < 20:
        try:
            await post(http, url, plain)
            answered += 1
        except (aiohttp.ClientError, Wrong):
            if _CLOCK.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
    await asyncio.sleep(_SETTLE_SECONDS)
    return await post(http, url, body) * 1e3


async def run(options: argparse.Namespace, folder: Path, stack: ExitStack) -> tuple[dict[str, Sample], float]:
    """Return the best figures of each contestant, and the median of first uses in milliseconds."""
    port = free_port()
    upstream = Running("upstream", [sys.executable, "-m", "benchmarks.common.upstream", "--ports", str(port)], folder)
    stack.callback(upstream.stop)
    await upstream.answers(port, "/health", _READY_SECONDS)
    by_name = {contestant.name: contestant for contestant in contestants()}
    proxies = {}
    for name in (BARE, CAIRN):
        proxies[name] = await start(by_name[name], [port], folder, 1, False)
        stack.callback(proxies[name].running.stop)
    message = b'{"role":"system","content":"%b"}' % words(options.size)
    named = json.dumps({"role": "cache", "content": f"tag={_TAG}"}).encode()
    ports = {"direct": port, BARE: proxies[BARE].port, CAIRN: proxies[CAIRN].port}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as http:
        await upload(http, f"http://127.0.0.1:{ports[CAIRN]}", message)
        samples: dict[str, list[Sample]] = {name: [] for name in ports}
        for round_ in range(options.rounds + 1):
            for name, at in ports.items():
                head = named if name == CAIRN else message
                url = f"http://127.0.0.1:{at}/v1/chat/completions"
                sample = await measure(
                    lambda body, url=url: post(http, url, body),  # type: ignore[misc]
                    lambda number, head=head, round_=round_: question(  # type: ignore[misc]
                        number + round_ * options.requests, options.size, head
                    ),
                    options.requests if round_ else 20,  # the first round warms
                    proxies.get(name),
                )
                if round_:
                    samples[name].append(sample)
        plain = question(0, 300, b'{"role":"system","content":"x"}')
        firsts = [
            await first_use_ms(http, proxies[CAIRN], question(0, options.size, named), plain)
            for _ in range(options.first_uses)
        ]
    return {name: _best(found) for name, found in samples.items()}, median(firsts) if firsts else 0.0


def _best(samples: Sequence[Sample]) -> Sample:
    return Sample(
        min(sample.cpu_microseconds for sample in samples),
        min(sample.p50_ms for sample in samples),
        min(sample.p99_ms for sample in samples),
        samples[0].sent_bytes,
    )


def table(bests: dict[str, Sample]) -> Table:
    """Return a table with a row for each contestant."""
    shown = Table(title="a question on a long prompt")
    for name in ("", "CPU µs", "p50 ms", "p99 ms", "bytes from the client"):
        shown.add_column(name, justify="right" if name else "left")
    for name, best in bests.items():
        cpu = f"{best.cpu_microseconds:,.0f}" if name != "direct" else ""
        shown.add_row(name, cpu, f"{best.p50_ms:.2f}", f"{best.p99_ms:.2f}", f"{best.sent_bytes:,}")
    return shown


def main(arguments: Sequence[str]) -> int:
    """Return 0 if every target is met, else 1."""
    options = parse_arguments(arguments)
    end_on_signals()
    console = Console()
    with ExitStack() as stack, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        folder = Path(stack.enter_context(scratch_folder()))
        try:
            bests, first_ms = runner.run(run(options, folder, stack))
        except (StartFailed, Wrong) as failure:
            Console(stderr=True).print(str(failure), style="red", highlight=False)
            return 1
    print_table(table(bests))
    cairn, bare, direct = bests[CAIRN], bests[BARE], bests["direct"]
    ratio = cairn.cpu_microseconds / bare.cpu_microseconds
    added_ms, more_ms = cairn.p50_ms - direct.p50_ms, first_ms - cairn.p50_ms
    fewer = 1 - cairn.sent_bytes / direct.sent_bytes
    console.print(
        f"CPU {ratio:.2f}x the pass-through's (at most {CPU_AT_MOST}), added {added_ms:+.2f} ms (at most 5)"
    )
    console.print(
        f"first use on a worker {more_ms:+.1f} ms more (at most 30), {fewer:.2%} fewer bytes from the client"
    )
    met = ratio <= CPU_AT_MOST and added_ms <= ADDED_MS_AT_MOST and more_ms <= FIRST_MS_AT_MOST and fewer > 0.999
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

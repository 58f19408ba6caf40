"""Loads that try to make Cairn hold more and more; what it holds is measured before, during and after each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.hostile.fuzz.requests import MARK, mark
from tests.hostile.fuzz.session import Answer, read_answer
from tests.hostile.fuzz.world import MIB, Held, World

CLIENTS = 16
PROMPT_BYTES = 6_000  # enough to be kept in the prefix index
SIXTEEN, CONTEXT, OBJECT = 16, 6, 7  # of sixteen requests, one stores a context and one makes an object
CONTENT_BYTES = 3_000
WARMING_SHARE = 0.4  # of the requests, in which everything that is distinct has come at least once
QUIET_SECONDS = 1.5
BODY_BYTES = 2 * MIB
OTHERS = 32  # plain requests that are sent while a load holds connections open


@dataclass(frozen=True, slots=True)
class Scale:
    """The size of every load."""

    requests: int
    prompts: int
    models: int
    keys: int
    names: int  # of headers, and of request ids
    silent: int
    trickling: int
    bodies: int
    explained_bytes: int


FULL = Scale(
    requests=100_000, prompts=10_000, models=1_000, keys=1_000, names=10_000, silent=5_000, trickling=1_000,
    bodies=500, explained_bytes=31 * MIB,
)  # fmt: skip
SHORT = Scale(
    requests=4_000, prompts=400, models=100, keys=100, names=1_000, silent=500, trickling=200, bodies=60,
    explained_bytes=31 * MIB,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """One load's result. `during` is what Cairn held at its worst, `refused` how many requests got no 200."""

    name: str
    before: Held
    during: Held
    after: Held
    refused: int = 0
    most_growth_bytes: int = 0

    @property
    def problems(self) -> list[str]:
        """Return what grew by more than it may."""
        found = []
        growth = max(self.during.memory_bytes, self.after.memory_bytes) - self.before.memory_bytes
        if growth > self.most_growth_bytes:
            found.append(f"{self.name}: {growth / MIB:.1f} MB more, at most {self.most_growth_bytes / MIB:.1f}")
        for kind in ("client", "file", "pipe"):
            before, after = self.before.descriptors.get(kind, 0), self.after.descriptors.get(kind, 0)
            if after > before:
                found.append(f"{self.name}: {after} descriptors of kind {kind}, {before} before")
        return found


Load = Callable[[World, Scale], Awaitable[Measured]]


def post(body: bytes, more: bytes = b"", path: bytes = b"/v1/chat/completions") -> bytes:
    """A request with a JSON body."""
    head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n%b" % (path, more)
    return head + b"content-length: %d\r\n\r\n%b" % (len(body), body)


def chat(content: str, model: str = "m-0") -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": content}]}).encode()


async def connect(world: World) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", world.ports[0], limit=1 << 20)


async def quiet(world: World) -> Held:
    await asyncio.sleep(QUIET_SECONDS)
    return world.held()


async def others(world: World) -> int:
    """Send plain requests on connections of their own; return how many were not served."""

    async def one() -> bool:
        reader, writer = await connect(world)
        try:
            writer.write(post(chat("hi")))
            answer = await read_answer(reader, "POST")
            return answer is None or answer.status != 200
        finally:
            writer.close()

    return sum([await one() for _ in range(OTHERS)])


async def distinct(world: World, scale: Scale) -> Measured:
    """Many prompts, models, keys, header names, request ids, stored contexts and objects."""
    numbers = iter(range(scale.requests))
    refused = 0

    def request(number: int) -> bytes:
        prompt = f"{number % scale.prompts} " + "words " * (PROMPT_BYTES // 6)
        more = b"authorization: Bearer key-%d\r\nx-h%d: y\r\nx-request-id: id-%d\r\n" % (
            number % scale.keys, number % scale.names, number % scale.names,
        )  # fmt: skip
        body = chat(prompt, f"made-up-{number % scale.models}")
        more += b"%b: %b\r\n" % (MARK, mark(number))
        if number % SIXTEEN == CONTEXT:
            messages = [{"role": "system", "content": f"context {number} " + "words " * (CONTENT_BYTES // 6)}]
            return post(json.dumps({"model": "m-0", "messages": messages}).encode(), more, b"/v1/caching")
        return post(body, more, b"/v1/conversations" if number % SIXTEEN == OBJECT else b"/v1/chat/completions")

    async def client(until: int) -> None:
        nonlocal refused
        reader, writer = await connect(world)
        for number in numbers:
            writer.write(request(number))
            answer = await read_answer(reader, "POST")
            is_full = number % SIXTEEN == CONTEXT and answer is not None and answer.status == 503
            refused += (answer is None or answer.status >= 500) and not is_full
            if answer is None or answer.ends:
                writer.close()
                reader, writer = await connect(world)
            if number >= until:
                break
        writer.close()

    held = []
    for until in (int(scale.requests * WARMING_SHARE), scale.requests):
        await asyncio.gather(*[client(until) for _ in range(CLIENTS)])
        held.append(await quiet(world))
    most = max(8 * MIB, held[0].memory_bytes // 20)
    return Measured("distinct requests", held[0], held[1], held[1], refused, most)


async def silent(world: World, scale: Scale) -> Measured:
    """Connections that send nothing."""
    before = await quiet(world)
    writers = [(await connect(world))[1] for _ in range(scale.silent)]
    during = await quiet(world)
    refused = await others(world)
    for writer in writers:
        writer.close()
    return Measured(
        "silent connections", before, during, await quiet(world), refused, 4 * MIB + 6 * 1024 * scale.silent
    )


async def trickling(world: World, scale: Scale) -> Measured:
    """Connections that send a head byte by byte, behind 30 KB of it."""
    before = await quiet(world)
    writers = [(await connect(world))[1] for _ in range(scale.trickling)]
    for writer in writers:
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 30_000)
    for _ in range(5):
        await asyncio.sleep(0.1)
        for writer in writers:
            writer.write(b"b")
    during = world.held()
    refused = await others(world)
    for writer in writers:
        writer.close()
    bound = 32 * MIB  # server.max_in_flight_head_bytes
    most = bound + 8 * MIB + 8 * 1024 * scale.trickling
    return Measured("heads that trickle", before, during, await quiet(world), refused, most)


async def bodies(world: World, scale: Scale) -> Measured:
    """Bodies of 2 MB at once, each but for its last bytes."""
    before = await quiet(world)
    body = chat("x" * BODY_BYTES)
    refused = 0
    arrived = asyncio.Semaphore(0)
    go_on = asyncio.Event()

    async def one() -> None:
        nonlocal refused
        reader, writer = await connect(world)
        message = post(body)
        try:
            with suppress(ConnectionError):
                writer.write(message[:-10])
                await writer.drain()
            arrived.release()
            await go_on.wait()
            with suppress(ConnectionError):
                writer.write(message[-10:])
            answer: Answer | None = None
            with suppress(ConnectionError):
                answer = await read_answer(reader, "POST")
            refused += answer is None or answer.status != 200
        finally:
            writer.close()

    tasks = [asyncio.get_running_loop().create_task(one()) for _ in range(scale.bodies)]
    for _ in tasks:
        await arrived.acquire()
    await asyncio.sleep(QUIET_SECONDS)
    during = world.held()
    go_on.set()
    await asyncio.gather(*tasks)
    bound = min(512 * MIB, scale.bodies * BODY_BYTES)  # server.max_in_flight_bytes
    # a buffer is larger than what has arrived, and while bodies are sent each is held a second time at most
    return Measured("bodies of 2 MB", before, during, await quiet(world), refused, int(1.3 * bound) + 32 * MIB)


async def explained(world: World, scale: Scale) -> Measured:
    """/explain with the largest body, a few times in a row."""
    before = await quiet(world)
    body = chat("x" * scale.explained_bytes)
    refused = 0
    during = before
    for _ in range(3):
        reader, writer = await asyncio.open_connection("127.0.0.1", world.ports[1], limit=1 << 20)
        writer.write(post(body, path=b"/explain").replace(b"host: x", b"host: localhost", 1))
        answer = await read_answer(reader, "POST")
        refused += answer is None or answer.status != 200
        writer.close()
        held = world.held()
        during = max(during, held, key=lambda each: each.memory_bytes)
    most = 8 * scale.explained_bytes  # in the supervisor, on its way and in the worker, twice each at most
    return Measured("/explain", before, during, await quiet(world), refused, most)


LOADS: tuple[Load, ...] = (distinct, silent, trickling, bodies, explained)

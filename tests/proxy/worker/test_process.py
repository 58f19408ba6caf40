"""The worker process's own part: how it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from proxy.config.load import Config, Pool, Replica, Secret, secrets_of
from proxy.control.channel import Channel, WorkerControl
from proxy.control.messages import Configure, Drain, FromWorker
from proxy.tasks import Tasks
from proxy.worker import process as worker
from tests.support.process_logging import logging_restored

ROOT = Path(__file__).resolve().parents[3]


async def run(target: Callable[[WorkerControl], Awaitable[None]], then: Callable[[Channel], object]) -> int:
    """The exit code of a worker that runs `target`, while the supervisor does `then`."""
    ours, theirs = socket.socketpair()
    channel: Channel[FromWorker] = await Channel.open(ours, FromWorker)
    await channel.send(Configure(Config()))
    tasks = Tasks()
    control, _ = await WorkerControl.open(theirs, tasks)

    async def work() -> None:
        await target(control)

    then(channel)
    async with asyncio.timeout(60):
        code = await worker._run_target(work(), control, tasks)  # noqa: SLF001 - internal state that no public name shows
    await tasks.close()
    channel.close()
    return code


async def test_it_ends_with_its_target() -> None:
    """0 where that returns."""

    async def until_drained(control: WorkerControl) -> None:
        await control.wait_for_drain()

    assert await run(until_drained, lambda channel: channel.post(Drain(1.0))) == 0


async def test_a_worker_that_cannot_read_its_configuration_says_why(caplog: pytest.LogCaptureFixture) -> None:
    """One of another version, which was installed while its supervisor runs, ends again and again."""
    ours, theirs = socket.socketpair()
    channel: Channel[FromWorker] = await Channel.open(ours, FromWorker)
    pools = (Pool("p", replicas=(Replica("http://h", name="*"),)),)  # a name that no configuration may have
    await channel.send(Configure(Config(pools=pools)))

    async def unused(*_: object) -> None:
        raise AssertionError

    assert await worker._serve(theirs, (), unused) == 1  # noqa: SLF001 - internal state that no public name shows
    channel.close()
    assert "cannot start: " in caplog.text
    assert "pools[0].replicas[0].name" in caplog.text.replace("[...]", "[0]")


async def test_a_target_that_fails_is_exit_1(caplog: pytest.LogCaptureFixture) -> None:
    """And its exception is in the log."""

    async def fail(_: WorkerControl) -> None:
        raise OSError("a broken part")

    with caplog.at_level(logging.ERROR):
        assert await run(fail, lambda channel: None) == 1
    assert "a broken part" in caplog.text


async def test_without_a_supervisor_it_ends_its_target_and_itself() -> None:
    """If the kernel does not end it, the closed socket does."""
    ended = asyncio.Event()

    async def for_ever(_: WorkerControl) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    assert await run(for_ever, lambda channel: channel.close()) == 1
    assert ended.is_set()


async def test_keys_of_a_reloaded_configuration_are_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    """Not even by what the reload itself logs."""

    async def serve(_: Config, __: Sequence[socket.socket], control: WorkerControl) -> None:
        ended = asyncio.Event()

        async def reload(config: Config) -> None:
            (key,) = secrets_of(config)
            logging.getLogger("cairn.x").warning("bad key %s", key)
            ended.set()

        control.on_reload = reload
        await ended.wait()

    def keyed(key: str) -> Configure:
        return Configure(Config(pools=(Pool("p", (Replica("http://h", key=Secret(key)),)),)))

    ours, theirs = socket.socketpair()
    channel: Channel[FromWorker] = await Channel.open(ours, FromWorker)
    channel.post(keyed("first-key"))
    channel.post(keyed("second-key"))
    with logging_restored():
        async with asyncio.timeout(60):
            assert await worker._serve(theirs, [], serve) == 0  # noqa: SLF001 - `run` would change this process
    channel.close()
    assert capfd.readouterr().err.endswith("bad key ***\n")


def test_a_worker_whose_parent_is_another_ends_at_once() -> None:
    """The supervisor died before the worker could be tied to it."""
    command = [sys.executable, "-m", "tests.support.tiny_worker", "serve", "--control", "0", "--listen", "0"]
    done = subprocess.run([*command, "--parent", "999999999"], timeout=60, cwd=ROOT, check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"")

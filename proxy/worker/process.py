"""Run a worker process on uvloop: it ends with its supervisor and ignores signals that are for the supervisor.

It receives the configuration over the control socket and runs a target, which is
`proxy.worker.lifecycle.run_worker` except in tests.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import uvloop

from proxy import logs
from proxy.config.load import Config, secrets_of
from proxy.control.channel import ControlBroken, WorkerControl
from proxy.control.handover import Handover
from proxy.tasks import Tasks
from proxy.worker.heap import keep_freed_memory

Target = Callable[[Config, Sequence[socket.socket], WorkerControl], Coroutine[Any, Any, None]]

ORPHAN_SECONDS = 2.0  # time for the clean-up of a worker whose supervisor is gone
_PR_SET_PDEATHSIG = 1

log = logging.getLogger("cairn.worker")


def run(
    control_descriptor: int,
    listen_descriptors: Sequence[int],
    parent_pid: int,
    target: Target,
    handover_descriptor: int | None = None,
) -> int:
    """Run a worker until the target returns or the supervisor is gone. Return the exit code.

    Args:
        control_descriptor: the inherited end of the control socket.
        listen_descriptors: the inherited listening sockets.
        parent_pid: the supervisor; if the parent is another process, the supervisor has ended.
        target: called with the configuration, the sockets and the control.
        handover_descriptor: the inherited end of the socket that brings connections of workers that ended.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # a service manager may send these to all processes; the supervisor acts on them
        signal.signal(number, signal.SIG_IGN)
    # a terminal may stop a process of a background group, as this one is, that writes to it
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    if not _tie_to_parent(parent_pid):
        return 1
    keep_freed_memory()
    control = socket.socket(fileno=control_descriptor)
    listening = [socket.socket(fileno=descriptor) for descriptor in listen_descriptors]
    handover = None if handover_descriptor is None else socket.socket(fileno=handover_descriptor)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(control, listening, target, handover))


def _tie_to_parent(parent_pid: int) -> bool:
    """Let the kernel end this process with its parent, if it can. Return False if the parent is already gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent_pid


async def _serve(
    end: socket.socket, listening: Sequence[socket.socket], target: Target, handover: socket.socket | None = None
) -> int:
    tasks = Tasks()
    try:
        control, config = await WorkerControl.open(end, tasks)
    except ControlBroken as error:
        # to standard error, since logging is not set up; a package that was replaced meanwhile is the likeliest cause
        log.warning("worker %d cannot start: %s; if Cairn was reinstalled, restart it", os.getpid(), error)
        return 1
    if handover is not None:
        control.handover = Handover(handover)
    process_log = logs.set_up(config.log.level.value, secrets_of(config))
    control.before_reload = lambda following: process_log.redact(secrets_of(following))
    logs.forward(logs.REPLICAS, control.announce)  # all workers find the same
    try:
        return await _run_target(target(config, listening, control), control, tasks)
    finally:
        await tasks.close()
        process_log.stop()


async def _run_target(serving: Coroutine[Any, Any, None], control: WorkerControl, tasks: Tasks) -> int:
    work = tasks.start(serving, "worker")
    orphaned = tasks.start(control.orphaned.wait(), "orphaned")
    await asyncio.wait({work, orphaned}, return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        return 1 if work.cancelled() or work.exception() is not None else 0
    log.error("the supervisor has ended; ending too")
    work.cancel()
    await asyncio.wait({work}, timeout=ORPHAN_SECONDS)
    if not work.done():
        os._exit(1)
    return 1

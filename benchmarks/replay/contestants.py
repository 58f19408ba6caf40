"""Start each contestant in front of a fleet of engines, and return the ports on which it answers.

Contestants that are not installed are left out.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import yaml

from benchmarks.common.processes import Running, free_port
from benchmarks.datapath.contestants import SGLANG, VLLM, Wanted, contestants
from cache.store.embedded import find_server
from proxy.config.schema import Admission, Routing

_START_SECONDS = 60.0
_HAPROXY = """
global
  maxconn 4000
  nbthread 1
defaults
  mode http
  option http-no-delay
  timeout connect 5s
  timeout client 3600s
  timeout server 3600s
listen front
  bind 127.0.0.1:{port}
  balance {balance}
{servers}
"""


class Plan(msgspec.Struct, frozen=True):
    """Settings that all contestants share."""

    engines: int
    capacity_tokens: int
    speed: float
    folder: Path
    pins: bool = False  # blocks of running requests cannot be evicted
    max_concurrent: int | None = None  # of each engine, in Cairn's configuration
    template: str = ""  # by which the engines render; empty: a prompt is the text of its messages


@dataclass(slots=True)
class Entrant:
    """A router, or several proxies, that has started, with its engines."""

    name: str
    engine_ports: list[int]
    ports: list[int] = field(default_factory=list)  # requests go to them by turns
    admin_ports: list[int] = field(default_factory=list)  # of Cairn
    running: list[Running] = field(default_factory=list)

    @property
    def is_cairn(self) -> bool:
        """True if its answers show what was predicted."""
        return bool(self.admin_ports)


def known(proxies: Sequence[int], *, peers: bool) -> list[str]:
    """Return the names of all contestants that can be started here, in the order of the table."""
    names = [ROUND_ROBIN]
    if peers:
        if shutil.which("haproxy"):
            names += ["round robin (haproxy)", "least connections (haproxy)"]
        installed = {each.name for each in contestants() if each.installed()}
        names += [name for name in (SGLANG, VLLM) if name in installed]
    return [*names, *(cairn_name(count) for count in proxies)]


ROUND_ROBIN = "round robin"
UNGATED = "Cairn without the gate"


def cairn_name(count: int) -> str:
    """Return the name of the row for this number of proxies."""
    return "Cairn" if count == 1 else f"Cairn, {count} proxies"


async def enter(name: str, plan: Plan, stack: ExitStack) -> Entrant:
    """Start the engines and the router `name`; raises `StartFailed`. What was started is ended with `stack`."""
    entrant = Entrant(name, [free_port() for _ in range(plan.engines)])
    command = [sys.executable, "-m", "benchmarks.replay.engines", "--ports", ",".join(map(str, entrant.engine_ports))]
    command += ["--capacity", str(plan.capacity_tokens), "--speed", str(plan.speed)]
    command += ["--pins"] if plan.pins else []
    command += ["--template", plan.template] if plan.template else []
    engines = _run(f"engines of {name}", command, plan, stack)
    for port in entrant.engine_ports:
        await engines.answers(port, "/v1/models", _START_SECONDS)
    urls = tuple(f"http://127.0.0.1:{port}" for port in entrant.engine_ports)
    if name == ROUND_ROBIN:
        entrant.ports += entrant.engine_ports
        return entrant
    if name.startswith("Cairn"):
        count = 1 if name in (cairn_name(1), UNGATED) else int(name.split()[1])
        await _enter_cairn(entrant, count, urls, plan, stack)
        return entrant
    port = free_port()
    if "haproxy" in name:
        running = _run(name, _haproxy(name, port, entrant.engine_ports, plan), plan, stack)
        path = "/v1/models"
    else:
        contestant = next(each for each in contestants() if each.name == name)
        wanted = Wanted(urls, port, free_port(), 1, quiet_peers=True)
        running, path = _run(name, contestant.command(wanted), plan, stack), contestant.ready_path
    await running.answers(port, path, _START_SECONDS)
    entrant.ports.append(port)
    entrant.running.append(running)
    return entrant


def _run(name: str, command: Sequence[str], plan: Plan, stack: ExitStack) -> Running:
    running = Running(name, command, plan.folder)
    stack.callback(running.stop)
    return running


def _haproxy(name: str, port: int, engines: Sequence[int], plan: Plan) -> list[str]:
    balance = "roundrobin" if name.startswith("round") else "leastconn"
    servers = "\n".join(f"  server engine-{n} 127.0.0.1:{each}" for n, each in enumerate(engines))
    file = plan.folder / f"haproxy-{balance}.cfg"
    file.write_text(_HAPROXY.format(port=port, balance=balance, servers=servers))
    return ["haproxy", "-f", str(file), "-db"]


async def _enter_cairn(entrant: Entrant, count: int, urls: Sequence[str], plan: Plan, stack: ExitStack) -> None:
    """Start `count` proxies on one Valkey. Capacities and rates are not configured: both are learned."""
    store = free_port()
    command = [find_server(), "--port", str(store), "--save", "", "--bind", "127.0.0.1", "--dir", str(plan.folder)]
    _run(f"valkey of {entrant.name}", command, plan, stack)
    file = plan.folder / f"cairn-{count}.yaml"
    admission = _admission(plan.speed, enabled=entrant.name != UNGATED)
    config = cairn_config(urls, store, plan.speed, plan.max_concurrent)
    file.write_text(yaml.safe_dump({**config, "admission": admission}))
    for number in range(count):
        port, admin = free_port(), free_port()
        where = ["--host", "127.0.0.1", "--port", str(port), "--admin-port", str(admin)]
        command = [sys.executable, "-m", "proxy", "serve", "--config", str(file), *where]
        entrant.running.append(_run(f"{entrant.name} {number}", command, plan, stack))
        entrant.ports.append(port)
        entrant.admin_ports.append(admin)
    for running, port in zip(entrant.running, entrant.ports, strict=True):
        await running.answers(port, "/v1/models", _START_SECONDS)
    if count > 1:
        await asyncio.sleep(_LOOK_AROUND_SECONDS)


_LOOK_AROUND_SECONDS = 3.5
"""Time until proxies have noticed each other, by the lease, each second; until then they publish slowly."""


def _admission(speed: float, *, enabled: bool) -> dict[str, object]:
    """Return the gate's settings with times divided by `speed`; no session is refused, since clients wait."""
    gate = Admission()
    return {
        "enabled": "auto" if enabled else "never",
        "quiet_seconds": gate.quiet_seconds / speed,
        "rest_seconds": gate.rest_seconds / speed,
        "memory_seconds": gate.memory_seconds / speed,
        "max_wait_seconds": 86_400,
    }


def cairn_config(
    urls: Sequence[str], store_port: int, speed: float, max_concurrent: int | None = None
) -> dict[str, object]:
    """Return a default configuration in which the cost rule's constants in seconds are divided by `speed`."""
    routing = Routing()
    limit = {} if max_concurrent is None else {"max_concurrent": max_concurrent}
    return {
        "redis": {"url": f"redis://127.0.0.1:{store_port}/0"},
        "pools": [{"name": "engines", "replicas": [{"url": url, **limit} for url in urls]}],
        "routing": {
            "in_flight_seconds_least": routing.in_flight_seconds_least / speed,
            "in_flight_seconds_most": routing.in_flight_seconds_most / speed,
            "future_weight_per_second": routing.future_weight_per_second * speed,
        },
    }

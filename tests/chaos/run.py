"""Play one scenario and judge it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.chaos import scene
from tests.chaos.load import CLOCK, End, Load
from tests.chaos.plays import SMALL_DISK, Scenario
from tests.chaos.scene import Scene
from tests.chaos.stack import CLOCK_FILE, Failed, Proxy, Stack, Surroundings, clock_shift, until
from tests.chaos.verdict import (
    UNREPORTED_SECONDS,
    UNWRITTEN_SECONDS,
    Counted,
    Marks,
    Verdict,
    check_counts,
    first_reason,
    heal_seconds,
    is_excused,
    is_refusal,
    lost,
    reasons,
)

CLIENTS = 12
WARM_SECONDS, AFTER_SECONDS = 1.0, 1.0  # of load before the fault and after healing
HEAL_LIMIT_SECONDS = 90.0  # beyond the time for which a worker that gets no processor is waited for
SETTLE_SECONDS, SETTLE_PAUSE_SECONDS = 6.0, 0.3
_INPUT = ("input_fresh", "input_cached", "input_cache_write")


class Skipped(Exception):
    """The scenario cannot be played here; the text says why."""


async def play(scenario: Scenario, folder: Path, *, hold_seconds: float, seed: int) -> Verdict:
    """Start everything, play the scenario under load, and judge it. Raises Skipped, or Failed if it cannot start."""
    with ExitStack() as exits:
        store = exits.enter_context(scenario.store())
        surroundings = Surroundings(_prepare(scenario, folder, exits), scenario.open_files)
        redis = {"url": store.url} if store.url else {"folder": str(folder / "valkey"), "max_memory_bytes": "32MiB"}
        stack = Stack(folder, redis, scenario.proxies, surroundings)
        try:
            await stack.start()
            load = Load([proxy.port for proxy in stack.proxies], CLIENTS, seed)
            return await _play(scenario, Scene(stack, store, load, hold_seconds), load)
        finally:
            await stack.stop()


def _prepare(scenario: Scenario, folder: Path, exits: ExitStack) -> Mapping[str, str]:
    """Return the environment of the proxies; raises Skipped if the machine lacks what the scenario needs."""
    if scenario.needs == "clock":
        changes = clock_shift(folder / CLOCK_FILE)
        if changes is None:
            raise Skipped("libfaketime is not installed, or does not work here")
        return changes
    if scenario.needs == "disk":
        if why := scene.mount_small(folder / "valkey", SMALL_DISK):
            raise Skipped(why)
        exits.callback(scene.unmount, folder / "valkey")
    return {}


async def _play(scenario: Scenario, on: Scene, load: Load) -> Verdict:
    problems: list[str] = []
    load.start()
    try:
        await asyncio.sleep(WARM_SECONDS)
        on.begin()
        await scenario.play(on)
        await until(on.stack.is_ready, HEAL_LIMIT_SECONDS, "every proxy is ready again")
        await until(on.shares_again, HEAL_LIMIT_SECONDS, "the workers share what they know again")
        await asyncio.sleep(AFTER_SECONDS)
    except Failed as failure:
        problems.append(str(failure))
    await load.stop()
    problems += await _settled(scenario, on, load)
    with suppress(Failed):  # the verdict tells; a busy machine may have been late with a look at the end
        await until(on.stack.is_ready, SETTLE_SECONDS, "every proxy is ready at the end")
    return _verdict(scenario, on, load, problems)


def _marks(scenario: Scenario, on: Scene) -> Marks:
    return Marks(
        begun=on.begun,
        mended=on.mended or on.begun,
        lost_until=on.lost_until,
        lost_ports=on.lost_ports,
        lost_replicas=on.lost_replicas,
        refuses=scenario.refuses,
    )


async def _settled(scenario: Scenario, on: Scene, load: Load) -> list[str]:
    """Compare the counters until they are right, at most for `SETTLE_SECONDS`: reports and totals come in beats."""
    deadline = CLOCK.monotonic() + SETTLE_SECONDS
    while True:
        problems = await _check(scenario, on, load)
        if not problems or CLOCK.monotonic() > deadline:
            return problems
        await asyncio.sleep(SETTLE_PAUSE_SECONDS)


async def _check(scenario: Scenario, on: Scene, load: Load) -> list[str]:
    """Compare the counters with what the clients received."""
    marks, problems = _marks(scenario, on), []
    records = load.records
    if not scenario.starts_over:
        pages = [await proxy.page() for proxy in on.stack.proxies]
        counted = Counted(
            sum(int(_sum(page, f'type="{kind}"')) for page in pages for kind in _INPUT),
            sum(int(_sum(page, 'type="output"')) for page in pages),
        )
        problems += check_counts("the metrics", counted, records, marks, UNREPORTED_SECONDS)
        for name, wanted in (("worker_restarts", scenario.restarts), ("background_task_failures", 0)):
            found = sum(_sum(page, "", f"cairn_{name}_total") for page in pages)
            if found != wanted:
                problems.append(f"cairn_{name}_total is {found:.0f}, not {wanted}")
    if scenario.keeps_totals:
        problems += check_counts("the totals", await _totals(on.stack.proxy), records, marks, UNWRITTEN_SECONDS)
    return problems


async def _totals(proxy: Proxy) -> Counted:
    """All proxies write to one Redis, so that one of them can read all totals."""
    total = (await proxy.savings())["total"]
    return Counted(int(total["prompt_tokens"]), int(total["output_tokens"]))


def _sum(page: Mapping[str, float], label: str, name: str = "cairn_tokens_total") -> float:
    return sum(value for series, value in page.items() if series.partition("{")[0] == name and label in series)


def _verdict(scenario: Scenario, on: Scene, load: Load, problems: list[str]) -> Verdict:
    marks, records = _marks(scenario, on), load.records
    seen = [proxy.seen for proxy in on.stack.proxies]
    missing = lost(records, marks)
    wrong = [record for record in records if record.end is End.WRONG]
    found = reasons(seen, on.begun)
    shown = first_reason(found, scenario.shows)
    healed = heal_seconds(seen, marks.mended)
    if scenario.shows and not shown:
        problems.append(f"/readyz never said {scenario.shows!r}, but {dict(found)}")
    if healed is None:
        problems.append("it did not become ready again")
    for record in (*missing[:5], *wrong[:5]):
        when = f"{record.started - on.begun:+.2f} to {record.ended - on.begun:+.2f} s"
        kind = "stream" if record.ask.stream else "plain"
        problems.append(f"{record.end} ({kind}, {when}, replica {record.replica or '-'}): {record.detail}")
    return Verdict(
        name=scenario.name,
        requests=len(records),
        in_flight=sum(record.end is not End.RIGHT and is_excused(record, marks) for record in records),
        refused=sum(is_refusal(record, marks) for record in records),
        lost=len(missing),
        wrong=len(wrong),
        heal_seconds=healed,
        shown=shown,
        problems=tuple(problems),
    )

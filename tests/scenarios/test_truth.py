"""Cairn's counts equal the upstreams' reports, to the token and the picodollar, whatever happens on the way."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec
import pytest
import yaml

from proxy.config.schema import Pool
from proxy.metrics import definitions as metrics
from tests.conftest import IS_COMPILED
from tests.support.cairn import Cairn, config_for, running
from tests.support.counting_upstream import (
    KNOWN_MODEL,
    MUTE_MODEL,
    PAIR_MODEL,
    STRICT_MODEL,
    TIER_PERCENT,
    CountingUpstream,
    body_of,
    case_of,
    headers_of,
)
from tests.support.lean_client import LeanClient
from tests.support.served import ROOT, Served, served
from tests.support.valkey import Valkey, eventually

PICOS_PER_USD = 10**12
CLIENTS = 48
MANY = 10_000 if IS_COMPILED else 1_000  # `make test` runs both; the sources take three times as long for a request
LOST_SECONDS = 1.5  # the second that a crash may cost, and half of one for a machine that is busy with other tests
PRICE = {"input": 3, "cached_read": 0.3, "cache_write_5m": 3.75, "cache_write_1h": 6, "output": 15}


class Upstreams:
    """All upstreams of the cases: one that reports what it cached, one that never does, one that refuses
    `stream_options`, and a pair of which one fails. Use it as an asynchronous context."""

    def __init__(self) -> None:
        self._of = {
            "loud": CountingUpstream(),
            "mute": CountingUpstream(),
            "strict": CountingUpstream(is_strict=True),
            "sick": CountingUpstream(fails=True),
            "well": CountingUpstream(),
        }
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for upstream in self._of.values():
            await self._stack.enter_async_context(upstream)
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._stack.aclose()

    @property
    def counts(self) -> Counter[str]:
        """Return what they reported, by their own count."""
        return sum((upstream.counts for upstream in self._of.values()), Counter())

    @property
    def answered(self) -> int:
        """Requests that were answered, and not refused so that they came again."""
        return sum(upstream.answered for upstream in self._of.values())

    def pools(self) -> list[dict[str, Any]]:
        """The configuration's pools."""
        served = {
            "known": ([KNOWN_MODEL, "made-up-*"], ["loud"]),
            "mute": ([MUTE_MODEL], ["mute"]),
            "strict": ([STRICT_MODEL], ["strict"]),
            "pair": ([PAIR_MODEL], ["sick", "well"]),
        }
        return [
            {
                "name": pool,
                "models": models,
                "default": pool == "known",
                "replicas": [{"url": self._of[name].url, "name": name} for name in names],
            }
            for pool, (models, names) in served.items()
        ]


async def ask_one(client: LeanClient, number: int) -> None:
    """Send a case and read its answer, cut or whole; a background response is then fetched twice."""
    case = case_of(number)
    headers = headers_of(case, number)
    answered = await client.post(case.path, headers, body_of(case, number))
    assert answered == (case.status, not case.cut), (number, answered)
    for _ in range(case.requests - 1):
        assert await client.post(f"{case.path}/resp_{number}", headers, b"", "GET") == (200, True), number


async def ask_all(url: str, numbers: Iterable[int]) -> None:
    """Send all cases over connections that are kept."""
    waiting = iter(numbers)

    async def ask_in_turn() -> None:
        client = LeanClient(urlsplit(url).port or 0)
        for number in waiting:
            await ask_one(client, number)
        client.close()

    async with asyncio.TaskGroup() as all_:
        for _ in range(CLIENTS):
            all_.create_task(ask_in_turn())


def requests_of(numbers: Iterable[int]) -> int:
    return sum(case_of(number).requests for number in numbers)


def counted_by(cairn: Cairn) -> dict[str, float]:
    counts = {kind: cairn.tokens(kind) for kind in ("input_fresh", "input_cached", "input_cache_write", "output")}
    for name, spec in (
        ("unknown", metrics.CACHED_UNKNOWN), ("missing", metrics.USAGE_MISSING),
        ("inconsistent", metrics.USAGE_INCONSISTENT),
    ):  # fmt: skip
        counts[name] = cairn.count(spec)
    return counts


def counted_for_others(cairn: Cairn) -> tuple[float, float, int]:
    """Input and output tokens and answers under OpenTelemetry's names."""
    series = cairn.heard.exposition.observed(metrics.GEN_AI_USAGE)
    totals = [
        sum(observed.total for labels, observed in series.items() if labels[-1] == kind)
        for kind in ("input", "output")
    ]
    return totals[0], totals[1], sum(sum(observed.counts) for observed in series.values()) // 2


def totals_for_others(truth: Counter[str]) -> tuple[float, float, int]:
    """The same as the upstreams counted them."""
    counted = totals_of(truth)
    return counted["prompt_tokens"], counted["output_tokens"], counted["answers"]


def figures(truth: Counter[str]) -> dict[str, float]:
    names = ("input_fresh", "input_cached", "input_cache_write", "output", "unknown", "missing", "inconsistent")
    return {name: truth[name] for name in names}


async def test_mixed_requests_through_one_worker_add_up_exactly() -> None:
    """Streams and plain answers of all dialects; missing, null, negative and doubled usage; cut answers; compressed
    requests, background responses, tiers, compaction, failover, refused fields, errors with status 200."""
    numbers = range(1_000)
    async with Upstreams() as upstreams:
        pools = [msgspec.convert(pool, Pool) for pool in upstreams.pools()]
        async with running(config_for([], pools=pools)) as cairn:
            await ask_all(cairn.url, numbers)
            assert upstreams.answered == requests_of(numbers)
            assert counted_by(cairn) == figures(upstreams.counts)
            assert counted_for_others(cairn) == totals_for_others(upstreams.counts)
            models = {labels[0] for labels in cairn.heard.exposition.labels(metrics.TOKENS)}
            assert models == {KNOWN_MODEL, MUTE_MODEL, PAIR_MODEL, STRICT_MODEL, metrics.OTHER}


def write_config(folder: Path, upstreams: Upstreams, workers: int, redis_url: str | None = None) -> Path:
    tiers = [
        {name: value * percent / 100 for name, value in PRICE.items()} | {"service_tier": tier}
        for tier, percent in TIER_PERCENT.items()
    ]
    file = folder / "cairn.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "server": {"workers": workers},
                "pools": upstreams.pools(),
                "prices": [*tiers, PRICE],
                "log": {"access": False},
                "redis": {"url": redis_url},
            }
        )
    )
    return file


async def counts_of(http: aiohttp.ClientSession, cairn: Served) -> dict[str, float]:
    async with http.get(f"{cairn.admin}/metrics") as answer:
        page = await answer.text()

    def total(name: str, label: str = "") -> float:
        return sum(
            float(row.rpartition(" ")[2]) for row in page.splitlines() if row.startswith(name) and label in row
        )

    kinds = ("input_fresh", "input_cached", "input_cache_write", "output")
    counts = {kind: total("cairn_tokens_total{", f'type="{kind}"') for kind in kinds}
    counts["unknown"] = total("cairn_cached_unknown_tokens_total{")
    counts["missing"] = total("cairn_usage_missing_total{")
    counts["inconsistent"] = total("cairn_usage_inconsistent_total{")
    return counts


async def savings_of(http: aiohttp.ClientSession, cairn: Served, by: str = "model") -> dict[str, Any]:
    async with http.get(f"{cairn.admin}/savings?by={by}") as answer:
        assert answer.status == 200, await answer.text()
        made: dict[str, Any] = await answer.json()
        return made


def totals_in(made: dict[str, Any]) -> dict[str, int]:
    """The figures of the totals, of which none is unpriced."""
    total = made["total"]
    assert total["unpriced"] == 0
    names = ("answers", "missing_usage", "prompt_tokens", "cached_tokens", "written_tokens", "output_tokens")
    money = {name: int(Decimal(total[name]) * PICOS_PER_USD) for name in ("cost_usd", "uncached_cost_usd")}
    return {name: total[name] for name in (*names, "unknown_tokens")} | money


def totals_of(truth: Counter[str]) -> dict[str, int]:
    """The same figures as the upstreams counted them."""
    return {
        "answers": truth["answers"],
        "missing_usage": truth["missing"],
        "prompt_tokens": truth["input_fresh"] + truth["input_cached"] + truth["input_cache_write"],
        "cached_tokens": truth["input_cached"],
        "written_tokens": truth["input_cache_write"],
        "output_tokens": truth["output"],
        "unknown_tokens": truth["unknown"],
        "cost_usd": truth["cost_picos"],
        "uncached_cost_usd": truth["uncached_picos"],
    }


async def test_mixed_requests_through_four_workers_add_up_exactly_and_outlive_them(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Tokens in /metrics and in the totals, money in the totals; and the totals again after a restart of it all.

    `--truth-requests 10000` makes it long.
    """
    numbers = range(pytestconfig.getoption("--truth-requests") or MANY)
    async with Upstreams() as upstreams, aiohttp.ClientSession() as http:
        file = write_config(tmp_path, upstreams, workers=4)
        async with served(["--config", str(file)], tmp_path) as cairn:
            await eventually(lambda: len(cairn.worker_pids()) == 4)
            await ask_all(cairn.url, numbers)
            truth = upstreams.counts

            async def all_counted() -> bool:
                return await counts_of(http, cairn) == figures(truth)

            with suppress(AssertionError):
                await eventually(all_counted)
            assert await counts_of(http, cairn) == figures(truth)
            assert upstreams.answered == requests_of(numbers)

            async def all_requests_counted() -> bool:  # one without tokens may be reported after the others
                return await cairn.metric(http, "cairn_requests_total") == requests_of(numbers)

            await eventually(all_requests_counted)

            async def all_written() -> bool:
                # a worker's last second may hold nothing but answers without usage
                total = (await savings_of(http, cairn))["total"]
                return (total["answers"], total["missing_usage"]) == (truth["answers"], truth["missing"])

            await eventually(all_written)
            made = await savings_of(http, cairn)
            assert totals_in(made) == totals_of(truth)
            models = {KNOWN_MODEL, MUTE_MODEL, PAIR_MODEL, STRICT_MODEL, metrics.OTHER}
            assert {line["name"] for line in made["lines"]} == models
        again = ["--config", str(file), "--workers", "1"]
        async with served(again, tmp_path) as cairn:
            assert await savings_of(http, cairn) == made
            await ask_all(cairn.url, range(numbers.stop, numbers.stop + 100))
            cairn.stop()  # at once: what was not written yet is written while it drains
        async with served(again, tmp_path) as cairn:
            assert totals_in(await savings_of(http, cairn)) == totals_of(upstreams.counts)
            printed = await printed_savings(cairn)
            assert printed == await savings_of(http, cairn)


async def printed_savings(cairn: Served) -> dict[str, Any]:
    """Return the report of `cairn savings` for the running Cairn."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", "savings", "--by", "model", "--url", cairn.admin, "--json",
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    made: dict[str, Any] = json.loads(out)
    return made


def is_single(number: int) -> bool:
    """True if the case is one request that is answered whole."""
    return not case_of(number).cut and case_of(number).requests == 1


class Load:
    """Clients that ask one case after another until nobody answers; what was answered whole, and when."""

    def __init__(self, url: str) -> None:
        self._port = urlsplit(url).port or 0
        self._numbers = (number for number in itertools.count() if is_single(number))
        self._clock = asyncio.get_running_loop().time
        self._answered: list[tuple[float, Counter[str]]] = []

    async def run(self) -> None:
        """Ask until nobody answers."""
        async with asyncio.TaskGroup() as all_:
            for _ in range(4):
                all_.create_task(self._ask_in_turn())

    async def _ask_in_turn(self) -> None:
        client = LeanClient(self._port)
        for number in self._numbers:
            case = case_of(number)
            try:
                _, whole = await client.post(case.path, headers_of(case, number), body_of(case, number))
            except OSError:
                return
            if not whole:
                return
            self._answered.append((self._clock(), case.counts))

    def answered(self, seconds_ago: float) -> Counter[str]:
        """Return the cases that were answered more than this long ago."""
        latest = self._clock() - seconds_ago
        return sum((counts for at, counts in self._answered if at <= latest), Counter())


@pytest.mark.once
async def test_a_crash_of_the_whole_tree_loses_what_was_served_in_the_last_second_at_most(
    tmp_path: Path, redis: Valkey
) -> None:
    """SIGKILL to the supervisor and its workers while requests pass: the totals hold all that is older and nothing
    that was not served, and the next Cairn goes on from them to the token. A process that was paused before the crash
    loses more: the best of three crashes counts."""
    for _ in range(3):
        redis.flush()
        if not (lost := await lost_in_a_crash(tmp_path, redis.url)):
            return
    pytest.fail(f"lost, though served more than {LOST_SECONDS} s before: {lost}")


async def lost_in_a_crash(folder: Path, redis_url: str) -> dict[str, int]:
    """Crash Cairn under load and start another; return what the totals lack of what was served long enough before."""
    async with Upstreams() as upstreams, aiohttp.ClientSession() as http:
        file = write_config(folder, upstreams, workers=2, redis_url=redis_url)
        async with served(["--config", str(file)], folder) as cairn:
            await eventually(lambda: len(cairn.worker_pids()) == 2)
            load = Load(cairn.url)
            asking = asyncio.get_running_loop().create_task(load.run())
            await eventually(lambda: load.answered(LOST_SECONDS)["answers"] >= 300)
            kept = totals_of(load.answered(LOST_SECONDS))
            cairn.kill()
            await asking
        served_in_all = totals_of(upstreams.counts)
        async with served(["--config", str(file)], folder) as cairn:
            found = totals_in(await savings_of(http, cairn))
            assert all(amount <= served_in_all[name] for name, amount in found.items())
            before = upstreams.counts
            await ask_all(cairn.url, range(100))
            more = totals_of(upstreams.counts - before)

            async def all_written() -> bool:
                now = totals_in(await savings_of(http, cairn))
                return now == {name: amount + more[name] for name, amount in found.items()}

            await eventually(all_written)
    return {name: kept[name] - amount for name, amount in found.items() if amount < kept[name]}


@pytest.mark.once
async def test_counters_never_fall_when_a_worker_is_killed(tmp_path: Path) -> None:
    """Each series of /metrics is watched over the death of one of two workers under load."""
    async with Upstreams() as upstreams, aiohttp.ClientSession() as http:
        file = write_config(tmp_path, upstreams, workers=2)
        async with served(["--config", str(file)], tmp_path) as cairn:
            await eventually(lambda: len(cairn.worker_pids()) == 2)
            before: dict[str, float] = {}
            for step in range(6):
                numbers = [number for number in range(step * 200, step * 200 + 200) if is_single(number)]
                if step == 3:
                    os.kill(cairn.worker_pids()[0], signal.SIGKILL)
                    await eventually(lambda: len(cairn.worker_pids()) == 3)
                await ask_all(cairn.url, numbers)
                now = await counters_of(http, cairn)
                fallen = {name for name, value in before.items() if now.get(name, 0) < value}
                assert not fallen
                before = now
            assert sum(value for name, value in before.items() if name.startswith("cairn_tokens_total")) > 0


async def counters_of(http: aiohttp.ClientSession, cairn: Served) -> dict[str, float]:
    async with http.get(f"{cairn.admin}/metrics") as answer:
        page = await answer.text()
    names = set(re.findall(r"^# TYPE (\S+) (?:counter|histogram)$", page, re.MULTILINE))
    rows = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    counted = re.compile("|".join(f"{re.escape(name)}(_bucket|_count)?(?={{|$)" for name in names))
    return {head: float(value) for head, _, value in rows if counted.match(head)}

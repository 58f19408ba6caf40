"""`cairn savings`: where it finds the totals, and what it prints of them."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner, Result

from cache import Sums, Totals, open_store
from proxy.cli.main import cli
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.valkey import PATIENT_SECONDS, Valkey, free_port, running

USD = 10**12


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    """With one day's totals of two tenants."""
    with running() as valkey:
        asyncio.run(write(valkey.url))
        yield valkey


async def write(url: str) -> None:
    tasks = Tasks()
    store = open_store(url, clock=SystemClock(), tasks=tasks, limit_seconds=PATIENT_SECONDS)
    await store.start()
    totals, today = Totals(store, "w"), datetime.now(UTC).date().isoformat()
    totals.row(today, "gpt", "east", "red").add(
        Sums(
            answers=2,
            routing_gain_tokens=4_500,
            prompt_tokens=12_000,
            cached_tokens=9_000,
            input_picos=4 * USD,
            saving_picos=3 * USD,
        )
    )
    totals.row(today, "gpt", "east", "blue").add(Sums(answers=1, unpriced=1, prompt_tokens=77, unknown_tokens=77))
    assert await totals.flush()
    await store.close()
    await tasks.close()


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    result = CliRunner().invoke(cli, ("savings", *arguments), env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_table_for_people_with_what_is_not_in_it(valkey: Valkey) -> None:
    """Tokens and money; what has no price or no word on its cache is told below."""
    text = run("--redis", valkey.url, "--by", "tenant").output
    assert "12,000" in text
    assert "75.0 %" in text
    assert "3.0000" in text
    assert "for lack of a price: 1 response;" in text
    assert "4,500 cached tokens (50.0 %) that round robin would have missed" in text
    assert "as cached or not: 77 prompt tokens." in text
    assert any(line.split()[:5] == ["blue", "1", "77", "0", "?"] for line in text.splitlines()), text


def test_json_and_csv_are_exact(valkey: Valkey) -> None:
    """The same figures."""
    tree = json.loads(run("--redis", valkey.url, "--by", "model", "--since", "7d", "--json").output)
    assert tree["lines"][0]["name"] == "gpt"
    assert tree["total"]["net_usd"] == "3"
    rows = list(csv.DictReader(io.StringIO(run("--redis", valkey.url, "--by", "tenant", "--csv").output)))
    assert [(row["tenant"], row["cached_tokens"]) for row in rows] == [
        ("red", "9000"),
        ("blue", "0"),
        ("total", "9000"),
    ]


def test_the_redis_of_the_configuration_is_asked(valkey: Valkey) -> None:
    """Here out of the environment."""
    assert '"net_usd":"3"' in run("--json", env={"CAIRN_REDIS": valkey.url}).output


def test_what_cannot_be_read_is_one_line(valkey: Valkey) -> None:
    """Exit 1 where nothing answers, 2 where the question is wrong."""
    nobody = f"127.0.0.1:{free_port()}"
    away = run("--redis", f"redis://{nobody}")
    assert (away.exit_code, away.stderr.count("\n")) == (1, 1)
    gone = run("--url", f"http://{nobody}")
    assert gone.exit_code == 1
    assert "no Cairn answers" in gone.stderr
    assert run("--redis", valkey.url, "--since", "soon").exit_code == 2

"""`cairn init` and `cairn doctor` against living and dead endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from proxy.cli.endpoint import Endpoint
from proxy.cli.init import configuration
from proxy.cli.main import cli
from proxy.config.load import load
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.valkey import free_port, running


@pytest.fixture
async def upstream() -> AsyncIterator[OpenAIUpstream]:
    async with OpenAIUpstream() as upstream:
        yield upstream


async def run(*arguments: str) -> Result:
    """The command in a thread, since the upstream lives in this loop."""
    env = {"OPENAI_API_KEY": "", "CAIRN_CONFIG": ""}
    result = await asyncio.to_thread(CliRunner().invoke, cli, arguments, None, env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


async def test_init_writes_a_file_that_can_be_served(upstream: OpenAIUpstream, tmp_path: Path) -> None:
    """With what the endpoints said beside each; a dead one is told and still written."""
    file, dead = tmp_path / "cairn.yaml", f"http://127.0.0.1:{free_port()}"
    done = await run("init", upstream.url, dead, "--output", str(file))
    assert done.exit_code == 0
    assert f"{dead} does not answer" in done.stderr
    config = load(file, {"HOME": str(tmp_path)}).config
    assert [replica.url for pool in config.pools for replica in pool.replicas] == [upstream.url, dead]
    assert config.pools[0].models == ("test-model",)
    assert (await run("init", upstream.url, "--output", str(file))).exit_code == 2, "nothing is overwritten"
    assert (await run("init", upstream.url, "--output", str(file), "--force")).exit_code == 0


def test_init_writes_no_key_and_quotes_what_it_was_told(tmp_path: Path) -> None:
    """An endpoint may list any name."""
    odd = Endpoint("http://h:1", ('a": {b', "# c"), "vLLM")
    file = tmp_path / "c.yaml"
    text = configuration([odd, Endpoint("https://api.example.com", ("gpt",))], "c.yaml", has_key=True)
    file.write_text(text)
    config = load(file, {"OPENAI_API_KEY": "sk", "HOME": "/h"}).config
    assert [pool.kind.value for pool in config.pools] == ["engine", "provider"]
    assert config.pools[0].models == odd.models


def config_file(folder: Path, *replicas: dict, models: str = "test-*", **sections: object) -> str:
    tree = {
        "server": {"port": free_port()},
        "admin": {"port": free_port()},
        "redis": {"folder": str(folder / "valkey")},
        "pools": [{"name": "p", "models": [models], "replicas": list(replicas)}],
    }
    (folder / "cairn.yaml").write_text(yaml.safe_dump(tree | sections))
    return str(folder / "cairn.yaml")


async def test_doctor_finds_a_good_configuration_good(upstream: OpenAIUpstream, tmp_path: Path) -> None:
    """A line for each check, exit 0."""
    done = await run("doctor", "--config", config_file(tmp_path, {"url": upstream.url, "name": "one"}))
    assert done.exit_code == 0, done.output
    assert "ok    replica one answers" in done.output
    assert "test-model" in done.output
    assert "FAIL" not in done.output


async def test_doctor_says_what_to_mend(upstream: OpenAIUpstream, tmp_path: Path) -> None:
    """A dead replica, a model that no pattern fits, and a Redis that is away."""
    file = config_file(
        tmp_path,
        {"url": upstream.url, "name": "odd"},
        {"url": f"http://127.0.0.1:{free_port()}", "name": "dead"},
        models="other-*",
        redis={"url": f"redis://127.0.0.1:{free_port()}"},
    )
    done = await run("doctor", "--config", file)
    assert done.exit_code == 1
    for words in (
        "FAIL  replica odd serves test-model, none of which matches",
        "FAIL  replica dead does not answer (connection refused): check the address",
        "FAIL  redis does not answer",
    ):
        assert words in done.output, done.output


async def test_doctor_asks_redis_and_compares_the_clocks(upstream: OpenAIUpstream, tmp_path: Path) -> None:
    """A real one."""
    with running() as valkey:
        file = config_file(tmp_path, {"url": upstream.url}, redis={"url": valkey.url, "operation_seconds": 5})
        done = await run("doctor", "--config", file)
    assert "and the clocks agree" in done.output, done.output


async def test_doctor_finds_a_folder_that_others_can_write_to(upstream: OpenAIUpstream, tmp_path: Path) -> None:
    """The private Valkey would not start there."""
    file = config_file(tmp_path, {"url": upstream.url})
    (tmp_path / "valkey").mkdir()
    (tmp_path / "valkey").chmod(0o777)
    done = await run("doctor", "--config", file)
    assert (done.exit_code, "can be written to by other users, so the private" in done.output) == (1, True)


async def test_doctor_reports_a_bad_file_as_every_command_does(tmp_path: Path) -> None:
    """All problems, exit 2."""
    (tmp_path / "c.yaml").write_text("sever: {}\nlog: {level: loud}\n")
    done = await run("doctor", "--config", str(tmp_path / "c.yaml"))
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 2

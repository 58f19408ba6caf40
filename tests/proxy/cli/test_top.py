"""`cairn top`: what it shows of a state, and what it says when nothing answers."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from click.testing import CliRunner

from proxy.accounting.savings import By, SavingsReport
from proxy.admin.port import AdminPort
from proxy.admin.status import StatusBoard, build
from proxy.admin.status.state import Moment
from proxy.cli.main import cli
from proxy.cli.terminal import terminal_width
from proxy.cli.top import lines
from proxy.config.schema import Config
from proxy.control.error_rows import ErrorRow
from proxy.control.messages import ReplicaDown, StatusReport
from proxy.control.prefix_rows import PrefixReport, PrefixRow
from proxy.control.readiness import Readiness, ReadinessStatus
from proxy.metrics import definitions as metrics
from proxy.metrics.exposition import Exposition
from proxy.metrics.recorder import Recorder
from proxy.supervisor import sockets
from tests.support.clock import FakeClock
from tests.support.valkey import free_port

READINESS = Readiness(ReadinessStatus.DEGRADED, ("upstream two is down",), 1, 3, "up", {"one": True, "two": False})


def state() -> dict[str, Any]:
    """A state as the admin port sends it."""
    recorder, exposition = Recorder(), Exposition()
    for kind, count in (("input_fresh", 250), ("input_cached", 750)):
        recorder.inc(metrics.TOKENS, ("m", "one", kind), count)
    recorder.inc(metrics.SAVINGS, ("m", "one"), 12.5)
    exposition.apply(0, recorder.take())
    report = StatusReport(
        PrefixReport([PrefixRow(1, "m", 400, 7, 750, 5.0)]),
        errors=[ErrorRow("web", "m", "upstream_timeout", 4, 880.0)],
        down={"two": ReplicaDown(700.0, "connection refused")},
    )
    made = build.build(exposition, READINESS, [report], Moment(1000.0, 100.0, "1.2.3"))
    found: dict[str, Any] = json.loads(msgspec.json.encode(made))
    return found


def test_the_screen_answers_an_operators_first_questions() -> None:
    """Is it up, what fails, for whom, since when, and what does it save."""
    shown = "\n".join(lines(state(), 100))
    for words in (
        "Cairn 1.2.3: degraded",
        "1 of 2 replicas up",
        "now: upstream two is down",
        "down for 5 min: connection refused",
        "web     m      upstream timeout",
        "2 min",
        "$12.50",
        "75.0 %",
        "400     7",
    ):
        assert words in shown, words


def test_the_share_of_a_replica_that_never_reports_cached_tokens_is_unknown() -> None:
    """It is not zero; with some reported, the share is the least that was cached."""
    found = state()
    found["replicas"][0] |= {"cached_tokens": 0, "prompt_tokens": 700, "unknown_tokens": 700}
    assert any(line.startswith("one ") and line.endswith(" ?") for line in lines(found, 100))
    found["replicas"][0] |= {"cached_tokens": 70, "unknown_tokens": 350}
    assert any(line.startswith("one ") and line.endswith(" 10.0 %") for line in lines(found, 100))


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_figure_is_cut_at_any_width(width: int) -> None:
    """A narrow terminal gets records."""
    shown = "\n".join(lines(state(), width))
    assert "connection refused" in shown
    assert "$12.50" in shown


class Overview:
    """The state that the admin port of this test shows."""

    def __init__(self) -> None:
        self.config = Config()
        self.board = StatusBoard(Exposition(), self.readiness, FakeClock(), "1.2.3")

    def readiness(self) -> Readiness:
        return READINESS

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        raise NotImplementedError

    async def savings(self, since: str, by: By) -> SavingsReport:
        raise NotImplementedError

    async def explain(
        self, path: str, body: bytes, credential: bytes, headers: tuple[tuple[bytes, bytes], ...]
    ) -> tuple[int, bytes]:
        raise NotImplementedError


async def test_it_reads_the_stream_of_a_running_cairn() -> None:
    """Once, for scripts."""
    listening = sockets.open_admin("127.0.0.1", 0)
    port = AdminPort(Overview())
    await port.start(listening)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    result = await asyncio.to_thread(CliRunner().invoke, cli, ["top", "--once", "--url", url])
    await port.close()
    assert result.exit_code == 0, result.output
    assert "Cairn 1.2.3: degraded" in result.output


async def test_without_a_terminal_it_shows_the_figures_once() -> None:
    """Nothing would be shown otherwise, for ever."""
    listening = sockets.open_admin("127.0.0.1", 0)
    port = AdminPort(Overview())
    await port.start(listening)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    result = await asyncio.to_thread(CliRunner().invoke, cli, ["top", "--url", url])
    assert result.exit_code == 0, result.output
    assert "Cairn 1.2.3: degraded" in result.output
    await port.close()


def test_a_standard_output_that_was_closed_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has none then, and every command that prints a table would end with a traceback."""
    monkeypatch.setattr(sys, "stdout", None)
    assert terminal_width() is None


@pytest.mark.parametrize("state", [{"version": "0.1.0", "status": "ready"}, {"figures": []}, "\u0000"])
async def test_figures_of_another_version_are_told(state: object) -> None:
    """In one line, with what to do; which figures are sent may change with each version."""

    async def events(_: web.BaseRequest) -> web.Response:
        return web.Response(text=f"event: state\ndata: {json.dumps(state)}\n\n")

    async with RawTestServer(events) as server:
        result = await asyncio.to_thread(
            CliRunner().invoke, cli, ["top", "--once", "--url", str(server.make_url("/"))]
        )
    assert result.exit_code == 1
    assert "sends figures of another version than this command's" in result.stderr.replace("\n  ", " ")


def test_without_a_cairn_it_says_so() -> None:
    """In one line, with what to do."""
    result = CliRunner().invoke(cli, ["top", "--url", f"http://127.0.0.1:{free_port()}"])
    assert result.exit_code == 1
    assert "no Cairn answers at" in result.stderr
    assert "--url" in result.stderr


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_figure_is_broken_in_a_narrow_terminal(width: int) -> None:
    """Every line fits, and each fact of the head is whole on one of them."""
    shown = lines(state(), width)
    assert [line for line in shown if len(line) > width] == []
    for fact in ("1 of 2 replicas up", "0.0 requests/s", "3 in flight", "0 waiting", "0 requests in 15 min"):
        assert any(fact in line for line in shown)

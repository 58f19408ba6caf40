"""The short form of `make chaos`: a few faults under load, each for a second, and what the tool does with errors."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from tests.chaos.__main__ import parse_arguments
from tests.chaos.plays import SCENARIOS
from tests.chaos.run import Skipped, play
from tests.chaos.stack import seconds_until_half_past_eleven

SHORT = ("worker-frozen", "redis-password", "upstream-killed")


@pytest.mark.parametrize("name", SHORT)
async def test_a_fault_under_load_costs_no_answer(name: str, tmp_path: Path) -> None:
    """No answer is lost or wrong, the fault shows in /readyz, everything heals, and the counters are right."""
    scenario = next(each for each in SCENARIOS if each.name == name)
    try:
        verdict = await play(scenario, tmp_path, hold_seconds=1.0, seed=7)
    except Skipped as why:
        pytest.skip(str(why))
    assert verdict.problems == ()
    assert (verdict.lost, verdict.wrong) == (0, 0)
    assert verdict.requests > 20


@pytest.mark.parametrize(
    ("time_of_day", "seconds"), [("23:30:00", 0), ("23:29:59", 1), ("00:00:00", 84_600), ("23:30:01", 86_399)]
)
def test_the_clock_begins_before_midnight_at_any_time_of_day(time_of_day: str, seconds: int) -> None:
    """It is never set back, since what it counted there would be of a third day."""
    unix_seconds = datetime.fromisoformat(f"2026-03-31T{time_of_day}+00:00").timestamp()
    assert seconds_until_half_past_eleven(unix_seconds) == seconds


def test_scenarios_have_names_of_their_own() -> None:
    """`--only` names one scenario."""
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)


def test_an_unknown_scenario_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The error lists what can be chosen."""
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--only", "nothing"])
    assert ended.value.code == 2
    assert "redis-killed" in capsys.readouterr().err


def test_help_describes_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` is all that one needs to use the tool."""
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    told = capsys.readouterr().out
    assert all(scenario.name in told and scenario.what in told for scenario in SCENARIOS)

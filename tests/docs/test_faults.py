"""The table of faults is complete, and every test and scenario that it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.chaos.plays import SCENARIOS

ROOT = Path(__file__).resolve().parents[2]
FAULTS = 56
_TEST = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


class Row(NamedTuple):
    """One fault."""

    number: int
    happens: str
    tests: list[tuple[str, str]]
    scenarios: list[str]


def rows() -> list[Row]:
    """Return the rows of all tables of the page."""
    found = []
    for line in (ROOT / "docs" / "faults.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0].isdecimal():
            scenarios = [name for name in cells[4].split(", ") if name]
            found.append(Row(int(cells[0]), cells[2], _TEST.findall(cells[3]), scenarios))
    return found


def test_every_fault_has_a_row_with_a_test() -> None:
    """In their order, and none twice."""
    assert [row.number for row in rows()] == list(range(1, FAULTS + 1))
    assert [row.number for row in rows() if not (row.happens and row.tests)] == []


@pytest.mark.parametrize("row", rows(), ids=lambda row: str(row.number))
def test_the_tests_that_a_row_names_exist(row: Row) -> None:
    """A test that is renamed must be renamed here too."""
    for file, name in row.tests:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / "tests" / file).read_text("utf-8"), re.MULTILINE)


def test_every_scenario_under_load_is_in_the_table_and_no_other() -> None:
    """`make chaos` plays what the table names; one scenario shows only how routing avoids a late replica."""
    named = {name for row in rows() for name in row.scenarios}
    assert named == {scenario.name for scenario in SCENARIOS} - {"upstream-late"}

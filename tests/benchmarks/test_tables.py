"""The tables that benchmarks print."""

from __future__ import annotations

import pytest
from rich.table import Table

from benchmarks.common.tables import print_table


def test_no_figure_is_cut_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A table that is wider than the terminal is printed with all columns at their full width."""
    monkeypatch.setenv("COLUMNS", "20")
    table = Table("rule", "turns an hour")
    table.add_row("Cairn without the gate", "5,484")
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert "rule                   ┃ turns an hour" in lines[1]
    assert "Cairn without the gate │ 5,484" in lines[3]

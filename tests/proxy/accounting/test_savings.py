"""From totals to savings: exact sums, shares, order, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import KEPT_DAYS, RowKey, Sums
from proxy.accounting.savings import By, SavingsReport, as_csv, as_json, first_day, from_json, report

D = Decimal
SINCE, UNTIL = date(2026, 11, 20), date(2026, 11, 23)
USD = 10**12
ROWS = {
    RowKey("2026-11-22", "big", "east", "red"): Sums(
        answers=2, prompt_tokens=1000, cached_tokens=800, written_tokens=100, output_tokens=50,
        input_picos=3 * USD, output_picos=USD, saving_picos=2 * USD, surcharge_picos=USD // 4,
        prefill_micros=1_500_000,
    ),
    RowKey("2026-11-21", "small", "east", "blue"): Sums(
        answers=1, unpriced=1, missing=3, prompt_tokens=500, unknown_tokens=500, output_tokens=5
    ),
    RowKey("2026-11-23", "small", "west", "red"): Sums(answers=1, prompt_tokens=10, surcharge_picos=7),
}  # fmt: skip


def made(by: By = By.MODEL) -> SavingsReport:
    return report(ROWS, by, SINCE, UNTIL)


def test_money_is_exact_and_input_and_bill_savings_are_two_figures() -> None:
    """Two dollars saved of three of input and four in all, minus a quarter for writing."""
    line = made().lines[0]
    assert (line.name, line.answers, line.cached_share) == ("big", 2, D("0.8000"))
    assert (line.uncached_cost_usd, line.saving_usd, line.surcharge_usd) == (D(4), D(2), D("0.25"))
    assert (line.net_usd, line.cost_usd) == (D("1.75"), D("2.25"))
    assert (line.input_saving_share, line.bill_saving_share) == (D("0.5833"), D("0.4375"))
    assert line.prefill_seconds_saved == D("1.5")


def test_a_share_of_tokens_of_which_none_was_reported_is_unknown() -> None:
    """None, and not zero; as soon as some were reported, the others count as not cached."""
    red, blue = made(By.TENANT).lines
    assert (blue.prompt_tokens, blue.cached_share) == (500, None)
    assert red.cached_share == D("0.7921")
    assert made().total.cached_share == D("0.5298")


def test_a_write_that_is_never_read_shows_as_a_loss() -> None:
    """The net is below zero, to the last picodollar."""
    line = made(By.UPSTREAM).lines[1]
    assert (line.name, line.net_usd) == ("west", D("-0.000000000007"))
    assert line.input_saving_share is None


def test_lines_come_by_what_they_saved_and_days_in_order() -> None:
    """The total is the sum of the lines, whatever they are made for."""
    assert [line.name for line in made(By.TENANT).lines] == ["red", "blue"]
    assert [line.name for line in made(By.DAY).lines] == ["2026-11-21", "2026-11-22", "2026-11-23"]
    assert len({made(by).total for by in By}) == 1
    total = made().total
    assert (total.answers, total.missing_usage, total.unpriced, total.unknown_tokens) == (4, 3, 1, 500)


def test_json_is_exact_and_is_read_back() -> None:
    """Money is text without exponents, counts are numbers."""
    text = as_json(made())
    assert from_json(text) == made()
    tree = json.loads(text)
    assert tree["lines"][0]["net_usd"] == "1.75"
    assert tree["total"]["surcharge_usd"] == "0.250000000007"
    assert tree["lines"][1]["prompt_tokens"] == 510
    assert (tree["since"], tree["until"], tree["by"]) == ("2026-11-20", "2026-11-23", "model")


def test_csv_has_a_heading_the_lines_and_the_total() -> None:
    """One column for each figure; what has no share has an empty one."""
    rows = list(csv.DictReader(io.StringIO(as_csv(made(By.UPSTREAM)))))
    assert [row["upstream"] for row in rows] == ["east", "west", "total"]
    assert rows[0]["saving_usd"] == "2"
    assert rows[1]["net_usd"] == "-0.000000000007"
    assert rows[1]["input_saving_share"] == ""


def test_since_is_a_day_or_so_many_days_or_all() -> None:
    """Seven days are today and the six before."""
    today = date(2026, 11, 23)
    assert first_day("7d", today) == date(2026, 11, 17)
    assert first_day("1d", today) == today
    assert first_day("2026-01-31", today) == date(2026, 1, 31)
    assert (today - first_day("", today)).days == KEPT_DAYS
    for wrong in ("0d", "d", "yesterday", "2026-13-01", "7 d"):
        with pytest.raises(ValueError):
            first_day(wrong, today)


@given(st.lists(st.integers(0, 10**18), min_size=4, max_size=4))
def test_no_picodollar_is_lost_between_the_totals_and_the_text(amounts: list[int]) -> None:
    """None is added either."""
    names = ("input_picos", "output_picos", "saving_picos", "surcharge_picos")
    sums = Sums(**dict(zip(names, amounts, strict=True)))
    line = from_json(as_json(report({RowKey("2026-11-23", "m", "u", "t"): sums}, By.DAY, SINCE, UNTIL))).total
    assert line.uncached_cost_usd * USD == amounts[0] + amounts[1]
    assert line.cost_usd * USD == amounts[0] + amounts[1] - amounts[2] + amounts[3]

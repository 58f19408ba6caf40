"""The layout of tables: no value is cut or broken, at any width."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from proxy.cli.tables import fold, lay_out, number, printable, text

COLUMNS = [text("day"), number("prompt tokens"), number("saved")]
ROWS = [("2026-11-26", "1,296,000", "$12.0000"), ("total", "7", "$0.5000")]


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_can_be_printed_and_controls_no_terminal(anything: str) -> None:
    """Names of models and clients come from outside."""
    for shown in (printable(anything), *fold(anything, None), *lay_out([text("model")], [(anything,)], None)):
        assert shown.isprintable()
        shown.encode()


def test_a_table_that_fits_is_aligned() -> None:
    """Numbers to the right, texts to the left, no space at the end of a line."""
    assert lay_out(COLUMNS, ROWS, 80) == [
        "day         prompt tokens     saved",
        "2026-11-26      1,296,000  $12.0000",
        "total                   7   $0.5000",
    ]


def test_a_table_that_is_too_wide_becomes_records() -> None:
    """Under the first heading; the first value is the title of a record."""
    assert lay_out(COLUMNS, ROWS, 34) == [
        "day",
        "  2026-11-26",
        "    prompt tokens  1,296,000",
        "    saved           $12.0000",
        "  total",
        "    prompt tokens          7",
        "    saved            $0.5000",
    ]


def test_a_text_that_does_not_fit_beside_its_heading_follows_it() -> None:
    """A sentence is broken between words; a name is not broken at all."""
    columns = [text("replica"), text("state"), text("model"), number("waiting")]
    row = ("one", "down for 5 min: connection refused", "meta-llama/Llama-3.3-70B-Instruct", "1,234")
    assert lay_out(columns, [row], 30) == [
        "replica",
        "  one",
        "    state",
        "      down for 5 min:",
        "      connection refused",
        "    model",
        "      meta-llama/Llama-3.3-70B-Instruct",
        "    waiting  1,234",
    ]


def test_a_sentence_is_broken_between_words_but_not_before_a_unit() -> None:
    """In a terminal only; what a pipe gets is one line."""
    sentence = "ok    redis answers in 300 ms, and the clocks agree"
    assert fold(sentence, 26, "      ") == ["ok    redis answers in", "      300 ms, and the", "      clocks agree"]
    assert fold(sentence, 80) == [sentence]
    assert fold(sentence, None) == [sentence]


def test_a_pipe_gets_the_table_at_its_full_width() -> None:
    """However wide it is."""
    assert len(lay_out([text("a"), text("b")], [("x" * 500, "y")], None)) == 2


@given(
    st.lists(st.tuples(*[st.text("abc1,.$ü漢", min_size=1, max_size=30)] * 3), max_size=5),
    st.one_of(st.none(), st.integers(0, 120)),
)
def test_every_value_is_whole(rows: list[tuple[str, str, str]], width: int | None) -> None:
    """On one line, with space around it."""
    lines = lay_out(COLUMNS, rows, width)
    for row in rows:
        for value in row:
            assert any(re.search(rf"(^|\s){re.escape(value)}(\s|$)", line) for line in lines)

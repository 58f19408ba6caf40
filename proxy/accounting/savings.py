"""From the totals in Redis to what a person wants to know: what was saved, by day, model, upstream or tenant.

Pure. It must not know Redis, metrics or the command line.
"""

from __future__ import annotations

import csv
import enum
import io
import re
from collections.abc import Mapping
from datetime import date, timedelta
from decimal import Decimal

import msgspec

from cache import KEPT_DAYS, RowKey, Sums

_PICOS_PER_USD = Decimal(10**12)
_MICROS_PER_SECOND = Decimal(10**6)
_DAYS = re.compile(r"([1-9]\d{0,3})d")
_SHARE_DIGITS = Decimal("0.0001")


class By(enum.StrEnum):
    """What lines are made for."""

    DAY = "day"
    MODEL = "model"
    UPSTREAM = "upstream"
    TENANT = "tenant"


class SavingsLine(msgspec.Struct, frozen=True):
    """One line; tokens and counts are whole numbers, money is exact, in USD.

    `cost` is `uncached_cost` less `saving` plus `surcharge`, and `net` is the saving less the surcharge. The input
    saving is the net over what the input alone would have cost, the bill saving over the whole bill. Of the cached
    tokens `routing_gain_tokens` are those that round robin would not have had. Answers without a price have tokens
    and no money; a share of nothing is None.
    """

    name: str
    answers: int
    missing_usage: int
    unpriced: int
    prompt_tokens: int
    cached_tokens: int
    routing_gain_tokens: int
    unknown_tokens: int
    written_tokens: int
    output_tokens: int
    cached_share: Decimal | None
    cost_usd: Decimal
    uncached_cost_usd: Decimal
    saving_usd: Decimal
    surcharge_usd: Decimal
    net_usd: Decimal
    input_saving_share: Decimal | None
    bill_saving_share: Decimal | None
    prefill_seconds_saved: Decimal


class SavingsReport(msgspec.Struct, frozen=True):
    """The lines of a time, and their sum."""

    since: str
    until: str
    by: By
    lines: tuple[SavingsLine, ...]
    total: SavingsLine


def first_day(since: str, today: date) -> date:
    """The first day of `since`: an ISO date, `7d` (today and the six days before), or empty: all that is kept.

    Raises ValueError where it is none of these.
    """
    if not since:
        return today - timedelta(days=KEPT_DAYS)
    if found := _DAYS.fullmatch(since):
        return today - timedelta(days=int(found[1]) - 1)
    return date.fromisoformat(since)


def report(rows: Mapping[RowKey, Sums], by: By, since: date, until: date) -> SavingsReport:
    """Add `rows` up. Days come in order, all else by what it saved most."""
    groups: dict[str, Sums] = {}
    total = Sums()
    for key, sums in rows.items():
        groups.setdefault(getattr(key, by.value), Sums()).add(sums)
        total.add(sums)
    lines = [_line(name, sums) for name, sums in groups.items()]
    if by is By.DAY:
        lines.sort(key=lambda line: line.name)
    else:
        lines.sort(key=lambda line: (-line.net_usd, -line.cached_tokens, line.name))
    return SavingsReport(since.isoformat(), until.isoformat(), by, tuple(lines), _line("total", total))


def _line(name: str, sums: Sums) -> SavingsLine:
    uncached_input = _usd(sums.input_picos)
    uncached = uncached_input + _usd(sums.output_picos)
    saving, surcharge = _usd(sums.saving_picos), _usd(sums.surcharge_picos)
    net = saving - surcharge
    return SavingsLine(
        name,
        sums.answers,
        sums.missing,
        sums.unpriced,
        sums.prompt_tokens,
        sums.cached_tokens,
        sums.routing_gain_tokens,
        sums.unknown_tokens,
        sums.written_tokens,
        sums.output_tokens,
        _share(Decimal(sums.cached_tokens), Decimal(sums.prompt_tokens)),
        uncached - net,
        uncached,
        saving,
        surcharge,
        net,
        _share(net, uncached_input),
        _share(net, uncached),
        sums.prefill_micros / _MICROS_PER_SECOND,
    )


def _usd(picos: int) -> Decimal:
    """Without an exponent and without zeros at the end, so that it reads the same wherever it is written."""
    usd = picos / _PICOS_PER_USD
    return usd.quantize(Decimal(1)) if usd == usd.to_integral_value() else usd.normalize()


def _share(part: Decimal, whole: Decimal) -> Decimal | None:
    return (part / whole).quantize(_SHARE_DIGITS) if whole else None


# --- as JSON and CSV; money is text there, since a float would not be exact


def as_json(made: SavingsReport) -> bytes:
    """The whole report; `from_json` reads it back."""
    return msgspec.json.encode(_plain(made))


def from_json(text: bytes) -> SavingsReport:
    """Raises msgspec.MsgspecError where it is no report."""
    return msgspec.json.decode(text, type=SavingsReport)


def as_csv(made: SavingsReport) -> str:
    """A heading, the lines and the total."""
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    rows.writerow((made.by.value, *SavingsLine.__struct_fields__[1:]))
    for line in (*made.lines, made.total):
        values = (getattr(line, field) for field in SavingsLine.__struct_fields__)
        rows.writerow(["" if value is None else _text(value) for value in values])
    return written.getvalue()


def _plain(made: SavingsReport) -> dict[str, object]:
    tree: dict[str, object] = msgspec.to_builtins(made, builtin_types=(Decimal,))
    for line in (*tree["lines"], tree["total"]):  # type: ignore[misc]
        line.update({field: _text(value) for field, value in line.items() if isinstance(value, Decimal)})
    return tree


def _text(value: object) -> object:
    return f"{value:f}" if isinstance(value, Decimal) else value

"""Sum the totals up to a report of savings by day, model, upstream or tenant. Pure."""

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
    """The dimension of a report's lines."""

    DAY = "day"
    MODEL = "model"
    UPSTREAM = "upstream"
    TENANT = "tenant"


class SavingsLine(msgspec.Struct, frozen=True):
    """One line of a report. Counts are whole numbers; amounts of money are exact, in USD.

    `cost` is `uncached_cost` minus `saving` plus `surcharge`; `net` is `saving` minus `surcharge`. The shares are
    `net` divided by the uncached cost of the input, and by that of the whole bill; None if that is 0.
    Unknown tokens count as not cached in `cached_share`, which is None if all are unknown.
    `routing_gain_tokens` is the part of the cached tokens that round robin would not have had. Responses without a
    price count with their tokens only.
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
    """The lines of a period, and their sum."""

    since: str
    until: str
    by: By
    lines: tuple[SavingsLine, ...]
    total: SavingsLine


def first_day(since: str, today: date) -> date:
    """Return the first day of `since`: an ISO date, `7d` (today and six days before), or empty (all that is kept).

    Raises ValueError if it is none of these.
    """
    if not since:
        return today - timedelta(days=KEPT_DAYS)
    if found := _DAYS.fullmatch(since):
        return today - timedelta(days=int(found[1]) - 1)
    return date.fromisoformat(since)


def report(rows: Mapping[RowKey, Sums], by: By, since: date, until: date) -> SavingsReport:
    """Sum `rows` up. Days are in chronological order, everything else is sorted by its saving."""
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
        name=name,
        answers=sums.answers,
        missing_usage=sums.missing,
        unpriced=sums.unpriced,
        prompt_tokens=sums.prompt_tokens,
        cached_tokens=sums.cached_tokens,
        routing_gain_tokens=sums.routing_gain_tokens,
        unknown_tokens=sums.unknown_tokens,
        written_tokens=sums.written_tokens,
        output_tokens=sums.output_tokens,
        cached_share=_cached_share(sums),
        cost_usd=uncached - net,
        uncached_cost_usd=uncached,
        saving_usd=saving,
        surcharge_usd=surcharge,
        net_usd=net,
        input_saving_share=_share(net, uncached_input),
        bill_saving_share=_share(net, uncached),
        prefill_seconds_saved=sums.prefill_micros / _MICROS_PER_SECOND,
    )


def _usd(picos: int) -> Decimal:
    """Convert to USD, without an exponent and without trailing zeros, so that it is written alike everywhere."""
    usd = picos / _PICOS_PER_USD
    return usd.quantize(Decimal(1)) if usd == usd.to_integral_value() else usd.normalize()


def _cached_share(sums: Sums) -> Decimal | None:
    if sums.unknown_tokens >= sums.prompt_tokens:
        return None
    return _share(Decimal(sums.cached_tokens), Decimal(sums.prompt_tokens))


def _share(part: Decimal, whole: Decimal) -> Decimal | None:
    return (part / whole).quantize(_SHARE_DIGITS) if whole else None


# --- as JSON and CSV; amounts of money are text there, because a float would not be exact


def as_json(report: SavingsReport) -> bytes:
    """Encode the report as JSON, which `from_json` reads."""
    return msgspec.json.encode(_plain(report))


def from_json(text: bytes) -> SavingsReport:
    """Decode a report. Raises msgspec.MsgspecError if `text` is not one."""
    return msgspec.json.decode(text, type=SavingsReport)


def as_csv(report: SavingsReport) -> str:
    """Encode the report as CSV: a heading, the lines and the total."""
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    rows.writerow((report.by.value, *SavingsLine.__struct_fields__[1:]))
    for line in (*report.lines, report.total):
        values = (getattr(line, field) for field in SavingsLine.__struct_fields__)
        rows.writerow(["" if value is None else _text(value) for value in values])
    return written.getvalue()


def _plain(report: SavingsReport) -> dict[str, object]:
    tree: dict[str, object] = msgspec.to_builtins(report, builtin_types=(Decimal,))
    for line in (*tree["lines"], tree["total"]):  # type: ignore[misc]
        line.update({field: _text(value) for field, value in line.items() if isinstance(value, Decimal)})
    return tree


def _text(value: object) -> object:
    return f"{value:f}" if isinstance(value, Decimal) else value

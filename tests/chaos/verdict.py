"""Judge one scenario by what the clients, /readyz and the counters showed. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.chaos.load import End, Record
from tests.chaos.stack import Seen

UNREPORTED_SECONDS = 0.6  # counts of at most this time are lost with a killed worker: its reports are 0.25 s apart
UNWRITTEN_SECONDS = 2.0  # the same for totals, which are written about once a second
_READY = "ready"


class Marks(NamedTuple):
    """Observations of a play. Times are monotonic seconds."""

    begun: float
    mended: float
    lost_until: float
    lost_ports: Mapping[int, set[int]]
    lost_replicas: set[str]
    refuses: bool


class Counted(NamedTuple):
    """Tokens of prompts and of outputs, as counted in one place."""

    prompt: int
    output: int


class Verdict(NamedTuple):
    """One line of the table. `problems` is empty if everything is as it must be."""

    name: str
    requests: int
    in_flight: int  # lost in a killed or frozen process
    refused: int  # by Cairn itself, where the scenario allows that
    lost: int
    wrong: int
    heal_seconds: float | None
    shown: str
    problems: tuple[str, ...]


def is_excused(record: Record, marks: Marks) -> bool:
    """Return whether a request was in flight in a process that the play killed or froze.

    At a killed replica only a response that had begun counts: before that, another replica could have given it. A
    frozen one may still be computing; what it was asked is not asked twice, and ends with 504.
    """
    if record.ended < marks.begun:
        return False
    if record.started <= marks.lost_until and record.end in (End.BROKEN, End.CUT):
        return True
    if record.port in marks.lost_ports.get(record.proxy, ()):
        return record.end in (End.BROKEN, End.CUT, End.HUNG)
    if record.end is End.REFUSED:
        return bool(marks.lost_replicas) and "upstream_timeout" in record.detail and record.started <= marks.mended
    return record.end is End.CUT and record.replica in marks.lost_replicas


def is_refusal(record: Record, marks: Marks) -> bool:
    """Return whether Cairn refused a request with an error that the scenario allows."""
    allowed = marks.refuses and record.end is End.REFUSED and record.detail.startswith("503")
    return allowed and record.ended >= marks.begun


def lost(records: Sequence[Record], marks: Marks) -> list[Record]:
    """Return the requests that a well replica could have answered and that were not answered."""
    failed = [record for record in records if record.end not in (End.RIGHT, End.WRONG)]
    return [record for record in failed if not (is_excused(record, marks) or is_refusal(record, marks))]


def heal_seconds(seen: Sequence[Sequence[Seen]], mended: float) -> float | None:
    """Return the time from `mended` until every proxy was ready for good; None if one never was."""
    healed = mended
    for looks in seen:
        after = [look for look in looks if look.at >= mended]
        bad = [number for number, look in enumerate(after) if look.status != _READY]
        if not after or (bad and bad[-1] == len(after) - 1):
            return None
        if bad:
            healed = max(healed, after[bad[-1] + 1].at)
    return healed - mended


def reasons(seen: Sequence[Sequence[Seen]], begun: float) -> Counter[str]:
    """Return the reasons that /readyz gave since `begun`, by how often."""
    return Counter(reason for looks in seen for look in looks if look.at >= begun for reason in look.reasons)


def bounds(records: Sequence[Record], marks: Marks, unreported_seconds: float) -> tuple[Counted, Counted]:
    """Return the least and the most tokens that may be counted.

    The most includes requests that their clients lost, since the replica may have answered. The least leaves out
    what a killed worker had not reported yet.
    """
    right = [record for record in records if record.end is End.RIGHT]
    others = [record for record in records if record.end is not End.RIGHT]
    killed = [record for record in right if _unreported(record, marks, unreported_seconds)]
    most = _tokens([*right, *others])
    least = _tokens(right)
    missing = _tokens(killed)
    return Counted(least.prompt - missing.prompt, least.output - missing.output), most


def _unreported(record: Record, marks: Marks, seconds: float) -> bool:
    """True if a worker that was killed may have answered this just before, without reporting it.

    Which worker answered is not visible to a client; so all that were answered in that time count.
    """
    killed = any(marks.lost_ports.values())
    return killed and marks.begun - seconds <= record.ended <= marks.begun + seconds


def _tokens(records: Sequence[Record]) -> Counted:
    answers = [record.ask.answer for record in records]
    return Counted(sum(each.prompt_tokens for each in answers), sum(each.output_tokens for each in answers))


def check_counts(where: str, counted: Counted, records: Sequence[Record], marks: Marks, seconds: float) -> list[str]:
    """Return a problem if the tokens counted are not those of the answers."""
    least, most = bounds(records, marks, seconds)
    return [
        f"{where} count {found:,} {kind} tokens, not {low:,} to {high:,}"
        for kind, found, low, high in zip(Counted._fields, counted, least, most, strict=True)
        if not low <= found <= high
    ]


def first_reason(found: Mapping[str, int], pattern: str) -> str:
    """Return the first reason that matches `pattern`, empty if none does."""
    return next((reason for reason in found if re.search(pattern, reason)), "") if pattern else ""

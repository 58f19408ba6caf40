"""Remember for the status page which prefixes saved most, and the last prompts that were not fully cached.

Bounded, in plain memory, and without any text: a prefix is identified by the hash of its last boundary, which goes to
the supervisor and no further.

A prefix in this sense is either a beginning that many prompts share, or a conversation that grows. A row is kept at
the boundary up to which a prompt was cached. While each prompt only extends the previous one, the row moves along;
as soon as two prompts continue differently, the row stays where it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import nlargest
from typing import Final

from cache import Placement
from proxy.control.prefix_rows import MissRow, PrefixReport, PrefixRow
from proxy.model import MissReason
from proxy.records import Outcome, Usage

PREFIXES_REPORTED: Final = 60  # the page shows twenty; joining several workers' lists needs more of each
PREFIXES_AT_MOST: Final = 1024  # 300 bytes each
_KEPT_BEST: Final = 256  # kept when the table is full: the 256 rows that saved most and the 256 that were used last
MISSES_AT_MOST: Final = 20
_NO_MISS = frozenset({MissReason.NONE, MissReason.SHORT})  # nothing could have been cached


class PrefixTable:
    """Rows by key, at most `PREFIXES_AT_MOST`."""

    def __init__(self) -> None:
        self._rows: dict[int, PrefixRow] = {}

    def hit(
        self, model: str, hashes: Sequence[int], blocks: int, tokens: int, saved_tokens: int, unix_seconds: float
    ) -> None:
        """Add a response with `saved_tokens` cached; the first `blocks` of `hashes`, worth `tokens`, were known."""
        key = hashes[blocks - 1]
        next_key = hashes[blocks] if blocks < len(hashes) else 0
        row = self._rows.get(key) or self._moved(hashes, blocks)
        if row is None:
            row = self._rows[key] = PrefixRow(key, model, tokens, 0, 0, unix_seconds, next_key)
            if len(self._rows) > PREFIXES_AT_MOST:
                self._thin()
        elif row.next_key != next_key:
            row.forked = row.forked or (row.next_key != 0 and next_key != 0)
            row.next_key = next_key or row.next_key
        row.tokens = tokens
        row.hits += 1
        row.saved_tokens += saved_tokens
        row.used_unix_seconds = unix_seconds

    def best(self, count: int) -> list[PrefixRow]:
        """Return the `count` rows that saved most."""
        return nlargest(count, self._rows.values(), key=_saved)

    def _moved(self, hashes: Sequence[int], blocks: int) -> PrefixRow | None:
        """Move the deepest row above to this boundary if this prompt continues its conversation, and return it."""
        rows = self._rows
        for depth in range(blocks - 1, 0, -1):
            row = rows.get(hashes[depth - 1])
            if row is None:
                continue
            if row.next_key not in (0, hashes[depth]):
                row.forked = True
            if row.forked:
                return None
            del rows[row.key]
            row.key = hashes[blocks - 1]
            row.next_key = 0
            rows[row.key] = row
            return row
        return None

    def _thin(self) -> None:
        best = self.best(_KEPT_BEST)
        freshest = nlargest(_KEPT_BEST, self._rows.values(), key=_used)
        self._rows = {row.key: row for row in (*best, *freshest)}


class PrefixStats:
    """One per worker. `label` maps a model's name to a metric label; `unix_seconds` is the clock."""

    def __init__(self, label: Callable[[str | None], str], unix_seconds: Callable[[], float]) -> None:
        self._label = label
        self._unix_seconds = unix_seconds
        self._prefixes = PrefixTable()
        self._misses: deque[MissRow] = deque(maxlen=MISSES_AT_MOST)
        self._is_new = False

    def add(self, outcome: Outcome, placement: Placement | None, usage: Usage | None) -> None:
        """Add a finished request: what was cached, and why no more."""
        if usage is None or outcome.replica is None or placement is None:
            return
        if usage.cached_tokens and placement.held_blocks:
            self._is_new = True
            self._prefixes.hit(
                self._label(outcome.model),
                placement.fingerprint.hashes,
                placement.held_blocks,
                placement.predicted_tokens,
                usage.cached_tokens,
                self._unix_seconds(),
            )
        plan = outcome.plan
        if plan is not None and plan.miss not in _NO_MISS:
            self._is_new = True
            model, upstream = self._label(outcome.model), outcome.replica.name
            self._misses.append(
                MissRow(self._unix_seconds(), model, upstream, usage.prompt_tokens, usage.cached_tokens, plan.miss)
            )

    def report(self) -> PrefixReport | None:
        """Return a report that replaces the previous one, or None if nothing changed."""
        if not self._is_new:
            return None
        return PrefixReport(prefixes=self._prefixes.best(PREFIXES_REPORTED), misses=list(self._misses))

    def report_sent(self) -> None:
        """Note that the supervisor has the last report."""
        self._is_new = False


def _saved(row: PrefixRow) -> int:
    return row.saved_tokens


def _used(row: PrefixRow) -> float:
    return row.used_unix_seconds

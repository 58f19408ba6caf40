"""What a worker remembers for the status page: the prefixes that saved most, and the last prompts that missed.

Bounded, in plain memory, and free of text: a prefix is known by the hash of its last boundary, which goes to the
supervisor and no further. It must not know HTTP, nor how the page looks.

What a person calls a prefix is either a head that many prompts share or a conversation that grows. So a row stands
at the boundary that was found cached; it moves along while one prompt after another only goes on from there, and it
stays where it is as soon as two of them go on differently.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import nlargest
from typing import Final

from cache import Placement
from proxy.control.prefix_rows import MissRow, PrefixRow
from proxy.model import MissReason, Outcome, Usage

PREFIXES_REPORTED: Final = 60  # a page shows twenty; workers' lists differ, and the sum of several needs more of each
PREFIXES_AT_MOST: Final = 1024  # some 300 bytes each
_KEPT_BEST: Final = 256  # of a table that is full: these by what they saved, and as many again by how fresh they are
MISSES_AT_MOST: Final = 20
_UNSEEN = frozenset({MissReason.NONE, MissReason.SHORT})  # nothing was to be found there


class PrefixTable:
    """Rows by key, at most `PREFIXES_AT_MOST`."""

    def __init__(self) -> None:
        self._rows: dict[int, PrefixRow] = {}

    def hit(
        self, model: str, hashes: Sequence[int], blocks: int, tokens: int, saved_tokens: int, unix_seconds: float
    ) -> None:
        """An answer that had `saved_tokens` cached: the first `blocks` of `hashes`, worth `tokens`, were known."""
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
        """The rows that saved most."""
        return nlargest(count, self._rows.values(), key=_saved)

    def _moved(self, hashes: Sequence[int], blocks: int) -> PrefixRow | None:
        """The deepest row above, moved here where this prompt is one more turn of what it stands for."""
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
    """One per worker. `label` turns a model's name into one that may be shown; `unix_seconds` is the clock."""

    def __init__(self, label: Callable[[str | None], str], unix_seconds: Callable[[], float]) -> None:
        self._label = label
        self._unix_seconds = unix_seconds
        self._prefixes = PrefixTable()
        self._misses: deque[MissRow] = deque(maxlen=MISSES_AT_MOST)
        self._is_new = False

    def saw(self, outcome: Outcome, placement: Placement | None, usage: Usage | None) -> None:
        """A finished request: what it found cached, and why no more."""
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
        if plan is not None and plan.miss not in _UNSEEN:
            self._is_new = True
            model, upstream = self._label(outcome.model), outcome.replica.name
            self._misses.append(
                MissRow(self._unix_seconds(), model, upstream, usage.prompt_tokens, usage.cached_tokens, plan.miss)
            )

    def report(self) -> dict[str, object]:
        """All of it for the supervisor, which puts it in the place of the last one; empty where nothing is new."""
        if not self._is_new:
            return {}
        return {"prefixes": self._prefixes.best(PREFIXES_REPORTED), "misses": list(self._misses)}

    def reported(self) -> None:
        """The last report was taken."""
        self._is_new = False


def _saved(row: PrefixRow) -> int:
    return row.saved_tokens


def _used(row: PrefixRow) -> float:
    return row.used_unix_seconds

"""The supervisor's side of the status page: keeps what workers reported and the history, and gives the state as JSON.

Built at most once a change, however many look. It must not know HTTP or processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from proxy.accounting import savings
from proxy.admin.status import state
from proxy.admin.status.history import History, Sample
from proxy.admin.status.state import Moment, PageState, Saved
from proxy.clock import Clock
from proxy.control.channel import WorkerReport
from proxy.control.prefix_rows import PrefixRow
from proxy.control.readiness import Readiness
from proxy.metrics import definitions as metrics
from proxy.metrics.exposition import Exposition

_REMEMBERED_PREFIXES = 200  # of workers that are gone

_encode = msgspec.json.encode


class StatusBoard:
    """One per supervisor."""

    def __init__(
        self, exposition: Exposition, readiness: Callable[[], Readiness], clock: Clock, version: str
    ) -> None:
        self._exposition = exposition
        self._readiness = readiness
        self._clock = clock
        self._version = version
        self._started_unix_seconds = clock.unix()
        self._pages: dict[int, PageState] = {}
        self._gone: dict[int, PrefixRow] = {}
        self._changed = asyncio.Event()
        self._encoded: bytes | None = None
        self._periods: dict[str, Saved] = {}
        self._watched = asyncio.Event()
        self._viewers = 0
        self.history = History()

    def heard(self, worker: int, report: WorkerReport) -> None:
        """A worker's report came; its counts are in the exposition already."""
        self._encoded = None
        if report.page:
            self._pages[worker] = _merged(self._pages.get(worker), report.page)
        if any(row[0] == metrics.REQUESTS.number for row in report.counts.counters):
            self._wake()  # a request ended

    def gone(self, worker: int) -> None:
        """A worker died: what it saw saved stays, the rest of what it said is no longer so."""
        page = self._pages.pop(worker, None)
        for row in (page and page.prefixes) or ():
            have = self._gone.get(row.key)
            self._gone[row.key] = row if have is None else state.join(have, row)
        if len(self._gone) > _REMEMBERED_PREFIXES:
            best = sorted(self._gone.values(), key=lambda row: row.saved_tokens, reverse=True)
            self._gone = {row.key: row for row in best[:_REMEMBERED_PREFIXES]}
        self._encoded = None

    def tick(self) -> None:
        """Take the reading of this second."""
        figures = self._exposition
        self.history.add(
            Sample(
                self._clock.unix(),
                figures.value(metrics.REQUESTS),
                state.prompt_tokens(figures),
                figures.total(metrics.TOKENS, 2, "input_cached"),
            )
        )
        self._encoded = None
        self._wake()

    def totalled(self, week: savings.SavingsReport | None) -> None:
        """The totals of seven days by day, or None where they cannot be read now."""
        self._periods = state.periods(week) if week is not None else {}
        self._encoded = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Someone looks for as long as the block lasts."""
        self._viewers += 1
        self._watched.set()
        try:
            yield
        finally:
            self._viewers -= 1
            if not self._viewers:
                self._watched.clear()

    @property
    def viewers(self) -> int:
        """How many look."""
        return self._viewers

    async def watched(self) -> None:
        """Wait until someone looks; what is costly to know waits here."""
        await self._watched.wait()

    def state_json(self) -> bytes:
        """The page's state."""
        if self._encoded is None:
            pages = [*self._pages.values(), PageState(prefixes=list(self._gone.values()))]
            samples = self.history.seconds
            moment = Moment(
                self._clock.unix(),
                self._started_unix_seconds,
                self._version,
                self.history.requests_per_second(state.RATE_WINDOW_SECONDS),
                samples[-1] if samples else None,
                self._periods,
            )
            self._encoded = _encode(state.build(self._exposition, self._readiness(), pages, moment))
        return self._encoded

    def history_json(self) -> bytes:
        """Both rings, for a page that was just opened."""
        return _encode({"seconds": list(self.history.seconds), "minutes": list(self.history.minutes)})

    async def changed(self) -> None:
        """Wait for the next second, or for a request that ended before it."""
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _merged(known: PageState | None, reported: Mapping[str, Any]) -> PageState:
    """What a worker says now; what it left out is as it was."""
    page = state.page_of(reported)
    if known is None:
        return page
    return msgspec.structs.replace(
        page,
        prefixes=known.prefixes if page.prefixes is None else page.prefixes,
        misses=known.misses if page.misses is None else page.misses,
    )

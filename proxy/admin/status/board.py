"""Keep what the status page shows: the workers' reports, the history and the totals; encode it as JSON when asked.

The JSON is built at most once per change, however many viewers there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from proxy.accounting.savings import SavingsReport
from proxy.admin.status import build
from proxy.admin.status.history import History, Sample
from proxy.admin.status.state import Moment, Saved
from proxy.clock import Clock
from proxy.control.messages import StatusReport, WorkerReport
from proxy.control.prefix_rows import PrefixReport, PrefixRow
from proxy.control.readiness import Readiness
from proxy.metrics import definitions as metrics
from proxy.metrics.exposition import Exposition

_ENDED_PREFIXES_AT_MOST = 200  # kept of workers that have ended

_encode = msgspec.json.encode


class StatusBoard:
    """The state of the status page. One per supervisor."""

    def __init__(
        self, exposition: Exposition, readiness: Callable[[], Readiness], clock: Clock, version: str
    ) -> None:
        self._exposition = exposition
        self._readiness = readiness
        self._clock = clock
        self._version = version
        self._started_unix_seconds = clock.unix()
        self._reports: dict[int, StatusReport] = {}
        self._ended_prefixes: dict[int, PrefixRow] = {}
        self._changed = asyncio.Event()
        self._encoded: bytes | None = None
        self._periods: dict[str, Saved] = {}
        self._has_viewer = asyncio.Event()
        self._totals_read = asyncio.Event()
        self._totals_read.set()  # nobody waits for a reader that there may not be
        self._viewers = 0
        self.history = History()
        self.base_url = ""
        self.example_model = "MODEL"
        """The address of the client port and a model, for the hint on a page without any request."""

    def add_report(self, worker: int, report: WorkerReport) -> None:
        """Keep a worker's report. Its counts must already be in the exposition."""
        self._encoded = None
        self._reports[worker] = _completed(report.page, self._reports.get(worker))
        if any(row[0] == metrics.REQUESTS.number for row in report.counts.counters):
            self._notify()  # a request ended

    def remove_worker(self, worker: int) -> None:
        """Forget a worker that has ended, except for what its prefixes saved."""
        report = self._reports.pop(worker, None)
        kept = self._ended_prefixes
        for row in report.prefixes.prefixes if report is not None and report.prefixes is not None else ():
            known = kept.get(row.key)
            kept[row.key] = row if known is None else build.join(known, row)
        if len(kept) > _ENDED_PREFIXES_AT_MOST:
            best = sorted(kept.values(), key=lambda row: row.saved_tokens, reverse=True)
            self._ended_prefixes = {row.key: row for row in best[:_ENDED_PREFIXES_AT_MOST]}
        self._encoded = None

    def take_sample(self) -> None:
        """Add the current counters to the history; call it once a second."""
        figures = self._exposition
        self.history.add(
            Sample(
                unix_seconds=self._clock.unix(),
                requests=figures.value(metrics.REQUESTS),
                prompt_tokens=build.prompt_tokens(figures),
                cached_tokens=figures.total(metrics.TOKENS, 2, "input_cached"),
                errors={labels[0]: count for labels, count in figures.series(metrics.ERRORS).items()},
            )
        )
        self._encoded = None
        self._notify()

    def set_totals(self, week: SavingsReport | None) -> None:
        """Set the totals of seven days, by day; None if they cannot be read."""
        self._periods = build.periods(week) if week is not None else {}
        self._encoded = None
        self._totals_read.set()

    def forget_totals(self) -> None:
        """Show no totals until they are set again: those that the last viewer saw may be of another day."""
        self._periods = {}
        self._encoded = None
        self._totals_read.clear()

    async def wait_for_totals(self) -> None:
        """Wait until the totals were read, or found to be unreadable, since they were forgotten."""
        await self._totals_read.wait()

    @contextmanager
    def viewing(self) -> Iterator[None]:
        """Count a viewer for as long as the block lasts."""
        self._viewers += 1
        self._has_viewer.set()
        try:
            yield
        finally:
            self._viewers -= 1
            if not self._viewers:
                self._has_viewer.clear()

    @property
    def viewers(self) -> int:
        """The number of open streams."""
        return self._viewers

    async def wait_for_viewer(self) -> None:
        """Wait until somebody is viewing the page; expensive figures are read only then."""
        await self._has_viewer.wait()

    def state_json(self) -> bytes:
        """Return the page's state."""
        if self._encoded is None:
            ended = StatusReport(prefixes=PrefixReport(prefixes=list(self._ended_prefixes.values())))
            samples = self.history.seconds
            moment = Moment(
                now_unix_seconds=self._clock.unix(),
                started_unix_seconds=self._started_unix_seconds,
                version=self._version,
                requests_per_second=self.history.requests_per_second(build.RATE_WINDOW_SECONDS),
                sample=samples[-1] if samples else None,
                base_url=self.base_url,
                example_model=self.example_model,
                periods=self._periods,
            )
            reports = [*self._reports.values(), ended]
            self._encoded = _encode(build.build(self._exposition, self._readiness(), reports, moment))
        return self._encoded

    def history_json(self) -> bytes:
        """Return both rings of the history, for a page that was just opened."""
        return _encode({"seconds": list(self.history.seconds), "minutes": list(self.history.minutes)})

    async def wait_for_change(self) -> None:
        """Wait for the next sample, or until a request ends."""
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _completed(report: StatusReport, previous: StatusReport | None) -> StatusReport:
    """Fill in what `report` leaves out because it has not changed since `previous`."""
    if report.prefixes is None and previous is not None:
        return msgspec.structs.replace(report, prefixes=previous.prefixes)
    return report

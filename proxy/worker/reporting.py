"""Report to the supervisor several times a second: counts, gauges, and the state of Redis and of the replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from cache import ContextRow
from proxy.control.error_rows import ErrorRow
from proxy.control.messages import ContextReport, ReplicaDown, SharingReport, StatusReport, WorkerReport
from proxy.control.prefix_rows import PrefixReport
from proxy.fleet.pools import Pools
from proxy.metrics import definitions as metrics
from proxy.metrics.recorder import Recorder
from proxy.worker.figures import Figures, Growth, Index, Journal

REPORT_SECONDS = 0.25
"""Interval of reports: at most the counts of this time are lost when a worker is killed."""


class ReportChannel(Protocol):
    """The channel to the supervisor; `proxy.control.channel.WorkerControl` in the product."""

    def report(self, report: WorkerReport) -> bool:
        """Send `report` without waiting; returns False if it was not sent."""
        ...


class Prefixes(Protocol):
    """The prefixes and misses to report; `proxy.accounting.prefix_stats.PrefixStats` in the product."""

    def report(self) -> PrefixReport | None: ...
    def report_sent(self) -> None: ...


class Contexts(Protocol):
    """The part of `cache.ContextStore` that the status page shows."""

    @property
    def most_worth(self) -> Sequence[ContextRow]: ...
    def now(self) -> float: ...


class Requests(Protocol):
    """The requests inside this worker."""

    @property
    def requests(self) -> int: ...


class Settled(Protocol):
    """Finished requests; `count` counts those that are not counted yet."""

    def count(self) -> None: ...


class DroppedLines(Protocol):
    """The access log's count of lost lines."""

    @property
    def dropped(self) -> int: ...


class Errors(Protocol):
    """The errors of the last hour; `proxy.accounting.error_stats.ErrorStats` in the product."""

    def report(self) -> list[ErrorRow]: ...


class Down(Protocol):
    """The replicas that are down; `proxy.worker.membership.DownReplicas` in the product."""

    def report(self) -> dict[str, ReplicaDown]: ...


class StatusSource:
    """Builds the part of a report that only the status page shows."""

    def __init__(
        self,
        prefixes: Prefixes,
        errors: Errors,
        down: Down,
        index: Index,
        journal: Journal,
        pools: Pools,
        contexts: Contexts,
    ) -> None:
        self._prefixes = prefixes
        self._errors = errors
        self._down = down
        self._index = index
        self._journal = journal
        self._pools = pools
        self._contexts = contexts

    def report(self) -> StatusReport:
        """Return the current state; its prefixes are None if they have not changed since the last report."""
        return StatusReport(
            prefixes=self._prefixes.report(),
            budgets=self._budgets(),
            sharing=self._sharing(),
            contexts=self._stored(),
            errors=self._errors.report(),
            down=self._down.report(),
        )

    def report_sent(self) -> None:
        """Note that the supervisor has the last report."""
        self._prefixes.report_sent()

    def _budgets(self) -> dict[str, int]:
        backends: Mapping[int, object] = self._pools.backends
        return {
            self._pools.backends[number].name: stats.budget_tokens
            for number, stats in self._index.replicas().items()
            if number in backends
        }

    def _sharing(self) -> SharingReport:
        journal = self._journal
        return SharingReport(
            state=journal.state.value,
            others=journal.others,
            holds_lease=journal.holds_lease,
            written=journal.stats.written_entries,
            read=journal.stats.read_entries,
            rebuilds=journal.stats.rebuilds,
        )

    def _stored(self) -> list[ContextReport]:
        now = self._contexts.now()
        return [
            ContextReport(
                model=row.head.model,
                status=row.status(now).value,
                tokens=row.tokens,
                size_bytes=row.size_bytes,
                pinned=row.pinned,
                worth_usd_per_hour=row.saving_usd_per_hour,
                expires_unix_seconds=row.expires_unix_seconds,
            )
            for row in self._contexts.most_worth
        ]


class Reporter:
    """Sends the reports of one worker.

    `access_log` is None if no access log is written. `failing_tasks` returns the names of the background tasks that
    failed and wait for a restart.
    """

    def __init__(
        self,
        channel: ReportChannel,
        recorder: Recorder,
        figures: Figures,
        status: StatusSource,
        *,
        settled: Settled,
        requests: Requests,
        access_log: DroppedLines | None,
        failing_tasks: Callable[[], Iterable[str]],
    ) -> None:
        self._channel = channel
        self._recorder = recorder
        self._growth = Growth(recorder)
        self._figures = figures
        self._status = status
        self._settled = settled
        self._requests = requests
        self._access_log = access_log
        self._failing_tasks = failing_tasks

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            self.report()

    def report(self) -> None:
        """Send one report; if the supervisor does not read, keep the counts for the next one."""
        self._settled.count()
        upstreams, pools = self._figures.replicas.update()
        self._figures.gate.update()
        self._figures.index.update()
        self._figures.store.update()
        self._recorder.set(metrics.IN_FLIGHT, (), self._requests.requests)
        if self._access_log is not None:
            self._growth.count(metrics.LOG_DROPPED, (), self._access_log.dropped)
        page = self._status.report()
        counts, is_sent = self._recorder.take(), False
        try:
            report = WorkerReport(
                counts=counts,
                in_flight=self._requests.requests,
                redis=self._figures.store.redis,
                upstreams=upstreams,
                pools=pools,
                failing_tasks=tuple(sorted(self._failing_tasks())),
                page=page,
            )
            is_sent = self._channel.report(report)
        finally:
            if not is_sent:  # also if something failed: counts are never lost by that
                self._recorder.put_back(counts)
        if is_sent:
            self._status.report_sent()

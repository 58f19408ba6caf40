"""A worker's reports to its supervisor, with small fakes in place of the parts that they describe."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from cache import BreakerState as StoreBreakerState
from cache import ErrorKind, JournalState, JournalStats, ReplicaStats, StoreState
from proxy.accounting.round_robin import RoundRobinBaseline
from proxy.control.error_rows import ErrorRow
from proxy.control.messages import WorkerReport
from proxy.control.prefix_rows import PrefixReport
from proxy.fleet import BreakerState, Fleet, ReplicaSpec
from proxy.fleet.breaker import Cause
from proxy.fleet.pools import Pools, ReplicaEndpoint, ServedPool
from proxy.metrics import definitions as metrics
from proxy.metrics.definitions import Labels, Spec
from proxy.metrics.exposition import Exposition
from proxy.metrics.recorder import Recorder
from proxy.records import ReplicaView
from proxy.routing.fair_shares import Priority
from proxy.upstream import Origin
from proxy.worker.figures import (
    MAX_CLIENTS_SHOWN,
    Figures,
    GateFigures,
    IndexFigures,
    OperationFigures,
    ReplicaFigures,
    StoreFigures,
)
from proxy.worker.reporting import Reporter, StatusSource
from tests.support.clock import FakeClock

ERROR = ErrorRow("web", "m", "upstream_timeout", 3, 7.0)


def part(**attributes: Any) -> Any:
    """A part of a worker with the attributes that a test gives it."""
    return SimpleNamespace(**attributes)


class Supervisor:
    """Adds reports up, as the supervisor does, while it `reads`."""

    def __init__(self) -> None:
        self.reads = True
        self.exposition = Exposition()
        self.last: WorkerReport | None = None

    def report(self, report: WorkerReport) -> bool:
        if self.reads:
            self.exposition.apply(0, report.counts)
            self.last = report
        return self.reads


class Bench:
    """A reporter on one replica named `one`, whose parts a test may change."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.supervisor = Supervisor()
        self.journal = part(state=JournalState.LIVE, others=2, holds_lease=True, stats=JournalStats())
        self.store = part(state=StoreState.AVAILABLE, breaker_state=StoreBreakerState.CLOSED, reason=None)
        self.vectors = part(dropped={"vector_corrupt": 0})
        self.evicted_blocks = 0
        self.is_in_index = True
        self.prefixes: Any = part(
            waiting=PrefixReport(), report=lambda: self.prefixes.waiting, report_sent=self._sent
        )
        self.log = part(dropped=0)
        self.counted = 0
        backend = ReplicaEndpoint("one", "p", "http://one:1", Origin.parse("http://one:1"))
        pools = Pools([ServedPool("p", ("*",))], "p", {0: backend})
        index = part(replicas=self._replicas, stats=lambda: part(size_bytes=77))
        self.gate = part(
            waiting_by_client=lambda: {(Priority.LOW, "batch"): 4, (Priority.LOW, ""): 1},
            warm_waiting_by_client=lambda: {(Priority.HIGH, "batch"): 2},
            admitted=7,
            refused=1,
            need=lambda pool: 2.1,
            is_holding=True,
        )
        self.baseline = RoundRobinBaseline(pools)
        contexts = part(total_contexts=3, total_bytes=30, memory_bytes=7, most_worth=(), now=lambda: 0.0)
        self.reporter = Reporter(
            self.supervisor,
            self.recorder,
            Figures(
                ReplicaFigures(
                    self.recorder, self._fleet(), pools, {0: [1, 2]}, FakeClock(), part(mixed_models=lambda pool: 1)
                ),
                GateFigures(self.recorder, self.gate, pools, self.baseline),
                IndexFigures(self.recorder, index, self.journal, pools, self.baseline),
                StoreFigures(self.recorder, self.store, self.journal, contexts, (self.vectors,)),
            ),
            StatusSource(
                self.prefixes, part(report=lambda: [ERROR]), part(report=dict), index, self.journal, pools, contexts
            ),
            settled=part(count=self._count),
            requests=part(requests=5),
            access_log=self.log,
            failing_tasks=lambda: {"totals", "health"},
        )

    def series(self, spec: Spec) -> dict[Labels, float]:
        return dict(self.supervisor.exposition.series(spec))

    def _fleet(self) -> Any:
        view = ReplicaView(0, "one", True, 100.0, 40.0, 3, None, 0.0, 0.05)
        return part(
            snapshot=lambda pool, now: (view,),
            breaker_state=lambda number, now: BreakerState.HALF_OPEN,
            own_in_flight=lambda number: 3,
            may_be_tried=lambda number: True,
            measured_rate=lambda number: None,
        )

    def _replicas(self) -> dict[int, ReplicaStats]:
        stats = part(blocks=4, tokens=40, evicted_blocks=self.evicted_blocks, budget_tokens=900, epoch=0)
        return {0: stats, 9: stats} if self.is_in_index else {}

    def _count(self) -> None:
        self.counted += 1

    def _sent(self) -> None:
        self.prefixes.waiting = None


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_report_has_the_state_of_every_part(bench: Bench) -> None:
    """Gauges, readiness and the status page's figures come from the parts; a replica out of service has none."""
    bench.reporter.report()
    last = bench.supervisor.last
    assert last is not None
    assert (last.in_flight, last.redis, last.upstreams) == (5, "up", {"one": True})
    assert last.failing_tasks == ("health", "totals")
    assert (last.page.budgets, last.page.sharing.others, last.page.errors) == ({"one": 900}, 2, [ERROR])
    for spec, labels, value in (
        (metrics.UPSTREAM_BREAKER, ("one",), 1),
        (metrics.UPSTREAM_QUEUED, ("one",), 2),
        (metrics.UPSTREAM_PENDING, ("one",), 40),
        (metrics.INDEX_TOKENS, ("one",), 40),
        (metrics.INDEX_BYTES, (), 77),
        (metrics.CONTEXTS_BYTES, (), 30),
        (metrics.CONTEXT_MEMORY_BYTES, (), 7),
        (metrics.IN_FLIGHT, (), 5),
        (metrics.COLD_ADMITTED, (), 7),
        (metrics.COLD_REFUSED, (), 1),
        (metrics.CACHE_NEED, ("p",), 2.1),
        (metrics.MIXED_TEMPLATES, ("p",), 1.0),
    ):
        assert bench.series(spec) == {labels: value}, spec.name
    waiting = {("low", "batch"): 4, ("low", "other"): 1, ("normal", "other"): 0, ("high", "other"): 0}
    assert bench.series(metrics.COLD_WAITING) == waiting
    warm = {("high", "batch"): 2, ("low", "other"): 0, ("normal", "other"): 0, ("high", "other"): 0}
    assert bench.series(metrics.WARM_WAITING) == warm
    assert bench.series(metrics.UPSTREAM_RATE) == {}, "a rate that is not measured is not reported"


def test_finished_requests_are_counted_before_the_report(bench: Bench) -> None:
    """Settlement counts in batches, and a report includes the last one."""
    bench.reporter.report()
    assert bench.counted == 1


def test_redis_is_reported_by_its_state(bench: Bench) -> None:
    """Readiness shows the word and the reason."""
    bench.store.state = StoreState.AWAY
    bench.store.breaker_state, bench.store.reason = StoreBreakerState.OPEN, "refuses writes"
    bench.reporter.report()
    assert bench.supervisor.last is not None
    assert bench.supervisor.last.redis == f"{StoreState.AWAY.value} (refuses writes)"
    assert bench.series(metrics.REDIS_BREAKER) == {(): 2}


def test_what_was_dropped_of_redis_is_counted_once(bench: Bench) -> None:
    """By kind, as it grows."""
    for total in (2, 2, 5):
        bench.vectors.dropped["vector_corrupt"] = total
        bench.reporter.report()
    assert bench.series(metrics.REDIS_DROPPED) == {("vector_corrupt",): 5}


def test_counts_wait_while_the_supervisor_does_not_read(bench: Bench) -> None:
    """They arrive once with the next report, and so do the prefixes."""
    bench.recorder.inc(metrics.ROUTE_DECISIONS, ("warm",), 2)
    bench.supervisor.reads = False
    bench.reporter.report()
    bench.supervisor.reads = True
    bench.reporter.report()
    assert bench.series(metrics.ROUTE_DECISIONS) == {("warm",): 2}
    assert bench.supervisor.last is not None
    assert bench.supervisor.last.page.prefixes is not None
    bench.reporter.report()
    assert bench.series(metrics.ROUTE_DECISIONS) == {("warm",): 2}
    assert bench.supervisor.last.page.prefixes is None


def test_counts_of_a_report_that_fails_come_with_the_next(bench: Bench) -> None:
    """Whichever part fails, before or after the counts were taken."""
    bench.recorder.inc(metrics.ROUTE_DECISIONS, ("warm",), 2)
    sends, bench.supervisor.report = bench.supervisor.report, part()  # type: ignore[method-assign]
    with pytest.raises(TypeError):
        bench.reporter.report()
    bench.supervisor.report = sends  # type: ignore[method-assign]
    bench.journal.state = None
    with pytest.raises(AttributeError):
        bench.reporter.report()
    bench.journal.state = JournalState.LIVE
    bench.reporter.report()
    assert bench.series(metrics.ROUTE_DECISIONS) == {("warm",): 2}


def test_totals_that_others_keep_are_counted_by_their_growth(bench: Bench) -> None:
    """Evictions, lost log lines and discarded updates."""
    for evicted, dropped in ((5, 1), (5, 1), (7, 4)):
        bench.evicted_blocks, bench.log.dropped, bench.journal.stats.dropped_corrupt = evicted, dropped, dropped
        bench.reporter.report()
    assert bench.series(metrics.INDEX_EVICTIONS) == {("one",): 7}
    assert bench.series(metrics.LOG_DROPPED) == {(): 4}
    assert bench.series(metrics.JOURNAL_DROPPED) == {("corrupt",): 4}


def test_a_replica_that_comes_back_has_evictions_again(bench: Bench) -> None:
    """One that was forgotten begins at zero; pods get addresses that others had before."""
    for bench.is_in_index, bench.evicted_blocks in ((True, 5), (False, 0), (True, 3), (True, 4)):
        bench.reporter.report()
    assert bench.series(metrics.INDEX_EVICTIONS) == {("one",): 9}


def test_only_one_worker_counts_what_all_of_them_see(bench: Bench) -> None:
    """Every worker has the whole index; the one that holds the lease counts its evictions."""
    bench.evicted_blocks, bench.journal.holds_lease = 5, False
    bench.reporter.report()
    assert bench.series(metrics.INDEX_EVICTIONS) == {}
    bench.evicted_blocks, bench.journal.holds_lease = 6, True
    bench.reporter.report()
    assert bench.series(metrics.INDEX_EVICTIONS) == {("one",): 1}


def test_operations_on_redis_are_timed_unless_they_wait_by_design() -> None:
    """And a script that Redis does not know yet is no error."""
    recorder, exposition = Recorder(), Exposition()
    observer = OperationFigures(recorder)
    observer.observe("GET", 0.001, None)
    observer.observe("XREAD", 5.0, None)
    observer.observe("EVALSHA", 0.001, ErrorKind.NOSCRIPT)
    observer.observe("SET", 0.001, ErrorKind.TIMEOUT)
    exposition.apply(0, recorder.take())
    assert {labels[0] for labels in exposition.observed(metrics.REDIS_DURATION)} == {"GET", "EVALSHA", "SET"}
    assert dict(exposition.series(metrics.REDIS_ERRORS)) == {("SET", ErrorKind.TIMEOUT.value): 1}


def test_only_some_clients_have_a_label_of_their_own(bench: Bench) -> None:
    """The others are counted together, so that a configuration of a thousand makes no thousand series."""
    bench.gate.waiting_by_client = lambda: {(Priority.NORMAL, f"client {n}"): 1 for n in range(MAX_CLIENTS_SHOWN + 5)}
    bench.reporter.report()
    series = bench.series(metrics.COLD_WAITING)
    assert series["normal", "client 3"] == 1
    assert series["normal", "other"] == 5
    assert len(series) == MAX_CLIENTS_SHOWN + len(Priority)


def test_what_routing_gains_counts_as_thrash_avoided_only_while_memory_is_short(bench: Bench) -> None:
    """Each token once."""
    bench.baseline.gained_tokens = 500
    bench.gate.is_holding = False
    bench.reporter.report()
    bench.gate.is_holding = True
    bench.baseline.gained_tokens += 300
    bench.reporter.report()
    bench.reporter.report()
    assert bench.series(metrics.THRASH_AVOIDED) == {(): 300}


@pytest.mark.parametrize(
    ("cause", "is_up"),
    [(Cause.UNREACHABLE, False), (Cause.LOADING, False), (Cause.SILENT, False), (None, True)],
)
def test_a_dead_replica_is_not_up_while_its_next_probe_is_due(cause: Cause | None, is_up: bool) -> None:
    """Otherwise readiness and the alerts would change with each probe. One that failed is tried by a request."""
    clock, recorder, fleet = FakeClock(), Recorder(), Fleet(Random(1).random)
    numbers = {name: fleet.add(ReplicaSpec(name, "p")) for name in ("one", "two")}
    origin = Origin.parse("http://one:1")
    endpoints = {number: ReplicaEndpoint(name, "p", "http://one:1", origin) for name, number in numbers.items()}
    pools = Pools([ServedPool("p", ("*",))], "p", endpoints)
    waiting: dict[int, list[int]] = {number: [] for number in endpoints}
    figures = ReplicaFigures(recorder, fleet, pools, waiting, clock, part(mixed_models=lambda pool: 0))
    if cause is None:
        fleet.proven(numbers["one"], clock.monotonic(), "status 500")
    else:
        fleet.unreachable(numbers["one"], clock.monotonic(), "dead", cause)
    clock.advance(60.0)
    assert fleet.breaker_state(numbers["one"], clock.monotonic()) is BreakerState.HALF_OPEN
    assert figures.update()[0] == {"one": is_up, "two": True}
    exposition = Exposition()
    exposition.apply(0, recorder.take())
    assert dict(exposition.series(metrics.UPSTREAM_UP)) == {("one",): float(is_up), ("two",): 1.0}
    assert dict(exposition.series(metrics.POOL_REPLICAS_UP)) == {("p", "false"): 1.0 + is_up}


def test_a_pool_without_a_reachable_replica_is_down_while_a_probe_is_due() -> None:
    """Readiness depends on it."""
    clock, recorder, fleet = FakeClock(), Recorder(), Fleet(Random(1).random)
    number = fleet.add(ReplicaSpec("one", "p"))
    endpoint = ReplicaEndpoint("one", "p", "http://one:1", Origin.parse("http://one:1"))
    pools = Pools([ServedPool("p", ("*",))], "p", {number: endpoint})
    figures = ReplicaFigures(recorder, fleet, pools, {number: []}, clock, part(mixed_models=lambda pool: 0))
    fleet.unreachable(number, clock.monotonic(), "dead")
    clock.advance(60.0)
    assert not figures.update()[1]["p"].up

"""Counting in workers and adding up in the supervisor."""

from __future__ import annotations

import tracemalloc
from itertools import islice

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from proxy.metrics import definitions as metrics
from proxy.metrics.definitions import SPECS, Kind, MetricsDelta
from proxy.metrics.exposition import SHOWN_SECONDS, Exposition
from proxy.metrics.recorder import Recorder
from tests.support.operations import operations

LABELS = ("m", "u", "hit")


def sample(page: str, name: str, **labels: str) -> float:
    for family in parse_text(page):
        for found in family.samples:
            if found.name == name and labels.items() <= found.labels.items():
                return found.value
    raise KeyError(name)


def page_of(exposition: Exposition, accept: str = "text/plain") -> str:
    return b"".join(exposition.render(accept)[0]).decode()


def test_counters_of_workers_add_up_and_outlive_them() -> None:
    """A worker that is gone takes its gauges along and leaves its counts."""
    exposition = Exposition()
    for worker in (1, 2):
        recorder = Recorder()
        recorder.inc(metrics.ROUTE_DECISIONS, ("warm",), 3)
        recorder.set(metrics.IN_FLIGHT, (), 5)
        exposition.apply(worker, recorder.take())
    assert sample(page_of(exposition), "cairn_in_flight_requests") == 10
    exposition.forget(1)
    assert sample(page_of(exposition), "cairn_in_flight_requests") == 5
    assert sample(page_of(exposition), "cairn_route_decisions_total", reason="warm") == 6


def test_a_delta_holds_only_what_is_new() -> None:
    """Taking twice counts nothing twice."""
    recorder, exposition = Recorder(), Exposition()
    recorder.inc(metrics.ROUTE_DECISIONS, ("warm",))
    exposition.apply(1, recorder.take())
    exposition.apply(1, recorder.take())
    recorder.inc(metrics.ROUTE_DECISIONS, ("warm",))
    exposition.apply(1, recorder.take())
    assert exposition.value(metrics.ROUTE_DECISIONS) == 2


@pytest.mark.parametrize(("value", "bucket"), [(0.001, "0.001"), (0.0011, "0.005"), (160.0, "160.0")])
def test_a_value_on_a_bound_belongs_to_its_bucket(value: float, bucket: str) -> None:
    """Bounds are inclusive, as Prometheus has them."""
    recorder, exposition = Recorder(), Exposition()
    recorder.observe(metrics.TTFT, LABELS, value)
    exposition.apply(1, recorder.take())
    page = page_of(exposition)
    assert sample(page, "cairn_time_to_first_token_seconds_bucket", le=bucket) == 1
    assert sample(page, "cairn_time_to_first_token_seconds_sum") == value


def test_histograms_join_over_workers_and_sorted_counts() -> None:
    """Buckets add up, whether observed one by one or handed in sorted."""
    recorder, exposition = Recorder(), Exposition()
    recorder.observe(metrics.INTER_TOKEN, ("m", "u"), 0.02)
    counts = [0] * (len(metrics.INTER_TOKEN.buckets) + 1)
    counts[3] = 4
    recorder.histogram(metrics.INTER_TOKEN, ("m", "u")).add_counts(counts, 0.04)
    exposition.apply(1, recorder.take())
    exposition.apply(2, recorder.take())
    assert sample(page_of(exposition), "cairn_inter_token_seconds_count") == 5


def test_gauges_that_all_workers_see_are_not_added() -> None:
    """All workers report the same index; the largest value counts."""
    exposition = Exposition()
    for worker, blocks in ((1, 10.0), (2, 12.0)):
        recorder = Recorder()
        recorder.set(metrics.INDEX_BLOCKS, ("u",), blocks)
        exposition.apply(worker, recorder.take())
    assert sample(page_of(exposition), "cairn_index_blocks", upstream="u") == 12


def test_replaced_gauges_lose_the_series_of_what_is_gone() -> None:
    """A replica that was removed leaves no series behind."""
    recorder = Recorder()
    recorder.replace_gauges(metrics.UPSTREAM_UP, {("a",): 1, ("b",): 1})
    recorder.replace_gauges(metrics.UPSTREAM_UP, {("b",): 0})
    assert recorder.take().gauges == [(metrics.UPSTREAM_UP.number, ("b",), 0)]


def test_a_delta_survives_the_control_socket() -> None:
    """One process reads what the other packed."""
    recorder = Recorder()
    recorder.inc(metrics.TOKENS, ("m", "u", "output"), 7)
    recorder.observe(metrics.TTFT, LABELS, 0.3)
    delta = recorder.take()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(delta), type=MetricsDelta) == delta


def test_both_formats_parse_and_every_name_has_a_prefix() -> None:
    """A scrape in either format is read by the reference parsers."""
    recorder, exposition = Recorder(), Exposition()
    for spec in metrics.SPECS:
        labels = tuple("x" for _ in spec.labels)
        if spec.kind is metrics.Kind.COUNTER:
            recorder.inc(spec, labels)
        elif spec.kind is metrics.Kind.HISTOGRAM:
            recorder.observe(spec, labels, 0.1)
        else:
            recorder.set(spec, labels, 1)
    exposition.apply(1, recorder.take())
    openmetrics, content_type = exposition.render("application/openmetrics-text; version=1.0.0")
    assert "openmetrics" in content_type
    names = {family.name for family in parse_text(page_of(exposition))}
    assert len(names) == len(metrics.SPECS)
    assert all(name.startswith(("cairn_", "gen_ai_")) for name in names)
    assert {family.name for family in parse_openmetrics(b"".join(openmetrics).decode())} == names


@pytest.mark.parametrize(
    "accept", ["text/plain; version=1.x", "application/openmetrics-text; version=\ufffd", "a;version=" + "9" * 5000]
)
def test_a_scraper_that_asks_for_a_version_which_is_no_number_gets_a_page(accept: str) -> None:
    """In the format of all others; it is not an error of Cairn's."""
    pieces, content_type = Exposition().render(accept)
    assert b"".join(pieces).startswith(b"# HELP")
    assert content_type.startswith("text/plain; version=0.0.4")


def test_a_series_that_is_kept_goes_on_after_it_was_taken_and_shows_nothing_before_it_counted() -> None:
    """Code that counts for every request looks up its series once."""
    recorder = Recorder()
    tally = recorder.counter(metrics.REJECTED, ("a",))
    buckets = recorder.histogram(metrics.OVERHEAD, ("b",))
    assert recorder.take() == metrics.MetricsDelta()
    for _ in range(2):
        tally.value += 2
        buckets.add(0.5)
        taken = recorder.take()
        assert [(labels, value) for _, labels, value in taken.counters] == [(("a",), 2)]
        assert [(labels, sum(counts), total) for _, labels, counts, total in taken.histograms] == [(("b",), 1, 0.5)]
    recorder.inc(metrics.REJECTED, ("a",), 0)
    assert [value for _, _, value in recorder.take().counters] == [0], "a zero that happened is shown"
    assert recorder.take() == metrics.MetricsDelta()


def test_replicas_that_come_and_go_for_ever_take_no_memory() -> None:
    """Each pod of a deployment has another name, and what is written of it is kept only while it is there."""
    exposition, recorder = Exposition(), Recorder()

    def visit(name: str) -> None:
        recorder.replace_gauges(metrics.UPSTREAM_UP, {(name,): 1.0})
        for spec in SPECS:
            if spec.kind is Kind.HISTOGRAM:
                names = {"upstream": name, "server_address": name}
                recorder.observe(spec, tuple([names.get(label, "x") for label in spec.labels]), 0.1)
        exposition.apply(0, recorder.take())
        page_of(exposition)
        recorder.forget(name)
        exposition.apply(0, recorder.take())
        exposition.pass_time(0.0)
        exposition.pass_time(SHOWN_SECONDS)

    for number in range(20):
        visit(f"warm-up-{number}")
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(50):
        visit(f"pod-{number}")
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 50 * 1_000


class Scraper:
    """What Prometheus computes of the page: each series' increase, where a smaller value is a restart from zero."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], float] | None = None
        self.increase = 0.0

    def scrape(self, exposition: Exposition, name: str) -> None:
        """Add the increase of all series of the metric `name`; the first page counts in full."""
        page = {
            tuple(found.labels.values()): found.value
            for family in parse_text(page_of(exposition))
            for found in family.samples
            if found.name == name
        }
        last = self._last or {}
        self.increase += sum(
            value - last.get(labels, 0.0) if value >= last.get(labels, 0.0) else value
            for labels, value in page.items()
        )
        self._last = {**last, **page}


@pytest.mark.parametrize("name", ["cairn_savings_usd_total", "gen_ai_client_token_usage_sum"])
def test_the_counts_of_a_replica_that_is_gone_are_not_counted_a_second_time(name: str) -> None:
    """Two workers forget it, one a little later; what each counted last is on the page, and once only."""
    exposition, scraper = Exposition(), Scraper()
    workers = [Recorder(), Recorder()]

    def count(worker: int, replica: str) -> None:
        workers[worker].inc(metrics.SAVINGS, ("m", replica), 10.0)
        workers[worker].observe(metrics.GEN_AI_USAGE, ("chat", "m", replica, "input"), 10.0)

    def report(now_seconds: float) -> None:
        for number, recorder in enumerate(workers):
            exposition.apply(number, recorder.take())
        exposition.pass_time(now_seconds)
        scraper.scrape(exposition, name)

    for worker, replica in ((0, "a"), (1, "a"), (1, "b")):
        count(worker, replica)
    report(0.0)
    count(0, "a")
    workers[0].forget("a")
    report(60.0)
    count(1, "a")
    workers[1].forget("a")
    report(120.0)
    assert scraper.increase == 50.0
    for now_seconds in (300.0, 400.0, 500.0):
        report(now_seconds)
    assert scraper.increase == 50.0
    assert '"a"' not in page_of(exposition), "its series are gone as well"
    assert exposition.value(metrics.SAVINGS) == 50.0, "the status page shows all that was ever saved"


@pytest.mark.parametrize(("counted", "expected"), [(2.0, 3.0), (0.0, 1.0)])
def test_a_replica_that_is_back_keeps_its_series(counted: float, expected: float) -> None:
    """The same name may be used again within minutes; its counters go on, even if no request comes for long."""
    recorder, exposition = Recorder(), Exposition()
    recorder.inc(metrics.SAVINGS, ("m", "a"), 1.0)
    recorder.forget("a")
    exposition.apply(0, recorder.take())
    exposition.pass_time(0.0)
    if counted:
        recorder.inc(metrics.SAVINGS, ("m", "a"), counted)
    else:
        recorder.replace_gauges(metrics.UPSTREAM_UP, {("a",): 1.0})
    exposition.apply(0, recorder.take())
    exposition.pass_time(SHOWN_SECONDS)
    assert sample(page_of(exposition), "cairn_savings_usd_total", upstream="a") == expected


def test_the_last_counts_of_a_replica_survive_a_report_that_was_not_sent() -> None:
    """They are reported with its name, and leave nothing behind in the worker."""
    recorder, exposition = Recorder(), Exposition()
    recorder.inc(metrics.SAVINGS, ("m", "a"), 1.0)
    recorder.observe(metrics.TTFT, ("m", "a", "hit"), 0.1)
    recorder.forget("a")
    for _ in range(2):
        recorder.put_back(recorder.take())
    exposition.apply(0, recorder.take())
    assert exposition.value(metrics.SAVINGS) == 1.0
    exposition.pass_time(0.0)
    exposition.pass_time(SHOWN_SECONDS)
    assert '"a"' not in page_of(exposition)
    assert recorder.take() == MetricsDelta()


def many_series() -> Exposition:
    """Three thousand replicas with a gauge, a counter and a histogram each."""
    exposition, recorder = Exposition(), Recorder()
    for number in range(3_000):
        recorder.set(metrics.UPSTREAM_UP, (f"u{number}",), 1)
        recorder.inc(metrics.COST, ("m", f"u{number}"), 1)
        recorder.observe(metrics.INTER_TOKEN, ("m", f"u{number}"), 0.1)
    exposition.apply(0, recorder.take())
    return exposition


def leave(exposition: Exposition, replicas: int) -> None:
    """Let the first of many replicas be gone for so long that the page shows them no more."""
    exposition.apply(0, MetricsDelta(forgotten=[f"u{number}" for number in range(replicas)]))
    exposition.pass_time(0.0)
    exposition.pass_time(SHOWN_SECONDS)


def test_a_large_page_is_written_in_pieces_of_bounded_work() -> None:
    """A page of 14 MB held the supervisor, which answers probes, for a third of a second."""
    exposition = many_series()
    pieces, _ = exposition.render("")
    work: list[int] = []
    page: list[bytes] = []
    while len(work) == len(page):
        work.append(operations(lambda: page.extend(islice(pieces, 1))))
    assert sum(piece.count(b"\n") for piece in page) > 50_000
    assert max(work) < 10 * sum(work) / len(work)
    assert max(piece.count(b"\n") for piece in page) < 2_000


@pytest.mark.parametrize(
    ("begun", "counted"),
    [
        ("cairn_inter_token_seconds_bucket", "cairn_inter_token_seconds_count"),
        ("cairn_cost_usd_total{", "cairn_cost_usd_total{"),
    ],
)
def test_replicas_that_leave_between_two_pieces_leave_each_metric_consistent(begun: str, counted: str) -> None:
    """A metric of which one piece is written has all series that it had then: half of them would look like a loss."""
    exposition = many_series()
    pieces, _ = exposition.render("")
    page = [next(pieces)]
    while begun.encode() not in page[-1]:
        page.append(next(pieces))
    leave(exposition, 2_000)
    text = b"".join([*page, *pieces]).decode()
    counts = [line for line in text.splitlines() if line.startswith(counted)]
    assert sum(float(line.split()[-1]) for line in counts) == 3_000


def test_replicas_that_go_at_once_are_folded_in_one_pass() -> None:
    """A deployment that shrinks loses hundreds of names in one report; each looked at all series again."""

    def work(gone: int) -> int:
        exposition = many_series()
        return operations(lambda: leave(exposition, gone))

    assert work(200) < 3 * work(1)


def test_gauges_are_joined_once_for_all_that_read_them() -> None:
    """The status page reads a dozen gauges at a time, each of which looked at the rows of all."""
    exposition = many_series()
    assert operations(lambda: exposition.series(metrics.UPSTREAM_UP)) > 3_000
    assert operations(lambda: exposition.series(metrics.UPSTREAM_QUEUED)) < 100
    exposition.apply(0, MetricsDelta(gauges=[(metrics.UPSTREAM_QUEUED.number, ("u",), 2.0)]))
    assert exposition.series(metrics.UPSTREAM_QUEUED) == {("u",): 2.0}
    exposition.forget(0)
    assert exposition.series(metrics.UPSTREAM_QUEUED) == {}

"""The content of the status page: its state as a function of counters and reports, its history, and its stream."""

from __future__ import annotations

import asyncio
import json
from datetime import date
from typing import Any

import msgspec
import pytest

from cache import UNLIMITED_TOKENS, RowKey, Sums
from proxy.accounting import savings
from proxy.accounting.savings import By
from proxy.admin.status import build
from proxy.admin.status.board import StatusBoard
from proxy.admin.status.history import MINUTES_KEPT, SECONDS_KEPT, History, Sample
from proxy.admin.status.state import Moment, Saved
from proxy.control.error_rows import ErrorRow
from proxy.control.messages import ReplicaDown, SharingReport, StatusReport, WorkerReport
from proxy.control.prefix_rows import MissRow, PrefixReport, PrefixRow
from proxy.control.readiness import Readiness, ReadinessStatus
from proxy.metrics import definitions as metrics
from proxy.metrics.definitions import MetricsDelta
from proxy.metrics.exposition import Exposition
from proxy.metrics.recorder import Recorder
from proxy.model import MissReason
from tests.support.clock import FakeClock
from tests.support.operations import operations

READY = Readiness(ReadinessStatus.READY, (), 2, 3, "up", {"one": True, "two": False})
NOW = Moment(1000.0, 900.0, "1.2.3")


def counted(*counts: tuple[metrics.Spec, tuple[str, ...], float]) -> Exposition:
    """An exposition with these counters and gauges."""
    recorder, exposition = Recorder(), Exposition()
    for spec, labels, value in counts:
        if spec.kind is metrics.Kind.COUNTER:
            recorder.inc(spec, labels, value)
        else:
            recorder.set(spec, labels, value)
    exposition.apply(0, recorder.take())
    return exposition


def tokens(upstream: str, **kinds: int) -> list[tuple[metrics.Spec, tuple[str, ...], float]]:
    """Token counters of one upstream."""
    return [(metrics.TOKENS, ("m", upstream, kind), amount) for kind, amount in kinds.items()]


def row(key: int, saved: int, used: float = 1.0, hits: int = 1) -> PrefixRow:
    """A prefix of ten tokens."""
    return PrefixRow(key, "m", 10, hits, saved, used)


def test_saved_since_the_start_is_the_sum_of_the_series() -> None:
    """The surcharge is subtracted from the money; output is no part of the prompt."""
    figures = counted(
        *tokens("one", input_fresh=10, input_cached=30, input_cache_write=5, output=99),
        *tokens("two", input_cached=5),
        (metrics.SAVINGS, ("m", "one"), 3.0),
        (metrics.SURCHARGE, ("m", "one"), 0.5),
        (metrics.UNCACHED_COST, ("m", "one"), 9.0),
        (metrics.CACHED_UNKNOWN, ("m", "one"), 4),
        (metrics.PREFILL_SAVED, ("m", "two"), 7.0),
    )
    found = build.build(figures, READY, [], NOW).saved
    assert found == {"today": None, "7 days": None, "since start": Saved(2.5, 0.5, 9.0, 7.0, 50, 35, 4)}


def test_periods_that_outlive_a_restart_come_from_who_keeps_them() -> None:
    """Today is the last of seven days; a day without an answer saved nothing."""
    days = {"2026-11-21": 3, "2026-11-23": 4}
    rows = {RowKey(day, "m", "one", "t"): Sums(cached_tokens=n, saving_picos=n * 10**12) for day, n in days.items()}
    week = savings.report(rows, By.DAY, date(2026, 11, 17), date(2026, 11, 23))
    found = build.saved(counted(), moment(build.periods(week)))
    assert found["today"] == Saved(usd=4.0, cached_tokens=4)
    assert found["7 days"] == Saved(usd=7.0, cached_tokens=7)
    idle = savings.report(rows, By.DAY, date(2026, 11, 18), date(2026, 11, 24))
    assert build.periods(idle)["today"] == Saved()


def moment(periods: dict[str, Saved], started: float = 900.0, now: float = 1000.0) -> Moment:
    return Moment(now, started, "1.2.3", periods=periods)


def test_a_period_is_never_shown_with_less_than_the_time_since_the_start_that_it_includes() -> None:
    """The totals in Redis are some seconds behind; a start before the period is another matter."""
    day = 86_400.0
    figures = counted(*tokens("one", input_fresh=10, input_cached=30))
    behind = {"today": Saved(prompt_tokens=5), "7 days": Saved(prompt_tokens=500)}
    started_today = build.saved(figures, moment(behind, 10 * day + 5, 10 * day + 900))
    assert started_today["today"] == started_today["since start"]
    assert started_today["7 days"] == behind["7 days"]
    started_yesterday = build.saved(figures, moment(behind, 9 * day, 10 * day + 900))
    assert started_yesterday["today"] == behind["today"]
    assert build.saved(figures, moment({}, 10 * day, 10 * day + 900))["today"] is None, "unknown stays unknown"


def test_a_replica_that_is_down_has_its_time_and_reason() -> None:
    """Since the first worker found it so; one that is up has neither."""
    pages = [
        StatusReport(down={"two": ReplicaDown(70.0, "timeout"), "one": ReplicaDown(1.0, "old")}),
        StatusReport(down={"two": ReplicaDown(50.0, "connection refused")}),
    ]
    one, two = build.build(counted(), READY, pages, NOW).replicas
    assert (one.up, one.down_since_unix_seconds, one.why) == (True, None, "")
    assert (two.up, two.down_since_unix_seconds, two.why) == (False, 50.0, "timeout")


def test_errors_of_all_workers_are_added_up() -> None:
    """The most frequent first, with the last time of any."""
    rows = [
        [ErrorRow("web", "m", "upstream_timeout", 2, 5.0), ErrorRow("batch", "m", "invalid_api_key", 3, 6.0)],
        [ErrorRow("web", "m", "upstream_timeout", 4, 9.0)],
    ]
    shown = build.recent_errors(rows)
    assert [(each.client, each.reason, each.count, each.last_unix_seconds) for each in shown] == [
        ("web", "upstream_timeout", 6, 9.0),
        ("batch", "invalid_api_key", 3, 6.0),
    ]
    figures = counted((metrics.ERRORS, ("upstream_timeout",), 7), (metrics.UPSTREAM_QUEUED, ("one",), 2))
    state = build.build(figures, READY, [StatusReport(errors=rows[0])], NOW)
    assert (state.errors, state.waiting, len(state.recent_errors)) == ({"upstream_timeout": 7}, 2, 2)


def test_requests_wait_for_a_place_a_quiet_replica_or_the_one_that_holds_them() -> None:
    """The page's head counts all of them, as its notices and the metrics do."""
    figures = counted(
        (metrics.UPSTREAM_QUEUED, ("one",), 1),
        (metrics.UPSTREAM_QUEUED, ("two",), 1),
        (metrics.COLD_WAITING, ("normal", "other"), 4),
        (metrics.COLD_WAITING, ("high", "web"), 8),
        (metrics.WARM_WAITING, ("normal", "web"), 16),
    )
    assert build.build(figures, READY, [], NOW).waiting == 30


def test_a_prompt_that_is_too_short_to_share_is_no_miss() -> None:
    """It could not have been found."""
    figures = counted((metrics.PREFIX_MISS, ("cold",), 2), (metrics.PREFIX_MISS, ("short",), 9))
    assert build.miss_reasons(figures) == {"cold": 2}


def test_a_row_for_each_replica() -> None:
    """Predicted and cached side by side; the resident tokens with the budget where one is known."""
    figures = counted(
        *tokens("one", input_fresh=10, input_cached=30),
        (metrics.PREDICTED_CACHED, ("m", "one"), 32),
        (metrics.CACHED_UNKNOWN, ("m", "one"), 5),
        (metrics.INDEX_TOKENS, ("one",), 70),
        (metrics.UPSTREAM_IN_FLIGHT, ("one",), 2),
        (metrics.UPSTREAM_QUEUED, ("two",), 4),
        (metrics.UPSTREAM_PENDING, ("two",), 900.5),
        (metrics.UPSTREAM_BREAKER, ("two",), 2),
    )
    pages = [StatusReport(budgets={"one": 90, "two": UNLIMITED_TOKENS}), StatusReport(budgets={"one": 100})]
    one, two = build.build(figures, READY, pages, NOW).replicas
    assert (one.name, one.up, one.in_flight, one.resident_tokens, one.budget_tokens) == ("one", True, 2, 70, 100)
    assert (one.prompt_tokens, one.cached_tokens, one.unknown_tokens, one.predicted_tokens) == (40, 30, 5, 32)
    assert (two.up, two.breaker, two.queued, two.pending_tokens, two.budget_tokens) == (False, "open", 4, 900, None)


def test_the_rows_of_many_replicas_take_one_pass_over_the_series() -> None:
    """With 1,000 replicas of 64 models each row looked at the series of all, for ten seconds a state."""

    def work(replicas: int) -> int:
        names = [f"u{number}" for number in range(replicas)]
        figures = counted(*[each for name in names for each in tokens(name, input_fresh=1, input_cached=2)])
        readiness = Readiness(ReadinessStatus.READY, upstreams=dict.fromkeys(names, True))
        return operations(lambda: build.replicas(figures, readiness, []))

    assert work(400) < 5 * work(100)


def test_the_same_prefix_at_two_workers_is_one_row_without_its_hash() -> None:
    """The best first, numbered; never more than twenty."""
    shown = build.prefixes([[row(7, 100, 5.0), row(8, 30)], [row(7, 50, 9.0, hits=2)]])
    assert [(each.number, each.hits, each.saved_tokens, each.used_unix_seconds) for each in shown] == [
        (1, 3, 150, 9.0),
        (2, 1, 30, 1.0),
    ]
    assert "key" not in msgspec.to_builtins(shown[0])
    assert len(build.prefixes([[row(key, key) for key in range(50)]])) == build.PREFIXES_SHOWN


def test_the_newest_misses_come_first() -> None:
    """Of all workers."""
    lists = [[MissRow(at, "m", "one", 10, None, MissReason.COLD) for at in times] for times in ((1.0, 4.0), (2.0,))]
    assert [each.unix_seconds for each in build.misses(lists)] == [4.0, 2.0, 1.0]


def test_times_to_the_first_token_are_joined_by_what_was_predicted() -> None:
    """Over models and upstreams; a status that never came is left out."""
    recorder, exposition = Recorder(), Exposition()
    for upstream in ("one", "two"):
        recorder.observe(metrics.TTFT, ("m", upstream, "hit"), 0.03)
    recorder.observe(metrics.TTFT, ("m", "one", "miss"), 3.0)
    exposition.apply(0, recorder.take())
    hit, miss = build.build(exposition, READY, [], NOW).ttft
    assert (hit.cache, hit.count, miss.cache, miss.count) == ("hit", 2, "miss", 1)
    assert hit.p50_seconds == pytest.approx(0.03)
    assert 2.5 < (miss.p95_seconds or 0) <= 5


@pytest.mark.parametrize(
    ("counts", "share", "value"),
    [([0, 0, 0], 0.5, None), ([4, 0, 0], 0.5, 0.5), ([0, 4, 0], 0.25, 1.25), ([0, 0, 4], 0.5, 2.0)],
)
def test_quantiles_are_prometheus_own(counts: list[int], share: float, value: float | None) -> None:
    """Interpolated inside a bucket; what lies beyond the last bound is that bound."""
    assert build.quantile(share, (1.0, 2.0), counts) == value


def test_what_cannot_be_believed_is_said() -> None:
    """A missing price, unknown cached tokens, missing usage and a loss each have their sentence."""
    figures = counted(
        (metrics.UNPRICED, ("no_card",), 2),
        (metrics.CACHED_UNKNOWN, ("m", "one"), 1),
        (metrics.USAGE_MISSING, ("m", "one"), 1),
        (metrics.SURCHARGE, ("m", "one"), 1.0),
    )
    found = " | ".join(build.notices(figures))
    for words in (
        "2 responses without a price (no card)",
        "1 prompt token of",
        "ended without token counts",
        "have cost more",
    ):
        assert words in found
    assert build.notices(counted()) == []


def test_a_failed_reload_has_a_sentence_until_one_succeeds() -> None:
    """Afterwards the file's settings are in use, however often a reload failed before."""
    recorder, exposition = Recorder(), Exposition()
    recorder.inc(metrics.RELOADS_FAILED)
    for succeeded, sentences in ((0.0, 1), (1.0, 0)):
        recorder.set(metrics.RELOAD_SUCCEEDED, (), succeeded)
        exposition.apply(0, recorder.take())
        assert len(build.notices(exposition)) == sentences


def test_sessions_that_need_more_than_the_caches_are_said() -> None:
    """With how much more, and how many prompts wait; a pool with room has no sentence."""
    recorder, exposition = Recorder(), Exposition()
    recorder.replace_gauges(metrics.CACHE_NEED, {("engines",): 2.13, ("other",): 0.7})
    recorder.replace_gauges(metrics.COLD_WAITING, {("normal", "other"): 2.0, ("low", "batch"): 1.0})
    exposition.apply(0, recorder.take())
    assert build.notices(exposition) == [
        "sessions need 2.1 x the cache of pool engines: 3 prompts wait for a quiet replica"
    ]
    recorder.replace_gauges(metrics.WARM_WAITING, {("normal", "other"): 4.0})
    exposition.apply(0, recorder.take())
    assert build.notices(exposition)[0].endswith("quiet replica, 4 for the one that holds what they continue")


def test_a_pool_whose_engines_render_differently_has_a_sentence() -> None:
    """One whose engines agree has none."""
    recorder, exposition = Recorder(), Exposition()
    recorder.replace_gauges(metrics.MIXED_TEMPLATES, {("engines",): 2.0, ("other",): 0.0})
    exposition.apply(0, recorder.take())
    assert build.notices(exposition) == [
        "engines of pool engines render prompts of 2 models differently: only what all of them share is expected to "
        "be cached; see the log"
    ]


def test_the_state_is_json_without_a_word_of_a_prompt() -> None:
    """It goes over the wire as it is, and holds no hash."""
    pages = [StatusReport(prefixes=PrefixReport([row(2**63 + 12345, 100)]))]
    text = msgspec.json.encode(build.build(counted(), READY, pages, NOW)).decode()
    assert str(2**63 + 12345) not in text
    assert json.loads(text)["prefixes"][0]["saved_tokens"] == 100


# --- history


def readings(history: History, count: int) -> None:
    """One a second, two requests in each."""
    for second in range(count):
        history.add(Sample(1000.0 + second, 2.0 * second, 0, 0))


def test_the_history_is_bounded() -> None:
    """Ten minutes by the second, a day by the minute."""
    history = History()
    readings(history, 100_000)
    assert (len(history.seconds), len(history.minutes)) == (SECONDS_KEPT, MINUTES_KEPT)
    assert history.minutes[-1].unix_seconds - history.minutes[0].unix_seconds == (MINUTES_KEPT - 1) * 60


def test_the_rate_is_over_the_last_readings() -> None:
    """Or over what there is."""
    history = History()
    assert history.requests_per_second(10.0) == 0
    readings(history, 5)
    assert history.requests_per_second(10.0) == 2.0


def test_a_clock_set_back_adds_no_reading() -> None:
    """Time goes on only once it is past what is known."""
    history = History()
    readings(history, 5)
    history.add(Sample(900.0, 99, 0, 0))
    assert len(history.seconds) == 5


# --- the board


class Bench:
    """A board with its exposition."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.exposition = Exposition()
        self.board = StatusBoard(self.exposition, lambda: READY, self.clock, "1.2.3")

    def report(self, worker: int = 0, counts: MetricsDelta | None = None, page: StatusReport | None = None) -> None:
        """Hear a report as it comes over the control socket."""
        counts = counts or MetricsDelta()
        self.exposition.apply(worker, counts)
        sent = msgspec.msgpack.encode(WorkerReport(counts, page=page or StatusReport()))
        self.board.add_report(worker, msgspec.msgpack.decode(sent, type=WorkerReport))

    def state(self) -> Any:
        return json.loads(self.board.state_json())


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_what_a_report_leaves_out_is_as_it_was(bench: Bench) -> None:
    """Prefixes come only when there is news of them."""
    misses = [MissRow(1.0, "m", "one", 5, 0, MissReason.COLD)]
    bench.report(page=StatusReport(PrefixReport([row(2**64 - 1, 100)], misses)))
    bench.report(page=StatusReport(budgets={"one": 50}))
    found = bench.state()
    assert [len(found["prefixes"]), len(found["misses"]), found["replicas"][0]["budget_tokens"]] == [1, 1, 50]


async def test_what_a_dead_worker_saved_stays(bench: Bench) -> None:
    """Its successor's rows are added; its sharing state and misses are dropped."""
    bench.report(page=StatusReport(PrefixReport([row(7, 100)]), sharing=SharingReport("live")))
    bench.board.remove_worker(0)
    bench.report(page=StatusReport(PrefixReport([row(7, 5)])))
    assert [each["saved_tokens"] for each in bench.state()["prefixes"]] == [105]
    assert bench.state()["sharing"]["states"] == {}


async def test_a_request_that_ended_wakes_those_who_look(bench: Bench) -> None:
    """A report without one does not; the second's reading does."""
    waiting = asyncio.get_running_loop().create_task(bench.board.wait_for_change())
    await asyncio.sleep(0)
    bench.report(page=StatusReport(budgets={"one": 50}))
    await asyncio.sleep(0)
    assert not waiting.done()
    recorder = Recorder()
    recorder.inc(metrics.REQUESTS, ("chat_completions", "m", "one", "2xx", "hit", "true"))
    bench.report(counts=recorder.take())
    await asyncio.wait_for(waiting, 30)
    again = asyncio.get_running_loop().create_task(bench.board.wait_for_change())
    await asyncio.sleep(0)
    bench.board.take_sample()
    await asyncio.wait_for(again, 30)


async def test_a_new_page_gets_the_readings_so_far(bench: Bench) -> None:
    """And each state has the newest one."""
    for _ in range(3):
        bench.clock.advance(1)
        bench.board.take_sample()
    history = json.loads(bench.board.history_json())
    assert [len(history["seconds"]), len(history["minutes"])] == [3, 1]
    assert bench.state()["sample"] == history["seconds"][-1]

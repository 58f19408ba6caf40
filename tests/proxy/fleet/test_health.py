"""Health checks on their own: what each answer says about a replica, and what is learned from it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import pytest

from proxy.config.credentials import auth_of, credential_of, default_headers_of
from proxy.config.schema import Auth
from proxy.errors import (
    BadResponse,
    CairnError,
    ConnectFailed,
    FirstByteTimeout,
    PoolTimeout,
    ResetBeforeResponse,
)
from proxy.fleet import BreakerState, Cause, Fleet, ReplicaChange, ReplicaSpec
from proxy.fleet.engine_facts import EngineFacts
from proxy.fleet.findings import EngineFindings, Found
from proxy.fleet.health import FACTS_SECONDS, LOAD_SECONDS, HealthChecker
from proxy.fleet.pools import Pools, ReplicaEndpoint, ServedPool
from proxy.tasks import Tasks
from proxy.upstream import Limits, Origin, UpstreamResponse
from tests.support.clock import FakeClock

CHECK_SECONDS, BUSY_SECONDS = 5.0, 60.0
MODELS = b'{"data": [{"id": "a"}, {"id": "b"}]}'
PROPS = b'{"total_slots": 2, "default_generation_settings": {"n_ctx": 100}, "build_info": "b9", "chat_template": "x"}'

Page = tuple[int, bytes] | CairnError | None
"""A status and a body, an error, or None for silence."""


class Source:
    def taken(self) -> None: ...
    def allow_silence(self, seconds: float) -> None: ...
    def close(self, error: CairnError | None = None) -> None: ...


async def until(holds: Callable[[], object]) -> None:
    """Let the checker, which runs by itself, go on until `holds` does. Raises TimeoutError after 5 s."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - it polls what the checker changes
            await asyncio.sleep(0)


class Bench:
    """A health checker of one replica, which answers with `pages` by path, else 404."""

    def __init__(self, pages: Mapping[bytes, Page], **endpoint: Any) -> None:
        self.pages = dict(pages)
        self.clock = FakeClock()
        self.changes: list[ReplicaChange] = []
        self.fleet = Fleet(lambda: 0.5, changed=self.changes.append)
        self.fleet.add(ReplicaSpec("r", "pool"))
        origin = Origin.parse("http://10.0.0.1:80")
        self.endpoint = ReplicaEndpoint("r", "pool", "http://10.0.0.1:80", origin, **endpoint)
        self.pools = Pools([ServedPool("pool", ("*",))], "pool", {0: self.endpoint})
        self.found: list[Found] = []
        self.loads: list[tuple[int | None, int | None]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.retried: list[bool | None] = []
        self.found_at: list[tuple[int, ReplicaEndpoint]] = []
        self.tasks = Tasks()
        self.received = 0.0
        self.checker = HealthChecker(
            self, self.pools, self.fleet, self, self.tasks, self.clock, Limits(), busy_seconds=BUSY_SECONDS
        )

    def apply(self, number: int, endpoint: ReplicaEndpoint, found: Found, now_seconds: float) -> None:
        self.found.append(found)
        self.found_at.append((number, endpoint))

    def observe_load(self, number: int, facts: EngineFacts, now_seconds: float) -> None:
        self.loads.append((facts.running, facts.waiting))

    def request(
        self,
        origin: Origin,
        method: bytes,
        target: bytes,
        headers: Iterable[tuple[bytes, bytes]] = (),
        *,
        limits: Limits | None = None,
        repeatable: bool | None = None,
    ) -> Awaitable[UpstreamResponse]:
        self.headers.append(dict(headers))
        self.retried.append(repeatable)
        return self._respond(self.pages.get(target, (404, b"")))

    async def _respond(self, page: Page) -> UpstreamResponse:
        if page is None:
            await asyncio.Event().wait()
        if isinstance(page, FirstByteTimeout):
            self.clock.advance(CHECK_SECONDS)
        if isinstance(page, CairnError):
            raise page
        assert page is not None
        response = UpstreamResponse(asyncio.get_running_loop(), Source(), 0.0, reused=False)
        response.status = page[0]
        response.chunks.append(page[1])
        response.ended()
        return response

    def received_seconds(self, origin: Origin) -> float:
        return self.received

    async def check_times(self, count: int) -> None:
        for _ in range(count):
            await self.checker.check(0)

    def state(self) -> tuple[BreakerState, Cause | None]:
        return self.fleet.breaker_state(0, self.clock.monotonic()), self.fleet.cause(0)


@pytest.mark.parametrize(
    "error",
    [ConnectFailed("refused"), ResetBeforeResponse("reset"), BadResponse("not HTTP")],
)
async def test_a_replica_that_cannot_be_talked_to_is_down_and_the_reason_is_told(error: CairnError) -> None:
    bench = Bench({b"/v1/models": error})
    await bench.checker.check(0)
    assert bench.state() == (BreakerState.OPEN, Cause.UNREACHABLE)
    assert [change.reason for change in bench.changes] == [error.message]
    assert bench.checker.describe(0) == "replica r (pool pool) is down: unreachable"


async def test_a_replica_that_loads_its_model_is_down_until_it_answers_otherwise() -> None:
    bench = Bench({b"/v1/models": (503, b'{"error": {"message": "Loading model"}}')})
    await bench.checker.check(0)
    assert bench.state() == (BreakerState.OPEN, Cause.LOADING)
    bench.pages[b"/v1/models"] = (200, MODELS)
    await bench.checker.check(0)
    assert bench.state() == (BreakerState.CLOSED, None)
    assert [change.change.value for change in bench.changes] == ["down", "up"]


@pytest.mark.parametrize("page", [(200, MODELS), (401, b"who are you"), (404, b""), (503, b"busy"), (200, b"<html>")])
async def test_any_other_answer_shows_that_it_is_there(page: Page) -> None:
    bench = Bench({b"/v1/models": page})
    bench.fleet.unreachable(0, bench.clock.monotonic(), "refused")
    await bench.checker.check(0)
    assert bench.state() == (BreakerState.CLOSED, None)


async def test_a_slow_answer_shows_nothing_and_lets_another_probe_come() -> None:
    bench = Bench({b"/v1/models": FirstByteTimeout("late")})
    bench.fleet.unreachable(0, bench.clock.monotonic(), "refused")
    bench.clock.advance(5.0)
    assert bench.fleet.probes(bench.clock.monotonic()) == (0,)
    await bench.checker.check(0)
    assert bench.fleet.probes(bench.clock.monotonic()) == (0,)


FROZEN: Mapping[bytes, Page] = {b"/v1/models": FirstByteTimeout("late")}
"""The pages of a replica whose process is stopped: its kernel accepts connections, and nothing is answered."""


async def test_a_frozen_replica_is_down_after_three_unanswered_checks_and_up_with_the_first_answer() -> None:
    bench = Bench(FROZEN)
    await bench.check_times(2)
    assert bench.state() == (BreakerState.CLOSED, None)
    await bench.check_times(1)
    assert bench.state() == (BreakerState.OPEN, Cause.SILENT)
    assert [change.reason for change in bench.changes] == ["no health check was answered for 15 s"]
    assert bench.checker.describe(0) == "replica r (pool pool) is down: not responding"
    bench.pages[b"/v1/models"] = (404, b"")
    await bench.checker.check(0)
    assert bench.state() == (BreakerState.CLOSED, None)


async def test_an_answered_check_between_unanswered_ones_makes_a_new_start() -> None:
    bench = Bench(FROZEN)
    for page in (*[FROZEN[b"/v1/models"]] * 2, (200, MODELS), *[FROZEN[b"/v1/models"]] * 2):
        bench.pages[b"/v1/models"] = page
        await bench.checker.check(0)
    assert bench.state() == (BreakerState.CLOSED, None)


async def test_a_replica_that_sends_responses_is_not_frozen_however_slow_its_checks_are() -> None:
    """A loaded event loop answers checks after half a minute and relays tokens all the while."""
    bench = Bench(FROZEN)
    for _ in range(20):
        await bench.check_times(2)
        bench.received = bench.clock.monotonic() - 1.0
    assert bench.state() == (BreakerState.CLOSED, None)


async def test_bytes_that_came_between_two_checks_end_the_silence_before_them() -> None:
    bench = Bench(FROZEN)
    await bench.check_times(2)
    bench.received = bench.clock.monotonic()
    bench.clock.advance(1.0)
    await bench.check_times(2)
    assert bench.state() == (BreakerState.CLOSED, None)
    await bench.check_times(1)
    assert bench.state() == (BreakerState.OPEN, Cause.SILENT)


async def test_an_engine_that_computes_a_long_prompt_is_not_frozen_while_that_is_predicted_to_take_so_long() -> None:
    """One with a single thread answers nothing until its prefill has ended, and somewhat later than predicted."""
    bench = Bench(FROZEN)
    start_seconds = bench.clock.monotonic()
    charge = bench.fleet.charge(0, 300 * bench.fleet.rate_of(0), start_seconds)
    while bench.clock.monotonic() < start_seconds + 300 + BUSY_SECONDS - CHECK_SECONDS:
        await bench.check_times(1)
        assert bench.state() == (BreakerState.CLOSED, None)
    await bench.check_times(1)
    assert bench.state() == (BreakerState.OPEN, Cause.SILENT)
    bench.fleet.finish(charge, bench.clock.monotonic())


async def test_requests_that_come_to_a_frozen_replica_do_not_put_off_that_it_is_found() -> None:
    """Requests sent after the first unanswered check do not explain the silence before them."""
    bench = Bench(FROZEN)
    bench.fleet.charge(0, 1.0, bench.clock.monotonic())
    start_seconds = bench.clock.monotonic()
    while bench.fleet.cause(0) is None:
        await bench.check_times(1)
        bench.fleet.charge(0, 10 * bench.fleet.rate_of(0), bench.clock.monotonic())
        assert bench.clock.monotonic() <= start_seconds + BUSY_SECONDS + 2 * CHECK_SECONDS
    assert bench.fleet.cause(0) is Cause.SILENT


async def test_a_provider_and_a_replica_whose_connections_are_all_in_use_are_not_frozen() -> None:
    """Many machines serve a provider's address; and a check that found no free connection was never sent."""
    for bench in (Bench(FROZEN, is_provider=True), Bench({b"/v1/models": PoolTimeout("all are in use")})):
        await bench.check_times(10)
        assert bench.state() == (BreakerState.CLOSED, None)


async def test_a_replica_that_left_a_check_unanswered_is_checked_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A frozen replica is therefore found within seconds, and it is still asked afterwards."""
    monkeypatch.setattr("proxy.fleet.health.TICK_SECONDS", 0.0)
    bench = Bench(FROZEN)
    await bench.checker.check(0)
    running = bench.tasks.start(bench.checker.run(), "health checks")
    try:
        await until(lambda: bench.fleet.cause(0) is Cause.SILENT)
        assert len(bench.headers) == 3
        bench.pages[b"/v1/models"] = (200, MODELS)
        bench.clock.advance(1.0)
        await until(lambda: bench.state()[0] is BreakerState.CLOSED)
    finally:
        running.cancel()


async def test_a_busy_replica_is_not_asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its responses show that it lives, and checks would only add to its work."""
    monkeypatch.setattr("proxy.fleet.health.TICK_SECONDS", 0.0)
    bench = Bench(FROZEN)
    bench.received = bench.clock.monotonic() + 1.0
    await bench.checker.check(0)
    running = bench.tasks.start(bench.checker.run(), "health checks")
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(bench.headers) == 1
    running.cancel()


async def test_one_check_of_a_replica_runs_at_a_time() -> None:
    """Else a frozen replica would collect them."""
    bench = Bench({b"/v1/models": None})
    first = bench.tasks.start(bench.checker.check(0), "health check")
    await asyncio.sleep(0)
    await bench.checker.check(0)
    assert len(bench.headers) == 1
    first.cancel()


async def test_what_an_engine_says_is_found_and_described() -> None:
    bench = Bench({b"/v1/models": (200, MODELS), b"/props": (200, PROPS)})
    await bench.checker.check(0)
    found = bench.found[0]
    assert (found.models, found.facts.capacity_tokens, found.facts.in_flight_limit) == (("a", "b"), 200, 2)
    assert bench.checker.describe(0) == (
        "replica r (pool pool) is up: llama.cpp b9, models a, b, capacity 200 tokens, 2 requests at once, "
        "chat template known"
    )


@pytest.mark.parametrize(
    "page",
    [
        b"[" * 100_000,
        b'{"data": ' + b"[" * 100_000,
        b'{"data": [{"id": "a", "x": ' + b"[" * 10_000,
        b'{"data": [' + b"9" * 5_000,
        b"\xff\xfe",
        b"",
    ],
)
async def test_a_page_that_cannot_be_read_says_nothing_and_ends_nothing(page: bytes) -> None:
    paths = (b"/v1/models", b"/metrics", b"/props", b"/get_server_info", b"/version")
    bench = Bench(dict.fromkeys(paths, (200, page)))
    await bench.checker.check(0)
    assert bench.found[0].models is None
    assert bench.state() == (BreakerState.CLOSED, None)


async def test_a_metric_of_5000_digits_is_no_capacity() -> None:
    page = b'vllm:cache_config_info{block_size="16",num_gpu_blocks="' + b"9" * 5_000 + b'"} 1.0\n'
    bench = Bench({b"/v1/models": (200, MODELS), b"/metrics": (200, page)})
    await bench.checker.check(0)
    assert bench.found[0].facts.capacity_tokens is None


async def test_a_provider_is_asked_for_its_models_only_with_the_replicas_own_key() -> None:
    headers = ((b"anthropic-version", b"2023-06-01"),)
    bench = Bench(
        {b"/v1/models": (200, MODELS), b"/props": (200, PROPS)},
        is_provider=True,
        credential=(b"x-api-key", b"k"),
        default_headers=headers,
    )
    await bench.checker.check(0)
    assert bench.headers == [{b"x-api-key": b"k", b"anthropic-version": b"2023-06-01"}]
    assert bench.found[0].facts.capacity_tokens is None


async def test_the_first_answer_of_a_replica_that_was_silent_at_the_start_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the log would end with its silence."""
    monkeypatch.setattr("proxy.fleet.health.BEGIN_SECONDS", 0.01)
    caplog.set_level(logging.INFO)
    bench = Bench({b"/v1/models": None})
    await bench.checker.begin()
    await bench.tasks.close()
    bench.pages[b"/v1/models"] = (200, MODELS)
    for _ in range(2):
        await bench.checker.check(0)
    lines = [record.getMessage() for record in caplog.records if "replica r" in record.getMessage()]
    assert lines == ["replica r (pool pool) has not responded yet", bench.checker.describe(0)]


async def test_the_start_waits_for_no_replica_that_stays_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.fleet.health.BEGIN_SECONDS", 0.01)
    bench = Bench({b"/v1/models": None})
    await bench.checker.begin()
    assert bench.checker.describe(0) == "replica r (pool pool) has not responded yet"
    await bench.tasks.close()


async def test_the_start_checks_every_replica_and_logs_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench({b"/v1/models": (200, MODELS)})
    with caplog.at_level(logging.INFO):
        await bench.checker.begin()
    assert "replica r (pool pool) is up: models a, b" in caplog.messages


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (b'{"data": []}', "no models"),
        (b'{"data": [%s]}' % b", ".join(b'{"id": "m%d"}' % n for n in range(40)), "and"),
        (b"<html>", "it reports nothing about itself"),
    ],
)
async def test_a_description_is_short_and_says_what_is_unknown(models: bytes, words: str) -> None:
    """However many models a replica lists, and if it lists none."""
    bench = Bench({b"/v1/models": (200, models)})
    await bench.checker.check(0)
    assert words in bench.checker.describe(0)
    assert len(bench.checker.describe(0)) < 300


async def test_a_replica_that_is_not_configured_any_more_is_asked_nothing() -> None:
    bench = Bench({b"/v1/models": (200, MODELS)})
    await bench.checker.check(7)
    await bench.checker.check_load(7)
    assert bench.headers == []


async def test_an_engine_that_fails_while_it_tells_its_facts_keeps_what_was_known() -> None:
    bench = Bench({b"/v1/models": (200, MODELS), b"/metrics": ResetBeforeResponse("reset")})
    await bench.checker.check(0)
    assert bench.found == []
    assert bench.state() == (BreakerState.CLOSED, None)


async def test_a_load_check_that_fails_shows_nothing() -> None:
    bench = Bench({b"/metrics": ConnectFailed("refused")})
    await bench.checker.check_load(0)
    bench.pages[b"/metrics"] = (404, b"")
    await bench.checker.check_load(0)
    assert bench.loads == []
    assert bench.state() == (BreakerState.CLOSED, None)


async def test_new_replicas_are_checked_and_what_was_found_at_forgotten_ones_is_dropped() -> None:
    bench = Bench({b"/v1/models": (200, MODELS)})
    bench.checker.replicas_changed([0])
    await until(lambda: bench.found)
    bench.checker.replica_forgotten(0, bench.endpoint)
    assert bench.checker.describe(0) == "replica r (pool pool) has not responded yet"


async def test_facts_are_asked_for_again_by_and_by_and_a_down_replica_by_its_back_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine may have been started again with another model, or be back."""
    monkeypatch.setattr("proxy.fleet.health.TICK_SECONDS", 0.0)
    bench = Bench({b"/v1/models": (200, MODELS)})
    running = bench.tasks.start(bench.checker.run(), "health checks")
    try:
        await asyncio.sleep(0)
        assert bench.found == []
        bench.clock.advance(FACTS_SECONDS)
        await until(lambda: bench.found)
        bench.fleet.unreachable(0, bench.clock.monotonic(), "refused")
        bench.clock.advance(1.0)
        await until(lambda: bench.state()[0] is BreakerState.CLOSED)
    finally:
        running.cancel()


async def test_a_replica_that_was_forgotten_during_a_check_is_left_alone() -> None:
    """Its number may belong to another one by now."""
    for page in ((200, MODELS), ConnectFailed("refused"), FirstByteTimeout("late")):
        bench = Bench({b"/v1/models": page})
        bench.fleet.remove(0)
        bench.fleet.forget(0)
        await bench.checker.check(0)
        assert bench.found == []


# -- what is done with it


class Sink:
    """A journal, model names, queues and usage reports that keep what they are told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.budget = False

    def knows_budget(self, replica: int) -> bool:
        return self.budget

    def set_budget(self, replica: int, tokens: int) -> None:
        self.told.append(("budget", tokens))
        self.budget = True

    def set_capacity(self, replica: int, tokens: int, slots: int | None) -> None:
        self.told.append(("capacity", tokens, slots))

    def new_epoch(self, replica: int) -> None:
        self.told.append(("epoch", replica))

    def add(self, names: Iterable[str]) -> None:
        self.told.append(("models", *names))

    def update(self) -> None:
        self.told.append(("queues",))

    def always_reports_usage(self, replica: int) -> None:
        self.told.append(("usage", replica))

    def ranks_found(self, endpoint: ReplicaEndpoint, ranks: int) -> bool:
        if ranks == endpoint.ranks:
            return False
        self.told.append(("ranks", ranks))
        return True


def test_findings_are_applied_when_they_are_new() -> None:
    """A capacity that was set once is not set again, a later start is a new epoch, a configured capacity stays."""
    bench, sink = Bench({}), Sink()
    findings = EngineFindings(bench.fleet, sink, sink, sink, sink, sink)
    facts = EngineFacts(capacity_tokens=100, in_flight_limit=4, started_unix_seconds=10.0, tells_timings=True)
    findings.apply(0, bench.endpoint, Found(("a",), facts), 0.0)
    assert sink.told == [
        ("models", "a"), ("capacity", 100, None), ("budget", 100), ("queues",), ("usage", 0),
    ]  # fmt: skip
    assert bench.fleet.limit_of(0) == 4
    sink.told.clear()
    later = EngineFacts(capacity_tokens=100, started_unix_seconds=11.0)
    findings.apply(0, bench.endpoint, Found(None, later), 0.0)
    findings.apply(0, bench.endpoint, Found(None, later), 0.0)
    assert sink.told == [("epoch", 0)]
    sink.told.clear()
    findings.forget(0)
    sink.budget = True
    findings.apply(0, bench.endpoint, Found(None, EngineFacts(capacity_tokens=100)), 0.0)
    assert sink.told == [("capacity", 100, None)]


async def test_a_busy_engine_that_states_no_limit_is_asked_for_its_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only while enough is under way there that a limit could be near."""
    page = b"vllm:num_requests_running 20.0\nvllm:num_requests_waiting 3.0\n"
    bench = Bench({b"/v1/models": (200, MODELS), b"/metrics": (200, page)})
    await bench.checker.check(0)
    monkeypatch.setattr("proxy.fleet.health.TICK_SECONDS", 0.0)
    running = bench.tasks.start(bench.checker.run(), "health checks")
    try:
        bench.clock.advance(LOAD_SECONDS)
        await asyncio.sleep(0)
        assert not bench.loads
        for _ in range(8):
            bench.fleet.charge(0, 100.0, bench.clock.monotonic())
        bench.clock.advance(LOAD_SECONDS)
        await until(lambda: bench.loads)
    finally:
        running.cancel()
    assert bench.loads == [(20, 3)]


def test_a_limit_learned_from_the_load_is_set_and_forgotten_when_the_engine_restarts() -> None:
    """The queues follow it; a limit that the engine states, or that is configured, is not touched."""
    bench, sink = Bench({}), Sink()
    findings = EngineFindings(bench.fleet, sink, sink, sink, sink, sink)
    busy = EngineFacts(running=64, waiting=9, started_unix_seconds=10.0)
    findings.apply(0, bench.endpoint, Found(None, busy), 0.0)
    assert (bench.fleet.limit_of(0), sink.told) == (64, [("queues",)])
    findings.observe_load(0, busy, 2.0)
    assert sink.told == [("queues",)]
    findings.apply(0, bench.endpoint, Found(None, EngineFacts(running=0, waiting=0, started_unix_seconds=11.0)), 4.0)
    assert bench.fleet.limit_of(0) is None
    bench.fleet.add(ReplicaSpec("r", "pool", in_flight_limit=5))
    findings.observe_load(0, busy, 6.0)
    assert bench.fleet.limit_of(0) == 5


def test_an_engine_that_turns_out_to_be_several_ranks_is_told_nothing_itself() -> None:
    """Its ranks are replicas of their own, each of which is checked."""
    bench, sink = Bench({}), Sink()
    findings = EngineFindings(bench.fleet, sink, sink, sink, sink, sink)
    findings.apply(0, bench.endpoint, Found(None, EngineFacts(capacity_tokens=400, ranks=4)), 0.0)
    assert sink.told == [("ranks", 4)]
    findings.apply(0, bench.endpoint, Found(None, EngineFacts(capacity_tokens=400, ranks=1)), 0.0)
    assert sink.told[1:] == [("capacity", 400, None), ("budget", 400)]


@pytest.mark.parametrize(
    ("host", "auth"),
    [
        ("api.anthropic.com", Auth.X_API_KEY),
        ("API.ANTHROPIC.COM", Auth.X_API_KEY),
        ("me.openai.azure.com", Auth.API_KEY),
        ("me.services.ai.azure.com", Auth.API_KEY),
        ("api.openai.com", Auth.BEARER),
        ("notanthropic.com", Auth.BEARER),
        ("anthropic.com.evil.org", Auth.BEARER),
        ("10.0.0.1", Auth.BEARER),
    ],
)
def test_a_key_goes_in_the_header_that_its_host_wants(host: str, auth: Auth) -> None:
    assert auth_of(None, host) is auth
    assert auth_of(Auth.API_KEY, host) is Auth.API_KEY
    name, value = credential_of("k", None, host)
    assert (name, value) == ((b"authorization", b"Bearer k") if auth is Auth.BEARER else (auth.value.encode(), b"k"))
    assert bool(default_headers_of(None, host)) is (auth is Auth.X_API_KEY)


async def test_a_check_on_a_connection_that_the_replica_had_closed_is_made_again() -> None:
    """Each request is marked so, or a replica that closes idle connections would seem to be down."""
    bench = Bench({b"/v1/models": (200, MODELS), b"/metrics": (200, b"")})
    await bench.checker.check(0)
    await bench.checker.check_load(0)
    assert len(bench.retried) > 2
    assert all(bench.retried)


async def test_what_is_found_is_told_with_the_replica_at_which_it_was_found() -> None:
    bench = Bench({b"/v1/models": (200, MODELS)})
    await bench.checker.check(0)
    assert bench.found_at == [(0, bench.endpoint)]

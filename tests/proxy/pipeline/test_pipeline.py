"""The phases in their order: what each one decides, who answers, and that every request is settled once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from proxy.errors import BadRequest, Overloaded, ResetBeforeResponse, UnknownObject
from proxy.model import Ending, Endpoint
from proxy.pipeline.dispatch import Upload
from proxy.pipeline.exchange import Exchange, TakesLong
from proxy.pipeline.pipeline import OBJECT_NEWS_SECONDS, Pipeline
from proxy.pipeline.silence import COMMENT, WaitingClient
from proxy.records import Prompt, Tenant
from proxy.wire.request import read as read_prompt
from tests.proxy.pipeline.test_cors import Kept
from tests.proxy.pipeline.test_reader import CHAT, exchange


class Phases:
    """All collaborators of a pipeline in one; `steps` are the calls, `failures` what a step raises."""

    def __init__(self, **failures: Any) -> None:
        self.steps: list[str] = []
        self.slept: list[float] = []
        self.failures = failures
        self.merges = False
        self.ending = Ending.COMPLETE
        self.waits_long = False  # the client is sent a head and a comment before any response
        self.accompanied = 0
        self.upload: Upload | None = None
        self.settled: list[Exchange] = []
        self.pipeline = Pipeline(self, self, self, self, self, Contexts(self), Waits(self), self.sleep)

    def step(self, name: str) -> None:
        """Note a call, and raise what it is to raise next."""
        self.steps.append(name)
        failures = self.failures.get(name, [])
        if failures and (failure := failures.pop(0)) is not None:
            raise failure

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def read(self, exchange: Exchange) -> None:
        self.step("read")

    async def check_inserted(self, exchange: Exchange) -> None:
        self.step("check_inserted")

    def checked(self, exchange: Exchange, upload: Upload, news: Callable[[], Awaitable[None]]) -> Upload:
        self.step("checked")
        self.news = news
        return upload

    def fingerprint(self, exchange: Exchange) -> None:
        self.step("fingerprint")

    def look_up(self, exchange: Exchange) -> None:
        self.step("look_up")

    def plan(self, exchange: Exchange) -> None:
        self.step("plan")

    def note_answered(self, exchange: Exchange) -> None:
        self.step("note_answered")

    async def run(self, exchange: Exchange, downstream: Any, upload: Upload | None = None) -> None:
        self.step("relay")
        self.upload = upload
        exchange.ending = self.ending

    def accompany(self, exchange: Exchange, downstream: Any) -> None:
        self.accompanied += 1
        if self.waits_long:
            exchange.waiting = WaitingClient(downstream, (), 0.0)
            exchange.waiting.fill()

    def release(self, exchange: Exchange) -> None:
        self.accompanied = 0

    def merges_for(self, tenant: Tenant) -> bool:
        return self.merges

    async def answer(self, exchange: Exchange, client: Any) -> None:
        self.step("models")

    def settle(self, exchange: Exchange) -> None:
        self.step("settle")


class Contexts:
    """Stored contexts, as a part of the phases."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases

    async def answer(self, exchange: Exchange, client: Any) -> None:
        self.phases.step("contexts.answer")

    async def expand(self, exchange: Exchange) -> None:
        self.phases.step("contexts.expand")

    def tell_checked(self, exchange: Exchange, client: Any) -> None:
        self.phases.step("contexts.tell_checked")

    def settle(self, exchange: Exchange) -> None:
        self.phases.step("contexts.settle")


class Waits:
    """The wait between plan and relay, as a part of the phases."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases

    async def admit(self, exchange: Exchange) -> None:
        self.phases.step("admit")

    def judge(self, exchange: Exchange) -> None:
        return None

    def settle(self, exchange: Exchange) -> None:
        self.phases.settled.append(exchange)
        self.phases.step("admit.settle")


DECISIONS = ["read", "fingerprint", "look_up", "plan"]
ANSWERED = ["admit", "relay", "note_answered"]
END = ["settle", "admit.settle", "contexts.settle"]


REFUSED_AT = [
    ("read", ["read"]),
    ("plan", DECISIONS),
    ("admit", [*DECISIONS, "admit"]),
    ("relay", [*DECISIONS, "admit", "relay"]),
]


async def ran(phases: Phases, asked: Exchange) -> tuple[Exchange, Kept]:
    """An exchange after the whole pipeline, and what the client got."""
    kept = Kept()
    await phases.pipeline.run(asked, kept)
    return asked, kept


async def test_a_request_goes_through_its_phases_in_order() -> None:
    """From the body to the settlement, each once."""
    phases = Phases()
    await phases.pipeline.handle(exchange("POST", "/v1/chat/completions", CHAT).call, Kept())
    assert phases.steps == [*DECISIONS, *ANSWERED, *END]


async def test_the_body_that_is_passed_through_and_the_exchange_itself_reach_the_last_phases() -> None:
    """The relay sends the one; the gate learns from the other and takes its pass back."""
    phases, asked, upload = Phases(), exchange("POST", "/v1/files"), Upload(no_pieces(), 0)
    await phases.pipeline.run(asked, Kept(), upload)
    assert phases.upload is upload
    assert phases.steps.index("checked") == phases.steps.index("relay") - 1
    await phases.news()
    assert phases.slept == [OBJECT_NEWS_SECONDS]
    assert phases.settled == [asked]


async def no_pieces() -> AsyncIterator[bytes]:
    return
    yield


@pytest.mark.parametrize("object_is_news", [False, True])
async def test_a_body_that_takes_long_is_read_in_a_thread_of_its_own(object_is_news: bool) -> None:
    """The loop goes on meanwhile; what was read is then the request's, also if it had to be read a second time."""
    phases = Phases(read=[TakesLong(), *([UnknownObject("no")] if object_is_news else [])])
    threads: list[tuple[int, bool]] = []

    def read(exchange: Exchange) -> None:
        threads.append((threading.get_ident(), exchange.is_read_aside))
        exchange.model = f"read {len(threads)}"
        phases.step("read")

    phases.read = read  # type: ignore[method-assign]
    phases.pipeline = Pipeline(phases, phases, phases, phases, phases, Contexts(phases), Waits(phases), phases.sleep)
    asked, _ = await ran(phases, exchange("POST", "/v1/chat/completions", CHAT))
    reads = 3 if object_is_news else 2
    assert phases.steps == ["read"] * (reads - 1) + [*DECISIONS, *ANSWERED, *END]
    assert threads[0] == (threading.get_ident(), False)
    assert all(thread != threading.get_ident() and aside for thread, aside in threads[1:])
    assert asked.model == f"read {reads}"
    assert not asked.only_explained
    assert phases.slept == ([OBJECT_NEWS_SECONDS] if object_is_news else [])


async def test_a_refusal_in_the_thread_is_answered_with_what_was_read_before_it() -> None:
    """The log names the model that the client may not use."""
    phases = Phases()

    def read(exchange: Exchange) -> None:
        if not exchange.is_read_aside:
            raise TakesLong
        exchange.model = "secret"
        raise BadRequest("no")

    phases.read = read  # type: ignore[method-assign]
    phases.pipeline = Pipeline(phases, phases, phases, phases, phases, Contexts(phases), Waits(phases), phases.sleep)
    asked, kept = await ran(phases, exchange("POST", "/v1/chat/completions", CHAT))
    assert (asked.model, asked.status, len(kept.calls)) == ("secret", 400, 1)


async def test_stored_contexts_and_the_list_of_models_are_answered_here() -> None:
    """Neither is routed; the list is made here only if a single replica's is not enough."""
    phases = Phases()
    await ran(phases, exchange("POST", "/v1/caching", {}))
    assert phases.steps == ["contexts.answer", *END]
    for merges, steps in ((True, ["models"]), (False, [*DECISIONS, *ANSWERED])):
        phases = Phases()
        phases.merges = merges
        await ran(phases, exchange("GET", "/v1/models"))
        assert phases.steps == [*steps, *END]


@pytest.mark.parametrize(("failing", "before"), REFUSED_AT)
async def test_a_refusal_is_answered_and_settled_wherever_it_arises(failing: str, before: list[str]) -> None:
    """With its status, its code and the request's id; the upstream's failures are told from Cairn's refusals."""
    for error, ending in (
        (BadRequest("no", param="x"), Ending.REFUSED),
        (Overloaded("full", retry_after_seconds=2.0), Ending.REFUSED),
        (ResetBeforeResponse("gone"), Ending.UPSTREAM_FAILED),
    ):
        phases = Phases(**{failing: [error]})
        asked, kept = await ran(phases, exchange("POST", "/v1/chat/completions", CHAT))
        assert phases.steps == [*before, *END]
        assert (asked.ending, asked.status, asked.error_code) == (ending, error.status, error.code or error.type)
        _, status, reason, headers, body = kept.calls[0]
        assert isinstance(headers, tuple)
        assert isinstance(body, bytes)
        assert (status, bool(reason)) == (error.status, True)
        assert (b"x-request-id", b"r") in headers
        assert json.loads(body)["error"]["message"] == error.message
        assert len(kept.calls) == 1


@pytest.mark.parametrize("failing", ["admit", "relay"])
async def test_a_refusal_after_comments_is_the_last_event_of_the_stream_and_no_second_head(failing: str) -> None:
    """In the cold gate as at a replica; status, ending and code are those of the refusal."""
    error = Overloaded("full", retry_after_seconds=2.0)
    phases = Phases(**{failing: [error]})
    phases.waits_long = True
    asked, kept = await ran(phases, exchange("POST", "/v1/chat/completions", CHAT))
    assert [call[0] for call in kept.calls] == ["begin", "write_last", "write_last", "end"]
    assert kept.calls[1][1] == COMMENT
    event = kept.calls[2][1]
    assert isinstance(event, bytes)
    assert json.loads(event.removeprefix(b"data: "))["error"]["message"] == "full"
    assert (asked.ending, asked.status, asked.error_code) == (Ending.REFUSED, 503, error.code)
    assert asked.outcome(0.0).head_sent_early
    assert phases.accompanied == 0


@pytest.mark.parametrize("error", [asyncio.CancelledError(), ConnectionResetError(), ZeroDivisionError()])
@pytest.mark.parametrize("failing", ["read", "admit", "relay"])
async def test_a_client_that_leaves_and_a_defect_are_settled_and_passed_on(
    failing: str, error: BaseException
) -> None:
    """Nothing is written for them here."""
    phases = Phases(**{failing: [error]})
    kept = Kept()
    with pytest.raises(type(error)):
        await phases.pipeline.run(exchange("POST", "/v1/chat/completions", CHAT), kept)
    assert phases.steps[-len(END) :] == END
    assert kept.calls == []
    assert phases.accompanied == 0


async def test_an_object_that_another_worker_made_a_moment_ago_is_waited_for_once() -> None:
    """News of it takes some milliseconds; after that it does not exist."""
    unknown = UnknownObject("no such object")
    phases = Phases(read=[unknown, None])
    await ran(phases, exchange("GET", "/v1/files/file-1"))
    assert phases.steps == ["read", *DECISIONS, *ANSWERED, *END]
    assert phases.slept == [OBJECT_NEWS_SECONDS]
    phases = Phases(read=[unknown, unknown])
    asked, _ = await ran(phases, exchange("GET", "/v1/files/file-1"))
    assert (asked.status, phases.steps) == (404, ["read", "read", *END])


@pytest.mark.parametrize(("named", "expands"), [(True, True), (False, False)])
async def test_a_context_is_inserted_before_the_prompt_is_hashed(named: bool, expands: bool) -> None:
    """If a message or a header may name one."""
    phases = Phases()
    reader = phases.read

    def read(asked: Exchange) -> None:
        reader(asked)
        asked.prompt = _prompt(may_name_context=named)

    phases.read = read  # type: ignore[method-assign, assignment]
    await ran(phases, exchange("POST", "/v1/chat/completions", CHAT))
    assert (phases.steps[1:3] == ["contexts.expand", "check_inserted"]) is expands
    assert ("check_inserted" in phases.steps) is expands
    assert phases.slept == []


async def test_an_object_that_a_context_names_may_be_announced_a_moment_later() -> None:
    """By the worker at which it was created; then it is looked up once more."""
    unknown = UnknownObject("none")
    for failures, status in (([unknown], 0), ([unknown, unknown], 404)):
        phases = Phases(check_inserted=failures)
        reader = phases.read

        def read(asked: Exchange, reader: Any = reader) -> None:
            reader(asked)
            asked.prompt = _prompt(may_name_context=True)

        phases.read = read  # type: ignore[method-assign, assignment]
        asked, _ = await ran(phases, exchange("POST", "/v1/chat/completions", CHAT))
        assert phases.slept == [OBJECT_NEWS_SECONDS]
        assert asked.status == status


def _prompt(*, may_name_context: bool) -> Prompt:
    body = b'{"model":"m","messages":[{"role":"cache","content":"tag=a"}]}'
    prompt = read_prompt(body if may_name_context else body.replace(b"cache", b"user"), Endpoint.CHAT)
    assert prompt.may_name_context is may_name_context
    return prompt


async def test_a_dry_run_of_a_context_is_answered_and_not_relayed() -> None:
    """It only checks."""
    phases = Phases()
    asked = exchange("POST", "/v1/chat/completions", CHAT)
    asked.only_checked = True
    await ran(phases, asked)
    assert phases.steps == [*DECISIONS, "contexts.tell_checked", *END]


async def test_only_an_answered_prompt_is_noted() -> None:
    """A prompt that was refused, or failed, does not count as answered for the tenant."""
    for ending, noted in ((Ending.COMPLETE, True), (Ending.UPSTREAM_STATUS, False), (Ending.TRUNCATED, False)):
        phases = Phases()
        phases.ending = ending
        await ran(phases, exchange("POST", "/v1/chat/completions", CHAT))
        assert ("note_answered" in phases.steps) is noted


async def test_a_call_that_was_not_admitted_is_answered_and_settled() -> None:
    """Like any other."""
    phases, kept = Phases(), Kept()
    phases.pipeline.turn_away(exchange("POST", "/v1/chat/completions").call, BadRequest("no"), kept)
    assert phases.steps == ["settle"]
    assert kept.calls[0][1] == 400

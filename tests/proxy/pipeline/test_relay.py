"""The relay on its own: each await cancelled, each failure, and what is given back."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import threading
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest

from proxy.errors import (
    BadResponse,
    CairnError,
    ConnectFailed,
    FirstByteTimeout,
    IdleTimeout,
    PoolTimeout,
    ResetBeforeResponse,
    ResetMidResponse,
)
from proxy.fleet import Failure, Fleet
from proxy.metrics.definitions import HIDDEN_ERRORS, STREAM_ABORTS
from proxy.model import Ending, Endpoint, UsageRequest
from proxy.pipeline import response_relay
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.silence import COMMENT, SilenceWatch
from proxy.records import Usage
from proxy.upstream import Framing
from proxy.wire.late import events_of_plain
from tests.proxy.pipeline.bench import DONE, SSE, TOKEN, Bench, Downstream, Upstream, turns

JSON = ((b"content-type", b"application/json"),)
OK_BODY = b'{"choices":[{"message":{"content":"a"}}],"usage":{"prompt_tokens":9,"completion_tokens":1}}'


def upstream(bench: Bench, status: int = 200, body: bytes | None = OK_BODY, *, sse: bool = False) -> Upstream:
    made = Upstream(bench.clock, status, SSE if sse else (), body)
    bench.client.script.append(made)
    return made


# -- plain responses


async def test_a_plain_response_is_passed_on_whole_with_its_usage() -> None:
    bench = Bench()
    upstream(bench)
    exchange = bench.exchange()
    client = await bench.run(exchange)
    assert (client.status, client.body, client.ended) == (200, OK_BODY, True)
    assert exchange.ending is Ending.COMPLETE
    assert exchange.usage is not None
    assert exchange.usage.prompt_tokens == 9
    assert bench.nothing_is_claimed()
    assert bench.placements.done == {"placed": 1, "computed": 1}


async def test_a_long_plain_response_is_relayed_in_pieces_with_back_pressure() -> None:
    """Nothing more is taken from the upstream while the client does not read."""
    bench = Bench()
    made = upstream(bench, body=None)
    made.send(b"x" * 300_000)
    exchange = bench.exchange()
    bench.downstream.full = True
    task = bench.start(exchange)
    await bench.downstream.waiting.wait()
    made.send(b"y" * 10)
    await turns()
    assert len(bench.downstream.body) == 300_000
    bench.downstream.full = False
    bench.downstream.read.set()
    made.end()
    client = await task
    assert client.body.endswith(b"y" * 10)
    assert client.ended


@pytest.mark.parametrize(("status", "is_read"), [(200, True), (400, False)])
async def test_the_usage_of_a_long_plain_response_is_read_though_it_is_relayed_in_pieces(
    status: int, is_read: bool
) -> None:
    """From all pieces together, and only of a success."""
    bench = Bench()
    made = upstream(bench, status, body=None)
    body = b'{"pad":"%b",%b' % (b"x" * 300_000, OK_BODY[1:])
    for begin in range(0, len(body), 100_000):
        made.send(body[begin : begin + 100_000])
    made.response.content_length = len(body)
    exchange = bench.exchange()
    task = bench.start(exchange)
    await turns()
    made.end()
    client = await task
    assert (client.body, client.length) == (body, len(body))
    assert (exchange.usage is not None) is is_read
    assert exchange.usage is None or exchange.usage.prompt_tokens == 9


async def test_an_error_status_is_passed_on_and_its_placement_taken_back() -> None:
    bench = Bench()
    upstream(bench, 400, b"no")
    exchange = bench.exchange()
    client = await bench.run(exchange)
    assert (client.status, client.body) == (400, b"no")
    assert exchange.ending is Ending.UPSTREAM_STATUS
    assert bench.placements.done["taken back"] == 1
    assert bench.nothing_is_claimed()


@pytest.mark.parametrize("status", [200, 304])
async def test_a_response_without_a_body_is_passed_on_with_the_length_that_its_head_names(status: int) -> None:
    """As the answer to a HEAD."""
    bench = Bench()
    made = upstream(bench, status, b"")
    made.response.framing, made.response.content_length = Framing.NONE, 17
    exchange = bench.exchange(endpoint=Endpoint.OTHER)
    client = await bench.run(exchange)
    assert (client.status, client.length, client.body, client.ended) == (status, 17, b"", True)
    assert exchange.ending is Ending.COMPLETE


@pytest.mark.parametrize(("status", "note"), [(200, b"4"), (400, None)])
async def test_the_answer_to_a_stored_context_says_how_many_tokens_that_saved(
    status: int, note: bytes | None
) -> None:
    """If it succeeded."""
    bench = Bench()
    body = OK_BODY[:-2] + b',"prompt_tokens_details":{"cached_tokens":4}}}'
    upstream(bench, status, body)
    exchange = bench.exchange()
    exchange.stored = cast("Any", object())  # any stored context
    client = await bench.run(exchange)
    assert client.headers.get(b"msh-context-cache-token-saved") == note
    assert client.body == body


async def test_the_usage_of_a_compressed_response_is_read_and_its_bytes_are_the_upstream_s() -> None:
    bench = Bench()
    made = upstream(bench, body=gzip.compress(OK_BODY))
    made.response.headers = ((b"content-encoding", b"gzip"),)
    exchange = bench.exchange()
    assert gzip.decompress((await bench.run(exchange)).body) == OK_BODY
    assert exchange.usage is not None
    assert exchange.usage.prompt_tokens == 9


@pytest.mark.parametrize(("method", "names"), [("GET", {"a", "b"}), ("DELETE", set())])
async def test_the_models_that_an_upstream_lists_may_be_labels(method: str, names: set[str]) -> None:
    """A body that is no list of models names none."""
    for body, found in ((b'{"data":[{"id":"a"},{"id":"b"}]}', names), (b"<html>", set())):
        bench = Bench()
        upstream(bench, body=body)
        exchange = bench.exchange(endpoint=Endpoint.MODELS)
        exchange.call = dataclasses.replace(exchange.call, method=method)
        assert (await bench.run(exchange)).body == body
        assert bench.names == found


@pytest.mark.parametrize(("named", "ending"), [((), Ending.TRUNCATED), (JSON, Ending.COMPLETE)])
async def test_a_compressed_answer_to_a_request_for_a_stream_is_what_its_content_type_says(
    named: tuple[tuple[bytes, bytes], ...], ending: Ending
) -> None:
    """Without one it is a stream, of which the end is missing."""
    bench = Bench()
    made = upstream(bench, body=gzip.compress(OK_BODY))
    made.response.headers = (*named, (b"content-encoding", b"gzip"))
    exchange = bench.exchange(stream=True)
    await bench.run(exchange)
    assert exchange.ending is ending


async def test_what_a_plain_response_creates_is_remembered_with_its_replica() -> None:
    """Its later requests go there."""
    bench = Bench()
    upstream(bench, body=b'{"id":"resp_1","object":"response","usage":null}')
    exchange = bench.exchange(endpoint=Endpoint.RESPONSES)
    exchange.call = dataclasses.replace(exchange.call, target="/v1/responses")
    await bench.run(exchange)
    assert [name for part in bench.placements.locations.chunks(9) for name in part.values()] == ["0"]


@pytest.mark.parametrize(("is_provider", "names"), [(True, {"m"}), (False, set())])
async def test_a_provider_s_model_may_be_a_label_once_it_has_answered(is_provider: bool, names: set[str]) -> None:
    """A name that only clients have sent may not, and engines list theirs."""
    for body, found in ((OK_BODY, names), (b"{}", set())):
        bench = Bench()
        upstream(bench, body=body)
        exchange = bench.exchange()
        exchange.pool = msgspec.structs.replace(bench.pool, is_provider=is_provider)
        await bench.run(exchange)
        assert bench.names == found


@pytest.mark.parametrize(
    ("endpoint", "body", "kind"),
    [
        (Endpoint.CHAT, b'{"error":{"message":"out of memory"}}', "error_body"),
        (Endpoint.CHAT, b' \n{"error":{"message":"out of memory"}}', "error_body"),
        (Endpoint.CHAT, b"<!DOCTYPE html><title>Sign in</title>", "html"),
        (Endpoint.INFERENCE, b"  <HTML>Sign in</HTML>", "html"),
        (Endpoint.INFERENCE, b"RIFF....WAVE", None),
        (Endpoint.EMBEDDINGS, b'{"data":[]}', None),
    ],
)
async def test_an_error_behind_a_successful_status_is_counted_and_its_placement_taken_back(
    monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint, body: bytes, kind: str | None
) -> None:
    """The client gets what the upstream sent. Sound and other media are no errors, and only a prompt was placed."""
    bench = Bench(max_retries=0)
    upstream(bench, body=body)
    failures: list[Failure] = []
    reasons: list[str] = []

    def failed(_: Fleet, number: int, failure: Failure, now_seconds: float, reason: str) -> None:
        assert (number, now_seconds) == (0, bench.clock.monotonic())
        failures.append(failure)
        reasons.append(reason)

    monkeypatch.setattr(Fleet, "failed", failed)
    exchange = bench.exchange(endpoint=endpoint)
    client = await bench.run(exchange)
    assert (client.status, client.body) == (200, body)
    assert exchange.ending is (Ending.COMPLETE if kind is None else Ending.UPSTREAM_ERROR)
    if kind is not None:
        assert bench.recorder.counter(HIDDEN_ERRORS, ("r0", kind)).value == 1
        assert {failure.by_status for failure in failures} == {True}, "clients are told apart, as for a status"
        assert reasons[-1] == f"a successful status with {kind}"
    assert bench.placements.done["taken back"] == (1 if kind and endpoint is Endpoint.CHAT else 0)


@pytest.mark.parametrize(("error", "counted"), [(b"", 1), (b'data: {"error":{"message":"m"}}\n\n', 0)])
async def test_a_stream_without_tokens_from_the_last_replica_is_passed_on_and_counted(
    error: bytes, counted: int
) -> None:
    """Once: an error that follows is counted as such."""
    bench = Bench(max_retries=0)
    made = upstream(bench, sse=True, body=None)
    made.send(DONE)
    exchange = bench.exchange(stream=True)
    task = bench.start(exchange)
    await turns()
    if error:
        made.send(error)
    made.end()
    client = await task
    assert (client.status, client.body, exchange.ending) == (200, DONE + error, Ending.UPSTREAM_ERROR)
    assert bench.recorder.counter(HIDDEN_ERRORS, ("r0", "empty")).value == counted


# -- failures before anything reached the client


BEFORE: list[CairnError] = [
    ConnectFailed("refused"),
    ResetBeforeResponse("reset"),
    BadResponse("not HTTP"),
]


@pytest.mark.parametrize("error", BEFORE)
async def test_a_failure_before_the_response_is_tried_at_the_next_replica(error: CairnError) -> None:
    """The claims of the first attempt are released before the second begins."""
    bench = Bench(error)
    upstream(bench)
    exchange = bench.exchange()
    client = await bench.run(exchange)
    assert (client.status, len(bench.client.sent)) == (200, 2)
    assert bench.client.sent[0][0] != bench.client.sent[1][0]
    assert bench.placements.done == {"placed": 2, "taken back": 1, "computed": 1}
    assert client.headers[b"x-cairn-tried"].startswith(b"r0;")
    assert exchange.outcome(0.0).retries == 1
    assert bench.nothing_is_claimed()


async def test_a_success_elsewhere_is_told_to_the_fleet_with_the_failure_that_it_proves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that could not be made proves nothing by it."""
    proven: list[tuple[int, float, str]] = []
    monkeypatch.setattr(Fleet, "proven", lambda _, number, now, reason: proven.append((number, now, reason)))
    for error in (ConnectFailed("refused"), BadResponse("not HTTP")):
        bench = Bench(error)
        upstream(bench)
        assert (await bench.run(bench.exchange())).status == 200
    assert proven == [(0, bench.clock.monotonic(), f"{BadResponse.reason}, and another replica succeeded")]


@pytest.mark.parametrize("error", [*BEFORE, FirstByteTimeout("late")])
async def test_the_last_failure_is_raised_with_everything_given_back(error: CairnError) -> None:
    """With one replica there is no other to try, but a connection that died is worth a second attempt."""
    bench = Bench(error, error, replicas=1)
    with pytest.raises(type(error)):
        await bench.run(bench.exchange())
    assert not bench.downstream.begun
    assert len(bench.client.sent) == (2 if isinstance(error, ResetBeforeResponse) else 1)
    assert bench.nothing_is_claimed()


async def test_a_full_pool_of_connections_is_tried_elsewhere_and_says_nothing_about_the_replica() -> None:
    bench = Bench()
    for _ in range(3):
        bench.client.script.append(PoolTimeout("all in use"))
        upstream(bench)
        exchange = bench.exchange()
        assert (await bench.run(exchange)).status == 200
        bench.downstream = type(bench.downstream)()
    assert bench.fleet.cause(0) is None


async def test_a_compressed_stream_may_wait_for_its_prefill_too() -> None:
    """It cannot be looked into before it is relayed, but its silence is bounded alike."""
    bench = Bench(first_byte_seconds=600.0)
    made = upstream(bench, body=None, sse=True)
    made.response.headers = (*made.response.headers, (b"content-encoding", b"gzip"))
    task = bench.start(bench.exchange(stream=True))
    await turns()
    assert bench.downstream.begun
    assert made.source.allowed_silences == [600.0]
    made.send(gzip.compress(TOKEN + DONE))
    await turns()
    assert made.source.allowed_silences == [600.0, 120.0]
    made.end()
    await task


async def test_a_request_that_timed_out_is_sent_to_no_other_replica() -> None:
    bench = Bench(FirstByteTimeout("late"))
    upstream(bench)
    with pytest.raises(FirstByteTimeout):
        await bench.run(bench.exchange())
    assert len(bench.client.sent) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
async def test_a_status_is_tried_elsewhere_and_the_refused_response_is_closed(status: int) -> None:
    bench = Bench()
    refused = upstream(bench, status, None)
    upstream(bench)
    client = await bench.run(bench.exchange())
    assert client.status == 200
    assert refused.source.closed
    assert bench.nothing_is_claimed()


async def test_a_request_that_creates_something_is_sent_once_whatever_the_status() -> None:
    """A second batch or file would be one too many; only a connection that was never made is tried again."""
    bench = Bench()
    upstream(bench, 503, b"busy")
    exchange = bench.exchange(endpoint=Endpoint.OTHER)
    assert (await bench.run(exchange)).status == 503
    assert len(bench.client.sent) == 1
    bench = Bench(ConnectFailed("refused"))
    upstream(bench, 200, b"{}")
    assert (await bench.run(bench.exchange(endpoint=Endpoint.OTHER))).status == 200
    assert len(bench.client.sent) == 2


# -- streams


async def test_a_stream_is_relayed_as_it_comes_and_its_ending_is_noted() -> None:
    bench = Bench()
    made = upstream(bench, body=None, sse=True)
    made.send(TOKEN)
    exchange = bench.exchange(stream=True)
    task = bench.start(exchange)
    await turns()
    assert bench.downstream.body == TOKEN
    assert bench.placements.done["computed"] == 1
    made.send(DONE)
    made.end()
    client = await task
    assert (client.body, client.ended, exchange.ending) == (TOKEN + DONE, True, Ending.COMPLETE)
    assert bench.nothing_is_claimed()


@pytest.mark.parametrize("asks", [False, True])
async def test_usage_that_only_cairn_asked_for_is_read_and_not_passed_on(asks: bool) -> None:
    """A client that asked for it gets it."""
    bench = Bench()
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}}\n\n'
    upstream(bench, body=TOKEN + usage + DONE, sse=True)
    exchange = bench.exchange(stream=True)
    if asks:
        assert exchange.prompt is not None
        exchange.prompt = dataclasses.replace(exchange.prompt, usage_request=UsageRequest.ASKED)
    client = await bench.run(exchange)
    assert client.body == (TOKEN + usage + DONE if asks else TOKEN + DONE)
    assert exchange.usage == Usage(9, 1)


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize("withholds", [False, True])
async def test_the_length_of_a_stream_is_passed_on_only_if_nothing_is_added_or_withheld(
    withholds: bool, comments: bool
) -> None:
    """Either alone makes the body longer or shorter than the upstream says."""
    bench = Bench()
    if comments:
        Timers(bench)
    if not withholds:
        bench.dispatcher.always_reports_usage(0)
    made = upstream(bench, body=TOKEN + DONE, sse=True)
    made.response.content_length = len(TOKEN + DONE)
    exchange = bench.exchange(stream=True)
    client = await bench.run(exchange)
    assert exchange.asked_usage is withholds
    assert client.body == TOKEN + DONE
    assert client.length == (None if withholds or comments else len(TOKEN + DONE))


async def test_the_stream_of_a_response_is_read_by_its_own_dialect() -> None:
    """Its usage is in the event that ends it."""
    bench = Bench()
    ended = {
        "id": "r",
        "usage": {"input_tokens": 9, "output_tokens": 1, "input_tokens_details": {"cached_tokens": 4}},
    }
    events = ({"type": "response.output_text.delta", "delta": "a"}, {"type": "response.completed", "response": ended})
    upstream(bench, body=b"".join(b"data: %b\n\n" % msgspec.json.encode(each) for each in events), sse=True)
    exchange = bench.exchange(stream=True, endpoint=Endpoint.RESPONSES)
    await bench.run(exchange)
    assert (exchange.usage, exchange.ending) == (Usage(9, 1, 4), Ending.COMPLETE)


async def test_a_stream_without_its_end_is_truncated() -> None:
    bench = Bench()
    upstream(bench, body=TOKEN, sse=True)
    exchange = bench.exchange(stream=True)
    assert (await bench.run(exchange)).ended
    assert exchange.ending is Ending.TRUNCATED


@pytest.mark.parametrize("asked_usage", [False, True])
@pytest.mark.parametrize(
    ("end", "breaks"),
    [(b"", False), (TOKEN[:20], True), (b"data: [DONE]", False), (b": comment", True), (b"data: {}\n", True)],
)
async def test_a_stream_until_the_connection_closes_breaks_if_that_is_inside_an_event(
    end: bytes, breaks: bool, asked_usage: bool
) -> None:
    """A server that is killed closes its connections like one that has sent everything."""
    bench = Bench()
    made = upstream(bench, body=TOKEN + end, sse=True)
    made.response.framing = Framing.CLOSE
    exchange = bench.exchange(stream=True)
    assert exchange.prompt is not None
    if asked_usage:
        exchange.prompt = dataclasses.replace(exchange.prompt, usage_request=UsageRequest.ASKED)
    client = await bench.run(exchange)
    assert (client.broken, client.ended) == (breaks, not breaks)
    assert (b'"error"' in client.body.removeprefix(TOKEN + end + b"\n\n")) is breaks


CUT_JSON = [
    (b'{"a":"xxx', True),
    (b' ["x", {}] ', False),
    (b"12", False),
    (b"", False),
]


@pytest.mark.parametrize(("body", "is_cut"), CUT_JSON)
@pytest.mark.parametrize("kind", [b"application/json", b"application/octet-stream"])
async def test_unfinished_json_until_the_connection_closes_is_broken_off(
    kind: bytes, body: bytes, is_cut: bool
) -> None:
    """The client has its beginning. Content of another kind may end anywhere."""
    bench = Bench()
    made = Upstream(bench.clock, 200, ((b"content-type", kind),))
    made.response.framing = Framing.CLOSE
    bench.client.script.append(made)
    task = bench.start(bench.exchange(endpoint=Endpoint.OTHER))
    await turns()
    for piece in (body[:1], body[1:], b" \n"):
        made.send(piece)
        await turns()
    made.end()
    client = await task
    breaks = is_cut and b"json" in kind
    assert (client.broken, client.ended) == (breaks, not breaks)


@pytest.mark.parametrize("padding", [0, 100_000])
@pytest.mark.parametrize(("end", "is_cut"), [(b"]}", True), (b"]}}", False)])
async def test_json_that_was_cut_behind_a_bracket_inside_it_is_broken_off(
    end: bytes, is_cut: bool, padding: int
) -> None:
    """The body is read for its usage in any case there; a short one has not begun by then."""
    bench = Bench(replicas=1)
    made = Upstream(bench.clock, 200, JSON)
    made.response.framing = Framing.CLOSE
    bench.client.script.append(made)
    task = bench.start(bench.exchange())
    await turns()
    for piece in (b'{"a":{"b":["%b"' % (b"x" * padding), end):
        made.send(piece)
        await turns()
    made.end()
    if is_cut and not padding:
        with pytest.raises(ResetMidResponse):
            await task
    else:
        client = await task
        assert (client.broken, client.ended) == (is_cut, not is_cut)


@pytest.mark.parametrize(("body", "is_cut"), [*CUT_JSON, (b'{"a":{"b":[1]}', True)])
async def test_unfinished_json_until_the_connection_closes_is_an_error_if_it_came_at_once(
    body: bytes, is_cut: bool
) -> None:
    bench = Bench()
    made = Upstream(bench.clock, 200, JSON, body)
    made.response.framing = Framing.CLOSE
    bench.client.script.append(made)
    exchange = bench.exchange(endpoint=Endpoint.OTHER)
    if is_cut:
        with pytest.raises(ResetMidResponse):
            await bench.run(exchange)
        assert not bench.downstream.begun
    else:
        assert (await bench.run(exchange)).body == body


async def test_a_stream_that_breaks_before_its_first_event_is_tried_elsewhere() -> None:
    """The head had come, but the client has nothing yet."""
    bench = Bench()
    first = upstream(bench, body=None, sse=True)
    first.send(b": waiting\n\n")
    upstream(bench, body=TOKEN + DONE, sse=True)
    exchange = bench.exchange(stream=True)
    task = bench.start(exchange)
    await turns()
    assert not bench.downstream.begun
    first.fail(ResetMidResponse("reset"))
    client = await task
    assert client.body == TOKEN + DONE
    assert exchange.ending is Ending.COMPLETE


@pytest.mark.parametrize("error", [ResetMidResponse("reset"), IdleTimeout("silent"), BadResponse("bad chunk")])
@pytest.mark.parametrize("after_token", [False, True])
async def test_a_stream_that_breaks_later_ends_with_an_error_event_and_no_end(
    error: CairnError, after_token: bool
) -> None:
    """A prefix that was not computed is taken back."""
    bench = Bench()
    failures = list[Failure]()
    bench.fleet.failed = lambda number, failure, *_: failures.append(failure)  # type: ignore[method-assign,assignment]
    made = upstream(bench, body=None, sse=True)
    role = b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
    made.send(TOKEN if after_token else role)
    exchange = bench.exchange(stream=True)
    task = bench.start(exchange)
    await turns()
    made.fail(error)
    client = await task
    assert client.broken
    assert not client.ended
    assert b'"error"' in client.body
    assert exchange.ending is Ending.UPSTREAM_BROKE
    assert [(failure.by_status, failure.after_head) for failure in failures] == [(False, True)]
    assert bench.placements.done["taken back"] == (0 if after_token else 1)
    phase = "after_first_token" if after_token else "before_first_token"
    assert bench.recorder.counter(STREAM_ABORTS, ("upstream", phase)).value == 1
    assert bench.nothing_is_claimed()


@pytest.mark.parametrize("cut", range(1, len(b'data: {"error": {"message": "m"}}\n\n')))
async def test_an_error_in_the_first_event_is_found_at_any_cut(cut: int) -> None:
    event = b'data: {"error": {"message": "m"}}\n\n'
    bench = Bench()
    made = upstream(bench, body=None, sse=True)
    upstream(bench, body=TOKEN + DONE, sse=True)
    task = bench.start(bench.exchange(stream=True))
    for piece in (event[:cut], event[cut:]):
        made.send(piece)
        await turns()
    assert (await task).body == TOKEN + DONE
    assert bench.recorder.counter(HIDDEN_ERRORS, ("r0", "error_event")).value == 1


async def test_the_head_of_a_stream_is_held_back_for_its_first_event_and_no_longer_than_configured() -> None:
    """After that the client gets it, and no other replica is tried."""
    bench = Bench(hold_seconds=0.01)
    made = upstream(bench, body=None, sse=True)
    task = bench.start(bench.exchange(stream=True))
    async with asyncio.timeout(20):
        while not bench.downstream.begun:  # noqa: ASYNC110 - a timer of the loop, which has no event
            await asyncio.sleep(0)
    made.send(b'data: {"error": {}}\n\n')
    made.end()
    client = await task
    assert client.body == b'data: {"error": {}}\n\n'
    assert len(bench.client.sent) == 1


async def test_an_error_inside_a_stream_is_counted_though_the_stream_goes_on_to_its_end() -> None:
    """What came before it was computed, so the placement stays."""
    event = b'data: {"error": {"message": "m"}}\n\n'
    bench = Bench()
    upstream(bench, body=TOKEN + event + DONE, sse=True)
    exchange = bench.exchange(stream=True)
    client = await bench.run(exchange)
    assert (client.body, client.ended) == (TOKEN + event + DONE, True)
    assert exchange.ending is Ending.UPSTREAM_ERROR
    assert bench.recorder.counter(HIDDEN_ERRORS, ("r0", "error_event")).value == 1
    assert bench.placements.done["taken back"] == 0


async def test_what_follows_the_last_whole_event_of_a_stream_reaches_the_client() -> None:
    """Also if the chunk with the usage is withheld, for which events are collected."""
    bench = Bench()
    rest = b'data: {"choices":[{"delta":{"cont'
    upstream(bench, body=TOKEN + rest, sse=True)
    client = await bench.run(bench.exchange(stream=True))
    assert (client.body, client.ended) == (TOKEN + rest, True)


async def test_a_compressed_stream_passes_as_it_came_and_its_tokens_are_counted() -> None:
    """With no usage asked, so that nothing must be withheld."""
    bench = Bench()
    bench.dispatcher.always_reports_usage(0)
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1}}\n\n'
    body = gzip.compress(TOKEN + usage + DONE)
    made = upstream(bench, body=body, sse=True)
    made.response.headers = (*made.response.headers, (b"content-encoding", b"gzip"))
    exchange = bench.exchange(stream=True)
    assert (await bench.run(exchange)).body == body
    assert exchange.usage is not None
    assert (exchange.usage.prompt_tokens, exchange.ending) == (9, Ending.COMPLETE)


@pytest.mark.parametrize("shares_key", [True, False])
async def test_a_streamed_response_and_its_items_belong_to_the_client_that_made_them(shares_key: bool) -> None:
    """With a key of the client's own the upstream itself knows whose the items are."""
    bench = Bench()
    made = upstream(bench, body=None, sse=True)
    exchange = bench.exchange(stream=True, endpoint=Endpoint.RESPONSES)
    exchange.pool = msgspec.structs.replace(bench.pool, shares_key=shares_key)
    task = bench.start(exchange)
    for piece in (
        b'data: {"type":"response.created",',
        b'"response":{"id":"resp_1"}}\n\n',
        b'data: {"type":"response.output_item.added","item":{"id":"msg_1"}}\n\n',
    ):
        made.send(piece)
        await turns()
    made.end()
    await task
    keys = {key for part in bench.placements.locations.chunks(9) for key in part}
    assert keys == ({"tenant/resp_1", "tenant/msg_1"} if shares_key else {"resp_1"})


# -- long pieces of a stream

_TURN_BYTES = 8 * 1024  # of a stream, read at once


async def turns_of_others(task: asyncio.Task[Any]) -> int:
    """Return how often another task that is always ready runs before `task` is done."""
    count = 0
    while not task.done():
        await asyncio.sleep(0)
        count += 1
    return count


@pytest.mark.parametrize("event", [TOKEN, b'data: {"choices":[]}\n\n', b":\n\n", b":\r\n\r\n", b"event: ping\n\n"])
async def test_others_have_a_turn_after_each_few_kilobytes_of_a_long_piece_of_a_stream(event: bytes) -> None:
    """A read of the event loop can hold ten thousand events, which take 0.3 s; the client gets all of them."""
    bench = Bench()
    made = upstream(bench, body=None, sse=True)
    made.send(TOKEN)
    exchange = bench.exchange(stream=True)
    task = bench.start(exchange)
    await turns()
    long = event * (100_000 // len(event))
    made.send(long + DONE)
    made.end()
    assert await turns_of_others(task) > len(long) // _TURN_BYTES
    assert bench.downstream.body == TOKEN + long + DONE
    assert (exchange.ending, exchange.response_bytes) == (Ending.COMPLETE, len(bench.downstream.body))


async def test_others_have_a_turn_in_what_a_few_compressed_bytes_of_a_stream_expand_to() -> None:
    """A kilobyte can hold 40,000 events. The client gets the bytes as they came, and the usage counts."""
    bench = Bench()
    bench.dispatcher.always_reports_usage(0)
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1}}\n\n'
    text = TOKEN + b'data: {"choices":[]}\n\n' * 40_000 + usage + DONE
    body = gzip.compress(text)
    made = upstream(bench, body=body, sse=True)
    made.response.headers = (*made.response.headers, (b"content-encoding", b"gzip"))
    exchange = bench.exchange(stream=True)
    task = bench.start(exchange)
    assert await turns_of_others(task) > len(text) // _TURN_BYTES
    assert bench.downstream.body == body
    assert exchange.usage == Usage(9, 1)


@pytest.mark.parametrize("coding", [b"", b"gzip"])
async def test_a_client_that_is_behind_inside_a_long_piece_of_a_stream_gets_the_rest_when_it_has_read(
    coding: bytes,
) -> None:
    """It is not given more meanwhile, and nothing is given twice."""
    bench = Bench()
    bench.dispatcher.always_reports_usage(0)
    text = TOKEN * 2_000 + DONE
    body = gzip.compress(text) if coding else text
    made = upstream(bench, body=None, sse=True)
    made.response.headers = (*made.response.headers, *([(b"content-encoding", coding)] if coding else []))
    made.send(body)
    bench.downstream.full = True
    task = bench.start(bench.exchange(stream=True))
    await bench.downstream.waiting.wait()
    await turns()
    assert len(bench.downstream.body) == (len(body) if coding else _TURN_BYTES)
    bench.downstream.full = False
    bench.downstream.read.set()
    made.end()
    assert (await task).body == body


# -- silence


async def test_until_the_first_event_the_prefills_limit_holds_and_the_idle_limit_after_it() -> None:
    bench = Bench(first_byte_seconds=600.0, idle_seconds=120.0)
    made = upstream(bench, body=None, sse=True)
    task = bench.start(bench.exchange(stream=True))
    await turns()
    made.send(b": ping\n\n")
    await turns()
    assert made.source.allowed_silences == [600.0]
    made.send(TOKEN)
    await turns()
    assert made.source.allowed_silences == [600.0, 120.0]
    made.send(DONE)
    made.end()
    await task


@pytest.mark.parametrize("alive", [b": ping\n\n", b'event: ping\ndata: {"type": "ping"}\n\n'])
async def test_comments_and_pings_keep_a_stream_alive_for_a_bounded_time(alive: bytes) -> None:
    """Models think behind them; a stream that shows nothing else for too long is ended."""
    bench = Bench()
    made = upstream(bench, body=None, sse=True)
    made.send(TOKEN)
    exchange = bench.exchange(stream=True)
    task = bench.start(exchange)
    await turns()
    for _ in range(8):
        bench.clock.advance(100.0)
        made.send(alive)
        await turns()
    assert not task.done()
    for _ in range(2):
        bench.clock.advance(100.0)
        made.send(alive)
        await turns()
    client = await task
    assert client.broken
    assert exchange.error_code == "upstream_timeout"


class Timers:
    """The callbacks of a `SilenceWatch`, fired by hand."""

    def __init__(self, bench: Bench, **settings: bool) -> None:
        self._clock = bench.clock
        self._pending: list[Callable[[], None]] = []
        bench.silence = SilenceWatch(15.0, bench.clock, call_later=self._later, **settings)

    def _later(self, delay_seconds: float, callback: Callable[[], None]) -> None:
        assert delay_seconds == pytest.approx(1.0)
        self._pending.append(callback)

    def pass_time(self, seconds: int) -> None:
        """Let whole seconds pass, each with its check."""
        for _ in range(seconds):
            self._clock.advance(1.0)
            if self._pending:
                self._pending.pop(0)()

    @property
    def running(self) -> int:
        return len(self._pending)


async def test_a_client_that_gets_nothing_for_a_while_gets_a_comment() -> None:
    """Between events and never inside one."""
    bench = Bench()
    timers = Timers(bench)
    bench.dispatcher.always_reports_usage(0)  # so that nothing is withheld
    made = upstream(bench, body=None, sse=True)
    made.send(TOKEN)
    task = bench.start(bench.exchange(stream=True))
    await turns()
    timers.pass_time(10)
    made.send(TOKEN)
    await turns()
    timers.pass_time(10)
    assert bench.downstream.body == TOKEN * 2
    timers.pass_time(5)
    assert bench.downstream.body == TOKEN * 2 + COMMENT
    made.send(TOKEN[:10])
    await turns()
    timers.pass_time(30)
    assert bench.downstream.body == TOKEN * 2 + COMMENT + TOKEN[:10]
    made.send(TOKEN[10:] + DONE)
    made.end()
    assert (await task).body == TOKEN * 2 + COMMENT + TOKEN + DONE
    timers.pass_time(1)
    assert timers.running == 0


async def test_the_stream_of_a_background_response_gets_comments_and_may_be_silent_while_a_model_thinks() -> None:
    """A GET reads no prompt, so that the stream is passed on unread; a plain body gets none."""
    bench = Bench()
    timers = Timers(bench)
    made = upstream(bench, body=None, sse=True)
    made.send(TOKEN)
    task = bench.start(bench.exchange(endpoint=Endpoint.OTHER))
    await turns()
    assert made.source.allowed_silences == [900.0]
    timers.pass_time(15)
    assert bench.downstream.body == TOKEN + COMMENT
    for piece in (TOKEN[:-1], TOKEN[-1:]):
        made.send(piece)
        await turns()
        timers.pass_time(15)
    assert bench.downstream.body == TOKEN + COMMENT + TOKEN + COMMENT
    made.end()
    await task
    timers.pass_time(1)
    assert timers.running == 0


async def test_a_long_plain_body_gets_no_comment() -> None:
    bench = Bench()
    timers = Timers(bench)
    made = upstream(bench, body=None)
    made.send(b"x" * 300_000 + b"\n\n")
    task = bench.start(bench.exchange())
    await turns()
    timers.pass_time(60)
    made.end()
    assert COMMENT not in (await task).body
    assert made.source.allowed_silences == []


@pytest.mark.parametrize("of", ["encoding", "length"])
async def test_a_passed_stream_into_which_no_comment_fits_gets_none(of: str) -> None:
    """A compressed body, or one whose length its head names, has no place for it."""
    bench = Bench()
    timers = Timers(bench)
    made = upstream(bench, body=None, sse=True)
    if of == "encoding":
        made.response.headers = (*made.response.headers, (b"content-encoding", b"gzip"))
    else:
        made.response.content_length = 300_000
    made.send(b"\n\n")
    task = bench.start(bench.exchange(endpoint=Endpoint.OTHER))
    await turns()
    timers.pass_time(60)
    made.end()
    assert (await task).body == b"\n\n"


async def test_a_comment_comes_by_itself_and_none_after_the_end() -> None:
    """By a real timer."""
    bench = Bench()
    bench.silence = SilenceWatch(0.01, bench.clock)
    made = upstream(bench, body=None, sse=True)
    made.send(TOKEN)
    task = bench.start(bench.exchange(stream=True))
    async with asyncio.timeout(20):
        while COMMENT not in bench.downstream.body:
            bench.clock.advance(1.0)
            await asyncio.sleep(0)
    made.send(DONE)
    made.end()
    assert (await task).body.endswith(DONE)


async def test_a_client_that_waits_for_the_head_of_a_stream_gets_one_with_comments() -> None:
    """And then the events of whichever replica answers; the log shows that the head was sent early."""
    bench = Bench()
    timers = Timers(bench)
    made = upstream(bench, body=None, sse=True)
    exchange = bench.exchange(stream=True)
    exchange.context_notes = ((b"msh-context-cache-id", b"cache-1"),)
    task = bench.start(exchange)
    bench.client.hold.clear()
    await turns()
    timers.pass_time(13)
    assert not bench.downstream.begun
    timers.pass_time(17)
    assert (bench.downstream.status, bench.downstream.body) == (200, COMMENT * 2)
    assert bench.downstream.headers[b"content-type"].startswith(b"text/event-stream")
    assert bench.downstream.headers[b"x-request-id"] == b"id"
    assert bench.downstream.headers[b"msh-context-cache-id"] == b"cache-1"
    bench.client.hold.set()
    made.send(TOKEN + DONE)
    made.end()
    client = await task
    assert (client.body, client.ended) == (COMMENT * 2 + TOKEN + DONE, True)
    assert exchange.ending is Ending.COMPLETE
    assert exchange.outcome(0.0).head_sent_early


async def responding_late(bench: Bench, timers: Timers, exchange: Exchange) -> asyncio.Task[Downstream]:
    """Start a stream whose replica responds only once its client was sent a head and a comment."""
    bench.client.hold.clear()
    task = bench.start(exchange)
    await turns()
    timers.pass_time(15)
    bench.client.hold.set()
    return task


@pytest.mark.parametrize("first", [ResetBeforeResponse("reset"), 503, "error event"])
async def test_failover_stays_possible_after_the_head_was_sent_early(first: object) -> None:
    """Comments are no part of an answer."""
    bench = Bench()
    timers = Timers(bench)
    if isinstance(first, CairnError):
        bench.client.script.append(first)
    elif isinstance(first, int):
        upstream(bench, first)
    else:
        upstream(bench, body=b'data: {"error": {"message": "m"}}\n\n', sse=True)
    upstream(bench, body=TOKEN + DONE, sse=True)
    exchange = bench.exchange(stream=True)
    task = await responding_late(bench, timers, exchange)
    client = await task
    assert client.body == COMMENT + TOKEN + DONE
    assert (exchange.ending, len(exchange.tried)) == (Ending.COMPLETE, 1)
    assert bench.nothing_is_claimed()


@pytest.mark.parametrize("encoding", ["", "gzip"])
async def test_an_error_status_after_the_early_head_is_an_event_and_the_outcome_names_the_status(
    encoding: str,
) -> None:
    bench = Bench()
    timers = Timers(bench)
    bench.dispatcher.always_reports_usage(0)
    body = b'{\n "error": {"message": "too long", "code": "context_length_exceeded"}}'
    made = upstream(bench, 400, gzip.compress(body) if encoding else body)
    if encoding:
        made.response.headers = ((b"content-encoding", b"gzip"),)
    exchange = bench.exchange(stream=True)
    task = await responding_late(bench, timers, exchange)
    client = await task
    event = b'data: {"error":{"message":"too long","code":"context_length_exceeded"}}\n\n'
    assert (client.status, client.body, client.ended) == (200, COMMENT + event, True)
    assert (exchange.status, exchange.ending) == (400, Ending.UPSTREAM_STATUS)
    assert bench.placements.done["taken back"] == 1
    assert bench.nothing_is_claimed()


async def test_a_compressed_stream_is_decoded_for_a_client_that_was_sent_a_head_without_an_encoding() -> None:
    bench = Bench()
    timers = Timers(bench)
    made = upstream(bench, body=None, sse=True)
    made.response.headers = (*made.response.headers, (b"content-encoding", b"gzip"))
    task = await responding_late(bench, timers, bench.exchange(stream=True))
    made.send(gzip.compress(TOKEN + DONE))
    made.end()
    assert (await task).body == COMMENT + TOKEN + DONE


async def test_a_plain_answer_after_the_early_head_is_written_as_a_chunk_with_its_usage_counted() -> None:
    bench = Bench()
    timers = Timers(bench)
    upstream(bench, body=OK_BODY)
    exchange = bench.exchange(stream=True)
    task = await responding_late(bench, timers, exchange)
    client = await task
    assert b'"delta":{"content":"a"}' in client.body
    assert client.body.endswith(b"data: [DONE]\n\n")
    assert exchange.usage is not None
    assert exchange.usage.prompt_tokens == 9


@pytest.mark.parametrize("is_long", [False, True])
async def test_a_long_plain_answer_after_the_early_head_is_rewritten_in_a_thread(
    is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have 8 MB."""
    threads: list[int] = []

    def rewritten(*args: Any, **kwargs: Any) -> bytes:
        threads.append(threading.get_ident())
        return events_of_plain(*args, **kwargs)

    monkeypatch.setattr(response_relay, "events_of_plain", rewritten)
    bench = Bench()
    timers = Timers(bench)
    text = b"a" * (300_000 if is_long else 1)
    upstream(bench, body=b'{"choices":[{"message":{"content":"%b"}}]}' % text)
    client = await (await responding_late(bench, timers, bench.exchange(stream=True)))
    assert b'"delta":{"content":"%b"}' % text in client.body
    assert (threads[0] != threading.get_ident()) is is_long


async def test_an_error_event_after_the_early_head_names_the_request_as_its_dialect_does() -> None:
    """A body that is no error of the dialect, as a proxy in between writes, is told by its status."""
    bench = Bench(max_retries=0)
    timers = Timers(bench)
    bench.dispatcher.always_reports_usage(0)
    upstream(bench, 400, b"Bad Request")
    task = await responding_late(bench, timers, bench.exchange(stream=True, endpoint=Endpoint.MESSAGES))
    assert b'"request_id":"id"' in (await task).body


async def test_a_plain_response_that_breaks_after_the_early_head_is_raised_for_an_event_to_be_written() -> None:
    bench = Bench(max_retries=0)
    timers = Timers(bench)
    bench.dispatcher.always_reports_usage(0)
    made = upstream(bench, 400, None)
    made.send(b'{"err')
    task = await responding_late(bench, timers, bench.exchange(stream=True))
    await turns()
    made.fail(ResetMidResponse("reset"))
    with pytest.raises(ResetMidResponse):
        await task
    assert not bench.downstream.broken
    assert bench.nothing_is_claimed()


@pytest.mark.parametrize(("stream", "before_head"), [(False, True), (True, False)])
async def test_no_head_is_sent_early_for_a_plain_answer_or_where_it_is_off(stream: bool, before_head: bool) -> None:
    bench = Bench()
    timers = Timers(bench, before_head=before_head)
    upstream(bench)
    bench.client.hold.clear()
    task = bench.start(bench.exchange(stream=stream))
    await turns()
    timers.pass_time(60)
    assert not bench.downstream.begun
    bench.client.hold.set()
    assert (await task).body == OK_BODY


async def test_a_client_that_leaves_while_it_gets_comments_gets_no_more() -> None:
    bench = Bench()
    timers = Timers(bench)
    upstream(bench)
    bench.client.hold.clear()
    task = bench.start(bench.exchange(stream=True))
    await turns()
    timers.pass_time(15)
    await left(bench, task)
    timers.pass_time(60)
    assert bench.downstream.body == COMMENT
    assert timers.running == 0


# -- the client leaves


async def left(bench: Bench, task: asyncio.Task[object]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.nothing_is_claimed()


async def test_a_client_that_leaves_while_the_request_is_sent_gives_everything_back() -> None:
    bench = Bench(None)
    exchange = bench.exchange()
    task = bench.start(exchange)
    await bench.client.asked.wait()
    await left(bench, task)
    assert exchange.ending is Ending.CLIENT_LEFT
    assert bench.placements.done == {"placed": 1, "left": 1}


async def test_a_client_that_leaves_in_the_queue_was_never_at_the_replica() -> None:
    bench = Bench(None, limit=1)
    first = bench.start(bench.exchange())
    await bench.client.asked.wait()
    second = bench.exchange(prompt="y" * 9_000)
    waiting = bench.start(second)
    await turns()
    assert len(bench.queues[0]) == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(bench.queues[0]) == 0
    assert len(bench.client.sent) == 1
    assert bench.placements.done["taken back"] == 1
    await left(bench, first)


async def test_a_client_that_leaves_while_the_first_event_is_awaited_closes_the_upstream() -> None:
    bench = Bench()
    made = upstream(bench, body=None, sse=True)
    task = bench.start(bench.exchange(stream=True))
    await turns()
    await left(bench, task)
    assert made.source.closed


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_inside_a_response_closes_the_upstream(stream: bool) -> None:
    bench = Bench()
    made = upstream(bench, body=None, sse=stream)
    made.send(TOKEN)
    exchange = bench.exchange(stream=stream)
    task = bench.start(exchange)
    await turns()
    await left(bench, task)
    assert made.source.closed
    assert exchange.ending is Ending.CLIENT_LEFT
    phase = "after_first_token" if stream else "before_first_token"
    assert bench.recorder.counter(STREAM_ABORTS, ("client", phase)).value == 1


async def test_a_client_that_leaves_while_it_does_not_read_closes_the_upstream() -> None:
    bench = Bench()
    bench.downstream.full = True
    made = upstream(bench, body=None, sse=True)
    made.send(TOKEN)
    task = bench.start(bench.exchange(stream=True))
    await bench.downstream.waiting.wait()
    await left(bench, task)
    assert made.source.closed


async def test_a_write_that_fails_is_a_client_that_left() -> None:
    bench = Bench()
    bench.downstream.gone = True
    made = upstream(bench, body=None, sse=True)
    made.send(TOKEN)
    exchange = bench.exchange(stream=True)
    with pytest.raises(ConnectionResetError):
        await bench.run(exchange)
    assert made.source.closed
    assert exchange.ending is Ending.CLIENT_LEFT
    assert bench.nothing_is_claimed()


# -- stream_options


async def test_a_refusal_of_what_cairn_added_is_sent_again_without_it() -> None:
    """The second body is the client's own, to the byte."""
    bench = Bench()
    upstream(bench, 422, b'{"message": "Extra inputs are not permitted"}')
    upstream(bench, body=TOKEN + DONE, sse=True)
    exchange = bench.exchange(stream=True)
    assert (await bench.run(exchange)).status == 200
    first, second = (body for _, body, _ in bench.client.sent)
    assert b"stream_options" in first
    assert second == exchange.call.body
    assert exchange.asked_usage is False


async def test_a_client_that_leaves_during_the_second_send_gives_everything_back() -> None:
    bench = Bench()
    upstream(bench, 400, b"no")
    bench.client.script.append(None)
    task = bench.start(bench.exchange(stream=True))
    await turns()
    assert len(bench.client.sent) == 2
    await left(bench, task)

"""The access line and its writer."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from proxy.accounting import access_log as logs
from proxy.accounting.access_log import AccessLog, access_line
from proxy.model import AccessLine, CacheStatus, Ending, Endpoint, MissReason, RouteReason
from proxy.records import Call, Candidate, Outcome, Plan, ReplicaView, Tenant, Times, Usage

REPLICA = ReplicaView(0, "h:1", True, 1.0, 0.0, 0, None, 0.0, 0.05)
PLAN = Plan(
    (Candidate(REPLICA, 4096, 1000.7, 10.0, 0.1),), RouteReason.WARM, MissReason.CHANGED, CacheStatus.PARTIAL, 1010.0
)
OUTCOME = Outcome(
    "req-1",
    Endpoint.CHAT,
    "a-model",
    True,
    Ending.COMPLETE,
    200,
    Times(10.0, first_token_seconds=10.25, ended_seconds=12.5),
    replica=REPLICA,
    plan=PLAN,
    usage=Usage(1011, 20, 990),
    retries=1,
    response_bytes=5,
    request_bytes=6,
    tenant_id="the-tenant",
)

CALL = Call(
    request_id="req-1",
    tenant=Tenant("the-tenant", client="web"),
    endpoint=Endpoint.CHAT,
    method="POST",
    target="/v1/chat/completions?key=secret",
    headers=(),
    body=b"",
    received_seconds=10.0,
    read_seconds=10.0,
    peer="10.0.0.9",
)
NOBODYS = dataclasses.replace(CALL, tenant=Tenant(""), peer="")


def written(tmp_path: Path, *lines: AccessLine, **kwargs: Any) -> list[dict]:
    """Return what a log writes for `lines`, decoded."""
    file = tmp_path / "access.log"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = AccessLog(descriptor, **kwargs)
    for line in lines:
        log.write(line)
    log.close()
    os.close(descriptor)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_tells_one_request_and_no_tenant(tmp_path: Path) -> None:
    """One JSON object; times are durations in seconds and a date in UTC."""
    (line,) = written(tmp_path, access_line(CALL, OUTCOME, 1_700_000_000.25))
    assert line == {
        "time": "2023-11-14T22:13:20.250000Z",
        "request_id": "req-1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "client": "web",
        "peer": "10.0.0.9",
        "endpoint": "chat_completions",
        "status": 200,
        "ending": "complete",
        "duration": 2.5,
        "model": "a-model",
        "stream": True,
        "replica": "h:1",
        "cache": "partial",
        "reason": "warm",
        "miss": "changed",
        "ttft": 0.25,
        "prompt_tokens": 1011,
        "output_tokens": 20,
        "cached_tokens": 990,
        "matched_bytes": 4096,
        "predicted_tokens": 1000,
        "retries": 1,
        "request_bytes": 6,
        "answer_bytes": 5,
    }


def test_a_refused_request_has_a_short_line(tmp_path: Path) -> None:
    """Unknown fields are left out."""
    refused = Outcome(
        "r",
        Endpoint.OTHER,
        None,
        False,
        Ending.REFUSED,
        401,
        Times(1.0, ended_seconds=1.0),
        error_code="invalid_api_key",
    )
    (line,) = written(tmp_path, access_line(NOBODYS, refused, 0.0))
    assert line == {
        "time": "1970-01-01T00:00:00Z",
        "request_id": "r",
        "method": "POST",
        "route": "/v1/chat/completions",
        "endpoint": "other",
        "status": 401,
        "ending": "refused",
        "duration": 0.0,
        "error": "invalid_api_key",
    }


def test_the_replicas_that_were_tried_are_listed_with_the_reasons(tmp_path: Path) -> None:
    """In the order in which they failed."""
    outcome = dataclasses.replace(OUTCOME, retries=2, tried=("a;503", "b;connect"))
    (line,) = written(tmp_path, access_line(NOBODYS, outcome, 0.0))
    assert (line["retries"], line["tried"]) == (2, ["a;503", "b;connect"])


def test_a_hostile_model_name_stays_one_bounded_line(tmp_path: Path) -> None:
    """Line ends and quotes are escaped, length is cut."""
    hostile = Outcome("r", Endpoint.CHAT, '"\n{}' * 1000, False, Ending.REFUSED, 404, Times(1.0))
    (line,) = written(tmp_path, access_line(CALL, hostile, 0.0))
    assert line["model"] == ('"\n{}' * 1000)[:128]


@pytest.mark.parametrize("encode", [logs.json_lines, logs.logfmt_lines])
@pytest.mark.parametrize("odd", ["\x1b", "\x7f", "\x80", "\x9b", "\x9f", "\u2028", "\u202e", "\u2066"])
def test_nothing_that_a_client_chose_controls_a_terminal_that_shows_the_log(odd: str, encode: Any) -> None:
    """It is escaped as JSON escapes a line end, so that a reader of the log gets back what was sent."""
    call = dataclasses.replace(CALL, target=f"/v1/{odd}[2Jpath", tenant=Tenant("t", client=f"name{odd}"))
    outcome = dataclasses.replace(OUTCOME, model=f"m\xe9{odd}\u4e2d\U0001f600", tried=(f"a;{odd}",))
    text = encode([access_line(call, outcome, 0.0)]).decode()
    (line,) = text.split("\n")[:-1]
    assert line.isprintable()
    assert f'"/v1/\\u{ord(odd):04x}[2Jpath"' in line
    assert f'"m\xe9\\u{ord(odd):04x}\u4e2d\U0001f600"' in line


def test_every_line_is_written_in_order_by_the_end(tmp_path: Path) -> None:
    """More than a batch, and `close` waits for the last."""
    lines = [access_line(CALL, OUTCOME, float(number)) for number in range(1000)]
    found = written(tmp_path, *lines)
    assert [line["time"][14:19] for line in found] == [f"{n // 60:02d}:{n % 60:02d}" for n in range(1000)]


def test_lines_are_written_without_a_close() -> None:
    """A thread does it soon, without any timer of the loop."""
    reading, writing = os.pipe()
    log = AccessLog(writing, flush_seconds=0.001)
    for number in range(3):  # each after the one before was written: it wakes again
        log.write(access_line(CALL, OUTCOME, float(number)))
        assert os.read(reading, 65536).count(b"\n") == 1
    log.close()
    os.close(reading)
    os.close(writing)


def test_lines_of_several_workers_do_not_mix_in_one_pipe() -> None:
    """Each write into a pipe is one that the kernel keeps whole."""
    reading, writing = os.pipe()
    every = [AccessLog(writing, flush_seconds=0.001) for _ in range(4)]
    got: list[bytes] = []

    def read() -> None:
        while piece := os.read(reading, 65536):
            got.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(500):
        for log in every:
            log.write(access_line(CALL, OUTCOME, float(number)))
    for log in every:
        log.close()
    os.close(writing)
    reader.join(10)
    os.close(reading)
    lines = b"".join(got).splitlines()
    assert len(lines) == 2000
    assert all(json.loads(line)["request_id"] == "req-1" for line in lines)


def test_a_reader_that_stopped_costs_lines_and_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines without room are dropped and counted; memory is bounded."""
    monkeypatch.setattr(logs, "PENDING_LINES_AT_MOST", 100)
    monkeypatch.setattr(logs, "CLOSE_SECONDS", 0.05)
    reading, writing = os.pipe()
    log = AccessLog(writing, flush_seconds=0.001)
    line = access_line(CALL, OUTCOME, 0.0)
    for _ in range(10_000):  # some 4 MB; a pipe holds 64 KB
        log.write(line)
    assert log.dropped > 5_000
    os.close(reading)  # now the thread's write fails and it ends
    log.close()
    os.close(writing)


def test_a_reader_that_is_gone_costs_lines_and_nothing_else() -> None:
    """A closed pipe is counted, not raised."""
    reading, writing = os.pipe()
    os.close(reading)
    log = AccessLog(writing)
    log.write(access_line(CALL, OUTCOME, 0.0))
    log.close()
    assert log.dropped == 1
    os.close(writing)


def test_after_a_full_disk_a_line_begins_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk took half of a line of one of two workers, and it is the other that writes first."""
    file = tmp_path / "access.log"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    line = access_line(CALL, OUTCOME, 0.0)
    whole = logs.json_lines([line])
    really_write, room, tried = os.write, len(whole) // 2, threading.Semaphore(0)

    def write(to: int, content: memoryview) -> int:
        nonlocal room
        try:
            if not room:
                raise OSError(errno.ENOSPC, "full")
            taken = really_write(to, content[:room])
            room -= taken
            return taken
        finally:
            tried.release()

    monkeypatch.setattr(os, "write", write)
    one, other = AccessLog(descriptor, flush_seconds=0.001), AccessLog(descriptor, flush_seconds=0.001)
    for log, times in ((one, 2), (other, 1)):
        log.write(line)
        for _ in range(times):
            assert tried.acquire(timeout=10)
    room = 10 * len(whole)
    for log in (other, other, one, one):
        log.write(line)
        assert tried.acquire(timeout=10)
    for log in (one, other):
        log.close()
    os.close(descriptor)
    assert file.read_bytes() == whole[: len(whole) // 2] + b"\n" + whole * 2 + b"\n" + whole * 2
    assert (one.dropped, other.dropped) == (1, 1)


def test_lines_that_a_disk_took_before_it_was_full_are_not_counted_as_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is written in one piece, and cut anywhere."""
    line = access_line(CALL, OUTCOME, 0.0)
    room = len(logs.json_lines([line])) * 5 // 2
    really_write = os.write

    def write(to: int, content: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "full")
        taken = really_write(to, content[:room])
        room -= taken
        return taken

    descriptor = os.open(tmp_path / "access.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    monkeypatch.setattr(os, "write", write)
    log = AccessLog(descriptor)
    for _ in range(4):
        log.write(line)
    log.close()
    os.close(descriptor)
    assert log.dropped == 2


def test_lines_may_be_logfmt(tmp_path: Path) -> None:
    """Pairs without what is unknown; a value with spaces or quotes is quoted, so that no client can add a pair."""
    odd = dataclasses.replace(OUTCOME, model='a "b" c=d\n')
    text = logs.logfmt_lines([access_line(CALL, OUTCOME, 0.25), access_line(NOBODYS, odd, 0.0)]).decode()
    first, second = text.splitlines()
    assert first.startswith(
        "time=1970-01-01T00:00:00.250000Z request_id=req-1 method=POST route=/v1/chat/completions "
    )
    assert " status=200 ending=complete duration=2.5 client=web peer=10.0.0.9 model=a-model stream=true " in first
    assert r' model="a \"b\" c=d\n" ' in second
    assert " client=" not in second


@pytest.mark.parametrize(
    ("target", "object_id", "endpoint", "route"),
    [
        ("/v1/files/file-abc/content?x=1", "file-abc", Endpoint.OTHER, "/v1/files/{id}/content"),
        ("/v1/caching/cache-123", None, Endpoint.CACHING, "/v1/caching"),
        ("/v1/" + "x" * 500, None, Endpoint.OTHER, "/v1/" + "x" * 124),
    ],
)
def test_a_route_has_no_ids_and_no_query(target: str, object_id: str | None, endpoint: Endpoint, route: str) -> None:
    """Lines of one route can be grouped, and an id that is a secret is not logged."""
    assert logs.route_of(dataclasses.replace(CALL, target=target, object_id=object_id, endpoint=endpoint)) == route

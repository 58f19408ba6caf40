"""The fuzzer in its short form; `make fuzz` is the long one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import uvloop

from tests.hostile.fuzz.fuzzer import fuzz, growth
from tests.hostile.fuzz.requests import MARK, mark
from tests.hostile.fuzz.session import Session, Tally
from tests.hostile.fuzz.upstream import Recorder
from tests.hostile.fuzz.world import CONTEXT_BYTES, INDEX_BYTES, MIB, Held

REQUESTS = 20_000
SEED = 1


@pytest.mark.timeout(300)
def test_twenty_thousand_requests_of_which_most_are_mutated_break_nothing() -> None:
    """No 500, no hang, nothing lost, doubled or mixed up, no defect in the log, no growth."""
    verdict = uvloop.run(fuzz(REQUESTS, SEED))
    assert not verdict.problems, "\n".join(problem[:3000] for problem in verdict.problems[:5])
    assert verdict.tally.requests >= REQUESTS
    outcomes: Counter[str] = Counter()
    for (_, outcome), count in verdict.tally.outcomes.items():
        outcomes[outcome] += count
    assert outcomes["relayed"] > REQUESTS / 3  # or it would try refusals only


def test_growth_is_a_problem() -> None:
    """Of memory while tables are full, of a table beyond its bound, and of descriptors of any kind."""
    warm = Held(100 * MIB, {"upstream": 10, "client": 0}, INDEX_BYTES, CONTEXT_BYTES)
    assert not growth(warm, replace(warm, memory_bytes=109 * MIB, descriptors={"upstream": 12}), are_full=True)
    assert not growth(warm, replace(warm, memory_bytes=114 * MIB), are_full=False)
    assert len(growth(warm, replace(warm, memory_bytes=116 * MIB), are_full=False)) == 1
    grown = Held(111 * MIB, {"upstream": 200, "client": 1, "file": 3}, 2 * INDEX_BYTES, CONTEXT_BYTES)
    assert len(growth(warm, grown, are_full=True)) == 5


def test_memory_proves_nothing_while_tables_still_fill() -> None:
    """In a run that is long enough to fill them that is a problem."""
    warm = Held(100 * MIB, {}, INDEX_BYTES, CONTEXT_BYTES // 2)
    assert not growth(warm, warm, are_full=False)
    assert len(growth(warm, warm, are_full=True)) == 1


async def test_nothing_is_kept_of_a_request_when_its_session_has_ended() -> None:
    """Nor of one that its client left, or that reaches the upstream only then; while it lasts all are recorded."""
    recorder = Recorder(SEED)
    recorder.begin(7)
    for number in (7_001, 7_001, 7_002, 8_000):
        recorder.answer("GET", b"/v1/models/x", {MARK: mark(number)}, b"")
    assert {number: record.times for number, record in recorder.records.items()} == {7_001: 2, 7_002: 1}
    recorder.end(7)
    assert recorder.answer("GET", b"/v1/models/x", {MARK: mark(7_003)}, b"")[0]
    assert not recorder.records


class BrokenProxy(Recorder):
    """A proxy and its upstream in one, which breaks what the fuzzer watches over."""

    def __init__(self, fault: str) -> None:
        super().__init__(SEED)
        self._fault = fault

    def answer(self, method: str, target: bytes, headers: dict[bytes, bytes], body: bytes) -> tuple[bytes, bool]:
        """Record the request as an upstream does; return what reaches the client."""
        answer, ends = super().answer(method, target, headers, body)
        match self._fault:
            case "altered":
                return answer.replace(b'"choices"', b'"Choices"'), ends
            case "mixed up":
                return re.sub(rb"x-answer: \d+", b"x-answer: 7", answer), ends
            case "lost":
                return b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n", ends
            case "cut":
                return answer[:-1], True
            case "twice":
                return super().answer(method, target, headers, body)
        return answer, ends


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("altered", "another answer"),
        ("mixed up", "got the answer to request 7"),
        ("lost", "answer was lost: 502"),
        ("cut", "cut short"),
        ("twice", "sent to the upstream 2 times"),
    ],
)
async def test_what_a_broken_proxy_does_is_found(fault: str, found: str) -> None:
    """A hundred requests are enough to show it."""
    proxy, tally = BrokenProxy(fault), Tally()
    port = (await proxy.start(1))[0]
    try:
        for number in range(4):
            await Session(SEED, number, (port, port), proxy, tally).run(25)
    finally:
        proxy.close()
    assert any(found in finding for finding in tally.findings)
    assert not proxy.records

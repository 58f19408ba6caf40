"""The fuzzer in its short form; `make fuzz` is the long one."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import uvloop

from tests.hostile.fuzz.fuzzer import fuzz, growth
from tests.hostile.fuzz.session import Session, Tally
from tests.hostile.fuzz.upstream import Recorder
from tests.hostile.fuzz.world import MIB, Held

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
    """Of memory beyond what tables may take that are not full, and of descriptors of any kind."""
    warm = Held(100 * MIB, {"upstream": 10, "client": 0})
    assert not growth(warm, Held(110 * MIB, {"upstream": 12, "client": 0}))
    assert len(growth(warm, Held(130 * MIB, {"upstream": 200, "client": 1, "file": 3}))) == 4


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

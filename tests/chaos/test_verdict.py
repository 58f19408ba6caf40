"""The judge sees what it must see: wrong bytes, lost answers, wrong counts, a proxy that does not heal."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chaos import dialogue
from tests.chaos.load import End, Record, Response, judge
from tests.chaos.stack import Seen
from tests.chaos.verdict import Counted, Marks, check_counts, heal_seconds, is_excused, is_refusal, lost

PLAIN = dialogue.ask(1, "turn", stream=False, asks_usage=False)
STREAM = dialogue.ask(1, "turn", stream=True, asks_usage=False)
WHOLE = dialogue.whole(PLAIN.answer, 64)
EVENTS = dialogue.events(STREAM.answer, 64, usage=False)
MARKS = Marks(begun=10.0, mended=12.0, lost_until=0.0, lost_ports={0: {5000}}, lost_replicas={"r0"}, refuses=False)
ERROR = b'data: {"error":{"message":"cut"}}\n\n'


def response(body: bytes, *, status: int = 200, whole: bool = True) -> Response:
    return Response(status, {}, body, whole)


@pytest.mark.parametrize(
    ("ask", "given", "end"),
    [
        (PLAIN, response(WHOLE), End.RIGHT),
        (STREAM, response(b"".join(EVENTS)), End.RIGHT),
        (PLAIN, response(WHOLE.replace(b"stop", b"spot")), End.WRONG),
        (PLAIN, response(WHOLE + b" "), End.WRONG),
        (PLAIN, response(b""), End.WRONG),
        (STREAM, response(b"".join([EVENTS[1], EVENTS[0], *EVENTS[2:]])), End.WRONG),
        (STREAM, response(b"".join(EVENTS[:-1])), End.WRONG),
        (STREAM, response(b"".join([*EVENTS, EVENTS[-1]])), End.WRONG),
        (STREAM, response(b"".join(dialogue.events(STREAM.answer, 64, usage=True))), End.WRONG),
        (STREAM, response(EVENTS[0] + ERROR), End.CUT),
        (STREAM, response(EVENTS[0], whole=False), End.CUT),
        (STREAM, response(EVENTS[1] + ERROR), End.WRONG),
        (PLAIN, response(b"{}", status=503), End.REFUSED),
    ],
)
def test_an_answer_is_right_only_if_every_byte_is(ask: dialogue.Ask, given: Response, end: End) -> None:
    """A byte, the order of events, or an event too many or too few makes it wrong; a break does not."""
    assert judge(ask, given)[0] is end


def test_no_two_requests_have_the_same_answer() -> None:
    """So an answer that is given to another client is seen."""
    other = dialogue.ask(1, "another turn", stream=False, asks_usage=False)
    assert judge(other, response(WHOLE))[0] is End.WRONG


def record(end: End, **changes: Any) -> Record:
    whole = Record(end=end, started=10.5, ended=11.0, port=6000, proxy=0, replica="r1", ask=PLAIN)
    return whole._replace(**changes)


@pytest.mark.parametrize(
    ("given", "excused"),
    [
        (record(End.BROKEN, port=5000), True),
        (record(End.BROKEN, port=5000, proxy=1), False),
        (record(End.BROKEN, port=5000, started=8.0, ended=9.0), False),
        (record(End.BROKEN), False),
        (record(End.REFUSED, port=5000), False),
        (record(End.HUNG), False),
        (record(End.CUT, replica="r0"), True),
        (record(End.CUT, replica="r1"), False),
        (record(End.BROKEN, replica="r0"), False),
        (record(End.REFUSED, detail="504 upstream_timeout"), True),
        (record(End.REFUSED, detail="502 upstream_reset"), False),
        (record(End.REFUSED, detail="504 upstream_timeout", started=12.5, ended=14.0), False),
    ],
)
def test_only_what_was_in_flight_in_a_killed_process_is_excused(given: Record, excused: bool) -> None:
    """By the connection to a killed worker, or by the replica of a response that had begun."""
    assert is_excused(given, MARKS) is excused
    assert lost([given], MARKS) == ([] if excused else [given])


def test_what_was_sent_while_no_process_could_answer_is_excused() -> None:
    """As when the supervisor is killed with all of its workers."""
    marks = MARKS._replace(lost_until=10.6)
    assert is_excused(record(End.BROKEN), marks)
    assert not is_excused(record(End.BROKEN, started=10.7), marks)
    assert not is_excused(record(End.HUNG), marks)


def test_a_refusal_is_allowed_only_where_the_scenario_says_so() -> None:
    """And only with 503."""
    marks = MARKS._replace(refuses=True)
    refused = record(End.REFUSED, detail="503 full")
    assert is_refusal(refused, marks)
    assert not is_refusal(refused, MARKS)
    assert not is_refusal(record(End.REFUSED, detail="500 defect"), marks)


def looks(*statuses: str) -> list[Seen]:
    return [Seen(10.0 + number, status, ()) for number, status in enumerate(statuses)]


@pytest.mark.parametrize(
    ("seen", "seconds"),
    [
        ([looks("ready", "degraded", "ready", "degraded", "ready", "ready")], 2.0),
        ([looks("ready", "ready", "ready", "ready")], 0.0),
        ([looks("ready", "ready", "ready", "degraded")], None),
        ([looks("ready", "ready", "ready", "ready"), looks("ready", "ready", "ready", "not ready", "ready")], 2.0),
    ],
)
def test_healing_ends_when_every_proxy_is_ready_for_good(seen: list[list[Seen]], seconds: float | None) -> None:
    """A relapse counts."""
    assert heal_seconds(seen, 12.0) == seconds


def test_counters_must_be_those_of_the_answers() -> None:
    """One token more or less is a problem; only what a killed process had may be missing."""
    right = [record(End.RIGHT, started=1.0, ended=2.0), record(End.RIGHT)]
    tokens, words = PLAIN.answer.prompt_tokens, PLAIN.answer.output_tokens
    calm = MARKS._replace(lost_ports={})

    def problems(prompt: int, output: int, records: list[Record], marks: Marks = calm) -> list[str]:
        return check_counts("the metrics", Counted(prompt, output), records, marks, 1.0)

    assert problems(2 * tokens, 2 * words, right) == []
    assert problems(2 * tokens - 1, 2 * words, right) != []
    assert problems(2 * tokens, 2 * words + 1, right) != []
    assert problems(tokens, words, right, MARKS) == []
    assert problems(0, 0, right, MARKS) != []
    assert problems(3 * tokens, 3 * words, [*right, record(End.BROKEN)]) == []
    assert problems(4 * tokens, 4 * words, [*right, record(End.BROKEN)]) != []

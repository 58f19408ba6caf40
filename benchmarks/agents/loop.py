"""The closed loop on a virtual clock: the active sessions, the engines and one rule, with the resulting counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import msgspec

from benchmarks.agents.chunked import ChunkedEngine, Speed
from benchmarks.agents.sessions import Session, Turn, again
from benchmarks.fleet.engine import (
    DECODE_SECONDS,
    FIRST_TOKEN_SECONDS,
    PREFILL_FIXED_SECONDS,
    PREFILL_TOKENS_PER_SECOND,
    Engine,
)
from benchmarks.fleet.simulation import Calendar, Router
from benchmarks.fleet.trace import BLOCK_TOKENS, Request

ARRIVAL_SECONDS = 60.0
"""All active sessions begin within this time."""


class Loop(msgspec.Struct, frozen=True):
    """A simulation: `active` sessions at once for `seconds`; the first `warm_up_seconds` do not count.

    The sessions begin within `arrival_seconds`. With a `speed` the engines compute in steps, otherwise one prompt
    after another.
    """

    active: int
    replicas: int = 4
    capacity_tokens: int = 1_000_000
    seconds: float = 7_200.0
    warm_up_seconds: float = 1_200.0
    arrival_seconds: float = ARRIVAL_SECONDS
    speed: Speed | None = None
    block_tokens: int = BLOCK_TOKENS


class Program(msgspec.Struct):
    """One session under way. `ideal_seconds` is what its turns so far would take alone, with its own past cached."""

    number: int
    turns: Session
    next: int = 0
    began_seconds: float = 0.0
    sent_seconds: float = 0.0
    busy_seconds: float = 0.0
    ideal_seconds: float = 0.0

    @property
    def is_last(self) -> bool:
        return self.next >= len(self.turns)


class Result(msgspec.Struct, frozen=True):
    """Result of one rule. Times are in seconds; TTFT counts from the moment the client sent.

    `worst_slowdown` is the largest over all sessions of their turns' time over the same with nobody else there,
    `computed_tokens` the mean prompt tokens of a turn that engines computed.
    """

    turns_per_hour: float
    mean_ttft_seconds: float
    p50_ttft_seconds: float
    p99_ttft_seconds: float
    max_ttft_seconds: float
    session_seconds: float
    worst_slowdown: float
    hit_share: float
    turns: int
    computed_tokens: float


class ClosedLoop:
    """Drives the sessions and counts. A rule that knows sessions may call `program_of`."""

    rule: Router

    def __init__(self, sessions: list[Session], shared: frozenset[int], loop: Loop, calendar: Calendar) -> None:
        self._loop = loop
        self._calendar = calendar
        self._next_session = endless(sessions, shared)
        self._numbers = count()
        self._sessions = count()
        self._running: dict[int, Program] = {}
        self._programs: dict[int, Program] = {}
        self._engines = [self._make_engine(number) for number in range(loop.replicas)]
        self.ttft_seconds: list[float] = []
        self.session_seconds: list[float] = []
        self.slowdowns: list[float] = []
        self.cached_tokens = 0
        self.input_tokens = 0
        self.turns = 0

    def _make_engine(self, number: int) -> Engine | ChunkedEngine:
        loop, at = self._loop, self._calendar.at
        if loop.speed is None:
            return Engine(number, loop.capacity_tokens, at, self, pins=True)
        return ChunkedEngine(number, loop.capacity_tokens, at, self, speed=loop.speed, block_tokens=loop.block_tokens)

    def program_of(self, request: Request) -> Program:
        """Return the session of a request under way; `next` is the number of the turn after it."""
        return self._running[request.number]

    def start(self) -> None:
        """Let all sessions begin."""
        for place in range(self._loop.active):
            self._calendar.at(self._loop.arrival_seconds * place / self._loop.active, self._begin)

    def _begin(self, now: float) -> None:
        program = Program(next(self._sessions), next(self._next_session), began_seconds=now)
        self._programs[program.number] = program
        self._send(program, now)

    def _send(self, program: Program, now: float) -> None:
        turn = program.turns[program.next]
        program.next += 1
        program.sent_seconds = now
        request = turn.request(next(self._numbers), now)
        self._running[request.number] = program

        def send(replica: int, work: float, then: float) -> None:
            self._engines[replica].submit(request, work, then)

        self.rule.route(request, now, send)

    # -- the engines' listener

    def started(self, request: Request, now: float) -> None:
        self.rule.started(request, now)

    def first_token(self, request: Request, replica: int, cached_tokens: int, now: float) -> None:
        if now >= self._loop.warm_up_seconds:
            self.ttft_seconds.append(now - request.arrival_seconds)
            self.cached_tokens += cached_tokens
            self.input_tokens += request.input_tokens
        self.rule.first_token(request, replica, cached_tokens, now)

    def ended(self, request: Request, replica: int, now: float) -> None:
        self.rule.ended(request, replica, now)
        program = self._running.pop(request.number)
        before = program.turns[program.next - 2] if program.next > 1 else None
        program.ideal_seconds += alone_seconds(program.turns[program.next - 1], before, self._loop.speed)
        program.busy_seconds += now - program.sent_seconds
        self.turns += now >= self._loop.warm_up_seconds
        if program.is_last:
            del self._programs[program.number]
            if now >= self._loop.warm_up_seconds:
                self.session_seconds.append(now - program.began_seconds)
                self.slowdowns.append(program.busy_seconds / program.ideal_seconds)
            self._begin(now)
        else:
            self._calendar.at(now + program.turns[program.next].pause_seconds, lambda at: self._send(program, at))

    def result(self) -> Result:
        """Return the counts at the end of the run."""
        waits = sorted(self.ttft_seconds) or [0.0]
        return Result(
            turns_per_hour=self.turns * 3_600 / (self._loop.seconds - self._loop.warm_up_seconds),
            mean_ttft_seconds=sum(waits) / len(waits),
            p50_ttft_seconds=waits[len(waits) // 2],
            p99_ttft_seconds=waits[min(int(len(waits) * 0.99), len(waits) - 1)],
            max_ttft_seconds=waits[-1],
            session_seconds=sum(self.session_seconds) / max(len(self.session_seconds), 1),
            worst_slowdown=max([*self.slowdowns, *self._unfinished()], default=1.0),
            hit_share=self.cached_tokens / max(self.input_tokens, 1),
            turns=self.turns,
            computed_tokens=(self.input_tokens - self.cached_tokens) / max(len(self.ttft_seconds), 1),
        )

    def _unfinished(self) -> Iterator[float]:
        """Yield the slowdowns of unfinished sessions, including the time that their present turn has taken so far."""
        for program in self._running.values():
            waited = self._loop.seconds - program.sent_seconds
            before = program.turns[program.next - 2] if program.next > 1 else None
            ideal = program.ideal_seconds + alone_seconds(program.turns[program.next - 1], before, self._loop.speed)
            yield (program.busy_seconds + waited) / ideal


def alone_seconds(turn: Turn, before: Turn | None, speed: Speed | None = None) -> float:
    """Return the time of a turn on an idle replica that holds the session's turn before it, or nothing."""
    matched = 0
    if before is not None:
        pairs = zip(turn.blocks, before.blocks, strict=False)
        matched = next((place for place, (one, other) in enumerate(pairs) if one != other), len(before.blocks))
    uncached = max(turn.input_tokens - turn.block_tokens * matched, 1)
    if speed is not None:
        return speed.alone_seconds(uncached, turn.output_tokens)
    prefill = uncached / PREFILL_TOKENS_PER_SECOND + PREFILL_FIXED_SECONDS + FIRST_TOKEN_SECONDS
    return prefill + turn.output_tokens * DECODE_SECONDS


def endless(sessions: list[Session], shared: frozenset[int]) -> Iterator[Session]:
    """Yield the sessions for ever, in each cycle as those of others."""
    for cycle in count():
        for session in sessions:
            yield again(session, cycle, shared)


def run(
    sessions: list[Session],
    shared: frozenset[int],
    loop: Loop,
    make_rule: Callable[[Calendar, ClosedLoop], Router],
) -> Result:
    """Run sessions through one rule, for the time that `loop` states."""
    calendar = Calendar()
    closed = ClosedLoop(sessions, shared, loop, calendar)
    closed.rule = make_rule(calendar, closed)
    closed.start()
    calendar.run(until=loop.seconds)
    return closed.result()

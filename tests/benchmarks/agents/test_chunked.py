"""An engine in steps: chunks of prompts and decodes share a step, and what runs keeps its blocks."""

from __future__ import annotations

from benchmarks.agents.chunked import ChunkedEngine, Speed
from benchmarks.agents.sessions import Turn
from benchmarks.fleet.simulation import Calendar
from benchmarks.fleet.trace import Request

SPEED = Speed(1_000.0, step_seconds=0.1, decode_seconds=0.01, request_seconds=0.5, step_tokens=64)
"""A step of one whole chunk takes about 0.16 s."""


class Bench:
    """One engine of `blocks` blocks of 32 tokens, and what it told."""

    def __init__(self, blocks: int, speed: Speed = SPEED) -> None:
        self.calendar = Calendar()
        self.engine = ChunkedEngine(0, 32 * blocks, self.calendar.at, self, speed=speed, block_tokens=32)
        self.first: dict[int, tuple[float, int]] = {}
        self.end: dict[int, float] = {}

    def submit(self, number: int, blocks: tuple[int, ...], outputs: int = 2) -> None:
        self.engine.submit(Turn(0.0, 32 * len(blocks), outputs, blocks, 32).request(number, 0.0), 0.0, 0.0)

    def started(self, request: Request, now: float) -> None:
        """Nothing waits outside of the engine."""

    def first_token(self, request: Request, replica: int, cached_tokens: int, now: float) -> None:
        self.first[request.number] = (round(now, 3), cached_tokens)

    def ended(self, request: Request, replica: int, now: float) -> None:
        self.end[request.number] = round(now, 3)


def test_a_prompt_is_computed_in_chunks_and_decoded_in_steps():
    """It is read first; a prompt of three blocks takes two steps of at most 64 tokens, each token one more."""
    bench = Bench(blocks=10)
    bench.submit(1, (1, 2, 3), outputs=3)
    bench.calendar.run()
    assert bench.first == {1: (0.5 + 0.164 + 0.132, 0)}
    assert bench.end == {1: round(0.796 + 2 * 0.11, 3)}
    assert round(SPEED.alone_seconds(96, 3), 3) == bench.end[1]


def test_a_prompt_that_was_computed_is_reused_but_for_its_end():
    """Reuse whole blocks only, and never the whole prompt, since its last token must be computed."""
    bench = Bench(blocks=10)
    bench.submit(1, (1, 2, 3))
    bench.calendar.run()
    bench.submit(2, (1, 2, 3))
    bench.submit(3, (1, 2, 4))
    bench.calendar.run()
    assert (bench.first[2][1], bench.first[3][1]) == (64, 64)


def test_a_decode_shares_its_steps_with_the_chunks_of_another_prompt():
    """So its tokens come later than alone."""
    bench = Bench(blocks=20)
    bench.submit(1, (1, 2), outputs=9)
    bench.submit(2, tuple(range(10, 20)))
    bench.calendar.run()
    alone = Bench(blocks=20)
    alone.submit(1, (1, 2), outputs=9)
    alone.calendar.run()
    assert bench.end[1] > alone.end[1]


def test_a_prompt_begins_when_it_fits_beside_those_that_run():
    """Blocks of running requests are not evicted; those of ended ones are, if others need the room."""
    bench = Bench(blocks=5)
    bench.submit(1, (1, 2, 3))
    bench.submit(2, (4, 5, 6))
    bench.calendar.run()
    assert bench.first[2][0] > bench.end[1]
    bench.submit(3, (1, 2, 3))
    bench.calendar.run()
    assert bench.first[3][1] == 64  # the end of the older prompt went first


def test_an_unsteady_engine_takes_other_times_which_depend_on_its_number_only():
    """Two runs are equal."""
    ends = []
    for _ in range(2):
        bench = Bench(blocks=10, speed=Speed(1_000.0, 0.1, 0.01, 0.5, unsteadiness=0.5, step_tokens=64))
        bench.submit(1, (1, 2, 3))
        bench.calendar.run()
        ends.append(bench.end)
    assert ends[0] == ends[1] != {1: 0.906}

"""The load of `benchmarks.vllm` on a virtual clock: short prompts, and two engines on a CPU with small caches.

The engines' times are chosen so that the figures without the gate, and with 20 sessions, are about those of the real
servers. Everything depends on seeds only, so a rule can be tried in seconds where real servers take minutes and
differ by a tenth from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from statistics import mean

import msgspec

from benchmarks.agents.chunked import Speed
from benchmarks.agents.loop import ClosedLoop, Loop, Result, run
from benchmarks.agents.sessions import Chain, Session, Turn
from benchmarks.fleet.simulation import Calendar, Router

REPLICAS = 2
CAPACITY_TOKENS = 48_000
BLOCK_TOKENS = 32
SECONDS = 120.0
WARM_UP_SECONDS = 40.0
ARRIVAL_SECONDS = 5.0
SEEDS = (1, 2, 3, 4)
SPEED = Speed(
    prefill_tokens_per_second=12_000.0,
    step_seconds=0.034,
    decode_seconds=0.007,
    request_seconds=0.09,
    unsteadiness=0.5,
)
"""Two vLLM servers of one thread each with a tiny model, and their clients, on two cores that others use as well."""

FIRST_TOKENS = 3_040
NEW_TOKENS = 36
OUTPUT_TOKENS = 8
TURNS = 200


class Case(msgspec.Struct, frozen=True):
    """`sessions` at once, with exponential pauses of `pause_seconds` in the mean."""

    sessions: int
    pause_seconds: float


CASES = (Case(20, 2.0), Case(40, 2.0), Case(56, 2.0), Case(56, 4.0), Case(56, 6.0), Case(56, 10.0))


class Means(msgspec.Struct, frozen=True):
    """Means over all seeds of a case, as `benchmarks.vllm` prints them."""

    turns: float
    hit_share: float
    computed_tokens: float
    mean_ttft_seconds: float
    p50_ttft_seconds: float
    p99_ttft_seconds: float
    max_ttft_seconds: float


def measure(case: Case, make_rule: Callable[[Calendar, ClosedLoop], Router]) -> Means:
    """Run one rule with all seeds."""
    results = [run_once(case, seed, make_rule) for seed in SEEDS]
    return Means(
        turns=mean(each.turns for each in results),
        hit_share=mean(each.hit_share for each in results),
        computed_tokens=mean(each.computed_tokens for each in results),
        mean_ttft_seconds=mean(each.mean_ttft_seconds for each in results),
        p50_ttft_seconds=mean(each.p50_ttft_seconds for each in results),
        p99_ttft_seconds=mean(each.p99_ttft_seconds for each in results),
        max_ttft_seconds=mean(each.max_ttft_seconds for each in results),
    )


def conversations(case: Case, seed: int) -> list[Session]:
    """Return sessions that share nothing and grow little by little."""
    return [tuple(_turns(case, number, Random(f"{seed} {number}"))) for number in range(case.sessions)]


def run_once(case: Case, seed: int, make_rule: Callable[[Calendar, ClosedLoop], Router]) -> Result:
    """Run one rule with one seed."""
    loop = Loop(
        case.sessions,
        REPLICAS,
        CAPACITY_TOKENS,
        SECONDS,
        WARM_UP_SECONDS,
        arrival_seconds=ARRIVAL_SECONDS,
        speed=SPEED,
        block_tokens=BLOCK_TOKENS,
    )
    return run(conversations(case, seed), frozenset(), loop, make_rule)


def _turns(case: Case, number: int, random: Random) -> Iterator[Turn]:
    chain, tokens, pause, own = Chain(), FIRST_TOKENS, 0.0, b"talk%d" % number
    for turn in range(TURNS):
        whole = tokens // BLOCK_TOKENS
        chain.extend((own, place) for place in range(len(chain), whole))
        last = () if tokens % BLOCK_TOKENS == 0 else (chain.after(b"part%d.%d" % (number, turn)),)
        yield Turn(pause, tokens, OUTPUT_TOKENS, (*chain, *last), BLOCK_TOKENS)
        pause = random.expovariate(1.0 / case.pause_seconds)
        tokens += OUTPUT_TOKENS + NEW_TOKENS

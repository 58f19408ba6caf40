"""Loads on simulated engines, each a few lines of a table: what real templates, blocks and rooms do to a router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Protocol

import msgspec

from benchmarks.engines.caches import BlockCache
from benchmarks.engines.engine import At, Job, SimulatedEngine, Usage, seconds_alone
from benchmarks.engines.proxy import CairnProxy, Served
from benchmarks.engines.sessions import Session, tools, words
from benchmarks.engines.templates import Template, decode_chat
from benchmarks.fleet.simulation import Calendar
from proxy.model import TemplateFacts


class Router(Protocol):
    """Sends requests to engines: Cairn, or another rule."""

    def send(self, body: bytes, tenant: str, now: float, done: Callable[[Served], None]) -> None: ...


class SessionsByTurns:
    """Each session goes to one engine for good, by turns: what a load balancer with sticky sessions does."""

    def __init__(self, engines: Sequence[SimulatedEngine], at: At) -> None:
        self._engines = list(engines)
        self._at = at
        self._homes: dict[str, int] = {}

    def send(self, body: bytes, tenant: str, now: float, done: Callable[[Served], None]) -> None:
        home = self._homes.setdefault(tenant, len(self._homes) % len(self._engines))
        first = [now]

        def first_token(usage: Usage, then: float) -> None:
            del usage
            first[0] = then

        def ended(usage: Usage, then: float) -> None:
            del then
            done(Served(home, first[0] - now, usage))

        self._engines[home].submit(Job(decode_chat(body), first_token, ended), now, self._at)


class LoadResult(msgspec.Struct, frozen=True):
    """Cost of a load: median seconds to the first token of first and of later turns, the mean of all, and tokens."""

    first_seconds: float
    later_seconds: float
    mean_seconds: float
    computed_tokens: int
    prompt_tokens: int


class AgentLoad(msgspec.Struct, frozen=True):
    """Sessions of agents: the tools are common to all, the system prompt to those of one kind."""

    sessions: int = 60
    turns: int = 4
    seconds: float = 20.0
    kinds: int = 6
    engines: int = 4
    tool_tokens: int = 4_000
    system_tokens: int = 1_500
    pause_seconds: float = 1.0


def run_agents(
    load: AgentLoad,
    template: Template,
    make_router: Callable[[list[SimulatedEngine], At], Router],
    session: Callable[[int], Session] | None = None,
) -> LoadResult:
    """Run `load` on engines with `template`, through one router."""
    calendar = Calendar()
    engines = [SimulatedEngine(BlockCache(2_000_000), template) for _ in range(load.engines)]
    router = make_router(engines, calendar.at)
    make = session or (lambda number: _agent(load, number))
    first: list[float] = []
    later: list[float] = []

    def begin(number: int) -> Callable[[float], None]:
        talk = make(number)

        def ask(now: float, turn: int = 0) -> None:
            def done(served: Served) -> None:
                (later if turn else first).append(served.ttft_seconds)
                talk.answered(served.usage.output_tokens)
                if turn + 1 < load.turns:
                    ended = now + served.ttft_seconds + 0.02 * served.usage.output_tokens
                    calendar.at(ended + load.pause_seconds, lambda then: ask(then, turn + 1))

            router.send(talk.ask(120), talk.name, now, done)

        return ask

    random = Random(7)
    for number in range(load.sessions):
        calendar.at(random.random() * load.seconds, begin(number))
    calendar.run()
    return LoadResult(
        first_seconds=_median(first),
        later_seconds=_median(later),
        mean_seconds=_mean(first + later),
        computed_tokens=sum(engine.computed_tokens for engine in engines),
        prompt_tokens=sum(engine.prompt_tokens for engine in engines),
    )


def bound(load: AgentLoad, template: Template) -> LoadResult:
    """Compute the bound for any router: one cache of all engines, and never a queue."""
    engine = SimulatedEngine(BlockCache(2_000_000 * load.engines), template)
    first: list[float] = []
    later: list[float] = []
    for number in range(load.sessions):
        talk = _agent(load, number)
        for turn in range(load.turns):
            usage = engine.serve(decode_chat(talk.ask(120)))
            (later if turn else first).append(seconds_alone(usage.prompt_tokens - usage.cached_tokens))
            talk.answered(usage.output_tokens)
    return LoadResult(
        first_seconds=_median(first),
        later_seconds=_median(later),
        mean_seconds=_mean(first + later),
        computed_tokens=engine.computed_tokens,
        prompt_tokens=engine.prompt_tokens,
    )


def cairn(facts: TemplateFacts | None = None, **options: Any) -> Callable[[list[SimulatedEngine], At], Router]:
    """Cairn with `facts` of the engines' template."""
    return lambda engines, at: CairnProxy(engines, at=at, facts=facts, capacities=2_000_000, **options)


def _agent(load: AgentLoad, number: int) -> Session:
    kind = number % load.kinds
    system = words(f"kind {kind}", load.system_tokens)
    return Session(f"agent {number}", system, tools("search", load.tool_tokens))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)

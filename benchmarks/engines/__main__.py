"""`python -m benchmarks.engines`: what templates, blocks, rooms and slots do to routing, as tables. No HTTP."""

from __future__ import annotations

from random import Random

from rich.table import Table

from benchmarks.common.tables import print_table
from benchmarks.engines.caches import BlockCache, Slots
from benchmarks.engines.clients import SHAPES
from benchmarks.engines.engine import RankedEngine, SimulatedEngine
from benchmarks.engines.proxy import CairnProxy
from benchmarks.engines.scenarios import AgentLoad, SessionsByTurns, bound, cairn, run_agents
from benchmarks.engines.sessions import Session, words
from benchmarks.engines.templates import Template, decode_chat
from proxy.model import TemplateFacts, ToolOrder

SYSTEM_FIRST = TemplateFacts(order=ToolOrder.SYSTEM_FIRST)


def main() -> None:
    """Print all tables: about a minute."""
    print_table(orders())
    print_table(pressure())
    print_table(blocks())
    print_table(room())
    print_table(ranks())
    print_table(shapes())


def orders() -> Table:
    """Compare agents with the same tools on templates of either order."""
    table = Table(title="60 sessions of 4 turns in 20 s on 4 engines, tools in common")
    for heading in ("system prompts", "template", "router", "TTFT p50 first", "later", "mean", "computed Mtok"):
        table.add_column(heading)
    routers = {"sessions by turns": SessionsByTurns, "Cairn, template unknown": cairn()}
    for kinds in (6, 60):
        for name, template in (("tools first", Template()), ("system first", Template(system_first=True))):
            known = {"Cairn, template known": cairn(SYSTEM_FIRST if template.system_first else None)}
            load = AgentLoad(kinds=kinds)
            results = {router: run_agents(load, template, make) for router, make in {**routers, **known}.items()}
            for router, result in {**results, "bound: one cache, no queue": bound(load, template)}.items():
                seconds = (result.first_seconds, result.later_seconds, result.mean_seconds)
                row = [f"{each:.2f} s" for each in seconds]
                table.add_row(str(kinds), name, router, *row, f"{result.computed_tokens / 1e6:.2f}")
    return table


def pressure() -> Table:
    """Run sessions that need twice the available cache: predicted beside reported tokens."""
    table = Table(title="40 sessions of 3,000 tokens on two engines of 48,000 tokens, 900 turns")
    for heading in ("capacity", "predicted / reported", "cached", "budgets at the end"):
        table.add_column(heading)
    for stated in (48_000, None):
        proxy = CairnProxy([SimulatedEngine(BlockCache(48_000)) for _ in range(2)], capacities=stated)
        predicted, reported, total = _press(proxy)
        budgets = ", ".join(f"{stats.budget_tokens:,}" for stats in proxy.index.replicas().values())
        name = "not stated" if stated is None else f"{stated:,}"
        table.add_row(name, f"{predicted / reported:.3f}", f"{reported / total:.1%}", budgets)
    return table


def blocks() -> Table:
    """Run the same sessions before engines with large blocks, of which some never reuse the last."""
    table = Table(title="the same with large blocks: predicted / reported")
    for heading in ("block", "last one reused", "capacity stated", "not stated"):
        table.add_column(heading)
    for size, unused in ((528, 1), (784, 0), (1_056, 0), (1_056, 1), (2_096, 0)):
        shares = []
        for stated in (48_000, None):
            engines = [SimulatedEngine(BlockCache(48_000, size, unused)) for _ in range(2)]
            predicted, reported, _ = _press(CairnProxy(engines, capacities=stated))
            shares.append(f"{predicted / reported:.3f}")
        table.add_row(str(size), "no" if unused else "yes", *shares)
    return table


def _press(proxy: CairnProxy) -> tuple[int, int, int]:
    """Run 40 sessions, and return the predicted, the cached and all tokens of the last 600 of 900 prompts."""
    predicted = reported = total = 0
    talks, random = [Session(f"talk {number}", words("sys", 400)) for number in range(40)], Random(5)
    for step in range(900):
        talk = talks[step] if step < len(talks) else talks[min(int(random.expovariate(1 / 12)), 39)]
        if len(talk.messages) > 8:
            del talk.messages[3:]
        answer = proxy.ask(talk.ask(2_300 if step < len(talks) else 100))
        talk.answered(answer.usage.output_tokens)
        if step >= 300:
            predicted += min(answer.predicted_tokens, answer.usage.prompt_tokens)
            reported += answer.usage.cached_tokens
            total += answer.usage.prompt_tokens
    return predicted, reported, total


def room() -> Table:
    """Run conversations on engines that hold exactly as many, and on slots."""
    table = Table(title="conversations where room is scarce: cached share of follow-ups")
    table.add_column("engines")
    table.add_column("conversations")
    table.add_column("cached")
    sizes = (17_000, 19_000, 21_000, 23_000)
    blocks = CairnProxy([SimulatedEngine(BlockCache(size)) for size in sizes], capacities=sizes)
    table.add_row("4 that hold 5 to 7", "20", f"{_follow_ups(blocks, 20, 3_000):.1%}")
    for conversations in (8, 12):
        slots = CairnProxy([SimulatedEngine(Slots(4, 16_384)) for _ in range(2)], capacities=65_536, slots=4)
        table.add_row("2 of 4 slots", str(conversations), f"{_follow_ups(slots, conversations, 2_000):.1%}")
    return table


def _follow_ups(proxy: CairnProxy, conversations: int, tokens: int) -> float:
    talks, random = [Session(f"talk {number}") for number in range(conversations)], Random(3)
    cached = prompt = 0
    for step in range(21 * conversations):
        talk = talks[step] if step < conversations else random.choice(talks)
        answer = proxy.ask(talk.ask(tokens if step < conversations else 5))
        talk.answered(answer.usage.output_tokens)
        if step >= conversations:
            cached += answer.usage.cached_tokens
            prompt += answer.usage.prompt_tokens
    return cached / prompt


def ranks() -> Table:
    """Run four data-parallel ranks behind one URL, known and unknown to Cairn."""
    table = Table(title="23 conversations of 12 turns on 4 ranks: tokens computed")
    table.add_column("before")
    table.add_column("computed", justify="right")
    engine = RankedEngine([BlockCache(500_000) for _ in range(4)])
    talked = _talk(CairnProxy([engine], capacities=2_000_000))
    table.add_row("one URL, ranks unknown", f"{talked:,}")
    ranked = RankedEngine([BlockCache(500_000) for _ in range(4)])
    table.add_row("one URL, ranks known", f"{_talk(CairnProxy(ranked.ranks, capacities=500_000)):,}")
    urls = [SimulatedEngine(BlockCache(500_000)) for _ in range(4)]
    table.add_row("four URLs", f"{_talk(CairnProxy(urls, capacities=500_000)):,}")
    return table


def _talk(proxy: CairnProxy) -> int:
    """Let 23 conversations have 12 turns each, one after the other, and return the tokens computed."""
    talks = [Session(f"talk {number}", words(f"own {number}", 500)) for number in range(23)]
    for turn in range(12):
        for talk in talks:
            talk.answered(proxy.ask(talk.ask(3_000 if not turn else 100)).usage.output_tokens)
    return sum(engine.computed_tokens for engine in proxy.engines)


def shapes() -> Table:
    """Run sessions of known agents: computed tokens beside those of session affinity."""
    table = Table(title="6 sessions of 20 turns on 3 engines: tokens computed, of those with session affinity")
    templates = {
        "tools first": (Template(drops_billing=True), TemplateFacts()),
        "system first": (Template(system_first=True, drops_billing=True), SYSTEM_FIRST),
        "system first, reasoning dropped": (
            Template(system_first=True, drops_reasoning=True, drops_billing=True),
            TemplateFacts(order=ToolOrder.SYSTEM_FIRST, drops_reasoning=True),
        ),
    }
    table.add_column("agent")
    for name in templates:
        table.add_column(name)
    for shape in SHAPES:
        shares = [_share(shape, template, facts) for template, facts in templates.values()]
        table.add_row(shape, *(f"{share:.2f}" for share in shares))
    return table


def _share(shape: str, template: Template, facts: TemplateFacts) -> float:
    sticky = [SimulatedEngine(BlockCache(1_000_000), template) for _ in range(3)]
    proxy = CairnProxy(
        [SimulatedEngine(BlockCache(1_000_000), template) for _ in range(3)], capacities=1_000_000, facts=facts
    )
    talks = {number: SHAPES[shape](f"session {number}") for number in range(6)}
    while talks:
        for number, talk in list(talks.items()):
            body = next(talk, None)
            if body is None:
                del talks[number]
            else:
                proxy.ask(body)
                sticky[number % 3].serve(decode_chat(body))
    computed = sum(engine.computed_tokens for engine in proxy.engines)
    return computed / sum(engine.computed_tokens for engine in sticky)


if __name__ == "__main__":
    main()

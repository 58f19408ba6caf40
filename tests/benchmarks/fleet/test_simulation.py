"""The simulation on tiny traces: the engine's model, the rules' books, and Cairn's own code driven by it."""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks.agents.ours import Gated
from benchmarks.fleet import __main__ as command
from benchmarks.fleet import rules
from benchmarks.fleet.__main__ import main, pooled_hit
from benchmarks.fleet.engine import BlockCache
from benchmarks.fleet.ours import Cairn
from benchmarks.fleet.simulation import Calendar, Result, Router, Setup, simulate
from benchmarks.fleet.trace import Request, at_load, decode_heavy, make_request, read_trace, spread


def conversations(count: int, turns: int, gap_seconds: float = 2.0) -> list[Request]:
    """`count` conversations of `turns` turns, each turn 1,024 tokens longer, with nothing in common."""
    made: list[Request] = []
    for turn in range(turns):
        for one in range(count):
            blocks = [1_000 * (one + 1) + n for n in range(2 * (turn + 1))]
            at = gap_seconds * (turn * count + one) / count
            made.append(make_request(len(made), at, 512 * len(blocks), 10, blocks))
    return made


def run(requests: list[Request], choice: rules.Choice | None = None, **setup: object) -> Result:
    chosen = Setup(**{"replicas": 4, "capacity_tokens": 100_000, **setup})  # type: ignore[arg-type]

    def make(calendar: Calendar) -> Router:
        if choice is not None:
            return rules.Rule(choice, chosen.replicas, chosen.capacity_tokens)
        return Cairn([None] * chosen.replicas, chosen.capacity_tokens, calendar.at, ordered=chosen.ordered)

    return simulate(requests, chosen, make)


def test_one_request_takes_what_the_model_says():
    """4,096 tokens at 8,000 a second, 10 ms on top, 20 ms to the first token; nothing was cached."""
    result = run([make_request(0, 0.0, 4_096, 5, range(8))])
    assert result.mean_ttft_seconds == pytest.approx(4_096 / 8_000 + 0.030)
    assert (result.hit_share, result.computed_tokens) == (0.0, 4_096)


def test_a_repeated_prompt_computes_one_token():
    """Whole blocks are found, but the last token is computed whatever is cached."""
    result = run([make_request(n, 10.0 * n, 4_096, 5, range(8)) for n in range(2)])
    assert result.computed_tokens == 4_096 + 1


def test_engines_that_pin_admit_no_prompt_beside_a_running_one_for_which_there_is_no_room():
    """The second prompt waits for the end of the first one's long answer; elsewhere it takes its blocks."""
    requests = [make_request(n, 2.0 * n, 4_096, 500, range(8 * n, 8 * n + 8)) for n in range(2)]
    assert run(requests, replicas=1, capacity_tokens=6_144, pins=True).p99_ttft_seconds > 8.0
    assert run(requests, replicas=1, capacity_tokens=6_144).p99_ttft_seconds < 1.0


def test_a_warm_up_can_be_left_out_of_the_figures():
    """The first request is served and not counted."""
    requests = [make_request(n, 10.0 * n, 4_096, 5, range(8)) for n in range(2)]
    assert run(requests, skip=1).computed_tokens == 1


def test_blocks_go_least_recently_used_and_of_one_prompt_the_deepest_first():
    """The remaining blocks of a prompt are therefore a prefix of it."""
    cache = BlockCache(4 * 512)
    old, new = (make_request(n, 0.0, 1_536, 1, [10 * n, 10 * n + 1, 10 * n + 2]) for n in (1, 2))
    cache.use(old.blocks)
    cache.use(new.blocks)
    assert (cache.matched_tokens(old), cache.matched_tokens(new)) == (512, 1_536)


def test_cairn_keeps_conversations_together_and_spreads_them():
    """Nearly as many hits as one pooled cache, on all replicas, with a shorter wait than by turns."""
    requests = conversations(10, 6)
    result, by_turns = run(requests), run(requests, rules.round_robin())
    bound = pooled_hit(requests, 400_000)
    assert result.hit_share > 0.93 * bound
    assert result.hit_share > by_turns.hit_share + 0.1
    assert result.mean_ttft_seconds < by_turns.mean_ttft_seconds
    assert result.imbalance < 2.0


def test_a_queue_in_order_of_work_shortens_the_mean_wait():
    """Of long and short prompts that come faster than they are served; the hits are the same."""
    sizes = [20 if n % 2 else 2 for n in range(40)]
    requests = [
        make_request(n, 0.05 * n, 512 * size, 10, range(100 * n, 100 * n + size)) for n, size in enumerate(sizes)
    ]
    ordered, plain = run(requests, ordered=True, replicas=2), run(requests, replicas=2)
    assert ordered.mean_ttft_seconds < 0.8 * plain.mean_ttft_seconds
    assert ordered.computed_tokens == plain.computed_tokens


def test_siblings_of_a_hot_prompt_hardly_wait_for_its_further_copies():
    """Long answers ask for eight copies; the mean wait stays near that of least connections, which cares for none."""
    requests = decode_heavy(600)
    ours = run(requests, replicas=8, capacity_tokens=500_000)
    least = run(requests, rules.least_in_flight, replicas=8, capacity_tokens=500_000)
    assert ours.computed_tokens <= least.computed_tokens
    assert ours.mean_ttft_seconds < 1.8 * least.mean_ttft_seconds
    late = run(requests, replicas=8, capacity_tokens=500_000, skip=200)
    assert late.mean_ttft_seconds < 0.1


def test_several_proxies_choose_nearly_as_one_when_news_travel_fast():
    """Under a load with queues; without any news they agree less."""
    requests = conversations(43, 6, gap_seconds=5.0)

    def four(delay: float | None) -> Result:
        return simulate(
            requests,
            Setup(4, 100_000),
            lambda calendar: Cairn([None] * 4, 100_000, calendar.at, proxies=4, delay_seconds=delay),
        )

    one, told, untold = run(requests), four(0.01), four(None)
    assert told.hit_share > one.hit_share - 0.03
    assert told.mean_ttft_seconds < 1.12 * one.mean_ttft_seconds
    assert untold.mean_ttft_seconds > told.mean_ttft_seconds


@pytest.mark.parametrize(
    "choice",
    [
        rules.least_in_flight,
        rules.least_pending,
        rules.consistent_hash(4),
        rules.cache_aware(),
        rules.scorers(100_000),
        rules.dynamo,
        rules.pending_and_own(),
    ],
)
def test_every_rule_serves_every_request(choice):
    """None is lost, and what each computes lies between the bound and everything."""
    requests = conversations(6, 4)
    total = sum(request.input_tokens for request in requests)
    result = run(requests, choice)
    assert 0.0 <= result.hit_share <= pooled_hit(requests, 10**9) + 1e-9
    assert result.computed_tokens == pytest.approx(total * (1 - result.hit_share), rel=1e-6)


def write_trace(path: Path) -> Path:
    rows = [
        {"timestamp": 3_000 * (n // 4), "input_length": 1_000, "output_length": 4, "hash_ids": [0, n % 3 + 1]}
        for n in range(40)
    ]
    text = b"\n".join(msgspec.json.encode(row) for row in rows)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_any_trace_of_the_form_is_read(tmp_path, name):
    """Plain or packed; equal ids in equal places are equal prefixes, and a short last block keeps its size."""
    requests = read_trace(write_trace(tmp_path / name))
    assert len(requests) == 40
    assert requests[0].blocks == requests[3].blocks
    assert requests[0].blocks[0] == requests[1].blocks[0]
    assert requests[0].blocks[1] != requests[1].blocks[1]
    assert requests[0].fingerprint.size_bytes == 4_000


def test_load_and_spread_move_arrivals_only(tmp_path):
    """Spread: up to 3 s later. Load: raw input tokens at the rate asked for."""
    requests = read_trace(write_trace(tmp_path / "trace.jsonl"))
    moved = spread(requests)
    assert all(0 <= there.arrival_seconds - requests[there.number].arrival_seconds < 3 for there in moved)
    loaded = at_load(requests, 5_000.0)
    assert loaded[-1].arrival_seconds == pytest.approx(40_000 / 5_000)
    assert len({request.blocks[1] for request in decode_heavy(50)}) == 1
    assert len({request.blocks[-1] for request in decode_heavy(50)}) == 50


def test_a_trace_with_too_few_ids_is_refused():
    """It says which request."""
    with pytest.raises(ValueError, match="request 7"):
        make_request(7, 0.0, 2_000, 1, [1])


def test_the_command_prints_a_row_per_rule(tmp_path):
    """All of them where none is named."""
    trace = write_trace(tmp_path / "trace.jsonl")
    done = CliRunner().invoke(main, [str(trace), "--replicas", "2", "--capacity", "10000", "--spread"])
    assert done.exit_code == 0, done.output
    for title in ("round robin", "Dynamo's cost", "Cairn"):
        assert title in done.output
    assert CliRunner().invoke(main, [str(trace), "--rules", "magic"]).exit_code == 2


def test_the_command_runs_cairn_with_its_gate_unless_told_otherwise(tmp_path, monkeypatch):
    """As the proxy does."""
    made = []

    def noted(rule):
        def make(*arguments, **more):
            made.append(rule)
            return rule(*arguments, **more)

        return make

    monkeypatch.setattr(command, "Gated", noted(Gated))
    monkeypatch.setattr(command, "Cairn", noted(Cairn))
    options = [str(write_trace(tmp_path / "trace.jsonl")), "--rules", "cairn", "--replicas", "2"]
    for more in ([], ["--no-gate"]):
        assert CliRunner().invoke(main, [*options, *more]).exit_code == 0
    assert made == [Gated, Cairn]


def test_several_runs_show_the_error_of_their_mean(tmp_path: Path):
    """One run has none."""
    options = [str(write_trace(tmp_path / "trace.jsonl")), "--rules", "round-robin", "--replicas", "2"]
    shown = [CliRunner().invoke(main, [*options, "--runs", runs]).output for runs in ("1", "2")]
    assert ["±" in output for output in shown] == [False, True]


def test_each_arrival_is_moved_by_less_than_asked():
    """Another seed moves it otherwise."""
    requests = conversations(4, 3)
    one, other = spread(requests, 1, 0.05), spread(requests, 2, 0.05)
    for moved in (one, other):
        assert sorted(each.number for each in moved) == [each.number for each in requests]
        assert all(0 <= each.arrival_seconds - requests[each.number].arrival_seconds < 0.05 for each in moved)
    assert one != other

"""Sessions in a closed loop: the generator, the files, and that the gate does what it is for."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from statistics import mean

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks.agents import cpu
from benchmarks.agents.__main__ import CONTESTANTS, Fleet, main
from benchmarks.agents.loop import Loop, Result, alone_seconds, run
from benchmarks.agents.sessions import (
    COMMON_TOKENS,
    CONTEXT_TOKENS,
    GROUP_TOKENS,
    Turn,
    again,
    read_sessions,
    shared_blocks,
    synthetic,
    unshared_tokens,
)
from benchmarks.fleet.engine import PinningCache
from benchmarks.fleet.trace import make_request

SETS = [synthetic(200), synthetic(200, seed=2)]
SESSIONS = SETS[0]
SHARED = shared_blocks(SESSIONS)


@cache
def closed_loop(name: str, x: float, believed: float = 1.0, proxies: int = 1) -> Result:
    """Two replicas for 50 minutes; the clock is virtual, so equal arguments give equal results and are run once."""
    active = round(x * 2 * 1_000_000 / unshared_tokens(SESSIONS, SHARED))
    fleet = Fleet(2, round(believed * 1_000_000), proxies, 0.01)
    loop = Loop(active, 2, 1_000_000, 3_000.0, 900.0)
    return run(SESSIONS, SHARED, loop, lambda calendar, closed: CONTESTANTS[name][1](fleet, calendar, closed))


def test_a_made_up_session_grows_by_its_own_blocks_on_what_it_shares():
    """Turn after turn by the last answer and new tokens, up to the context; equal seeds make equal sessions."""
    session = max(SESSIONS, key=len)
    first, second = session[0], session[1]
    whole = first.input_tokens // 512
    assert all(b.input_tokens > a.input_tokens + a.output_tokens for a, b in pairwise(session))
    assert session[-1].input_tokens < CONTEXT_TOKENS
    assert first.blocks[:whole] == second.blocks[:whole]
    assert first.blocks[whole] != second.blocks[whole]
    common = COMMON_TOKENS // 512
    assert {session[0].blocks[:common] for session in SESSIONS} == {first.blocks[:common]}
    own = (COMMON_TOKENS + GROUP_TOKENS) // 512 + 1
    assert len({session[0].blocks[own] for session in SESSIONS if len(session[0].blocks) > own}) > 100
    assert synthetic(3)[2] == SESSIONS[2]


def test_made_up_sessions_have_the_sizes_of_coding_agents():
    """In the mean: 54,000 tokens at first, then 6,000 new and 1,000 out a turn, twelve turns, pauses of 7 s."""
    sessions = SETS[0] + SETS[1]
    turns = [turn for session in sessions for turn in session]
    later = [pair for session in sessions for pair in pairwise(session)]
    new = [b.input_tokens - a.input_tokens - a.output_tokens for a, b in later]
    assert mean(session[0].input_tokens for session in sessions) == pytest.approx(54_000, rel=0.05)
    assert mean(new) == pytest.approx(5_900, rel=0.1)
    assert mean(turn.output_tokens for turn in turns) == pytest.approx(1_000, rel=0.1)
    assert mean(map(len, sessions)) == pytest.approx(12, rel=0.1)
    assert mean(b.pause_seconds for _, b in later) == pytest.approx(7.4, rel=0.2)


def test_a_session_again_keeps_what_it_shares_and_is_another_beyond():
    """Or the second cycle of a file would be all hits."""
    other = again(SESSIONS[0], 1, SHARED)
    assert other[-1].blocks[:62] == SESSIONS[0][-1].blocks[:62]
    assert not set(other[-1].blocks[82:]) & set(SESSIONS[0][-1].blocks[82:])


def test_what_sessions_need_counts_only_what_no_other_session_has():
    """A prompt of three blocks whose first two are shared, by all or by a group, needs one block."""
    chains = [(1, 2, 3), (1, 2, 4), (1, 5, 6), (1, 5, 7)]
    sessions = [(Turn(0.0, 3 * 512, 1, chain),) for chain in chains]
    shared = shared_blocks(sessions)
    assert shared == {1, 2, 5}
    assert unshared_tokens(sessions, shared) == 512


def write(path, rows):
    path.write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))
    return path


def test_a_file_with_session_ids_is_read_as_it_says(tmp_path):
    """The form that AIPerf replays: the turns of a session by its id, delays in milliseconds."""
    rows = [
        {"session_id": "a", "input_length": 600, "output_length": 5, "hash_ids": [1, 2]},
        {"session_id": "b", "input_length": 512, "output_length": 5, "hash_ids": [1]},
        {"session_id": "a", "delay": 1_500, "input_length": 1_100, "output_length": 5, "hash_ids": [1, 2, 3]},
    ]
    sessions = read_sessions(write(tmp_path / "sessions.jsonl", rows))
    assert [len(session) for session in sessions] == [2, 1]
    assert sessions[0][1].pause_seconds == 1.5
    assert sessions[0][1].blocks[:2] == sessions[0][0].blocks
    assert sessions[1][0].blocks[0] == sessions[0][0].blocks[0]


def test_conversations_of_a_trace_are_found_by_their_prefixes(tmp_path):
    """A request continues the one whose whole blocks begin it; a common first block alone joins nothing."""
    rows = [
        {"timestamp": 0, "input_length": 1_500, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 1_000, "input_length": 1_500, "output_length": 5, "hash_ids": [0, 5, 6]},
        {"timestamp": 9_000, "input_length": 2_000, "output_length": 5, "hash_ids": [0, 1, 7, 8]},
    ]
    sessions = read_sessions(write(tmp_path / "trace.jsonl", rows))
    assert [len(session) for session in sessions] == [2, 1]
    assert sessions[0][1].pause_seconds == 9.0


def test_a_line_with_too_few_hash_ids_is_refused(tmp_path):
    """It says how many are needed."""
    rows = [{"session_id": 1, "input_length": 2_000, "output_length": 1, "hash_ids": [1]}]
    with pytest.raises(ValueError, match="need 4 hash ids"):
        read_sessions(write(tmp_path / "short.jsonl", rows))


def test_blocks_of_running_requests_are_not_evicted():
    """Others go, and a prompt fits only beside what runs."""
    cache = PinningCache(4 * 512)
    first, second = make_request(0, 0.0, 1_024, 1, [1, 2]), make_request(1, 0.0, 1_024, 1, [3, 4])
    third = make_request(2, 0.0, 1_024, 1, [5, 6])
    cache.pin(first.blocks)
    cache.pin(second.blocks)
    assert not cache.fits(third.blocks)
    cache.unpin(second.blocks)
    assert cache.fits(third.blocks)
    cache.pin(third.blocks)
    assert (cache.matched_tokens(first), cache.matched_tokens(second)) == (1_024, 0)


def test_alone_a_turn_computes_what_is_new_in_it():
    """The measure of a slowdown."""
    before, turn = max(SESSIONS, key=len)[:2]
    whole = before.input_tokens // 512 * 512
    expected = (turn.input_tokens - whole) / 8_000 + 0.03 + turn.output_tokens * 0.02
    assert alone_seconds(turn, before) == pytest.approx(expected)
    assert alone_seconds(before, None) == pytest.approx(
        before.input_tokens / 8_000 + 0.03 + before.output_tokens * 0.02
    )


def test_with_room_the_gate_changes_nothing_and_without_it_it_doubles_the_turns():
    """At half of the cache within a percent, at twice of it at least twice the turns and a shorter mean wait."""
    room, room_ungated = closed_loop("cairn", 0.5), closed_loop("ungated", 0.5)
    assert room.turns_per_hour == pytest.approx(room_ungated.turns_per_hour, rel=0.02)
    gated, ungated = closed_loop("cairn", 2.0), closed_loop("ungated", 2.0)
    assert gated.turns_per_hour > 2.0 * ungated.turns_per_hour
    assert gated.mean_ttft_seconds < 0.5 * ungated.mean_ttft_seconds


@pytest.mark.parametrize("believed", [0.8, 1.2, 2.0])
def test_a_capacity_believed_wrong_is_learned(believed):
    """It costs a tenth of the turns at most. Runs of this length differ by half of that by chance."""
    right, wrong = closed_loop("cairn", 2.0), closed_loop("cairn", 2.0, believed)
    assert wrong.turns > 0.9 * right.turns


def test_several_proxies_do_as_one():
    """Within five percent, since they claim replicas and the oldest of all goes first; with two the run is quick."""
    one, several = closed_loop("cairn", 2.0), closed_loop("cairn", 2.0, proxies=2)
    assert several.turns_per_hour > 0.95 * one.turns_per_hour
    assert several.p99_ttft_seconds < 1.3 * one.p99_ttft_seconds


@pytest.mark.parametrize("name", ["token-aware", "lmetric", "programs"])
def test_the_others_serve_their_sessions(name):
    """None stops, and none computes less than what is new."""
    result = closed_loop(name, 1.0)
    assert result.turns > 100
    assert 0.0 < result.hit_share < 1.0
    assert result.worst_slowdown >= 1.0


@cache
def on_a_cpu(name: str, pause_seconds: float) -> Result:
    """The load of `benchmarks.vllm` with one seed."""
    fleet = Fleet(cpu.REPLICAS, cpu.CAPACITY_TOKENS, 1, 0.0, is_stated=True)
    case = cpu.Case(56, pause_seconds)
    return cpu.run_once(case, 1, lambda calendar, closed: CONTESTANTS[name][1](fleet, calendar, closed))


def test_before_small_caches_and_short_prompts_the_gate_does_what_it_is_for():
    """Most turns are cached, and nobody waits longer than without it; with long pauses it changes nothing."""
    gated, ungated = on_a_cpu("cairn", 2.0), on_a_cpu("ungated", 2.0)
    assert gated.turns > 1.7 * ungated.turns
    assert gated.computed_tokens < 0.4 * ungated.computed_tokens
    assert gated.mean_ttft_seconds < 0.6 * ungated.mean_ttft_seconds
    assert gated.p99_ttft_seconds < 1.1 * ungated.p99_ttft_seconds
    assert on_a_cpu("cairn", 10.0).turns == pytest.approx(on_a_cpu("ungated", 10.0).turns, rel=0.02)


def test_the_command_prints_a_table_for_each_load():
    """A row per rule; an unknown one is refused."""
    arguments = ["--x", "0.5,1", "--rules", "cairn,ungated", "--replicas", "1", "--capacity", "300000"]
    done = CliRunner().invoke(main, [*arguments, "--seconds", "600"])
    assert done.exit_code == 0, done.output
    assert done.output.count("Cairn without the gate") == 2
    assert CliRunner().invoke(main, ["--rules", "magic"]).exit_code == 2


def test_the_command_prints_a_table_for_each_load_like_vllm(monkeypatch):
    """Means over the seeds."""
    monkeypatch.setattr(cpu, "SEEDS", (1,))
    monkeypatch.setattr(cpu, "CASES", (cpu.Case(4, 2.0), cpu.Case(8, 2.0)))
    done = CliRunner().invoke(main, ["--like-vllm", "--rules", "cairn,ungated"])
    assert done.exit_code == 0, done.output
    assert done.output.count("Cairn without the gate") == 2

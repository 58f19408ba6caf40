"""The live replay's parts: text that has the trace's own prefixes, engines that cache it, figures that add up."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks.engines.scenarios import AgentLoad
from benchmarks.fleet.trace import decode_heavy, make_request
from benchmarks.replay import report
from benchmarks.replay.agents import agents
from benchmarks.replay.contestants import Entrant, cairn_config
from benchmarks.replay.drive import EngineCount, Run, Seen, drive
from benchmarks.replay.engines import TEMPLATES, LiveEngine, blocks_of, serve
from benchmarks.replay.texts import BLOCK_BYTES, Texts
from proxy.config.load import load
from tests.support.valkey import eventually, free_port


def text_of(body: bytes) -> bytes:
    content: str = json.loads(body)["messages"][0]["content"]
    return content.encode()


def test_equal_prefixes_of_a_trace_have_equal_text_and_no_others():
    """Blocks of the text are the trace's blocks, and tokens its tokens."""
    texts = Texts()
    one = make_request(0, 0.0, 1_100, 8, [1, 2, 3])
    other = make_request(1, 0.0, 1_500, 8, [1, 2, 4])
    first, second = text_of(texts.body(one)), text_of(texts.body(other))
    assert (len(first), len(second)) == (4_400, 6_000)
    assert first[: 2 * BLOCK_BYTES] == second[: 2 * BLOCK_BYTES]
    assert [a == b for a, b in zip(blocks_of(first), blocks_of(second), strict=True)] == [True, True, False]
    assert text_of(Texts().body(one)) == first


async def is_served(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def test_the_engines_cache_what_they_computed_and_forget_it_on_command():
    """The second request of a prefix has it cached; after a restart nothing is."""
    requests = [make_request(n, n * 4.0, 2_048, 4, range(4)) for n in range(4)]
    for _ in range(20):
        port = free_port()
        serving = asyncio.get_running_loop().create_task(serve([port], 100_000, 200.0))
        await eventually(partial(is_served, port))
        try:
            run = await drive(Entrant("direct", [port], [port]), requests, Texts(), 200.0, restart=True)
        finally:
            serving.cancel()
        if all(each.late_seconds < 0.01 for each in run.seen):
            break  # else a pause of the machine made requests overlap that should follow each other
    assert [each.error for each in run.seen] == [""] * 4
    assert [each.cached_tokens for each in run.seen] == [0, 2_047, 0, 2_047]
    assert run.engines == [EngineCount(4, 4 * 2_048, 2 * 2_047)]
    assert run.shared_tokens == 2_048
    row = report.figures("direct", run, 200.0)
    assert row.hit_share == pytest.approx(0.5, abs=0.001)
    assert row.computed_tokens == 4 * 2_048 - 2 * 2_047
    assert row.mean_ttft_seconds > 0.1  # half of them computed 2,048 tokens at 8,000 a second


async def test_engines_with_a_template_render_tokenise_and_reuse_as_it_says():
    """Agents of one kind share tools and system prompt, two kinds only what the template puts first."""
    load = AgentLoad(sessions=4, turns=2, seconds=1.0, kinds=2, tool_tokens=2_000, system_tokens=1_200)
    template = TEMPLATES["system_first"]
    requests, bodies = agents(load, template, 20.0)
    assert [each.arrival_seconds for each in requests] == sorted(each.arrival_seconds for each in requests)
    port = free_port()
    serving = asyncio.get_running_loop().create_task(serve([port], 100_000, 200.0, template))
    await eventually(partial(is_served, port))
    try:
        run = await drive(Entrant("direct", [port], [port]), requests, bodies, 200.0)
    finally:
        serving.cancel()
    assert [each.error for each in run.seen] == [""] * 8
    assert [each.prompt_tokens for each in run.seen] == pytest.approx([each.input_tokens for each in requests], abs=1)
    warm = [each.cached_tokens for each in run.seen if each.cached_tokens]
    assert len(warm) == 6, "only the first of each kind computes everything"
    assert min(warm) >= 3_072
    engine = LiveEngine(0, 100_000, 1.0, template)
    tokens = engine.tokenized(bodies.body(requests[0]))["tokens"]
    assert isinstance(tokens, list)
    assert len(tokens) == pytest.approx(requests[0].input_tokens, abs=1)
    assert engine.tokenized(b'{"prompt": "x"}') == LiveEngine(0, 100_000, 1.0).tokenized(b"{}") == {}


def test_the_configuration_that_the_proxies_get_is_valid_and_scales_with_time(tmp_path: Path):
    """Seconds of the cost rule are as much shorter as time runs faster."""
    file = tmp_path / "cairn.yaml"
    file.write_text(json.dumps(cairn_config(["http://127.0.0.1:9001"], 6379, 4.0)))
    routing = load(file, {}).config.routing
    assert (routing.in_flight_seconds_least, routing.in_flight_seconds_most) == (0.0125, 0.05)
    assert routing.future_weight_per_second == 32.0


def test_a_restart_is_judged_by_what_was_predicted_of_the_engine_that_began_anew():
    """Without what all prompts share: that is there again at once, and would hide that nothing else is."""
    seen = [Seen(n, 0.1, 0.0, 2_000, 1_512, 1_512, "ab"[n % 2]) for n in range(400)]
    for number in range(200, 220, 2):
        seen[number] = Seen(number, 0.1, 0.0, 2_000, 512, 1_512, "a")
    found = report.recovery(Run(seen, [], [], 200, "a", 512))
    assert found is not None
    assert (found.kept_before, found.kept_later) == (1.0, 1.0)
    assert found.kept_first == pytest.approx(20 / 30)
    assert found.back_after == 10
    assert (found.hit_before, found.hit_later, found.others_later) == pytest.approx((1_000 / 1_488,) * 3)
    assert (found.wrong_before, found.wrong_first, found.wrong_later) == (0, 10, 0)
    row = report.figures("Cairn", Run(seen, [EngineCount(1, 1, 0)], [], 200, "a", 512), 1.0)
    assert report.table("t", [row]).columns[-1]._cells == ["10"]  # noqa: SLF001 - internal state that no public name shows
    forgotten = [each if each.number < 200 else Seen(each.number, 0.1, 0.0, 2_000, 512, 1_512, "a") for each in seen]
    never = report.recovery(Run(forgotten, [], [], 200, "a", 512))
    assert never is not None
    assert never.back_after is None


def test_figures_are_drawn_and_stored(tmp_path: Path):
    """A table, an SVG and a JSON file."""
    run = Run([Seen(n, 0.01 * n, 0.0) for n in range(300)], [EngineCount(300, 1_000, 250)], [])
    rows = [report.figures("Cairn", run, 2.0)]
    assert rows[0].p99_ttft_seconds == pytest.approx(2 * 2.96)
    report.draw(tmp_path / "a.svg", "title", 0.3, rows)
    report.store(tmp_path / "a.json", {"speed": 2.0}, 0.3, rows)
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["hit_share"] == 0.25
    assert report.table("t", rows).row_count == 1


def test_the_decode_heavy_load_shares_one_prompt():
    """4,096 tokens in common and 200 of one's own."""
    texts = Texts()
    one, other = (blocks_of(text_of(texts.body(request))) for request in decode_heavy(2))
    assert one[:8] == other[:8]
    assert len(one) == 9
    assert one[8] != other[8]

"""Facts that engines report about themselves."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.engine_facts import EngineFacts, read_llama_props, read_metrics, read_sglang_server

VLLM = b"""# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",enable_prefix_caching="True",num_gpu_blocks="27590"} 1.0
process_start_time_seconds 1.7e9
vllm:num_requests_running{model_name="m"} 3.0
"""


def test_vllms_capacity_is_blocks_times_their_size():
    """Added over the engines of one page, if each shows its own."""
    assert read_metrics(VLLM) == EngineFacts(441_440, None, 1.7e9, engine="vLLM", running=3)
    two = VLLM + b'vllm:cache_config_info{engine="1",num_gpu_blocks="10",block_size="16"} 1.0\n'
    assert read_metrics(two).capacity_tokens == 441_600


def _ranks(*numbers: int, labels: str) -> bytes:
    return "".join(f'vllm:cache_config_info{{{labels},engine="{number}"}} 1.0\n' for number in numbers).encode()


def test_vllms_ranks_each_hold_a_share_of_what_every_line_shows():
    """vLLM adds up the blocks of all data-parallel ranks and shows the sum in the line of each."""
    page = _ranks(0, 1, 2, 3, labels='block_size="16",num_gpu_blocks="4000"')
    assert read_metrics(page) == EngineFacts(64_000, engine="vLLM", ranks=4)
    assert read_metrics(page).per_rank(4).capacity_tokens == 16_000


def test_vllms_own_count_of_tokens_goes_before_blocks_and_is_of_one_rank():
    """For models with several kinds of layers blocks times their size is no capacity."""
    labels = 'block_size="528",num_gpu_blocks="4000",kv_cache_size_tokens="50000"'
    assert read_metrics(_ranks(0, labels=labels)) == EngineFacts(50_000, engine="vLLM", ranks=1)
    assert read_metrics(_ranks(0, 1, labels=labels)) == EngineFacts(100_000, engine="vLLM", ranks=2)


def test_ranks_that_are_not_numbered_from_zero_are_none_that_a_header_can_name():
    """The servers of a load balancer outside the engine show the number of their own rank only."""
    assert read_metrics(_ranks(2, labels='block_size="16",num_gpu_blocks="100"')).ranks is None
    assert read_metrics(VLLM).ranks is None


def test_on_a_processor_vllm_may_count_other_blocks():
    """num_gpu_blocks is then None."""
    page = b'vllm:cache_config_info{block_size="128",num_cpu_blocks="100",num_gpu_blocks="None"} 1.0\n'
    assert read_metrics(page).capacity_tokens == 12_800


def test_sglangs_capacity_from_its_metrics_or_its_server():
    """By release at the top or in internal_states."""
    assert read_metrics(b'sglang:max_total_num_tokens{model_name="m"} 500000.0\n').capacity_tokens == 500_000
    top = b'{"max_total_num_tokens": 500000, "max_running_requests": 64, "other": [1]}'
    assert read_sglang_server(top) == EngineFacts(500_000, 64, engine="SGLang")
    inner = b'{"max_total_num_tokens": 400, "max_running_requests": 8}'
    assert read_sglang_server(b'{"max_running_requests": null, "internal_states": [' + inner + b"]}") == EngineFacts(
        400, 8, engine="SGLang"
    )


def test_llamas_slots_limit_it_and_hold_its_tokens():
    """Each slot has its own context."""
    page = b'{"default_generation_settings": {"n_ctx": 4096, "params": {}}, "total_slots": 4, "build_info": "b1"}'
    assert read_llama_props(page) == EngineFacts(
        16_384, 4, tells_timings=True, slots=4, engine="llama.cpp", version="b1"
    )


@given(st.binary(max_size=300))
def test_nonsense_is_no_fact_and_no_error(page):
    """These pages come from the network."""
    for read in (read_metrics, read_llama_props, read_sglang_server):
        for start in (b"", b'{"total_slots": ', b"vllm:cache_config_info{", b"process_start_time_seconds "):
            facts = read(start + page)
            assert facts.capacity_tokens is None or facts.capacity_tokens > 0


def test_absurd_numbers_are_left_out():
    """A mistake of the page must not become a budget."""
    assert read_metrics(b"sglang:max_total_num_tokens 1e99\n").capacity_tokens is None
    assert read_metrics(b"sglang:max_total_num_tokens 99999999999999999999\n").capacity_tokens is None
    assert read_llama_props(b'{"total_slots": -3, "default_generation_settings": {"n_ctx": 10}}') == EngineFacts(10)


def test_a_rank_has_its_share_of_what_the_engine_reports():
    whole = EngineFacts(capacity_tokens=40_001, in_flight_limit=10, engine="vllm")
    assert whole.per_rank(4) == EngineFacts(capacity_tokens=10_000, in_flight_limit=2, engine="vllm")
    assert EngineFacts().per_rank(4) == EngineFacts()


def test_running_and_waiting_requests_are_read_and_added_over_the_ranks():
    """Of vLLM and SGLang; names that only begin alike are others."""
    vllm = (
        b'vllm:num_requests_running{engine="0",model_name="m"} 3.0\n'
        b'vllm:num_requests_running{engine="1",model_name="m"} 5.0\n'
        b'vllm:num_requests_waiting{engine="0",model_name="m"} 2.0\n'
        b'vllm:num_requests_waiting{engine="1",model_name="m"} 0.0\n'
        b'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0\n'
    )
    facts = read_metrics(vllm)
    assert (facts.running, facts.waiting) == (8, 2)
    assert (facts.per_rank(2).running, facts.per_rank(2).waiting) == (4, 1)
    sglang = read_metrics(b"sglang:num_running_reqs 4\nsglang:num_queue_reqs 1\n")
    assert (sglang.running, sglang.waiting) == (4, 1)
    assert read_metrics(b"vllm:num_requests_running nan\n").running is None


def test_sglang_names_its_version():
    """And an engine that names none has none."""
    assert read_sglang_server(b'{"version":"0.5.1","max_total_num_tokens":9}').version == "0.5.1"
    assert read_sglang_server(b'{"max_total_num_tokens":9}').version is None


def test_what_one_page_leaves_out_is_taken_from_the_next():
    """What a page says itself is kept."""
    full = EngineFacts(10, 2, 1.5, tells_timings=True, slots=3, engine="e", version="v", has_template=True)
    full = msgspec.structs.replace(full, running=4, waiting=5, ranks=6)
    assert EngineFacts().joined(full) == full
    assert full.joined(EngineFacts()) == full
    assert full.joined(EngineFacts(11, 12, 13.0, slots=14, engine="x", running=15, waiting=16, ranks=17)) == full


def test_each_of_many_ranks_holds_something():
    """A sum that is less than the number of ranks is no capacity of nothing."""
    one = EngineFacts(3, 2, running=9, waiting=3).per_rank(4)
    assert (one.capacity_tokens, one.in_flight_limit, one.running, one.waiting) == (1, 1, 2, 0)
    assert EngineFacts().per_rank(4) == EngineFacts()


@pytest.mark.parametrize("limit", [b"-1", b"0", b"99999999999999999999"])
def test_a_limit_under_which_a_replica_would_get_nothing_is_none(limit: bytes) -> None:
    """Nor is a number that no engine can have; SGLang writes -1 for what it does not know yet."""
    server = read_sglang_server(b'{"max_total_num_tokens": 400, "max_running_requests": %b}' % limit)
    assert (server.capacity_tokens, server.in_flight_limit) == (400, None)
    inner = read_sglang_server(
        b'{"internal_states": [{"max_running_requests": %b}, {"max_running_requests": 8}]}' % limit
    )
    assert inner.in_flight_limit == 8
    assert read_llama_props(b'{"total_slots": %b}' % limit).in_flight_limit is None

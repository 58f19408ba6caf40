"""What an engine says of itself: bytes of its metrics or properties in, facts out. Fetching them is another's work.

Whatever cannot be read is left out: these pages change from release to release, and a proxy works without them.
"""

from __future__ import annotations

import re

import msgspec


class EngineFacts(msgspec.Struct, frozen=True, gc=False):
    """Each None where the engine does not say. `started_unix_seconds` tells a restart under the same address.

    `tells_timings` is llama.cpp's habit: every stream ends with what was computed and cached, asked or not.
    """

    capacity_tokens: int | None = None
    in_flight_limit: int | None = None
    started_unix_seconds: float | None = None
    tells_timings: bool = False
    slots: int | None = None  # prompts that it holds at most, one per slot

    def joined(self, other: EngineFacts) -> EngineFacts:
        """Both pages' facts; where both have one, this one's."""
        return EngineFacts(
            self.capacity_tokens if self.capacity_tokens is not None else other.capacity_tokens,
            self.in_flight_limit if self.in_flight_limit is not None else other.in_flight_limit,
            self.started_unix_seconds if self.started_unix_seconds is not None else other.started_unix_seconds,
            self.tells_timings or other.tells_timings,
            self.slots if self.slots is not None else other.slots,
        )


_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_STARTED = re.compile(
    rb"^process_start_time_seconds(?:\{[^}]*\})? ([0-9]{1,20}(?:\.[0-9]*)?(?:[eE]\+?[0-9]{1,2})?)\s*$", re.MULTILINE
)
_VLLM = re.compile(rb"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
_SGLANG = re.compile(
    rb"^sglang:max_total_num_tokens(?:\{[^}]*\})? ([0-9]{1,20}(?:\.[0-9]*)?(?:[eE]\+?[0-9]{1,2})?)\s*$", re.MULTILINE
)

MOST_TOKENS = 1 << 40
"""A capacity beyond this is a mistake of the page."""


def read_metrics(page: bytes) -> EngineFacts:
    """A Prometheus page of vLLM or SGLang (any engine's for its start time).

    vLLM: `vllm:cache_config_info` has block_size and num_gpu_blocks as labels; their product is the capacity, per
    engine of a data-parallel server (the lines are added).
    """
    capacity = 0
    for line in _VLLM.findall(page):
        labels = dict(_LABEL.findall(line.decode("utf-8", "replace")))
        blocks = _whole(labels.get("num_gpu_blocks")) or _whole(labels.get("num_cpu_blocks"))
        capacity += (blocks or 0) * (_whole(labels.get("block_size")) or 0)
    if not capacity:
        found = _SGLANG.search(page)
        capacity = int(float(found.group(1))) if found else 0
    started = _STARTED.search(page)
    return EngineFacts(
        capacity_tokens=_bounded(capacity),
        started_unix_seconds=float(started.group(1)) if started else None,
    )


class _Generation(msgspec.Struct):
    n_ctx: int = 0


class _LlamaProps(msgspec.Struct):
    total_slots: int = 0
    default_generation_settings: _Generation = msgspec.field(default_factory=_Generation)


class _SglangInfo(msgspec.Struct):
    max_total_num_tokens: int | None = None
    max_running_requests: int | None = None
    internal_states: list[_SglangInfo] = []


def read_llama_props(page: bytes) -> EngineFacts:
    """llama.cpp's `/props`: slots, and the tokens of each; a slot serves one request at a time."""
    try:
        props = msgspec.json.decode(page, type=_LlamaProps)
    except msgspec.DecodeError:
        return EngineFacts()
    slots = props.total_slots if props.total_slots > 0 else None
    return EngineFacts(
        capacity_tokens=_bounded((slots or 1) * props.default_generation_settings.n_ctx),
        in_flight_limit=slots,
        tells_timings=slots is not None,
        slots=slots,
    )


def read_sglang_server(page: bytes) -> EngineFacts:
    """SGLang's `/get_server_info`: the numbers stand at the top or in `internal_states`, by release."""
    try:
        server = msgspec.json.decode(page, type=_SglangInfo)
    except msgspec.DecodeError:
        return EngineFacts()
    parts = server.internal_states if server.max_total_num_tokens is None and server.internal_states else [server]
    limits = [part.max_running_requests or server.max_running_requests or 0 for part in parts]
    return EngineFacts(
        capacity_tokens=_bounded(sum(part.max_total_num_tokens or 0 for part in parts)),
        in_flight_limit=sum(limits) or None,
    )


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _bounded(tokens: int) -> int | None:
    return tokens if 0 < tokens < MOST_TOKENS else None

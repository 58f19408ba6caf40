"""Read an engine's own pages (metrics, properties): bytes in, facts out. Pure.

Whatever cannot be read is left out: these pages change from release to release, and Cairn works without them.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from proxy.wire.schemas import DECODE_ERRORS

_MOST_REQUESTS = 1_000_000  # at once; more is not a limit
_T = TypeVar("_T")


class EngineFacts(msgspec.Struct, frozen=True, gc=False):
    """Facts about an engine; None for what it does not report.

    `started_unix_seconds` reveals a restart under the same address. `tells_timings` means that every stream ends with
    the computed and cached tokens, asked for or not, as from llama.cpp. `running` and `waiting` are its requests at
    the moment, of all clients.
    """

    capacity_tokens: int | None = None
    in_flight_limit: int | None = None
    started_unix_seconds: float | None = None
    tells_timings: bool = False
    slots: int | None = None  # most prompts that it can hold, one per slot
    engine: str | None = None
    version: str | None = None
    has_template: bool = False  # the chat template is known
    running: int | None = None
    waiting: int | None = None
    ranks: int | None = None  # data-parallel ranks behind the address, numbered from 0, each with its own cache

    def per_rank(self, ranks: int) -> EngineFacts:
        """Return the facts of one of `ranks` data-parallel ranks, of which these are the sum."""
        capacity, limit = self.capacity_tokens, self.in_flight_limit
        return msgspec.structs.replace(
            self,
            capacity_tokens=None if capacity is None else max(capacity // ranks, 1),
            in_flight_limit=None if limit is None else max(limit // ranks, 1),
            running=None if self.running is None else self.running // ranks,
            waiting=None if self.waiting is None else self.waiting // ranks,
        )

    def joined(self, other: EngineFacts) -> EngineFacts:
        """Join the facts of two pages; this one's win."""
        return EngineFacts(
            capacity_tokens=_first(self.capacity_tokens, other.capacity_tokens),
            in_flight_limit=_first(self.in_flight_limit, other.in_flight_limit),
            started_unix_seconds=_first(self.started_unix_seconds, other.started_unix_seconds),
            tells_timings=self.tells_timings or other.tells_timings,
            slots=_first(self.slots, other.slots),
            engine=_first(self.engine, other.engine),
            version=_first(self.version, other.version),
            has_template=self.has_template or other.has_template,
            running=_first(self.running, other.running),
            waiting=_first(self.waiting, other.waiting),
            ranks=_first(self.ranks, other.ranks),
        )


_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_STARTED = re.compile(
    rb"^process_start_time_seconds(?:\{[^}]*\})? ([0-9]{1,20}(?:\.[0-9]*)?(?:[eE]\+?[0-9]{1,2})?)\s*$", re.MULTILINE
)
_VLLM = re.compile(rb"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
_SGLANG = re.compile(
    rb"^sglang:max_total_num_tokens(?:\{[^}]*\})? ([0-9]{1,20}(?:\.[0-9]*)?(?:[eE]\+?[0-9]{1,2})?)\s*$", re.MULTILINE
)

_RUNNING = re.compile(
    rb"^(?:vllm:num_requests_running|sglang:num_running_reqs)(?:\{[^}]*\})? ([0-9]{1,9})(?:\.0*)?\s*$", re.MULTILINE
)
_WAITING = re.compile(
    rb"^(?:vllm:num_requests_waiting|sglang:num_queue_reqs)(?:\{[^}]*\})? ([0-9]{1,9})(?:\.0*)?\s*$", re.MULTILINE
)

MOST_TOKENS = 1 << 40
"""A larger capacity is a mistake of the page."""

_VERSION_CHARACTERS = 32


def read_metrics(page: bytes) -> EngineFacts:
    """Read a Prometheus page of vLLM or SGLang, or the start time of any engine; the requests of ranks are added."""
    lines = [dict(_LABEL.findall(line.decode("utf-8", "replace"))) for line in _VLLM.findall(page)]
    capacity = _vllm_capacity(lines)
    if not capacity:
        found = _SGLANG.search(page)
        capacity = int(float(found.group(1))) if found else 0
    started = _STARTED.search(page)
    is_vllm = b"\nvllm:" in page or page.startswith(b"vllm:")
    return EngineFacts(
        capacity_tokens=_bounded(capacity),
        started_unix_seconds=float(started.group(1)) if started else None,
        engine="vLLM" if is_vllm else "SGLang" if b"sglang:" in page else None,
        ranks=_vllm_ranks(lines),
        running=_sum(_RUNNING.findall(page)),
        waiting=_sum(_WAITING.findall(page)),
    )


def _vllm_capacity(lines: list[dict[str, str]]) -> int:
    """Return the tokens that all engines of a vLLM server hold, from the labels of `vllm:cache_config_info`.

    There is a line for each data-parallel rank. `kv_cache_size_tokens` counts one rank's tokens, also for models
    whose layers have different kinds of cache. Releases without it show blocks and their size; with several ranks
    each line then has the blocks of all.
    """
    sizes = [_whole(labels.get("kv_cache_size_tokens")) or 0 for labels in lines]
    if all(sizes):
        return sum(sizes)
    blocks = [
        (_whole(labels.get("num_gpu_blocks")) or _whole(labels.get("num_cpu_blocks")) or 0)
        * (_whole(labels.get("block_size")) or 0)
        for labels in lines
    ]
    is_sum = len(set(blocks)) == 1 and _vllm_ranks(lines) is not None
    return blocks[0] if is_sum else sum(blocks)


def _vllm_ranks(lines: list[dict[str, str]]) -> int | None:
    """Return how many data-parallel ranks the lines name; None unless they are numbered from 0."""
    numbers = {labels.get("engine") for labels in lines}
    return len(numbers) if lines and numbers == {str(number) for number in range(len(numbers))} else None


class _Generation(msgspec.Struct):
    n_ctx: int = 0


class _LlamaProps(msgspec.Struct):
    total_slots: int = 0
    build_info: str = ""
    chat_template: str = ""
    default_generation_settings: _Generation = msgspec.field(default_factory=_Generation)


class _SglangInfo(msgspec.Struct):
    max_total_num_tokens: int | None = None
    max_running_requests: int | None = None
    version: str | None = None
    internal_states: list[_SglangInfo] = []


def read_llama_props(page: bytes) -> EngineFacts:
    """Read llama.cpp's `/props`: slots and the tokens of each; a slot serves one request at a time."""
    try:
        props = msgspec.json.decode(page, type=_LlamaProps)
    except DECODE_ERRORS:
        return EngineFacts()
    slots = _limit(props.total_slots)
    return EngineFacts(
        capacity_tokens=_bounded((slots or 1) * props.default_generation_settings.n_ctx),
        in_flight_limit=slots,
        tells_timings=slots is not None,
        slots=slots,
        engine=None if slots is None else "llama.cpp",
        version=props.build_info[:_VERSION_CHARACTERS] or None,
        has_template=bool(props.chat_template),
    )


def read_sglang_server(page: bytes) -> EngineFacts:
    """Read SGLang's `/get_server_info`: the numbers are at the top or in `internal_states`, by release."""
    try:
        server = msgspec.json.decode(page, type=_SglangInfo)
    except DECODE_ERRORS:
        return EngineFacts()
    parts = server.internal_states if server.max_total_num_tokens is None and server.internal_states else [server]
    limits = [_limit(part.max_running_requests) or _limit(server.max_running_requests) or 0 for part in parts]
    return EngineFacts(
        capacity_tokens=_bounded(sum(part.max_total_num_tokens or 0 for part in parts)),
        in_flight_limit=_limit(sum(limits)),
        engine="SGLang" if server.max_total_num_tokens is not None or server.internal_states else None,
        version=server.version[:_VERSION_CHARACTERS] if server.version else None,
    )


class _Version(msgspec.Struct):
    version: str = ""


def read_version(page: bytes) -> EngineFacts:
    """Read vLLM's `/version`."""
    try:
        return EngineFacts(version=msgspec.json.decode(page, type=_Version).version[:_VERSION_CHARACTERS] or None)
    except DECODE_ERRORS:
        return EngineFacts()


def _first(one: _T | None, other: _T | None) -> _T | None:
    return other if one is None else one


def _sum(numbers: list[bytes]) -> int | None:
    return sum(map(int, numbers)) if numbers else None


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and len(text) <= 18 and text.isascii() and text.isdecimal() else None


def _limit(requests: int | None) -> int | None:
    """Return a number of requests at once, None if it is none: below a limit of 1 a replica would get no request."""
    return requests if requests is not None and 0 < requests <= _MOST_REQUESTS else None


def _bounded(tokens: int) -> int | None:
    return tokens if 0 < tokens < MOST_TOKENS else None

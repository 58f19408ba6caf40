"""Workloads: a trace in Mooncake's form, or a synthetic one.

A line is {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}, one id per 512
tokens; equal ids mean an equal prefix up to there (Mooncake, FAST'25).
"""

from __future__ import annotations

import gzip
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import msgspec

from cache.index.fingerprint import Fingerprint
from cache.index.hashing import chain_root

BLOCK_TOKENS = 512
BYTES_PER_TOKEN = 4
"""Bytes that a prompt's text would have; only the index's byte counts depend on it."""

SPREAD_SECONDS = 3.0
"""Most stamps of the published trace are multiples of this."""

NUDGE_SECONDS = 0.05
"""Arrivals of a repeated run are moved by up to this: it means nothing to a client, but ties fall otherwise."""


class Request(msgspec.Struct, frozen=True):
    """One request: `blocks` are chained, so equal numbers mean equal prefixes."""

    number: int
    arrival_seconds: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    fingerprint: Fingerprint


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path, limit: int | None = None) -> list[Request]:
    """Return the requests of a .jsonl or .jsonl.gz file in order of arrival, the first at 0 s; at most `limit`."""
    decoder = msgspec.json.Decoder(_Line)
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        rows = [decoder.decode(line) for line in lines if line.strip()]
    rows.sort(key=lambda row: row.timestamp)
    rows = rows[:limit]
    start = rows[0].timestamp if rows else 0.0
    return [
        make_request(n, (row.timestamp - start) / 1_000, row.input_length, row.output_length, row.hash_ids)
        for n, row in enumerate(rows)
    ]


def make_request(number: int, arrival_seconds: float, inputs: int, outputs: int, ids: Iterable[int]) -> Request:
    """Return a request with its chain, an id per 512 tokens of `inputs`; surplus ids are left out."""
    needed = -(-inputs // BLOCK_TOKENS)
    hashes, last = [], 0
    for place, block in enumerate(ids):
        if place == needed:
            break
        last = chain_root([last.to_bytes(8, "little"), block.to_bytes(16, "little", signed=True)])
        hashes.append(last)
    if len(hashes) < needed:
        raise ValueError(f"request {number}: {inputs} tokens need {needed} hash ids, it has {len(hashes)}")
    ends = [BLOCK_TOKENS * BYTES_PER_TOKEN * (place + 1) for place in range(needed)]
    if ends:
        ends[-1] = inputs * BYTES_PER_TOKEN
    return Request(
        number, arrival_seconds, inputs, outputs, tuple(hashes), Fingerprint(array("Q", hashes), array("I", ends))
    )


def spread(requests: list[Request], seed: int = 1, seconds: float = SPREAD_SECONDS) -> list[Request]:
    """Return each request moved to a random moment of the `seconds` after its stamp."""
    random = Random(seed)
    moved = [_at(request, request.arrival_seconds + random.random() * seconds) for request in requests]
    return sorted(moved, key=lambda request: request.arrival_seconds)


def at_load(requests: list[Request], tokens_per_second: float) -> list[Request]:
    """Return the same arrivals, faster or slower, so that `tokens_per_second` raw input tokens arrive in the mean."""
    seconds = requests[-1].arrival_seconds - requests[0].arrival_seconds
    if seconds <= 0:
        return requests
    factor = sum(request.input_tokens for request in requests) / seconds / tokens_per_second
    return [_at(request, request.arrival_seconds * factor) for request in requests]


def decode_heavy(count: int = 3_000, per_second: float = 30.0, seed: int = 1) -> list[Request]:
    """Return requests with a hot prefix of 4,096 tokens, 200 own tokens, and 800 of output: decoding is the load."""
    return list(_decode_heavy(count, per_second, Random(seed)))


def _decode_heavy(count: int, per_second: float, random: Random) -> Iterator[Request]:
    now = 0.0
    for number in range(count):
        now += random.expovariate(per_second)
        yield make_request(number, now, 4_296, 800, [*range(8), 1_000 + number])


def _at(request: Request, arrival_seconds: float) -> Request:
    return msgspec.structs.replace(request, arrival_seconds=arrival_seconds)

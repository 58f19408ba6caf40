"""A request of a trace as the body of a chat request: seeded words per block. Pure.

A block of 512 tokens is 2,048 bytes of ASCII, so that the engines of this benchmark count the trace's own tokens. Its
text is drawn by the block's chained id, so equal prefixes have equal text and different ones differ at once.
"""

from __future__ import annotations

import random
from typing import Protocol

from benchmarks.fleet.trace import BLOCK_TOKENS, BYTES_PER_TOKEN, Request

BLOCK_BYTES = BLOCK_TOKENS * BYTES_PER_TOKEN
MODEL = "replay"
_POOL_BYTES = 1 << 20
_ID_DIGITS = 16
_LETTERS = "etaoinshrdlucmfwypvbgkqjxz"


class Bodies(Protocol):
    """The bodies of requests."""

    def body(self, request: Request) -> bytes:
        """Return the JSON of a streamed chat request."""
        ...


class Texts:
    """Blocks to text. The words are the same for the same seed."""

    def __init__(self, seed: int = 1) -> None:
        chooser = random.Random(seed)
        weights = range(len(_LETTERS), 0, -1)
        vocabulary = ["".join(chooser.choices(_LETTERS, weights, k=chooser.randint(2, 9))) for _ in range(4_096)]
        self._pool = " ".join(chooser.choices(vocabulary, k=_POOL_BYTES // 5)).encode()

    def block(self, block: int) -> bytes:
        """Return the 2,048 bytes of one block."""
        start = block % (len(self._pool) - BLOCK_BYTES)
        return b"%0*x %b" % (_ID_DIGITS, block, self._pool[start : start + BLOCK_BYTES - _ID_DIGITS - 1])

    def body(self, request: Request) -> bytes:
        """Return the JSON of a streamed chat request whose one message has four bytes a token."""
        text = b"".join(map(self.block, request.blocks))[: request.input_tokens * BYTES_PER_TOKEN]
        return (
            b'{"model":"%b","stream":true,"stream_options":{"include_usage":true},"max_tokens":%d,'
            b'"messages":[{"role":"user","content":"%b"}]}'
        ) % (MODEL.encode(), max(request.output_tokens, 1), text)

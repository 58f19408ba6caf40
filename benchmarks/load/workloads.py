"""Decide the prompts to send and when: a trace as text, or conversations with a common prompt. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks.fleet.trace import BYTES_PER_TOKEN, read_trace
from benchmarks.replay.texts import Texts

TURN_TOKENS = 100
"""Length of a question, and of the made-up answer before it."""

_VOCABULARY = 4_096
_LETTERS = "etaoinshrdlucmfwypvbgkqjxz"


class Message(msgspec.Struct, frozen=True):
    """One message of a chat."""

    role: str
    content: str


class Turn(msgspec.Struct, frozen=True):
    """One request: when, in seconds from the start, and what."""

    at_seconds: float
    messages: tuple[Message, ...]
    output_tokens: int


def of_trace(file: Path, count: int | None, rate: float | None) -> Iterator[Turn]:
    """Yield the requests of a trace in Mooncake's form at its own times, or at a mean `rate` per second."""
    requests, texts = read_trace(file, count), Texts()
    span = requests[-1].arrival_seconds if requests else 0.0
    factor = len(requests) / rate / span if rate and span > 0 else 1.0
    for request in requests:
        text = b"".join(map(texts.block, request.blocks))[: request.input_tokens * BYTES_PER_TOKEN].decode()
        yield Turn(request.arrival_seconds * factor, (Message("user", text),), max(request.output_tokens, 1))


def conversations(
    shared_tokens: int, conversations: int, count: int, rate: float, output_tokens: int, seed: int
) -> Iterator[Turn]:
    """Return `count` requests at `rate` a second, at random times: alternating turns of several conversations,
    which all begin with one system prompt of about `shared_tokens`. The responses in the history are made up, so no
    request waits for another."""
    chooser = random.Random(seed)
    vocabulary = _vocabulary(chooser)
    shared = Message("system", _words(vocabulary, f"{seed}/shared", shared_tokens))
    histories: list[list[Message]] = [[shared] for _ in range(conversations)]
    now = 0.0
    for number in range(count):
        which, turn = number % conversations, number // conversations
        history = histories[which]
        if turn:
            history.append(Message("assistant", _words(vocabulary, f"{seed}/{which}/{turn}/a", TURN_TOKENS)))
        history.append(Message("user", _words(vocabulary, f"{seed}/{which}/{turn}/q", TURN_TOKENS)))
        yield Turn(now, tuple(history), output_tokens)
        now += chooser.expovariate(rate)


def _vocabulary(chooser: random.Random) -> list[str]:
    weights = range(len(_LETTERS), 0, -1)
    return ["".join(chooser.choices(_LETTERS, weights, k=chooser.randint(2, 6))) for _ in range(_VOCABULARY)]


def _words(vocabulary: list[str], seed: str, tokens: int) -> str:
    return " ".join(random.Random(seed).choices(vocabulary, k=tokens))[: tokens * BYTES_PER_TOKEN]

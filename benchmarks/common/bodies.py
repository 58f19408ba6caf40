"""Bodies of chat requests of a wanted size, each different from the last; pure, knows no socket.

A body is one conversation: a system message that all requests share, then a user message that begins with a stamp
and so is new in every request, however long it is. What a router has seen is thus the first message, and what it
must file anew is the second. The text is seeded words with the escapes that prose has in JSON.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

STAMP_DIGITS = 16  # room for more requests than any run makes
_STAMP = b"0" * STAMP_DIGITS
_WORDS_SEED = 20_240_607
_VOCABULARY = 4_096  # words; enough that no two paragraphs are alike
_LETTERS = "etaoinshrdlucmfwypvbgkqjxz"
_ESCAPE_EVERY_WORDS = 16  # a quote or a new line about every 90 bytes, as in prose

PLAIN = "bench"  # no wish


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of the bodies of one measurement.

    `size_bytes` is the size of the whole JSON body, `shared_share` how much of the text is the same in all,
    `wish` is what the static upstream is asked to do (see `upstream`), `verify` has it remember the body's digest.
    """

    size_bytes: int
    shared_share: float = 0.5
    stream: bool = False
    include_usage: bool = False
    wish: str = PLAIN
    verify: bool = False
    model: str = "bench"


def words(size_bytes: int, seed: int = _WORDS_SEED) -> bytes:
    """Return exactly `size_bytes` of seeded text, escaped for a JSON string; no escape is cut in two."""
    chooser = random.Random(seed)
    weights = range(len(_LETTERS), 0, -1)
    vocabulary = ["".join(chooser.choices(_LETTERS, weights, k=chooser.randint(2, 9))) for _ in range(_VOCABULARY)]
    pieces: list[str] = []
    have = 0
    while have <= size_bytes:
        sentence = " ".join(chooser.choices(vocabulary, k=_ESCAPE_EVERY_WORDS))
        piece = sentence + chooser.choice((" ", ".\\n", ', \\"', "; "))
        pieces.append(piece)
        have += len(piece)
    text = "".join(pieces).encode()[:size_bytes]
    cut_escape = (len(text) - len(text.rstrip(b"\\"))) % 2
    return text[:-1] + b"." if cut_escape else text


def body(shape: Shape) -> tuple[bytearray, int]:
    """Return the JSON body of `shape` and the offset of its stamp.

    Raises ValueError if the size is too small for the members themselves.
    """
    options = b',"stream":true' if shape.stream else b""
    if shape.include_usage:
        options += b',"stream_options":{"include_usage":true}'
    head = b'{"model":"%b"%b,"user":"%b","messages":[{"role":"system","content":"' % (
        shape.model.encode(),
        options,
        b"verify" if shape.verify else b"bench",
    )
    middle = b'"},{"role":"user","content":"'
    tail = b' [[%b %d]]"}],"max_tokens":64}' % (shape.wish.encode(), shape.size_bytes)
    room = shape.size_bytes - len(head) - len(middle) - len(tail) - STAMP_DIGITS - 1
    if room < 0:
        raise ValueError(f"{shape.size_bytes} bytes have no room for a chat request")
    shared = words(int(room * shape.shared_share))
    own = words(room - len(shared), seed=_WORDS_SEED + 1)
    start = head + shared + middle
    return bytearray(start + _STAMP + b" " + own + tail), len(start)


def stamp(buffer: bytearray, offset: int, number: int) -> None:
    """Make the body in `buffer` different from all others, in place and in the same size."""
    buffer[offset : offset + STAMP_DIGITS] = b"%0*d" % (STAMP_DIGITS, number)


def request_head(path: str, size_bytes: int) -> bytes:
    """Return the head that the OpenAI SDK would send, near enough in number and size of headers."""
    return (
        b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\nuser-agent: OpenAI/Python 3.50.0\r\n"
        b"authorization: Bearer sk-benchmark-0000000000000000\r\nx-stainless-lang: python\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
    ) % (path.encode(), size_bytes)

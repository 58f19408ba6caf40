"""Replace a secret by asterisks in a body that passes in pieces, compressed or not. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from proxy.errors import BadResponse
from proxy.wire.decode import ResponseDecoder

_OF_CODING: Final = (b"content-encoding", b"content-length")


class Concealer:
    """Conceals `secret` in one body, also where two pieces split it. With a decoder the body is passed on decoded."""

    def __init__(self, secret: bytes, decoder: ResponseDecoder | None = None) -> None:
        self._secret = secret
        self._decoder = decoder
        self._held = b""  # the end of what came, which may be the beginning of the secret

    def feed(self, piece: bytes, *, is_last: bool) -> bytes:
        """Return what may be passed on after `piece`; all of it if that `is_last`.

        Raises BadResponse if the body cannot be decoded.
        """
        if self._decoder is not None:
            piece = self._decoder.feed(piece)
            if not self._decoder.alive:
                raise BadResponse("the upstream's error cannot be decompressed")
        text = concealed(self._held + piece, self._secret)
        kept = 0 if is_last else _begun_bytes(text, self._secret)
        end = len(text) - kept
        self._held = text[end:]
        return text[:end]


def concealed(text: bytes, secret: bytes) -> bytes:
    """Return `text` with asterisks in place of `secret`, if there is one. Its length does not change."""
    return text.replace(secret, b"*" * len(secret)) if secret else text


def concealed_headers(
    headers: Iterable[tuple[bytes, bytes]], secret: bytes, *, is_decoded: bool
) -> tuple[tuple[bytes, bytes], ...]:
    """Return headers without the secret, and without those of the coding of a body that is passed on decoded."""
    kept = [pair for pair in headers if not (is_decoded and pair[0] in _OF_CODING)]
    return tuple([(name, concealed(value, secret)) for name, value in kept])


def _begun_bytes(text: bytes, secret: bytes) -> int:
    """Return the length of the longest end of `text` that `secret` begins with."""
    for length in range(min(len(text), len(secret) - 1), 0, -1):
        if text.endswith(secret[:length]):
            return length
    return 0

"""The offsets of a raw value are those of the value itself, wherever an equal text may be."""

from __future__ import annotations

import msgspec
import pytest

from proxy.wire.spans import span_of


class _Values(msgspec.Struct):
    values: list[msgspec.Raw]


def test_equal_values_have_their_own_offsets() -> None:
    """In bytes and in a bytearray, as a raw value and as a view of it."""
    for body in (b'{"values":["a", "a" ,"a"]}', bytearray(b'{"values":["a", "a" ,"a"]}')):
        raw = msgspec.json.decode(body, type=_Values).values
        assert [span_of(body, value) for value in raw] == [(11, 14), (16, 19), (21, 24)]
        assert span_of(body, memoryview(raw[1])) == (16, 19)


def test_a_value_of_another_body_has_none() -> None:
    """Rather than offsets that mean nothing."""
    body = b'{"values":["a"]}' * 100
    with pytest.raises(ValueError, match=r"^the part does not lie in this body$"):
        span_of(body, memoryview(bytes(bytearray(b"elsewhere"))))

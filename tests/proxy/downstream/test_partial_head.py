"""Find the end of a head that comes in several reads."""

from __future__ import annotations

import pytest

from proxy.downstream.partial_head import PartialHead

HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("before", [b"", b"the body of another request\r\n\r\nand its rest"])
@pytest.mark.parametrize("arrived", range(len(HEAD)))
def test_the_end_of_a_head_is_found_at_any_cut_and_never_before_its_own_bytes(arrived: int, before: bytes) -> None:
    """Bytes that precede the head in the same read belong to another request."""
    head = PartialHead()
    head.add(HEAD[:arrived])
    data = before + HEAD[arrived:] + b"the body\r\n\r\n"
    whole_bytes = len(before) + len(HEAD) - arrived
    assert head.end_in(data, len(before), len(data)) == whole_bytes
    assert head.end_in(data, len(before), whole_bytes - 1) == -1
    assert (head.nbytes, head.line) == (arrived, HEAD[:arrived].partition(b"\r\n")[0])

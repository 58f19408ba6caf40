"""Pages of listed origins may ask and read; what the upstream says about origins does not count."""

from __future__ import annotations

import pytest

from proxy.pipeline.cors import Cors, CorsResponse

ASKING = ((b"origin", b"https://a.example"), (b"access-control-request-method", b"POST"))
GRANTED = (b"access-control-allow-origin", b"https://a.example")


class Kept:
    """A response that keeps what is written."""

    def __init__(self) -> None:
        self.begun = False
        self.calls: list[tuple[object, ...]] = []

    def send(self, *arguments: object) -> None:
        self.calls.append(("send", *arguments))

    def begin(self, *arguments: object) -> None:
        self.calls.append(("begin", *arguments))

    async def write(self, piece: bytes | memoryview) -> None:
        self.calls.append(("write", piece))

    def offer(self, piece: bytes, framed: bytes | None = None) -> bool:
        self.calls.append(("offer", piece, framed))
        return False

    async def drained(self) -> None:
        self.calls.append(("drained",))

    def end(self) -> None:
        self.calls.append(("end",))

    def write_last(self, piece: bytes) -> None:
        self.calls.append(("write_last", piece))

    def break_off(self) -> None:
        self.calls.append(("break_off",))


@pytest.mark.parametrize("origins", [("https://a.example",), ("https://A.example/", "https://b.example"), ("*",)])
def test_a_preflight_of_a_listed_origin_is_granted(origins) -> None:
    """With the headers that it asks for; any origin gets a star, others their own name."""
    asked = (*ASKING, (b"access-control-request-headers", b"authorization, x-y"))
    granted = dict(Cors(origins).preflight("OPTIONS", asked) or ())
    assert granted[b"access-control-allow-origin"] == (b"*" if "*" in origins else b"https://a.example")
    assert granted[b"access-control-allow-headers"] == b"authorization, x-y"
    assert granted[b"access-control-allow-methods"] == b"GET, HEAD, POST, PUT, PATCH, DELETE"
    assert granted[b"access-control-max-age"] == b"7200"
    assert granted.get(b"vary") == (None if "*" in origins else b"Origin")
    assert len(granted) == (4 if "*" in origins else 5)


@pytest.mark.parametrize(
    ("origins", "method", "headers"),
    [
        ((), "OPTIONS", ASKING),
        (("https://b.example",), "OPTIONS", ASKING),
        (("https://a.example",), "GET", ASKING),
        (("https://a.example",), "OPTIONS", ASKING[:1]),
        (("https://a.example",), "OPTIONS", ASKING[1:]),
        (("https://a.example",), "OPTIONS", ((b"origin", b""), ASKING[1])),
    ],
)
def test_every_other_request_is_no_preflight(origins, method, headers) -> None:
    """It goes the way of all requests, key and all."""
    assert Cors(origins).preflight(method, headers) is None


def test_a_preflight_without_wishes_or_with_too_many_gets_a_star() -> None:
    """The names repeated to the client are bounded."""
    cors = Cors(("https://a.example",))
    for names, allowed in ((b"", b"*"), (b"x" * 4096, b"x" * 4096), (b"x" * 4097, b"*")):
        headers = (*ASKING, (b"access-control-request-headers", names))
        assert dict(cors.preflight("OPTIONS", headers) or ())[b"access-control-allow-headers"] == allowed
    assert dict(cors.preflight("OPTIONS", ASKING) or ())[b"access-control-allow-headers"] == b"*"


async def test_a_response_to_a_page_names_its_origin_in_place_of_the_upstreams_word() -> None:
    """And passes everything else on, call by call."""
    kept = Kept()
    client = Cors(("https://a.example",)).response(kept, ASKING)
    assert isinstance(client, CorsResponse)
    upstreams = ((b"access-control-allow-origin", b"*"), (b"content-type", b"x"))
    client.send(200, b"OK", upstreams, b"body")
    client.begin(200, b"OK", upstreams, 4)
    await client.write(b"w")
    assert client.offer(b"o", b"f") is False
    await client.drained()
    client.end()
    client.write_last(b"l")
    client.break_off()
    assert client.begun is False
    heads = [call[3] for call in kept.calls[:2]]
    for head in heads:
        assert isinstance(head, list)
        assert head[:3] == [(b"content-type", b"x"), GRANTED, (b"vary", b"Origin")]
    assert [call[0] for call in kept.calls] == [
        "send", "begin", "write", "offer", "drained", "end", "write_last", "break_off",
    ]  # fmt: skip
    assert kept.calls[3] == ("offer", b"o", b"f")


def test_without_an_allowed_origin_the_response_is_left_alone() -> None:
    """No wrapper, no header."""
    kept = Kept()
    assert Cors(()).response(kept, ASKING) is kept
    assert Cors(("https://b.example",)).response(kept, ASKING) is kept
    assert Cors(("https://a.example",)).response(kept, ()) is kept

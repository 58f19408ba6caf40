"""Base URLs, and the heads of requests as bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream import Origin
from proxy.upstream.request_head import HeadWriter

ORIGIN = Origin.parse("http://replica:8000/v1")


@pytest.mark.parametrize(
    ("url", "target", "expected"),
    [
        ("http://h", b"/v1/chat/completions", b"/v1/chat/completions"),
        ("http://h/", b"/v1/models?limit=1", b"/v1/models?limit=1"),
        ("http://h/v1", b"/v1/models", b"/v1/models"),
        ("http://h/v1/", b"/v1", b"/v1"),
        ("http://h/v1", b"/v1?x", b"/v1?x"),
        ("http://h/v1", b"/health", b"/health"),
        ("http://h/v1", b"/v10/x", b"/v10/x"),
        ("http://h/llm", b"/v1/models", b"/llm/v1/models"),
        ("http://h/llm", b"/metrics", b"/llm/metrics"),
        ("https://h/openai/v1", b"/v1/models", b"/openai/v1/models"),
        ("https://h/openai/v1", b"/health", b"/openai/health"),
        ("https://h/api/v3", b"/v1", b"/api/v3"),
        ("https://h/api/v3", b"/v1?x=1", b"/api/v3?x=1"),
        ("https://h/api/v3", b"/v1x", b"/api/v1x"),
        ("https://h/api/v3", b"/v1/chat/completions", b"/api/v3/chat/completions"),
        ("https://h/v1beta/openai/", b"/v1/chat/completions", b"/v1beta/openai/chat/completions"),
    ],
)
def test_a_base_url_with_or_without_v1_maps_targets_to_where_the_api_is(
    url: str, target: bytes, expected: bytes
) -> None:
    assert Origin.parse(url).target(target) == expected


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://h:80", b"h"),
        ("http://h:8000", b"h:8000"),
        ("https://h", b"h"),
        ("https://h:80", b"h:80"),
        ("http://[::1]:9", b"[::1]:9"),
    ],
)
def test_the_host_header_names_the_port_only_where_it_is_not_the_schemes_own(url: str, host: bytes) -> None:
    assert Origin.parse(url).host_header == host


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h",
        "h:80",
        "http://",
        "http://u:p@h",
        "http://h?x=1",
        "http://h#x",
        "http://h/a b",
        "http://h:x",
        "http://é",
    ],
)
def test_a_url_that_is_not_a_plain_base_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        Origin.parse(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("h:80", "an upstream's URL must be http://host[:port][/path] or https://host[:port][/path]"),
        ("http://u@h", "an upstream's URL must have no credentials, query or fragment"),
        ("http://h/a b", "an upstream's URL must be ASCII without spaces"),
    ],
)
def test_the_error_for_a_url_says_how_it_must_be(url: str, message: str) -> None:
    """The one who configured it reads this."""
    with pytest.raises(ValueError) as caught:
        Origin.parse(url)
    assert str(caught.value) == message


def test_a_head_has_host_first_the_callers_headers_in_order_and_the_length_last() -> None:
    head = HeadWriter(ORIGIN).write(b"POST", b"/v1/x", [(b"b", b"2"), (b"a", b"1"), (b"b", b"3")], 5)
    assert head == b"POST /v1/x HTTP/1.1\r\nhost: replica:8000\r\nb: 2\r\na: 1\r\nb: 3\r\ncontent-length: 5\r\n\r\n"


@pytest.mark.parametrize(
    ("method", "length", "line"),
    [
        (b"POST", 0, b"content-length: 0"),
        (b"GET", 0, None),
        (b"DELETE", 3, b"content-length: 3"),
        (b"POST", None, b"transfer-encoding: chunked"),
    ],
)
def test_framing_is_written_where_there_is_or_could_be_a_body(
    method: bytes, length: int | None, line: bytes | None
) -> None:
    lines = HeadWriter(ORIGIN).write(method, b"/", [], length).split(b"\r\n")
    assert lines[2:-2] == ([] if line is None else [line])


def test_headers_of_the_connection_are_the_clients_own_whatever_the_caller_gives() -> None:
    given_headers = [(b"Host", b"evil"), (b"content-length", b"9"), (b"Transfer-Encoding", b"chunked"), (b"te", b"x")]
    head = HeadWriter(ORIGIN).write(b"POST", b"/", given_headers, 1)
    assert head == b"POST / HTTP/1.1\r\nhost: replica:8000\r\ncontent-length: 1\r\n\r\n"


@pytest.mark.parametrize("bad", [b"\r", b"\n", b"\0", b"\r\n", b"x\r\nevil: 1"])
@pytest.mark.parametrize("where", ["method", "target", "name", "value"])
def test_nothing_in_a_head_can_start_another_line(where: str, bad: bytes) -> None:
    parts = {"method": b"GET", "target": b"/", "name": b"a", "value": b"b"}
    parts[where] += bad
    with pytest.raises(ValueError):
        HeadWriter(ORIGIN).write(parts["method"], parts["target"], [(parts["name"], parts["value"])], 0)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (b"/a b", b"a"),
        (b"", b"a"),
        (b"http://evil/", b"a"),
        (b"/\t", b"a"),
        (b"/", b"a b"),
        (b"/", b"a:"),
        (b"/", b""),
    ],
)
def test_a_target_or_name_of_another_shape_is_refused(target: bytes, name: bytes) -> None:
    with pytest.raises(ValueError):
        HeadWriter(ORIGIN).write(b"GET", target, [(name, b"v")], 0)


@pytest.mark.parametrize(
    ("method", "target", "name", "value", "message"),
    [
        (b"G T", b"/", b"a", b"b", "a method must be a token"),
        (
            b"GET",
            b"v1",
            b"a",
            b"b",
            "a target must start with a slash and contain no white space or control characters",
        ),
        (b"GET", b"/", b"a:", b"b", "a header's name must be a token"),
        (b"GET", b"/", b"a", b"b\nc", "a header's value must not contain CR, LF or NUL"),
    ],
)
def test_the_error_for_a_head_says_what_is_wrong_with_it(
    method: bytes, target: bytes, name: bytes, value: bytes, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        HeadWriter(ORIGIN).write(method, target, [(name, value)], 0)
    assert str(caught.value) == message


@given(st.lists(st.tuples(st.binary(max_size=6), st.binary(max_size=12)), max_size=4))
def test_whatever_is_written_has_exactly_the_lines_that_were_meant(headers: list[tuple[bytes, bytes]]) -> None:
    try:
        head = HeadWriter(ORIGIN).write(b"GET", b"/", headers, 0)
    except ValueError:
        return
    lines = head.replace(b"\r", b"\n").split(b"\n")
    assert len(head.split(b"\r\n")) == head.count(b"\n") + 1 == head.count(b"\r") + 1
    assert lines.count(b"GET / HTTP/1.1") == 1
    assert head.endswith(b"\r\n\r\n")
    assert head.count(b"\r\n\r\n") == 1


def test_made_up_header_names_do_not_grow_the_table_for_ever() -> None:
    writer = HeadWriter(ORIGIN)
    for number in range(5_000):
        writer.write(b"GET", b"/", [(b"x-%d" % number, b"v")], 0)
    assert len(writer._starts) <= 1024  # noqa: SLF001 - internal state that no public name shows
    assert b"x-4999: v" in writer.write(b"GET", b"/", [(b"x-4999", b"v")], 0)


def test_made_up_targets_do_not_grow_the_table_for_ever_and_are_written_all_the_same() -> None:
    """The longest that is remembered and the first that is not, too."""
    writer = HeadWriter(ORIGIN)
    for number in range(600):
        assert writer.write(b"GET", b"/v1/files/%d" % number, [], 0).startswith(b"GET /v1/files/%d HTTP/1.1" % number)
    assert len(writer._first_lines) == 256  # noqa: SLF001 - internal state that no public name shows
    writer = HeadWriter(ORIGIN)
    for length in range(400, 600):
        target = b"/" + b"x" * length
        for _ in range(2):
            assert writer.write(b"GET", target, [], 0).startswith(b"GET " + target + b" HTTP/1.1\r\nhost: ")
    assert all(len(line) < 512 for line in writer._first_lines.values())  # noqa: SLF001
    assert max(map(len, writer._first_lines.values())) == 511  # noqa: SLF001

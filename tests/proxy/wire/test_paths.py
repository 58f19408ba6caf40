"""Request targets are normalised as servers do it, and what stays ambiguous is refused."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.wire.paths import keys_in_query, split_target, without_credentials


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/v1/chat/completions", "/v1/chat/completions", ""),
        ("/v1/%63hat/completions", "/v1/chat/completions", ""),
        ("/v1/ch%61t%2Fx".replace("%2F", "/"), "/v1/chat/x", ""),
        ("/v1/chat/completions/", "/v1/chat/completions", ""),
        ("//v1///chat//completions?a=b", "/v1/chat/completions", "?a=b"),
        ("/v1/./chat/../chat/completions", "/v1/chat/completions", ""),
        ("/v1/files/%2e%2E/chat/completions", "/v1/chat/completions", ""),
        ("/v1/../../etc/passwd", "/etc/passwd", ""),
        ("http://169.254.169.254/v1/models?x", "/v1/models", "?x"),
        ("HTTPS://u:p@h:1", "/", ""),
        ("/v1/models/a%3ab", "/v1/models/a%3Ab", ""),
        ("/v1/é?é", "/v1/%C3%A9", "?%C3%A9"),
        ("/v1/...;x/.x%20/%F0%9F%98%80", "/v1/...;x/.x%20/%F0%9F%98%80", ""),
        ("/v1/x?a=%2F&b=../..", "/v1/x", "?a=%2F&b=../.."),
        ("/v1/x?", "/v1/x", "?"),
    ],
)
def test_a_path_is_what_a_server_takes_it_for(target: str, path: str, query: str) -> None:
    """Escapes of plain characters, dots, doubled and trailing slashes are resolved; the query is left alone."""
    assert split_target(target) == (path, query)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/chat%2Fcompletions",
        "/v1/chat%2fcompletions",
        "/v1/chat%5Ccompletions",
        "/v1/chat\\completions",
        "/v1/%2563hat/completions",
        "/v1/chat/completions%00",
        "/v1/chat/completions%0d",
        "/v1/chat/completions%3Fx",
        "/v1/chat/completions%23x",
        "/v1/chat/completions#x",
        "/v1/chat/completions?x#y",
        "/v1/chat%",
        "/v1/chat%4",
        "/v1/chat%zz",
        "/v1/a b",
        "/v1/x?a b",
        "/v1/a\x7f",
        "v1/chat/completions",
        "http:///v1/models",
        "http://:80/v1/models",
        "http://user@/v1/models",
        "*",
        "",
        "h:443",
        "/" + "a" * 20_000,
        "/v1/models/..;/organization/api_keys",
        "/v1/models/..;a=b/organization/api_keys",
        "/v1/models/%2e%2e;/organization/api_keys",
        "/v1/models/..%3b/organization/api_keys",
        "/v1/.;/files",
        "/v1/models/..%20/organization/api_keys",
        "/v1/models/%20..%20;x/organization/api_keys",
        "/v1/models/.%20./organization/api_keys",
        "/v1/models/%20./files",
        "/v1/models/%c0%ae%c0%ae/organization",
        "/v1/models/..%c0%af..%c0%aforganization",
        "/v1/models/%e0%80%ae%e0%80%ae/organization",
        "/v1/models/%ff",
        "/v1/models/%ed%a0%80",
        "/v1/\udcff",
    ],
)
def test_what_servers_could_read_in_two_ways_is_refused(target: str) -> None:
    """No decision is made on a path that the upstream might take for another one."""
    with pytest.raises(BadRequest) as caught:
        split_target(target)
    assert caught.value.code == "bad_path"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/" + "a" * 16_384, "The target of the request is too long."),
        ("/v1/x?a b", "The query contains a fragment, a space or a control character."),
        ("/v1/x?a#b", "The query contains a fragment, a space or a control character."),
        ("v1", "The target of the request is not a path."),
        ("/v1/a b", "The path contains a backslash, a hash, a space or a control character."),
        ("/v1/a\\b", "The path contains a backslash, a hash, a space or a control character."),
        ("/v1/%ff", "The escapes of the path are not UTF-8."),
        ("/v1/..;x", "The path has a dot segment with a parameter or spaces."),
        ("/v1/%4", "The path has a percent sign that is not followed by two hexadecimal digits."),
        (
            "/v1/%2F",
            "The path has an escaped slash, backslash, percent, question mark, hash or control character.",
        ),
        (
            "/v1/%7F",
            "The path has an escaped slash, backslash, percent, question mark, hash or control character.",
        ),
    ],
)
def test_the_error_for_a_target_says_what_is_wrong_with_it(target: str, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        split_target(target)
    assert caught.value.message == message
    assert caught.value.status == (414 if "too long" in message else 400)


def test_a_target_may_have_16_kib() -> None:
    """Path and query together."""
    path = "/" + "a" * 9_000
    query = "?" + "b" * (16_384 - len(path) - 1)
    assert split_target(path + query) == (path, query)


def test_the_escape_of_a_space_and_of_characters_beyond_ascii_pass() -> None:
    """Those of letters are resolved, and those of control characters up to the last are refused."""
    assert split_target("/v1/a%20b/%c3%a9/%7e") == ("/v1/a%20b/%C3%A9/~", "")
    for escape in ("%00", "%1f", "%7F"):
        with pytest.raises(BadRequest):
            split_target(f"/v1/{escape}")


@given(st.text(max_size=60) | st.text(alphabet="/.%25Fabc?#\\", max_size=40).map("/".__add__))
def test_any_target_is_refused_or_normal_once_and_for_all(target: str) -> None:
    """The result is ASCII, has no dot or empty segment however often it is decoded, and is stable."""
    try:
        path, query = split_target(target)
    except BadRequest:
        return
    assert (path + query).isascii()
    assert split_target(path + query) == (path, query)
    assert path == "/" or not {"", ".", ".."} & set(unquote(path, "latin-1")[1:].split("/"))


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models?limit=5&after=key", "/v1/models?limit=5&after=key"),
        ("/v1/models?key=sk-1", "/v1/models"),
        ("/v1/models?limit=5&api-key=sk-1&API_KEY=x&%6bey=y&access_token=z", "/v1/models?limit=5"),
    ],
)
def test_keys_in_a_query_can_be_left_out(target: str, kept: str) -> None:
    """The client's own key does not reach an upstream that has another, in whatever form it was sent."""
    assert without_credentials(target) == kept


@pytest.mark.parametrize(
    ("target", "keys"),
    [
        ("/v1/models", []),
        ("/v1/models?", []),
        ("/key=a/v1/models?b=c", []),
        ("/v1/models?key=a", ["a"]),
        ("/v1/models?x=1&KEY=a%3D=&api-key=b&api_key=&access_token=c?d&tokens=e", ["a==", "b", "", "c?d"]),
        ("/v1/models?%6Bey=a&key", ["a", ""]),
    ],
)
def test_the_keys_in_a_query_are_found_in_their_order(target: str, keys: list[str]) -> None:
    """By the names in which providers take them, in any letter case and with escapes."""
    assert keys_in_query(target) == keys

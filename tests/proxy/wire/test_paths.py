"""Request targets are normalised as servers do it, and what stays ambiguous is refused."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.wire.paths import split_target, without_credentials


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

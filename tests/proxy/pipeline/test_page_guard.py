"""Pages of other sites cannot use a port that anyone who reaches it may use."""

from __future__ import annotations

import pytest

from proxy.config.schema import Client, Config, Pool, Replica, Secret, Server
from proxy.errors import Forbidden
from proxy.pipeline.admission import Authenticator
from proxy.pipeline.page_guard import PageGuard
from proxy.worker import from_config

Headers = tuple[tuple[bytes, bytes], ...]
HERE = (b"host", b"127.0.0.1:8080")
FOREIGN = (b"origin", b"https://evil.example")
CROSS_SITE = (b"sec-fetch-site", b"cross-site")
KEY = (b"authorization", b"Bearer any")


def is_refused(
    method: str, headers: Headers, *origins: str, local_only: bool = False, has_clients: bool = False
) -> bool:
    guard = PageGuard(origins, local_only=local_only)
    clients = from_config.known_clients((Client("c", "0" * 64),)) if has_clients else ()
    try:
        Authenticator(clients, b"s", pages=guard).admit(method, headers)
    except Forbidden:
        return True
    return False


@pytest.mark.parametrize(
    "headers",
    [
        (HERE, FOREIGN),
        (HERE, (b"origin", b"null")),
        (HERE, (b"origin", b"http://127.0.0.1:3000")),
        (HERE, CROSS_SITE),
        (HERE, (b"sec-fetch-site", b"same-site")),
        (FOREIGN,),
    ],
)
def test_a_request_of_another_site_without_a_key_is_refused(headers: Headers) -> None:
    """A browser sends it without asking, for example as a form or as text/plain, and the prompt would be computed."""
    assert is_refused("POST", headers)


def test_a_key_in_the_query_is_no_proof_that_the_browser_asked() -> None:
    """A page may put anything into a URL."""
    with pytest.raises(Forbidden):
        Authenticator((), b"s", pages=PageGuard()).admit("POST", (HERE, FOREIGN), "/v1/chat/completions?key=x")


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("POST", (HERE,)),
        ("POST", (HERE, (b"origin", b"http://127.0.0.1:8080"), (b"sec-fetch-site", b"same-origin"))),
        ("POST", (HERE, (b"sec-fetch-site", b"none"))),
        ("POST", (HERE, FOREIGN, KEY)),
        ("GET", (HERE, FOREIGN, CROSS_SITE)),
        ("OPTIONS", (HERE, FOREIGN, CROSS_SITE)),
    ],
)
def test_other_requests_are_admitted(method: str, headers: Headers) -> None:
    """Programs send no origin; a key needs the browser's question first; what a GET returns, the page cannot read."""
    assert not is_refused(method, headers)


def test_pages_of_the_configured_origins_are_admitted() -> None:
    """In any letter case, and all of them with a star."""
    assert not is_refused("POST", (HERE, FOREIGN, CROSS_SITE), "https://EVIL.example/")
    assert not is_refused("POST", (HERE, FOREIGN, CROSS_SITE), "*")
    assert is_refused("POST", (HERE, FOREIGN, CROSS_SITE), "https://chat.example")


@pytest.mark.parametrize("host", [b"localhost", b"localhost:8080", b"127.0.0.1:8080", b"127.1.2.3", b"[::1]:8080"])
def test_names_of_loopback_are_admitted_where_only_these_are(host: bytes) -> None:
    """Requests that read and requests that write are treated alike."""
    assert not is_refused("GET", ((b"host", host),), local_only=True)
    assert not is_refused("POST", ((b"host", host), KEY), local_only=True)


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example:8080",
        b"10.0.0.7",
        b"[::1]x",
        b"localhost.evil.example",
        b"localhost:80.evil.example",
        b"127.0.0.1:x",
        b"[::1%evil.example]",
        b"\xff",
    ],
)
def test_a_host_name_that_was_made_to_point_to_loopback_is_refused(host: bytes) -> None:
    """Its page could send any header and read every response."""
    for method in ("GET", "POST"):
        assert is_refused(method, ((b"host", host), KEY), local_only=True)
        assert not is_refused(method, ((b"host", host), KEY))


def test_the_error_for_another_site_says_how_it_can_be_allowed() -> None:
    with pytest.raises(Forbidden) as refused:
        PageGuard().check("POST", (HERE, FOREIGN), has_key=False)
    assert refused.value.message == (
        "Pages of other sites may not send requests without a key. The operator can allow this page's origin "
        "in server.cors_origins."
    )
    assert refused.value.code == "cross_site_request"


def test_listed_clients_need_no_such_check() -> None:
    """No page has their keys."""
    with pytest.raises(Exception, match="Incorrect API key"):
        is_refused("POST", ((b"host", b"evil.example"), FOREIGN, KEY), local_only=True, has_clients=True)


@pytest.mark.parametrize(
    ("server", "key", "is_local"),
    [
        (Server(), Secret("k"), True),
        (Server(), None, False),
        (Server(open=True), Secret("k"), False),
        (Server(host="0.0.0.0"), Secret("k"), False),
    ],
)
def test_only_keys_that_rely_on_loopback_are_for_loopback_only(
    server: Server, key: Secret | None, is_local: bool
) -> None:
    """Other hosts are refused only if a replica's key is usable because the port is on loopback."""
    config = Config(server=server, pools=(Pool(name="p", replicas=(Replica("http://h", key=key),)),))
    guard = from_config.page_guard(config)
    if is_local:
        with pytest.raises(Forbidden) as refused:
            guard.check("GET", ((b"host", b"evil.example"),), has_key=True)
        assert refused.value.message == (
            "Without a list of clients, the replicas' keys can be used through localhost only. The operator "
            "can list clients, or allow every host name with server.open."
        )
        assert refused.value.code == "cross_site_request"
    else:
        guard.check("GET", ((b"host", b"evil.example"),), has_key=True)

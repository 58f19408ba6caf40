"""Who may enter: keys, tenants, paths and room."""

from __future__ import annotations

import hashlib

import pytest

from proxy.errors import BadRequest, Forbidden, NotFound, Overloaded, Unauthorized
from proxy.model import Endpoint, Tenant
from proxy.pipeline.admission import (
    Authenticator,
    InFlightLimit,
    KnownClient,
    check_model,
    credential_of,
    endpoint_of,
)

SECRET = b"s" * 32


def known(key: str, tenant: str, *models: str) -> KnownClient:
    return KnownClient(hashlib.sha256(key.encode()).digest(), tenant, models or ("*",))


@pytest.mark.parametrize(
    ("method", "path", "endpoint"),
    [
        ("POST", "/v1/chat/completions", Endpoint.CHAT),
        ("POST", "/v1/messages", Endpoint.MESSAGES),
        ("GET", "/v1/models", Endpoint.MODELS),
        ("GET", "/v1/chat/completions", Endpoint.OTHER),
        ("POST", "/v1/caching/refs/tags", Endpoint.CACHING),
        ("PUT", "/v1/files/x", Endpoint.OTHER),
    ],
)
def test_path_and_method_name_the_endpoint(method: str, path: str, endpoint: Endpoint) -> None:
    """What is asked for is told by method and path alone."""
    assert endpoint_of(method, path) is endpoint


@pytest.mark.parametrize("path", ["/", "/healthz", "/v2/chat", "/v1"])
def test_a_path_outside_v1_is_not_found(path: str) -> None:
    """Nothing but /v1/ is served on the client port."""
    with pytest.raises(NotFound):
        endpoint_of("GET", path)


@pytest.mark.parametrize("path", ["/v1/../admin", "/v1/a/%2E%2e/b", "/v1/.env", "/v1/a\\..\\b"])
def test_a_path_cannot_leave_the_base_path(path: str) -> None:
    """Dot segments, plain or encoded, are refused before any upstream sees them."""
    with pytest.raises(BadRequest):
        endpoint_of("GET", path)


def test_a_listed_key_is_its_tenant_and_any_other_is_refused() -> None:
    """With clients listed only their keys enter."""
    door = Authenticator([known("sk-a", "red"), known("sk-b", "red"), known("sk-c", "blue")], SECRET)
    assert door.tenant_of(b"sk-a").id == door.tenant_of(b"sk-b").id
    assert door.tenant_of(b"sk-a").id != door.tenant_of(b"sk-c").id
    for wrong in (b"", b"sk-d", b"sk-"):
        with pytest.raises(Unauthorized):
            door.tenant_of(wrong)


def test_without_a_list_each_key_is_a_tenant_and_its_name_needs_the_secret() -> None:
    """The keyed hash separates keys and cannot be computed from a key alone."""
    door, other = Authenticator([], SECRET), Authenticator([], b"t" * 32)
    assert door.tenant_of(b"one").id != door.tenant_of(b"two").id
    assert door.tenant_of(b"one").id == Authenticator([], SECRET).tenant_of(b"one").id
    assert door.tenant_of(b"one").id != other.tenant_of(b"one").id


def test_a_listed_tenant_cannot_be_met_by_sending_its_name_as_a_key() -> None:
    """Names and keys are hashed in spaces of their own."""
    listed = Authenticator([known("sk-a", "red")], SECRET).tenant_of(b"sk-a")
    assert Authenticator([], SECRET).tenant_of(b"red").id != listed.id


def test_many_keys_do_not_grow_memory() -> None:
    """The table of remembered keys is bounded."""
    door = Authenticator([], SECRET)
    for number in range(10_000):
        door.tenant_of(b"%d" % number)
    assert len(door._seen) <= 4096


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([(b"Authorization", b"Bearer sk-1")], b"sk-1"),
        ([(b"authorization", b"bearer  sk-1 ")], b"sk-1"),
        ([(b"X-Api-Key", b"sk-2")], b"sk-2"),
        ([(b"Authorization", b"Basic abc")], b"Basic abc"),
        ([(b"Accept", b"*/*")], b""),
    ],
)
def test_the_key_is_found_where_clients_put_it(headers: list[tuple[bytes, bytes]], key: bytes) -> None:
    """OpenAI's and Anthropic's headers both work."""
    assert credential_of(headers) == key


def test_a_tenant_may_use_its_models_only() -> None:
    """Globs decide; what they do not name is refused with the field."""
    tenant = Tenant("t", b"", ("gpt-*", "llama"))
    check_model(tenant, "gpt-5")
    check_model(tenant, "llama")
    with pytest.raises(Forbidden) as refusal:
        check_model(tenant, "llama-2")
    assert refusal.value.param == "model"


def test_room_is_bounded_by_requests_and_bytes_and_given_back() -> None:
    """Past a bound the client is told when to come back; leaving makes room again."""
    room = InFlightLimit(2, 100)
    room.enter(60)
    with pytest.raises(Overloaded) as refusal:
        room.enter(60)
    assert refusal.value.retry_after_seconds
    room.enter(40)
    with pytest.raises(Overloaded):
        room.enter(0)
    room.leave(60)
    room.leave(40)
    assert (room.requests, room.body_bytes) == (0, 0)


def test_one_body_over_the_bound_is_let_into_an_empty_house() -> None:
    """Otherwise a large body could never be served at all."""
    room = InFlightLimit(2, 100)
    room.enter(1000)
    assert room.requests == 1

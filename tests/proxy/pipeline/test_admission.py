"""Admission of requests: keys, tenants, paths and room."""

from __future__ import annotations

import hashlib

import pytest

from proxy.errors import Forbidden, Overloaded, Unauthorized
from proxy.pipeline.admission import (
    Authenticator,
    InFlightLimit,
    KnownClient,
    check_model,
    credentials_of,
)
from proxy.records import Tenant

SECRET = b"s" * 32


def known(key: str, tenant: str, *models: str) -> KnownClient:
    return KnownClient(hashlib.sha256(key.encode()).digest(), tenant, models or ("*",))


def test_a_listed_key_is_its_tenant_and_any_other_is_refused() -> None:
    """With clients listed only their keys enter."""
    door = Authenticator([known("sk-a", "red"), known("sk-b", "red"), known("sk-c", "blue")], SECRET)
    assert door.tenant_of(b"sk-a").id == door.tenant_of(b"sk-b").id
    assert door.tenant_of(b"sk-a").id != door.tenant_of(b"sk-c").id
    for wrong in (b"", b"sk-d", b"sk-"):
        with pytest.raises(Unauthorized):
            door.tenant_of(wrong)


def test_a_listed_client_has_what_its_configuration_gives_it() -> None:
    """It is named by its tenant if it has no name; without a list, all models are allowed."""
    digest = hashlib.sha256(b"sk-a").digest()
    listed = KnownClient(digest, "red", ("m-*",), "team", 2.5, 0)
    tenant = Authenticator([listed], SECRET).tenant_of(b"sk-a")
    assert (tenant.models, tenant.name, tenant.client) == (("m-*",), "red", "team")
    assert (tenant.weight, tenant.highest_priority, tenant.is_listed) == (2.5, 0, True)
    tenant = Authenticator([KnownClient(digest, "red")], SECRET).tenant_of(b"sk-a")
    assert (tenant.models, tenant.client, tenant.weight, tenant.highest_priority) == (("*",), "red", 1.0, 1)
    stranger = Authenticator([], SECRET).tenant_of(b"sk-a")
    assert (stranger.models, stranger.name, stranger.client) == (("*",), stranger.id[:12], "")
    assert not stranger.is_listed
    assert stranger.id == stranger.salt.hex()


@pytest.mark.parametrize(
    ("tenants", "discloses_all", "sees_all"),
    [
        (["red"], False, True),
        (["red", "red"], False, True),
        (["red", "blue"], False, False),
        (["red", "blue"], True, True),
    ],
)
def test_what_others_have_sent_is_shown_only_if_there_are_no_others_or_the_operator_says_so(
    tenants: list[str], discloses_all: bool, sees_all: bool
) -> None:
    """Several keys of one tenant are no others."""
    clients = [known(f"sk-{number}", tenant) for number, tenant in enumerate(tenants)]
    door = Authenticator(clients, SECRET, discloses_all=discloses_all)
    assert door.tenant_of(b"sk-0").sees_all is sees_all


def test_a_client_that_sent_no_key_is_told_how_to_send_one() -> None:
    """It is not told that its key is wrong."""
    door = Authenticator([known("sk-a", "red")], SECRET)
    with pytest.raises(Unauthorized, match="No API key was sent"):
        door.tenant_of_any([])
    with pytest.raises(Unauthorized, match=r"^Incorrect API key provided\.$"):
        door.tenant_of_any([b"sk-d"])


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
    assert len(door._seen) <= 4096  # noqa: SLF001 - internal state that no public name shows


@pytest.mark.parametrize(
    ("headers", "keys"),
    [
        ([(b"authorization", b"Bearer sk-1")], [b"sk-1"]),
        ([(b"authorization", b"bearer  sk-1 ")], [b"sk-1"]),
        ([(b"authorization", b"BEARER sk-1")], [b"sk-1"]),
        ([(b"authorization", b"sk-1")], [b"sk-1"]),
        ([(b"x-api-key", b"sk-2")], [b"sk-2"]),
        ([(b"api-key", b"sk-3")], [b"sk-3"]),
        ([(b"x-api-key", b"sk-2"), (b"accept", b"*/*"), (b"authorization", b"Bearer sk-1")], [b"sk-2", b"sk-1"]),
        ([(b"x-api-key", b"sk-1"), (b"authorization", b"Bearer sk-1")], [b"sk-1"]),
        ([(b"authorization", b"Basic abc")], [b"Basic abc"]),
        ([(b"authorization", b"Bearer ")], []),
        ([(b"authorization", b"bearer\tsk-1"), (b"x-api-key", b"Bearer sk-2")], [b"sk-1", b"sk-2"]),
        ([(b"authorization", b"bearer-1")], [b"bearer-1"]),
        ([(b"x-goog-api-key", b"sk-4")], [b"sk-4"]),
        ([(b"ocp-apim-subscription-key", b"sk-5")], [b"sk-5"]),
        ([(b"x-litellm-api-key", b"Bearer sk-6")], [b"sk-6"]),
        ([(b"authorization", b"")], []),
        ([(b"accept", b"*/*")], []),
    ],
)
def test_every_key_is_found_in_every_form_that_clients_send(headers, keys) -> None:
    """Bearer in any letter case, a bare key, Anthropic's header and Azure's; several are all found, each once."""
    assert credentials_of(headers) == keys


@pytest.mark.parametrize(
    ("target", "key"),
    [
        ("/v1/caching?key=sk-1", b"sk-1"),
        ("/v1/caching?limit=1&API%5FKEY=sk%2D1", b"sk-1"),
        ("/v1/caching?access_token=sk-1&key=sk-2", b"sk-1"),
        ("/v1/caching?monkey=sk-1", b""),
        ("/v1/caching", b""),
    ],
)
def test_a_key_in_the_query_is_a_tenants_too(target: str, key: bytes) -> None:
    """The upstream gets it there, so clients who send it so are not all the same. One in a header comes first."""
    door = Authenticator([], SECRET)
    assert door.admit("GET", (), target).id == door.tenant_of(key).id
    assert door.admit("GET", ((b"x-api-key", b"sk-0"),), target).id == door.tenant_of(b"sk-0").id


def test_of_several_keys_one_that_is_known_counts() -> None:
    """A client that sends a placeholder beside its key is let in, whichever comes first."""
    door = Authenticator([known("sk-a", "red")], SECRET)
    for keys in ([b"placeholder", b"sk-a"], [b"sk-a", b"placeholder"], [b"sk-a"]):
        assert door.tenant_of_any(keys).name == "red"
    for keys in ([], [b"x"], [b"x", b"y"]):
        with pytest.raises(Unauthorized):
            door.tenant_of_any(keys)


def test_many_keys_in_one_request_cost_a_bounded_number_of_hashes() -> None:
    """A request with thousands of key headers is no way to keep the worker busy."""
    assert len(credentials_of([(b"x-api-key", b"%d" % number) for number in range(5000)])) == 8
    assert len(credentials_of((), "/?" + "&".join([f"key={number}" for number in range(5000)]))) == 8


def test_each_key_in_a_query_is_found_once_behind_those_in_the_headers() -> None:
    """One that is empty is none; one that is no text is another key, and no defect."""
    target = "/v1/models?key=b&api_key=&access_token=a&api-key=c"
    assert credentials_of([(b"x-api-key", b"a")], target) == [b"a", b"b", b"c"]
    assert credentials_of((), "/v1/models?key=a\udcffb") == [b"a?b"]


@pytest.mark.parametrize("length", [1, 64, 65, 1000])
def test_a_secret_of_any_length_names_tenants(length: int) -> None:
    """The hash takes 64 bytes at most; a longer secret is hashed first, and still differs by its last byte."""
    one, other = (Authenticator([], b"s" * (length - 1) + last) for last in (b"a", b"b"))
    assert one.tenant_of(b"key").id != other.tenant_of(b"key").id


@pytest.mark.parametrize("length", [1, 32, 64, 65])
def test_the_id_of_a_tenant_is_the_same_in_every_version(length: int) -> None:
    """Prefixes of isolated pools are known by it; a secret of up to 64 bytes is the key of the hash as it is."""
    secret = bytes(range(length))
    key = secret if length <= 64 else hashlib.blake2b(secret).digest()
    stranger, listed = Authenticator([], secret), Authenticator([known("sk-a", "red")], secret)
    for tenant, name in (
        (stranger.tenant_of(b"sk-a"), b"key:sk-a"),
        (stranger.tenant_of(b""), b""),
        (listed.tenant_of(b"sk-a"), b"red"),
    ):
        assert tenant.id == hashlib.blake2b(name, key=key, digest_size=16).hexdigest()


def test_a_tenant_may_use_its_models_only() -> None:
    """Only * and ? are special, square brackets are letters; the error names the field."""
    tenant = Tenant("t", b"", ("gpt-*", "llama", "o?", "qwen[1m]", "x[a]*"))
    for model in ("gpt-5", "llama", "o3", "qwen[1m]", "x[a]b"):
        check_model(tenant, model)
    for model in ("qwen1", "qwenm", "xab", "o31", "LLAMA"):
        with pytest.raises(Forbidden):
            check_model(tenant, model)
    with pytest.raises(Forbidden) as refusal:
        check_model(tenant, "llama-2")
    assert (refusal.value.message, refusal.value.param) == ("This key may not use this model.", "model")
    assert refusal.value.code == "model_not_allowed"


def test_requests_in_flight_are_bounded_and_leaving_makes_room() -> None:
    """Past the bound the client is told when to come back."""
    room = InFlightLimit(2)
    room.enter()
    room.enter()
    with pytest.raises(Overloaded) as refusal:
        room.enter()
    assert (refusal.value.message, refusal.value.code) == ("Too many requests at once.", "proxy_overloaded")
    assert refusal.value.retry_after_seconds == 1.0
    room.leave()
    room.enter()
    assert room.requests == 2


def test_a_client_without_a_key_is_anonymous_if_no_clients_are_listed() -> None:
    """And differs from every client with a key."""
    door = Authenticator([], SECRET)
    assert door.tenant_of(b"").name == "anonymous"
    assert door.tenant_of(b"").id not in {door.tenant_of(b"anonymous").id, door.tenant_of(b"x").id}
    assert door.tenant_of_any([]).id == door.tenant_of(b"").id


def test_a_very_long_key_is_a_tenant_like_any_other_and_takes_no_memory() -> None:
    door = Authenticator([], SECRET)
    assert door.tenant_of(b"k" * 10_000).id == door.tenant_of(b"k" * 10_000).id
    assert door.tenant_of(b"k" * 10_000).id != door.tenant_of(b"k" * 10_001).id
    assert not door._seen  # noqa: SLF001 - internal state that no public name shows

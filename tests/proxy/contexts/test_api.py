"""The API of stored contexts by itself: paths, objects, lists, tags, warming and every error of the store."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cache import CacheError, PastExpiry, PinRefused, QuotaFull, StoreCorrupt, Trust, UnknownContext
from cache.errors import StoreUnavailable
from proxy.contexts.warming import WarmingFailed
from proxy.errors import CairnError
from proxy.records import Tenant
from tests.support.fake_contexts import NOW, Api

UPLOAD: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "stone"}]}
OTHER = Tenant("b" * 32)


def upload(**fields: Any) -> bytes:
    return json.dumps({**UPLOAD, **fields}).encode()


async def made(api: Api, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await api.call("POST", "", upload(**fields)))
    return found


async def listed(api: Api, query: str = "") -> list[str]:
    return [each["id"] for each in json.loads(await api.call("GET", f"?{query}"))["data"]]


async def error_of(api: Api, *args: Any, **options: Any) -> CairnError:
    with pytest.raises(CairnError) as raised:
        await api.call(*args, **options)
    return raised.value


async def test_a_context_is_created_pending_and_ready_once_it_is_warmed() -> None:
    """With the upstream's count of tokens; the uploaded messages come back as they were."""
    api = Api(warm_replicas=2)
    first = await made(api, name="n", metadata={"k": "v"}, ttl=60)
    assert (first["status"], first["messages"], first["tools"]) == ("pending", UPLOAD["messages"], [])
    assert first["expired_at"] == NOW + 60
    await api.settled()
    assert api.warmer.warmed == [(first["id"], True, 2)]
    ready = json.loads(await api.call("GET", f"/{first['id']}"))
    assert (ready["status"], ready["tokens"]) == ("ready", 123)


async def test_a_failed_warming_is_stored_and_the_store_is_told_again_once() -> None:
    """The first attempt to store the outcome fails, the second succeeds."""
    api = Api(warm_replicas=1)
    api.warmer.fails = WarmingFailed("bad", "refused")
    api.store.finish_failures = 1
    first = await made(api)
    await api.settled()
    assert api.store.finished == [(first["id"], 0, ("bad", "refused"))]
    found = json.loads(await api.call("GET", f"/{first['id']}"))
    assert found["error"] == {"type": "bad", "message": "refused"}


async def test_an_outcome_that_cannot_be_stored_leaves_the_context_pending() -> None:
    """Two failures end the attempts; nothing is raised in the background."""
    api = Api(warm_replicas=1)
    api.store.finish_failures = 2
    await made(api)
    await api.settled()
    assert api.store.finished == []
    assert not api.tasks.failures


async def test_nothing_is_warmed_at_a_provider_or_with_no_replicas() -> None:
    """The context is ready at once."""
    api = Api(warm_replicas=1)
    api.pools.pool.is_provider = True
    assert (await made(api))["status"] == "ready"
    assert (await made(Api(warm_replicas=0)))["status"] == "ready"
    assert api.warmer.warmed == []


async def test_a_context_without_an_expiry_gets_the_default() -> None:
    """And one with an absolute expiry keeps it."""
    api = Api(warm_replicas=0, default_ttl_seconds=77)
    assert (await made(api))["expired_at"] == NOW + 77
    assert (await made(api, expired_at=int(NOW) + 5))["expired_at"] == NOW + 5


async def test_a_context_that_is_too_large_is_refused_with_both_sizes() -> None:
    """Of messages and tools as uploaded."""
    error = await error_of(
        Api(max_context_bytes=1024), "POST", "", upload(messages=[{"role": "user", "content": "x" * 2000}])
    )
    assert error.status == 413
    assert "1,024" in error.message


async def test_pages_go_in_both_directions_and_filter_by_metadata() -> None:
    """Newest first unless asked otherwise; cursors exclude the object that they name."""
    api = Api(warm_replicas=0)
    ids = [(await made(api, metadata={"odd": str(number % 2)}))["id"] for number in range(5)]
    assert await listed(api) == ids[::-1]
    assert await listed(api, "order=asc&limit=2") == ids[:2]
    assert await listed(api, f"order=asc&limit=2&after={ids[1]}") == ids[2:4]
    assert await listed(api, f"order=asc&limit=2&before={ids[4]}") == ids[2:4]
    assert await listed(api, f"order=asc&after={ids[0]}&before={ids[2]}") == [ids[1]]
    assert await listed(api, "metadata[odd]=1") == [ids[3], ids[1]]
    assert json.loads(await api.call("GET", "?limit=4"))["has_more"] is True
    assert json.loads(await api.call("GET", "?limit=5"))["has_more"] is False
    assert (await error_of(api, "GET", "?after=cache-x")).param == "after"


async def test_a_context_is_changed_and_deleted() -> None:
    """Metadata and expiry; afterwards it is unknown."""
    api = Api(warm_replicas=0)
    name = (await made(api))["id"]
    changed = json.loads(await api.call("PUT", f"/{name}", b'{"metadata":{"a":"b"},"ttl":9}'))
    assert (changed["metadata"], changed["expired_at"]) == ({"a": "b"}, NOW + 9)
    assert json.loads(await api.call("DELETE", f"/{name}"))["deleted"] is True
    assert (await error_of(api, "GET", f"/{name}")).status == 404


async def test_tags_are_set_moved_listed_followed_and_deleted() -> None:
    """A tag that does not exist can be deleted, too."""
    api = Api(warm_replicas=0)
    one, two = (await made(api))["id"], (await made(api))["id"]
    for name in (one, two):
        tag = json.loads(await api.call("POST", "/refs/tags", json.dumps({"tag": "t", "cache_id": name}).encode()))
        assert (tag["cache_id"], tag["owned_by"]) == (name, "tenant")
    assert json.loads(await api.call("GET", "/refs/tags/t"))["cache_id"] == two
    assert json.loads(await api.call("GET", "/refs/tags/t/content"))["id"] == two
    assert [each["tag"] for each in json.loads(await api.call("GET", "/refs/tags"))["data"]] == ["t"]
    assert json.loads(await api.call("GET", "/refs/tags?before=t"))["data"] == []
    for _ in range(2):
        assert json.loads(await api.call("DELETE", "/refs/tags/t"))["deleted"] is True
    assert (await error_of(api, "GET", "/refs/tags/t")).status == 404
    unknown = await error_of(api, "POST", "/refs/tags", b'{"tag":"t","cache_id":"nonsense"}')
    assert unknown.status == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PATCH", ""),
        ("DELETE", "/refs/tags"),
        ("GET", "/a/b"),
        ("GET", "/refs/tags/t/other"),
        ("POST", "/refs/tags/t/content"),
        ("GET", "/not-an-id"),
        ("GET", "/refs/tags/%20"),
    ],
)
async def test_a_path_or_method_that_does_not_exist_is_404(method: str, path: str) -> None:
    """So is an id or a tag that cannot exist."""
    assert (await error_of(Api(), method, path)).status == 404


async def test_another_tenants_context_looks_as_if_it_did_not_exist() -> None:
    """By id, in a list, and to change or delete."""
    api = Api(warm_replicas=0)
    name = (await made(api))["id"]
    for method, body in (("GET", b""), ("PUT", b'{"ttl":5}'), ("DELETE", b"")):
        assert (await error_of(api, method, f"/{name}", body, tenant=OTHER)).status == 404
    assert json.loads(await api.call("GET", "", tenant=OTHER))["data"] == []


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (UnknownContext("x"), 404, "no such"),
        (PastExpiry("x"), 400, "future"),
        (QuotaFull("The limit is reached."), 429, "The limit is reached."),
        (PinRefused("Pin later."), 403, "Pin later."),
        (StoreCorrupt("x"), 404, "upload the context again"),
        (StoreUnavailable("x"), 503, "try again"),
        (CacheError("x"), 503, "try again"),
    ],
)
async def test_each_error_of_the_store_has_its_status(raised: CacheError, status: int, text: str) -> None:
    """And a message that says what to do; never another exception."""
    api = Api()
    api.store.fails = raised
    error = await error_of(api, "POST", "", upload())
    assert error.status == status
    assert text in error.message


async def test_only_an_unlisted_tenants_trust_is_asked_of_the_store() -> None:
    """A listed client is trusted as it is; others as far as an upstream has accepted their key."""
    api = Api(warm_replicas=0)
    name = (await made(api))["id"]
    await api.call("POST", "", upload(), tenant=OTHER)
    api.store.trusts = Trust.ACCEPTED
    await api.call("POST", "", upload(), tenant=OTHER)
    await api.call("PUT", f"/{name}", b'{"ttl":5}')
    assert api.store.asked_with == [Trust.LISTED, Trust.UNCHECKED, Trust.ACCEPTED, Trust.LISTED]

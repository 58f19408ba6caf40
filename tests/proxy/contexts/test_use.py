"""A stored context in a chat by itself: found and inserted, or why not; and what is noted at the end of a request."""

from __future__ import annotations

import dataclasses
import json
from array import array
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cache import CacheError, Content, ContextRow, ContextStatus, Draft, StoreCorrupt, Trust
from proxy.contexts.api import ContextApi
from proxy.contexts.facade import StoredContexts
from proxy.contexts.use import Use
from proxy.downstream.response import Downstream
from proxy.errors import BadRequest, CairnError, ContextDamaged, ContextNotFound, ContextsAway
from proxy.fleet.pools import ServedPool
from proxy.metrics import definitions as metrics
from proxy.model import Ending, Endpoint
from proxy.pipeline.exchange import Exchange, StoredUse
from proxy.records import Call, Tenant, Usage
from proxy.wire import request
from tests.support.fake_contexts import LISTED, NOW, Api, FakeStore

STORED = b'{"role":"system","content":"stone"}'
STRANGER = Tenant("b" * 32)
ID = f"cache-{1:032x}"


def exchange_of(body: bytes, tenant: Tenant = LISTED, *headers: tuple[bytes, bytes]) -> Exchange:
    call = Call(
        request_id="r",
        tenant=tenant,
        endpoint=Endpoint.CHAT,
        method="POST",
        target="/v1/chat/completions",
        headers=headers,
        body=body,
        received_seconds=0.0,
        read_seconds=0.0,
    )
    exchange = Exchange(call)
    exchange.prompt = request.read(body, Endpoint.CHAT)
    exchange.model = exchange.prompt.model
    return exchange


def naming(reference: str, tenant: Tenant = LISTED) -> Exchange:
    messages = [{"role": "cache", "content": reference}, {"role": "user", "content": "q"}]
    return exchange_of(json.dumps({"model": "m", "messages": messages}).encode(), tenant)


def repeating(first: bytes, *headers: tuple[bytes, bytes]) -> Exchange:
    body = b'{"model":"m","messages":[%b,{"role":"user","content":"q"}]}' % first
    return exchange_of(body, LISTED, (b"x-msh-context-cache", ID.encode()), *headers)


async def stored(store: FakeStore, **changes: Any) -> tuple[ContextRow, Content]:
    fields: dict[str, Any] = {
        "id": ID,
        "model": "m",
        "tools": b"",
        "messages": STORED,
        "bounds": array("I", (0, len(STORED))),
        "ttl_seconds": 60.0,
        "expires_unix_seconds": None,
        "status": ContextStatus.READY,
        "tokens": 9,
        "value_usd": 1e-6,
    }
    await store.create(LISTED.id, Draft(**{**fields, **changes}), Trust.LISTED)
    return store.contexts[LISTED.id, ID]


async def test_a_named_context_is_inserted_with_its_media() -> None:
    """The client is told which one, and until when it is kept."""
    store = FakeStore()
    await stored(store, media=(("image", 77),))
    exchange = naming(f"cache_id={ID};reset_ttl=100")
    await Use(store).expand(exchange)
    assert exchange.context_result == "used"
    assert [edit.insert for edit in exchange.edits] == [STORED]
    assert exchange.stored is not None
    assert (exchange.stored.expires_unix_seconds, exchange.stored.reset_ttl_seconds) == (NOW + 100, 100)
    assert dict(exchange.context_notes)[b"msh-context-cache-id"] == ID.encode()
    assert exchange.prompt is not None
    assert [(item.kind, item.size_bytes) for item in exchange.prompt.media] == [("image", 77)]


async def test_a_tag_and_a_dry_run_are_followed() -> None:
    """A dry run resets no expiry."""
    store = FakeStore()
    row, _ = await stored(store)
    await store.set_tag(LISTED.id, "t", ID)
    exchange = naming("tag=t;reset_ttl=100;dry_run=1")
    await Use(store).expand(exchange)
    assert exchange.only_checked
    assert exchange.stored is not None
    assert exchange.stored.expires_unix_seconds == row.expires_unix_seconds


@pytest.mark.parametrize(
    ("fails", "error", "result"),
    [
        (None, ContextNotFound, "unknown"),
        (StoreCorrupt("x"), ContextDamaged, "damaged"),
        (CacheError("x"), ContextsAway, "unavailable"),
    ],
)
async def test_a_named_context_that_cannot_be_used_is_an_error(
    fails: CacheError | None, error: type[CairnError], result: str
) -> None:
    """Without it the request is not whole."""
    store = FakeStore()
    store.fails = fails
    exchange = naming(f"cache_id={ID}")
    with pytest.raises(error):
        await Use(store).expand(exchange)
    assert exchange.context_result == result


@pytest.mark.parametrize("reference", ["cache_id=nonsense", "tag=9"])
async def test_a_reference_that_cannot_exist_is_unknown(reference: str) -> None:
    """It is not looked up."""
    with pytest.raises(ContextNotFound):
        await Use(FakeStore()).expand(naming(reference))


async def test_an_expired_context_is_revived_only_by_a_reset() -> None:
    """Otherwise the error says how."""
    store = FakeStore()
    await stored(store, ttl_seconds=None, expires_unix_seconds=NOW - 1)
    exchange = naming(f"cache_id={ID}")
    with pytest.raises(ContextNotFound, match="has expired"):
        await Use(store).expand(exchange)
    assert exchange.context_result == "inactive"
    revived = naming(f"cache_id={ID};reset_ttl=5")
    await Use(store).expand(revived)
    assert revived.context_result == "used"


async def test_a_repeated_context_is_replaced_by_the_stored_bytes() -> None:
    """However it is spaced."""
    store = FakeStore()
    await stored(store)
    exchange = repeating(b'{"content" : "stone", "role":"system"}')
    await Use(store).expand(exchange)
    assert exchange.context_result == "used"
    assert [edit.insert for edit in exchange.edits] == [STORED]


async def test_a_repeated_context_that_cannot_be_used_costs_its_saving_only() -> None:
    """The client is told why; only an unknown one is an error."""
    store = FakeStore()
    with pytest.raises(ContextNotFound):
        await Use(store).expand(repeating(STORED))
    await stored(store, ttl_seconds=None, expires_unix_seconds=NOW - 1)
    notes: list[tuple[str, bytes]] = []
    for fails, first in ((None, STORED), (CacheError("x"), STORED), (StoreCorrupt("x"), STORED)):
        store.fails = fails
        exchange = repeating(first)
        await Use(store).expand(exchange)
        notes.append((exchange.context_result, exchange.context_notes[0][1]))
        assert exchange.edits == ()
    store.fails = None
    await stored(store)
    exchange = repeating(b'{"role":"system","content":"other"}')
    await Use(store).expand(exchange)
    notes.append((exchange.context_result, exchange.context_notes[0][1]))
    assert notes == [
        ("inactive", b"inactive"),
        ("unavailable", b"unavailable"),
        ("damaged", b"damaged"),
        ("differs", b"differs;messages[0]"),
    ]


async def test_a_request_without_a_context_is_left_alone() -> None:
    """And one that cannot be read is refused."""
    exchange = exchange_of(b'{"model":"m","messages":[{"role":"user","content":"cache"}]}')
    await Use(FakeStore()).expand(exchange)
    assert (exchange.context_result, exchange.edits) == ("", ())
    exchange.prompt = None
    await Use(FakeStore()).expand(exchange)
    with pytest.raises(BadRequest):
        await Use(FakeStore()).expand(naming("cache_id=a;cache_id=b"))


# --- the end of a request


class Counted:
    def __init__(self) -> None:
        self.counts: list[tuple[str, tuple[str, ...], float]] = []

    def inc(self, spec: Any, labels: tuple[str, ...], amount: float = 1) -> None:
        self.counts.append((spec.name, labels, amount))


class Sent:
    """A client that keeps what it is sent."""

    def __init__(self) -> None:
        self.response: tuple[int, tuple[tuple[bytes, bytes], ...], bytes] = (0, (), b"")

    def send(self, status: int, reason: bytes, headers: tuple[tuple[bytes, bytes], ...], body: bytes) -> None:
        del reason
        self.response = status, headers, body


class Facade:
    def __init__(self) -> None:
        self.api = Api(warm_replicas=0)
        self.counted = Counted()
        api: ContextApi = self.api.api
        self.facade = StoredContexts(self.api.store, api, Use(self.api.store), self.counted)


def ended(tenant: Tenant = LISTED, **changes: Any) -> Exchange:
    exchange = exchange_of(b'{"model":"m","messages":[]}', tenant)
    exchange.status, exchange.ending = 200, Ending.COMPLETE
    exchange.attempt = cast(Any, SimpleNamespace())
    for name, value in changes.items():
        setattr(exchange, name, value)
    return exchange


async def test_a_successful_use_is_noted_with_the_tokens_it_saved() -> None:
    """A dry run and a failed request use nothing, but are counted."""
    bench = Facade()
    row, content = await stored(bench.api.store)
    use = StoredUse(row, content, NOW, 30.0)
    usage = Usage(100, 1, cached_tokens=80)
    bench.facade.settle(ended(stored=use, context_result="used", usage=usage, counted_usage=usage))
    bench.facade.settle(ended(stored=use, context_result="used", only_checked=True))
    bench.facade.settle(ended(stored=use, context_result="used", ending=Ending.UPSTREAM_FAILED))
    bench.facade.settle(ended(stored=use, context_result="used", is_warming=True))
    bench.facade.settle(ended())
    assert bench.api.store.used_ids == [(ID, 30.0)]
    uses = [labels for name, labels, _ in bench.counted.counts if name == metrics.CONTEXT_USES.name]
    assert uses == [("used",)] * 3
    saved = [amount for name, _, amount in bench.counted.counts if name == metrics.CONTEXT_CACHED_TOKENS.name]
    assert saved == [80]


async def test_cached_tokens_that_are_not_believed_are_none_of_a_context_either() -> None:
    """Otherwise contexts would have saved more than all requests together."""
    bench = Facade()
    row, content = await stored(bench.api.store)
    use, ignored = StoredUse(row, content, NOW, 30.0), Usage(100, 1)
    reported = Usage(100, 1, cached_tokens=10**9)
    bench.facade.settle(ended(stored=use, context_result="used", usage=reported, counted_usage=ignored))
    assert metrics.CONTEXT_CACHED_TOKENS.name not in [name for name, _, _ in bench.counted.counts]


async def test_only_an_upstreams_success_accepts_an_unlisted_key() -> None:
    """Not Cairn's own responses, not an error, not a request without a prompt, not one with a key open to anyone."""
    bench = Facade()
    for changes in (
        {"status": 401},
        {"ending": Ending.UPSTREAM_FAILED},
        {"attempt": None},
        {"prompt": None},
    ):
        bench.facade.settle(ended(STRANGER, **changes))
    bench.facade.settle(ended(LISTED))
    bench.facade.settle(ended(STRANGER, pool=ServedPool("p", ("*",), accepts_any_key=True)))
    assert bench.api.store.accepted_tenants == []
    bench.facade.settle(ended(STRANGER))
    bench.facade.settle(ended(STRANGER, is_warming=True))
    assert bench.api.store.accepted_tenants == [STRANGER.id]


@pytest.mark.parametrize(
    ("headers", "accepts"),
    [
        (((b"authorization", b"Bearer a"),), True),
        (((b"authorization", b"Bearer a"), (b"x-api-key", b"a")), True),
        (((b"x-api-key", b"made up"), (b"authorization", b"Bearer a")), False),
        (((b"authorization", b"Bearer made up"), (b"authorization", b"Bearer a")), False),
        (((b"authorization", b"Bearer made up"), (b"x-goog-api-key", b"a")), False),
        (((b"authorization", b"Bearer made up"), (b"ocp-apim-subscription-key", b"a")), False),
    ],
)
async def test_a_key_beside_another_one_is_not_taken_for_accepted(
    headers: tuple[tuple[bytes, bytes], ...], accepts: bool
) -> None:
    """The upstream may have looked at the other: one genuine key would make any number of made-up ones genuine."""
    bench = Facade()
    body = b'{"model":"m","messages":[]}'
    bench.facade.settle(ended(STRANGER, call=exchange_of(body, STRANGER, *headers).call))
    assert bench.api.store.accepted_tenants == [STRANGER.id] * accepts


async def test_a_key_beside_one_in_the_query_is_not_taken_for_accepted() -> None:
    """Some providers take it from there."""
    bench = Facade()
    call = exchange_of(b'{"model":"m","messages":[]}', STRANGER, (b"authorization", b"Bearer made up")).call
    bench.facade.settle(ended(STRANGER, call=dataclasses.replace(call, target=f"{call.target}?key=a")))
    assert bench.api.store.accepted_tenants == []


async def test_calls_and_dry_runs_are_answered_with_the_requests_id() -> None:
    """JSON, or an empty stream if the client asked for one."""
    bench, client = Facade(), Sent()
    listing = exchange_of(b'{"model":"m","messages":[]}')
    listing.call = Call(
        request_id="r",
        tenant=LISTED,
        endpoint=Endpoint.CACHING,
        method="GET",
        target="/v1/caching",
        headers=(),
        body=b"",
        received_seconds=0.0,
        read_seconds=0.0,
    )
    await bench.facade.answer(listing, cast(Downstream, client))
    status, headers, body = client.response
    assert (status, json.loads(body)["data"], dict(headers)[b"x-request-id"]) == (200, [], b"r")
    for stream in (False, True):
        checked = exchange_of(json.dumps({"model": "m", "messages": [], "stream": stream}).encode())
        bench.facade.tell_checked(checked, cast(Downstream, client))
        status, headers, body = client.response
        assert (status, checked.ending) == (200, Ending.COMPLETE)
        assert body.endswith(b"data: [DONE]\n\n") == stream
    await bench.facade.expand(exchange_of(b'{"model":"m","messages":[]}'))

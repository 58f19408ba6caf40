"""A context store in memory, a pool, and the rest of what the API of stored contexts needs, for tests of it alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from msgspec.structs import replace

from cache import CacheError, Content, ContextRow, ContextStatus, Draft, Tag, Trust, UnknownContext
from cache.contexts.retention import StoredValue
from cache.contexts.rows import Head
from proxy.config.schema import Contexts as Settings
from proxy.contexts.api import ContextApi
from proxy.contexts.warming import WarmingFailed
from proxy.fleet.pools import ServedPool
from proxy.model import Endpoint
from proxy.records import Call, Media, Tenant
from proxy.tasks import Tasks
from proxy.wire.contexts import Reference
from tests.support.valkey import eventually

NOW = 1_700_000_000.0
LISTED = Tenant("a" * 32, is_listed=True)


class FakeStore:
    """Contexts and tags in dictionaries. `fails` is raised by every operation; `trusts` is the answer about trust."""

    def __init__(self) -> None:
        self.contexts: dict[tuple[str, str], tuple[ContextRow, Content]] = {}
        self.named: dict[tuple[str, str], Tag] = {}
        self.fails: CacheError | None = None
        self.trusts = Trust.UNCHECKED
        self.asked_with: list[Trust] = []
        self.finished: list[tuple[str, int, tuple[str, str] | None]] = []
        self.finish_failures = 0
        self.used_ids: list[tuple[str, float | None]] = []
        self.accepted_tenants: list[str] = []

    def now(self) -> float:
        return NOW

    def _check(self) -> None:
        if self.fails is not None:
            raise self.fails

    async def create(self, tenant: str, draft: Draft, trust: Trust) -> ContextRow:
        self._check()
        self.asked_with.append(trust)
        content = Content(b"d" * 32, draft.tools, draft.messages, draft.bounds)
        row = ContextRow(
            id=draft.id,
            head=Head(draft.model, draft.name, draft.description, content.digest, draft.size_bytes, draft.media),
            metadata=draft.metadata,
            created_unix_seconds=NOW + len(self.contexts),
            expires_unix_seconds=draft.expires_unix_seconds or NOW + (draft.ttl_seconds or 0.0),
            stored_status=draft.status,
            tokens=draft.tokens,
            problem=None,
            size_bytes=draft.size_bytes,
            stored_value=StoredValue(1.0, NOW),
            value_usd=draft.value_usd,
            warming_until_unix_seconds=NOW + 100,
            pinned=draft.pinned,
            as_of_unix_seconds=NOW,
        )
        self.contexts[tenant, draft.id] = row, content
        return row

    async def ids(self, tenant: str) -> list[str]:
        self._check()
        return [name for owner, name in self.contexts if owner == tenant]

    async def some_rows(self, tenant: str, ids: Sequence[str]) -> list[ContextRow]:
        return [self.contexts[tenant, name][0] for name in ids if (tenant, name) in self.contexts]

    async def row(self, tenant: str, context_id: str) -> ContextRow:
        self._check()
        if (tenant, context_id) not in self.contexts:
            raise UnknownContext("unknown")
        return self.contexts[tenant, context_id][0]

    async def known_row(self, tenant: str, context_id: str) -> ContextRow:
        return await self.row(tenant, context_id)

    async def tagged(self, tenant: str, tag: str) -> ContextRow:
        return await self.row(tenant, (await self.tag(tenant, tag)).context_id)

    async def content(self, tenant: str, row: ContextRow) -> Content:
        self._check()
        return self.contexts[tenant, row.id][1]

    async def update(
        self,
        tenant: str,
        context_id: str,
        *,
        metadata: dict[str, str] | None,
        ttl_seconds: float | None,
        expires_unix_seconds: float | None,
        trust: Trust,
    ) -> ContextRow:
        row, content = await self.row(tenant, context_id), self.contexts[tenant, context_id][1]
        self.asked_with.append(trust)
        expires = NOW + ttl_seconds if ttl_seconds else expires_unix_seconds or row.expires_unix_seconds
        row = replace(row, metadata=row.metadata if metadata is None else metadata, expires_unix_seconds=expires)
        self.contexts[tenant, context_id] = row, content
        return row

    async def delete(self, tenant: str, context_id: str) -> None:
        await self.row(tenant, context_id)
        del self.contexts[tenant, context_id]

    async def finish(
        self, tenant: str, context_id: str, tokens: int, value_usd: float, problem: tuple[str, str] | None
    ) -> None:
        del value_usd
        if self.finish_failures:
            self.finish_failures -= 1
            raise CacheError("away")
        self.finished.append((context_id, tokens, problem))
        row, content = self.contexts[tenant, context_id]
        status = ContextStatus.ERROR if problem else ContextStatus.READY
        row = replace(row, stored_status=status, tokens=tokens or row.tokens, problem=problem)
        self.contexts[tenant, context_id] = row, content

    async def tag(self, tenant: str, tag: str) -> Tag:
        self._check()
        if (tenant, tag) not in self.named:
            raise UnknownContext("unknown")
        return self.named[tenant, tag]

    async def tags(self, tenant: str) -> list[Tag]:
        self._check()
        return [tag for (owner, _), tag in self.named.items() if owner == tenant]

    async def set_tag(self, tenant: str, tag: str, context_id: str) -> Tag:
        await self.row(tenant, context_id)
        self.named[tenant, tag] = Tag(tag, context_id, NOW)
        return self.named[tenant, tag]

    async def delete_tag(self, tenant: str, tag: str) -> None:
        self._check()
        self.named.pop((tenant, tag), None)

    async def trust_of(self, tenant: str) -> Trust:
        self._check()
        del tenant
        return self.trusts

    def used(self, tenant: str, row: ContextRow, reset_ttl_seconds: float | None) -> None:
        del tenant
        self.used_ids.append((row.id, reset_ttl_seconds))

    def accepted(self, tenant: str) -> None:
        self.accepted_tenants.append(tenant)

    def has_accepted(self, tenant: str) -> bool:
        return tenant in self.accepted_tenants


class FakePool:
    """A pool of engines, or a provider."""

    def __init__(self, *, is_provider: bool) -> None:
        self.is_provider = is_provider
        self.name = "pool"


class FakePools:
    def __init__(self) -> None:
        self.pool = FakePool(is_provider=False)

    def serving(self, model: str) -> ServedPool:
        del model
        return cast(ServedPool, self.pool)


class FakePredictor:
    def predict(self, model: str, size_bytes: int, media: Sequence[Media]) -> float:
        del model, media
        return size_bytes / 4


class FakeValue:
    def usd_per_token(self, model: str, pool: ServedPool) -> float:
        del model, pool
        return 1e-6


class FakeWarmer:
    """Warms at once, with `tokens` or by raising `fails`."""

    def __init__(self) -> None:
        self.tokens = 123
        self.fails: WarmingFailed | None = None
        self.warmed: list[tuple[str | None, bool, int]] = []

    async def warm(
        self,
        tenant: Tenant,
        headers: Iterable[tuple[bytes, bytes]],
        model: str,
        reference: Reference,
        *,
        ends_with_user: bool,
        replicas: int,
    ) -> int:
        del tenant, headers, model
        self.warmed.append((reference.id, ends_with_user, replicas))
        if self.fails is not None:
            raise self.fails
        return self.tokens


class Api:
    """The API of stored contexts on fakes."""

    def __init__(self, **settings: int) -> None:
        self.store = FakeStore()
        self.pools = FakePools()
        self.warmer = FakeWarmer()
        self.tasks = Tasks()
        self.api = ContextApi(
            self.store, self.pools, FakePredictor(), FakeValue(), self.warmer, Settings(**settings), self.tasks
        )

    async def call(self, method: str, path: str, body: bytes = b"", tenant: Tenant = LISTED) -> bytes:
        call = Call(
            request_id="r",
            tenant=tenant,
            endpoint=Endpoint.CACHING,
            method=method,
            target=f"/v1/caching{path}",
            headers=(),
            body=body,
            received_seconds=0.0,
            read_seconds=0.0,
        )
        return await self.api.answer(call)

    async def settled(self) -> None:
        """Let background work end."""
        await eventually(lambda: len(self.tasks) == 0)

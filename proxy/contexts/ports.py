"""Protocols that stored contexts need from the rest of Cairn, so that they can be tested without it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from cache import Content, ContextRow, Draft, Tag, Trust
from proxy.fleet.pools import ServedPool
from proxy.records import Media, Tenant
from proxy.wire.contexts import Reference


class FoundContexts(Protocol):
    """The part of `cache.ContextStore` that finds contexts. Everything that awaits raises CacheError."""

    def now(self) -> float: ...
    async def known_row(self, tenant: str, context_id: str) -> ContextRow: ...
    async def tagged(self, tenant: str, tag: str) -> ContextRow: ...
    async def content(self, tenant: str, row: ContextRow) -> Content: ...


class UsedContexts(Protocol):
    """The part of `cache.ContextStore` that records how requests ended."""

    def now(self) -> float: ...
    def used(self, tenant: str, row: ContextRow, reset_ttl_seconds: float | None) -> None: ...
    def accepted(self, tenant: str) -> None: ...
    def has_accepted(self, tenant: str) -> bool: ...


class ManagedContexts(FoundContexts, Protocol):
    """The part of `cache.ContextStore` behind the API."""

    async def create(self, tenant: str, draft: Draft, trust: Trust) -> ContextRow: ...
    async def ids(self, tenant: str) -> list[str]: ...
    async def some_rows(self, tenant: str, ids: Sequence[str]) -> list[ContextRow]: ...
    async def row(self, tenant: str, context_id: str) -> ContextRow: ...
    async def update(
        self,
        tenant: str,
        context_id: str,
        *,
        metadata: dict[str, str] | None,
        ttl_seconds: float | None,
        expires_unix_seconds: float | None,
        trust: Trust,
    ) -> ContextRow: ...
    async def delete(self, tenant: str, context_id: str) -> None: ...
    async def finish(
        self, tenant: str, context_id: str, tokens: int, value_usd: float, problem: tuple[str, str] | None
    ) -> None: ...
    async def tag(self, tenant: str, tag: str) -> Tag: ...
    async def tags(self, tenant: str) -> list[Tag]: ...
    async def set_tag(self, tenant: str, tag: str, context_id: str) -> Tag: ...
    async def delete_tag(self, tenant: str, tag: str) -> None: ...
    async def trust_of(self, tenant: str) -> Trust: ...


class ServingPools(Protocol):
    """The part of `proxy.fleet.pools.Pools` that finds a model's pool."""

    def serving(self, model: str) -> ServedPool: ...


class TokenPredictor(Protocol):
    """Predicts the tokens of a prompt."""

    def predict(self, model: str, size_bytes: int, media: Sequence[Media]) -> float: ...


class TokenValue(Protocol):
    """Values a token that is not computed again, in USD."""

    def usd_per_token(self, model: str, pool: ServedPool) -> float: ...


class Warmer(Protocol):
    """Computes a new context before it is used. Raises `proxy.contexts.warming.WarmingFailed`."""

    async def warm(
        self,
        tenant: Tenant,
        headers: Iterable[tuple[bytes, bytes]],
        model: str,
        reference: Reference,
        *,
        ends_with_user: bool,
        replicas: int,
    ) -> int: ...


class Counts(Protocol):
    """The part of `proxy.metrics.recorder.Recorder` that counts."""

    def inc(self, spec: Any, labels: tuple[str, ...], amount: float = 1) -> None: ...

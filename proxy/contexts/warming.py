"""Warm new contexts: send a request for one output token to each replica that should hold one.

It goes through the pipeline, so it is routed, charged and placed in the index like any other. If a context does not
end with a user message, a minimal one is appended, since many templates refuse a lone system message; its own tokens
are counted by one request per model and subtracted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

import msgspec

from proxy.clock import Clock
from proxy.downstream.response import Downstream
from proxy.errors import InternalError
from proxy.model import Ending, Endpoint
from proxy.pipeline.exchange import Exchange
from proxy.records import Call, Tenant
from proxy.wire.contexts import Reference
from proxy.wire.headers import KEY_HEADERS
from proxy.wire.schemas import DECODE_ERRORS

MINIMAL_MESSAGE = {"role": "user", "content": "."}
MODELS_REMEMBERED_AT_MOST = 1024
_ERROR_BYTES_MOST = 64 * 1024
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")


class Run(Protocol):
    """The signature of `Pipeline.run`."""

    def __call__(self, exchange: Exchange, client: Downstream) -> Coroutine[Any, Any, None]: ...


class WarmingFailed(Exception):
    """The upstream did not answer the request. `kind` and `message` can be shown to the client."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class _Error(msgspec.Struct):
    type: Any = None
    code: Any = None


class _Refusal(msgspec.Struct):
    error: _Error | None = None


class ResponseToNobody:
    """A `Downstream` without a client. Keeps the status and the beginning of the body."""

    def __init__(self) -> None:
        self.begun = False
        self.status = 0
        self.body = b""

    def send(self, status: int, reason: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        self.begin(status, reason, headers, len(body))
        self.body = body[:_ERROR_BYTES_MOST]

    def begin(self, status: int, *_: object) -> None:
        self.begun = True
        self.status = status

    async def write(self, piece: bytes | memoryview) -> None:
        self.offer(bytes(piece))

    def offer(self, piece: bytes, framed: bytes | None = None) -> bool:  # noqa: ARG002
        if len(self.body) < _ERROR_BYTES_MOST:
            self.body += piece
        return True

    async def drained(self) -> None:
        """Return at once: there is no client that reads slowly."""

    def end(self) -> None:
        """Do nothing: everything is kept already."""

    def write_last(self, piece: bytes) -> None:
        """Ignore the last piece of a stream: it is not needed here."""

    def break_off(self) -> None:
        """Do nothing: there is no connection."""


class Warming:
    """`run` serves an exchange; `new_id` makes request ids."""

    def __init__(self, run: Run, new_id: Callable[[], str], clock: Clock) -> None:
        self._run = run
        self._new_id = new_id
        self._clock = clock
        self._minimal_tokens: dict[tuple[str, str], int] = {}

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
        """Warm up to `replicas` replicas, one after another; return the context's tokens as the upstream counts them.

        Raises WarmingFailed if the first one does not answer.
        """
        kept = tuple(pair for pair in headers if pair[0] in KEY_HEADERS)
        messages: list[dict[str, str]] = [{"role": "cache", "content": f"cache_id={reference.id}"}]
        if not ends_with_user:
            messages.append(MINIMAL_MESSAGE)
        warmed: set[str] = set()
        tokens = 0
        for _ in range(replicas):
            try:
                exchange = await self._ask(tenant, kept, model, messages, frozenset(warmed))
            except WarmingFailed:
                if not warmed:
                    raise
                break
            warmed.add(exchange.replica_name)
            tokens = exchange.usage.prompt_tokens if exchange.usage is not None else tokens
        if not ends_with_user and tokens:
            tokens -= await self._tokens_of_minimal(tenant, kept, model)
        return max(0, tokens)

    async def _tokens_of_minimal(self, tenant: Tenant, headers: tuple[tuple[bytes, bytes], ...], model: str) -> int:
        key = (tenant.id, model)
        known = self._minimal_tokens.get(key)
        if known is not None:
            return known
        try:
            exchange = await self._ask(tenant, headers, model, [MINIMAL_MESSAGE], frozenset())
        except WarmingFailed:
            return 0
        tokens = 0 if exchange.usage is None else exchange.usage.prompt_tokens
        if len(self._minimal_tokens) >= MODELS_REMEMBERED_AT_MOST:
            self._minimal_tokens.clear()
        self._minimal_tokens[key] = tokens
        return tokens

    async def _ask(
        self,
        tenant: Tenant,
        headers: tuple[tuple[bytes, bytes], ...],
        model: str,
        messages: list[dict[str, str]],
        avoid: frozenset[str],
    ) -> Exchange:
        now_seconds = self._clock.monotonic()
        call = Call(
            request_id=self._new_id(),
            tenant=tenant,
            endpoint=Endpoint.CHAT,
            method="POST",
            target="/v1/chat/completions",
            headers=((b"content-type", b"application/json"), *headers),
            body=msgspec.json.encode({"model": model, "max_tokens": 1, "messages": messages}),
            received_seconds=now_seconds,
            read_seconds=now_seconds,
        )
        exchange, response = Exchange(call), ResponseToNobody()
        exchange.avoid, exchange.is_warming = avoid, True
        try:
            await self._run(exchange, response)
        except (InternalError, ConnectionError):
            raise WarmingFailed("server_error", "Warming failed inside Cairn.") from None
        if exchange.ending is not Ending.COMPLETE:
            raise _failure(response)
        return exchange


def _failure(response: ResponseToNobody) -> WarmingFailed:
    """Describe a refusal by status, type and code. The upstream's text may hold the prompt and is not repeated."""
    kind, code = "server_error" if response.status >= 500 else "invalid_request_error", ""
    try:
        refusal = msgspec.json.decode(response.body, type=_Refusal)
    except DECODE_ERRORS:
        refusal = _Refusal()
    if refusal.error is not None:
        if isinstance(refusal.error.type, str) and _CODE.fullmatch(refusal.error.type):
            kind = refusal.error.type
        if isinstance(refusal.error.code, str) and _CODE.fullmatch(refusal.error.code):
            code = f" ({refusal.error.code})"
    return WarmingFailed(kind, f"The upstream answered the warming request with status {response.status}{code}.")

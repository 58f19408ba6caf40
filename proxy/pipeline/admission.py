"""Phase 1: identify the client, check the models it may use, and limit the work in flight.

All of this happens before any byte of a prompt is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from proxy.errors import Forbidden, Overloaded, Unauthorized
from proxy.patterns import matches_any
from proxy.pipeline.page_guard import PageGuard
from proxy.records import Tenant
from proxy.wire.headers import KEY_HEADERS
from proxy.wire.paths import keys_in_query

_TENANTS_REMEMBERED: Final = 4096  # keys whose tenant is remembered; computing it takes 3 us
_KEY_BYTES_REMEMBERED: Final = 512  # longer keys are hashed each time, so that strangers cannot fill memory
_CREDENTIALS_MOST: Final = 8  # of one request; honest clients send one or two
_HASH_KEY_BYTES_MOST: Final = 64  # BLAKE2b takes no longer key
_ANONYMOUS: Final = b""
_ANONYMOUS_NAME: Final = "anonymous"
_NAME_DIGITS: Final = 12  # of a keyed hash, shown to the operator
_BUSY_RETRY_SECONDS: Final = 1.0
_NO_KEY: Final = "No API key was sent. Send it as `Authorization: Bearer KEY`, `x-api-key` or `api-key`."


@dataclass(frozen=True, slots=True)
class KnownClient:
    """A client of the configuration: the SHA-256 of its key, its tenant, and patterns of the models it may use.

    `weight` is its tenant's share while several tenants' requests wait, `highest_priority` the best that it may ask
    for (0 is high).
    """

    key_sha256: bytes
    tenant: str
    models: tuple[str, ...] = ("*",)
    name: str = ""
    weight: float = 1.0
    highest_priority: int = 1


class Authenticator:
    """Finds the tenant of a key.

    With `clients`, only their keys are accepted. Without, each key is a separate tenant, named by a keyed hash, and
    the upstream decides whether the key is valid.

    Args:
        clients: the clients of the configuration.
        secret: the key of the hash, so that a tenant's name cannot be computed from the client's key alone. A secret
            of any length is accepted.
        discloses_all: show every client that prefixes are cached which others sent. If false, and the clients belong
            to several tenants, each sees only its own.
        pages: without clients, decides which pages in browsers may send requests; None allows all.
    """

    def __init__(
        self,
        clients: Sequence[KnownClient],
        secret: bytes,
        *,
        discloses_all: bool = False,
        pages: PageGuard | None = None,
    ) -> None:
        self._pages = None if clients else pages
        self._clients = tuple(clients)
        self._sees_all = discloses_all or len({client.tenant for client in clients}) < 2
        self._secret = secret if len(secret) <= _HASH_KEY_BYTES_MOST else hashlib.blake2b(secret).digest()
        self._seen: dict[bytes, Tenant] = {}

    def weights(self) -> dict[str, float]:
        """Return the weights of the configuration's clients, by their tenant's id."""
        return {self._tenant_of(client).id: client.weight for client in self._clients}

    def admit(self, method: str, headers: Sequence[tuple[bytes, bytes]], target: str = "") -> Tenant:
        """Return the tenant of a request, from its keys.

        Raises:
            Unauthorized: clients are configured, and none has one of these keys.
            Forbidden: a page of another site may have sent the request.
        """
        credentials = credentials_of(headers)
        if self._pages is not None:  # a page may put a key into a URL without asking first
            self._pages.check(method, headers, has_key=bool(credentials))
        if not credentials and "?" in target:
            credentials = credentials_of((), target)
        return self.tenant_of_any(credentials)

    def tenant_of_any(self, credentials: Sequence[bytes]) -> Tenant:
        """Return the tenant of the first key in `credentials` that is accepted.

        Raises:
            Unauthorized: clients are configured, and none has one of these keys.
        """
        if len(credentials) < 2:
            return self.tenant_of(credentials[0] if credentials else _ANONYMOUS)
        for credential in credentials:
            try:
                return self.tenant_of(credential)
            except Unauthorized as error:
                refusal = error
        raise refusal

    def tenant_of(self, credential: bytes) -> Tenant:
        """Return the tenant of one key; empty means that the client sent none.

        Raises:
            Unauthorized: clients are configured, and none has this key.
        """
        # the table is no timing oracle: it compares keys only if their salted hashes are equal
        tenant = self._seen.get(credential)
        if tenant is None:
            tenant = self._known(credential) if self._clients else self._keyed(credential)
            if len(self._seen) >= _TENANTS_REMEMBERED:
                self._seen.clear()
            if len(credential) <= _KEY_BYTES_REMEMBERED:
                self._seen[credential] = tenant
        return tenant

    def _known(self, credential: bytes) -> Tenant:
        digest = hashlib.sha256(credential).digest()
        found: KnownClient | None = None
        for client in self._clients:  # constant time: do not stop at the first match
            if hmac.compare_digest(client.key_sha256, digest):
                found = client
        if found is None:
            raise Unauthorized("Incorrect API key provided." if credential else _NO_KEY)
        return self._tenant_of(found)

    def _tenant_of(self, client: KnownClient) -> Tenant:
        tenant = self._tenant(
            client.tenant.encode(), client.models, client.tenant, client.name or client.tenant, is_listed=True
        )
        return dataclasses.replace(tenant, weight=client.weight, highest_priority=client.highest_priority)

    def _keyed(self, credential: bytes) -> Tenant:
        if not credential:
            return self._tenant(_ANONYMOUS, ("*",), _ANONYMOUS_NAME)
        return self._tenant(b"key:" + credential, ("*",))

    def _tenant(
        self, key: bytes, models: tuple[str, ...], name: str = "", client: str = "", *, is_listed: bool = False
    ) -> Tenant:
        salt = hashlib.blake2b(key, key=self._secret, digest_size=16).digest()
        return Tenant(
            salt.hex(),
            salt,
            models,
            name or salt.hex()[:_NAME_DIGITS],
            is_listed=is_listed,
            client=client,
            sees_all=self._sees_all,
        )


def credentials_of(headers: Iterable[tuple[bytes, bytes]], target: str = "") -> list[bytes]:
    """Return the keys in a request's headers (names in lower case) and then in its query, in their order, each once.

    A key comes as `Authorization: Bearer KEY` (in any letter case) or as the value of `Authorization`, `x-api-key`
    (Anthropic), `api-key` (Azure) or another header in which providers take keys, with or without `Bearer`.
    """
    found: list[bytes] = []
    for name, value in headers:
        if name in KEY_HEADERS:
            key = value.strip()
            if key[:6].lower() == b"bearer" and key[6:7] in (b" ", b"\t", b""):
                key = key[6:].strip()
            if key and key not in found and len(found) < _CREDENTIALS_MOST:
                found.append(key)
    for text in keys_in_query(target):
        if (key := text.encode("utf-8", "replace")) and key not in found and len(found) < _CREDENTIALS_MOST:
            found.append(key)
    return found


def check_model(tenant: Tenant, model: str) -> None:
    """Raise Forbidden if `tenant` may not use `model`. One with control characters might be read as another one."""
    if "*" not in tenant.models and not (matches_any(model, tenant.models) and model.isprintable()):
        raise Forbidden("This key may not use this model.", param="model", code="model_not_allowed")


class InFlightLimit:
    """Limits the requests in flight. One per worker; the bytes of their bodies are limited at the client port."""

    def __init__(self, requests_at_most: int) -> None:
        self._requests_at_most = requests_at_most
        self.requests = 0

    def enter(self) -> None:
        """Count one more request; call `leave` once for it.

        Raises:
            Overloaded: the limit is reached; the client may come back after a second.
        """
        if self.requests >= self._requests_at_most:
            raise Overloaded(
                "Too many requests at once.", code="proxy_overloaded", retry_after_seconds=_BUSY_RETRY_SECONDS
            )
        self.requests += 1

    def leave(self) -> None:
        """Count one request fewer."""
        self.requests -= 1

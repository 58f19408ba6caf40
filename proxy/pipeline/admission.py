"""Who asks, whether they may, and whether there is room: everything before a byte of the prompt is looked at.

It must not know replicas, prompts or Redis.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from proxy.errors import BadRequest, Forbidden, NotFound, Overloaded, Unauthorized
from proxy.model import Endpoint, Tenant

_TENANTS_REMEMBERED: Final = 4096  # keys whose tenant is kept; the hashes that find it cost some 3 us
_KEY_BYTES_REMEMBERED: Final = 512  # a longer one is hashed each time, so that what strangers send is never much
_ANONYMOUS: Final = b""
_ANONYMOUS_NAME: Final = "anonymous"
_NAME_DIGITS: Final = 12  # of a keyed hash, for the operator's eyes
_BUSY_RETRY_SECONDS: Final = 1.0

_ENDPOINTS = {
    "/v1/chat/completions": Endpoint.CHAT,
    "/v1/completions": Endpoint.COMPLETIONS,
    "/v1/responses": Endpoint.RESPONSES,
    "/v1/messages": Endpoint.MESSAGES,
    "/v1/embeddings": Endpoint.EMBEDDINGS,
}


def endpoint_of(method: str, path: str) -> Endpoint:
    """What `method` and `path` (without its query) ask for.

    Raises:
        NotFound: the path is not under /v1/.
        BadRequest: it has dot segments, which could leave the upstream's base path.
    """
    if method == "POST" and (endpoint := _ENDPOINTS.get(path)):
        return endpoint
    if path == "/v1/models" and method == "GET":
        return Endpoint.MODELS
    if not path.startswith("/v1/"):
        raise NotFound(f"There is nothing at this path for {method}.", code="unknown_path")
    if "/." in path or "%2e" in path.lower() or "\\" in path:
        raise BadRequest("The path has dot segments.", code="bad_path")
    if path.startswith("/v1/caching"):
        return Endpoint.CACHING
    return Endpoint.OTHER


@dataclass(frozen=True, slots=True)
class KnownClient:
    """A client that the configuration lists: the SHA-256 of its key, whose it is, what it may use."""

    key_sha256: bytes
    tenant: str
    models: tuple[str, ...] = ("*",)


class Authenticator:
    """Turns a credential into a tenant.

    With `clients` only their keys are known. Without, every key is a tenant of its own, named by a keyed hash, since
    the upstream is who judges it. `secret` keys that hash, so that no name can be computed from a key alone.
    """

    def __init__(self, clients: Sequence[KnownClient], secret: bytes) -> None:
        self._clients = tuple(clients)
        self._secret = secret
        self._seen: dict[bytes, Tenant] = {}

    def tenant_of(self, credential: bytes) -> Tenant:
        """The tenant of the key in `credential` (the bytes after `Bearer`, or empty).

        Raises:
            Unauthorized: clients are listed and this is none of theirs.
        """
        # a table is no oracle: it compares keys only where their salted hashes are equal
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
        for client in self._clients:  # no early end: the time must not tell which one it was
            if hmac.compare_digest(client.key_sha256, digest):
                found = client
        if found is None:
            raise Unauthorized("Incorrect API key provided.")
        return self._tenant(found.tenant.encode(), found.models, found.tenant)

    def _keyed(self, credential: bytes) -> Tenant:
        if not credential:
            return self._tenant(_ANONYMOUS, ("*",), _ANONYMOUS_NAME)
        return self._tenant(b"key:" + credential, ("*",))

    def _tenant(self, key: bytes, models: tuple[str, ...], name: str = "") -> Tenant:
        salt = hashlib.blake2b(key, key=self._secret, digest_size=16).digest()
        return Tenant(salt.hex(), salt, models, name or salt.hex()[:_NAME_DIGITS])


def credential_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key that a client sent: `Authorization: Bearer KEY`, or `x-api-key` as Anthropic's clients do."""
    for name, value in headers:
        if len(name) == 13 and name.lower() == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else value
        if len(name) == 9 and name.lower() == b"x-api-key":
            return value
    return _ANONYMOUS


def check_model(tenant: Tenant, model: str) -> None:
    """Raise Forbidden where `tenant` may not use `model`."""
    for pattern in tenant.models:
        if pattern == "*" or fnmatchcase(model, pattern):
            return
    raise Forbidden("This key may not use this model.", param="model", code="model_not_allowed")


class InFlightLimit:
    """How much is inside at once: requests, and bytes of bodies that are held. One per worker.

    `empty` is set while nobody is inside.
    """

    def __init__(self, requests_at_most: int, body_bytes_at_most: int) -> None:
        self._requests_at_most = requests_at_most
        self._body_bytes_at_most = body_bytes_at_most
        self.requests = 0
        self.body_bytes = 0
        self.empty = asyncio.Event()
        self.empty.set()

    def enter(self, announced_bytes: int) -> None:
        """Take a place and `announced_bytes`; each `enter` wants one `leave` with the same figure.

        Raises:
            Overloaded: there is none; the client is told to come back.
        """
        # one request is always let in, however large, or a body over the bound could never be served
        if self.requests >= self._requests_at_most or (
            self.requests and self.body_bytes + announced_bytes > self._body_bytes_at_most
        ):
            raise Overloaded(
                "Too many requests at once.", code="proxy_overloaded", retry_after_seconds=_BUSY_RETRY_SECONDS
            )
        if not self.requests:
            self.empty.clear()
        self.requests += 1
        self.body_bytes += announced_bytes

    def leave(self, announced_bytes: int) -> None:
        """Give the place back."""
        self.requests -= 1
        self.body_bytes -= announced_bytes
        if not self.requests:
            self.empty.set()

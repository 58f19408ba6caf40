"""Choose the header in which a replica's key is sent. Pure.

OpenAI and most compatible servers want `Authorization: Bearer`. Anthropic wants `x-api-key` and a version of its API,
Azure wants `api-key`. The configuration decides; if it does not, the host does, for the hosts known here.
"""

from __future__ import annotations

from typing import Final

from proxy.config.schema import Auth

ANTHROPIC_VERSION: Final = (b"anthropic-version", b"2023-06-01")
"""Sent to Anthropic if the client sends no version: the API refuses requests without one."""

_ANTHROPIC_HOSTS: Final = (".anthropic.com",)
_AZURE_HOSTS: Final = (
    ".openai.azure.com",
    ".cognitiveservices.azure.com",
    ".services.ai.azure.com",
    ".azure-api.net",
)


def auth_of(configured: Auth | None, host: str) -> Auth:
    """Return the header's kind for `host`: as configured, else by the host's name, else a bearer token."""
    if configured is not None:
        return configured
    dotted = f".{host.lower()}"
    if dotted.endswith(_ANTHROPIC_HOSTS):
        return Auth.X_API_KEY
    if dotted.endswith(_AZURE_HOSTS):
        return Auth.API_KEY
    return Auth.BEARER


def credential_of(key: str, configured: Auth | None, host: str) -> tuple[bytes, bytes]:
    """Return the header that carries `key` to `host`."""
    name, value = auth_header(key, configured, host)
    return name.encode(), value.encode()


def auth_header(key: str, configured: Auth | None, host: str) -> tuple[str, str]:
    """Return the same header as texts."""
    auth = auth_of(configured, host)
    return ("authorization", f"Bearer {key}") if auth is Auth.BEARER else (auth.value, key)


def default_headers_of(configured: Auth | None, host: str) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers that `host` needs if the client does not send them."""
    return (ANTHROPIC_VERSION,) if auth_of(configured, host) is Auth.X_API_KEY else ()

"""The section `pools`: which replicas there are and what is known of them. Pure."""

from __future__ import annotations

import enum
import re
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

from msgspec import Meta

from proxy.config.schema.values import NAME_LENGTH_MOST, RATE_MOST, Count, Name, Patterns, Seconds, Secret, Section
from proxy.model import ToolOrder

FOLLOWED_SCHEME = "dns+http"
"""Scheme of a URL that stands for every address of its host name."""

KUBERNETES_SCHEME = "kubernetes+http"
"""Scheme of a URL that stands for the ready endpoints of a Kubernetes Service, or of several."""

_DEFAULT_PORTS = {"http": 80, "https": 443, FOLLOWED_SCHEME: 80}
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._:/\[\]-]")
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SERVICE_URL = re.compile(
    rf"kubernetes\+http://(?P<service>\*|{_LABEL})(\.(?P<namespace>{_LABEL}))?(\.svc(\.cluster\.local)?)?"
    rf"(:(?P<port>{_LABEL}))?(?P<path>(/[!-~]*)?)"
)


class ServiceUrl(NamedTuple):
    """A URL of Kubernetes endpoints in its parts.

    `service` is `*` for all Services that the label selector finds. `namespace` is empty for Cairn's own. `port` is a
    number or a name, or empty if the Service has only one.
    """

    service: str
    namespace: str
    port: str
    path: str

    @classmethod
    def parse(cls, url: str) -> ServiceUrl | None:
        """Return the parts of `url`, or None if it is not such a URL.

        >>> ServiceUrl.parse("kubernetes+http://vllm.models:http/v1")
        ServiceUrl(service='vllm', namespace='models', port='http', path='/v1')
        """
        found = _SERVICE_URL.fullmatch(url)
        if found is None:
            return None
        return cls(found["service"], found["namespace"] or "", found["port"] or "", found["path"])


class PoolKind(enum.StrEnum):
    """The kind of upstream: engines keep prefixes while there is memory, providers for a fixed time."""

    ENGINE = "engine"
    PROVIDER = "provider"


class Auth(enum.StrEnum):
    """The header in which a replica's key is sent: `authorization: Bearer`, `x-api-key` or `api-key`."""

    BEARER = "bearer"
    X_API_KEY = "x-api-key"
    API_KEY = "api-key"


class Tenancy(enum.StrEnum):
    """Share cached prefixes among clients, or keep each client's to itself (`isolated`)."""

    SHARED = "shared"
    ISOLATED = "isolated"


class Replica(Section, frozen=True):
    """One endpoint of a pool.

    A `url` of `dns+http://name:port` stands for one endpoint at each address of the name, and one of
    `kubernetes+http://service.namespace:port` for each ready endpoint of a Service, as the Kubernetes API reports
    them; the port is a number or a name.
    """

    url: str
    """Base URL, with or without `/v1`."""

    selector: Annotated[str, Meta(max_length=1024)] | None = None
    """Labels that a Service followed through Kubernetes must have, such as `app=vllm,tier in (gpu, big)`. With it the
    URL may be `kubernetes+http://*.namespace:port`, for all Services that have them."""

    name: Name | None = None
    """Name in metrics, logs and the shared index, by default host and port. It must be the same in all proxies that
    share a Redis."""

    key: Secret | None = None
    """API key to send to this replica in place of the client's."""

    key_env: str | None = None
    """Environment variable that contains the key."""

    key_file: str | None = None
    """File that contains the key, relative to the configuration file."""

    auth: Auth | None = None
    """Header that carries the key: `bearer`, `x-api-key` or `api-key`; by default what the host is known to want."""

    capacity_tokens: Count | None = None
    """Tokens that the engine's cache can hold, corrected by its responses; by default the engine is asked."""

    max_concurrent: Count | None = None
    """Requests that the replica handles at once; further ones wait in Cairn. By default what the engine reports."""

    prefill_tokens_per_second: Annotated[float, Meta(gt=0, le=RATE_MOST)] | None = None
    """Prefill rate; by default measured on streams."""

    ranks: Annotated[int, Meta(ge=1, le=256)] | None = None
    """Data-parallel ranks behind the URL, each with its own cache; by default as many as vLLM's metrics show. Each is
    a replica `<name>/rank-<n>`, selected by the header `X-data-parallel-rank`. The other settings then apply to each
    rank."""

    @property
    def label(self) -> str:
        """The name, given or derived."""
        return self.name or derived_name(self.url)

    @property
    def is_followed(self) -> bool:
        """True if the URL stands for every address of its host name."""
        return self.url.startswith(f"{FOLLOWED_SCHEME}://")

    @property
    def is_service(self) -> bool:
        """True if the URL stands for endpoints that the Kubernetes API reports."""
        return self.url.startswith(f"{KUBERNETES_SCHEME}://")


class Template(Section, frozen=True):
    """The chat template of a pool's engines. By default Cairn asks an engine, or goes by the model's name.

    Only the key by which prompts are found depends on it; requests are passed on as they are.
    """

    order: ToolOrder | None = None
    """Place of the tools: `tools_first`, `system_first` (after the system message) or `tools_last` (before the last
    user message)."""

    drops_reasoning: bool | None = None
    """Reasoning before the last user message is left out."""

    drops_thoughts: bool | None = None
    """Text between `<think>` and `</think>` in assistant messages before the last user message is left out."""

    ignores_reasoning: bool | None = None
    """The field `reasoning_content` (or `reasoning`) of messages is left out wherever it is."""

    system_last: bool | None = None
    """The system message is rendered with the last user message, and so moves with each turn."""

    moves_system: bool | None = None
    """System messages from within the conversation are put at its head."""

    dated: bool | None = None
    """The prompt begins with today's date, so that it is a new one each day (in UTC)."""

    none_drops_tools: bool | None = None
    """`tool_choice: none` leaves the tools out of the prompt."""

    keeps_billing: bool | None = None
    """The text that begins with `x-anthropic-billing-header` is rendered; by default it counts as left out."""

    arguments_without_effect: tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...] | None = None
    """Request fields such as `enable_thinking` that change nothing before the last message."""

    arguments_in_turns: tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...] | None = None
    """Request fields that change nothing before the end of tools and system messages, but what follows them: a switch
    that is written into every message of the user, or `documents` behind the system message."""


class Pool(Section, frozen=True):
    """Replicas that serve the same models."""

    name: Name
    """Name of the pool."""

    replicas: Annotated[tuple[Replica, ...], Meta(min_length=1, max_length=1024)]
    """The endpoints."""

    models: Annotated[Patterns, Meta(min_length=1)] = ("*",)
    """Model names that the pool serves, as patterns with `*` and `?`. The first pool that matches is used."""

    kind: PoolKind = PoolKind.ENGINE
    """`engine` for engines, whose caches are limited by memory; `provider` for an API that caches by time."""

    default: bool = False
    """Send requests that name no model to this pool."""

    tenancy: Tenancy | None = None
    """Tenancy of this pool; by default the top-level setting."""

    cache_salt: bool = False
    """Send each tenant's salt in the field `cache_salt`, for engines that support it."""

    template: Template | None = None
    """The engines' chat template, if neither asking them nor the model's name shows it. For engines only."""

    ttl_seconds: Seconds = 300
    """Time for which a provider keeps a prefix that nobody uses."""

    optional: bool = False
    """Report Cairn as ready while all replicas of this pool are down."""


def derived_name(url: str) -> str:
    """Return host and port of `url` (the port only if it is not the default) and the path without `/v1`.

    The result is a valid `Name` if the URL is valid: what a name cannot have is a hyphen in it.

    >>> [derived_name(u) for u in ("http://10.0.0.7:8000/v1", "https://api.openai.com/v1", "http://h:1/~a/v1")]
    ['10.0.0.7:8000', 'api.openai.com', 'h:1/-a']
    """
    if url.startswith(f"{KUBERNETES_SCHEME}://"):  # its port may be a name
        service = url.partition("://")[2].rstrip("/").removesuffix("/v1")
        return _as_name(f"all{service[1:]}" if service.startswith("*") else service)
    parts = urlsplit(url)
    path = parts.path.rstrip("/").removesuffix("/v1")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    shown = "" if parts.port in (None, _DEFAULT_PORTS.get(parts.scheme)) else f":{parts.port}"
    return _as_name(host + shown + path)


def rank_name(name: str, rank: int) -> str:
    """Return the name of one of the replicas that the ranks behind a URL are."""
    return f"{name}/rank-{rank}"


def _as_name(text: str) -> str:
    return _NOT_IN_NAMES.sub("-", text)[:NAME_LENGTH_MOST]

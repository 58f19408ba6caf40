"""Apply a new configuration, and the tenants' shared secret, to a worker that is running."""

from __future__ import annotations

from dataclasses import dataclass

from cache import ContextStore
from proxy.accounting.pricing import PriceBook
from proxy.accounting.rate_cards import rules_of
from proxy.config.schema import Config
from proxy.contexts.api import ContextApi
from proxy.fleet.discovery import Discovery
from proxy.fleet.templates import Templates
from proxy.metrics.model_labels import ModelNames
from proxy.routing.cold_gate import ColdGate
from proxy.routing.fair_shares import TenantShares
from proxy.worker import from_config
from proxy.worker.http_server import HttpServer
from proxy.worker.replica_queues import ReplicaQueues


@dataclass(frozen=True, slots=True)
class LiveParts:
    """The objects that a reload changes."""

    http_server: HttpServer
    discovery: Discovery
    templates: Templates
    queues: ReplicaQueues
    cold_gate: ColdGate
    shares: TenantShares
    model_names: ModelNames
    prices: PriceBook
    contexts: ContextStore
    context_api: ContextApi


class LiveConfig:
    """The configuration in use and the secret of the tenants' hash."""

    def __init__(self, config: Config, secret: bytes, parts: LiveParts) -> None:
        self._secret = secret
        self._parts = parts
        self.config = config

    async def reconfigure(self, config: Config) -> None:
        """Apply the live part of a new configuration (`proxy.config.reload`); running requests are not affected.

        It takes a few seconds if names are to be looked up first. The one in use is served meanwhile.

        Raises:
            ConfigError: the configuration needs a restart; nothing was changed.
        """
        parts = self._parts
        addresses = await parts.discovery.look_ahead(config)
        self.config = config
        parts.cold_gate.limits = gate_limits = from_config.gate_limits(config.admission)
        parts.queues.set_limits(from_config.queue_limits(config.queue), gate_limits.pace)
        parts.discovery.adopt(config, addresses)
        parts.templates.set_config(config)
        parts.model_names.add(from_config.model_names(config))
        parts.prices.adopt(rules_of(config.prices))
        parts.contexts.adopt(from_config.context_limits(config.contexts))
        parts.context_api.adopt(config.contexts)
        self._set_authenticator()
        parts.cold_gate.changed()

    def name_models(self, models: tuple[str, ...]) -> None:
        """Count these models under their own names, as all workers do."""
        self._parts.model_names.adopt(models)

    def adopt_secret(self, secret: bytes) -> None:
        """Use the secret that all proxies share through Redis."""
        self._secret = secret
        self._set_authenticator()

    def _set_authenticator(self) -> None:
        authenticator = from_config.authenticator(self.config, self._secret)
        self._parts.http_server.authenticator = authenticator
        self._parts.shares.set_weights(authenticator.weights())

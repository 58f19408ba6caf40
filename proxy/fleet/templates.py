"""The facts of every model's chat template: as configured, as shown by an engine, or its family's default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from proxy.config.schema import Config, Pool, PoolKind, Template
from proxy.fleet.template_families import family_facts
from proxy.model import TemplateFacts

PLAIN: Final = TemplateFacts()
"""Tools first and nothing left out: the order of the dialects themselves."""

MAX_MODELS: Final = 1_024
"""Models remembered; model names come from clients."""


class Templates:
    """Facts by pool and model. One per worker. Every change is synchronous; nothing here opens a socket."""

    def __init__(self, config: Config) -> None:
        self._said: dict[str, Template | None] = {}
        self._shown: dict[tuple[str, str], TemplateFacts] = {}
        self._roots: dict[tuple[str, str], str] = {}
        self._found: dict[tuple[str, str], TemplateFacts] = {}
        self.set_config(config)

    def set_config(self, config: Config) -> None:
        """Follow a new configuration."""
        self._said = {pool.name: pool.template for pool in config.pools if _renders(pool)}
        self._found.clear()

    def of(self, pool: str, model: str) -> TemplateFacts:
        """Return what is known of `model` at `pool`; `PLAIN` if nothing is."""
        found = self._found.get((pool, model))
        if found is None:
            found = self._combine(pool, model)
            if len(self._found) >= MAX_MODELS:
                self._found.clear()
            self._found[pool, model] = found
        return found

    def wants_probe(self, pool: str, model: str) -> bool:
        """Return whether an engine of the pool should be asked how it renders."""
        return pool in self._said and (pool, model) not in self._shown

    def shown(self, pool: str, model: str, facts: TemplateFacts) -> None:
        """Store the facts that an engine of the pool showed when it was asked."""
        if len(self._shown) < MAX_MODELS:
            self._shown[pool, model] = facts
            self._found.clear()

    def listed(self, pool: str, models: Sequence[Mapping[str, Any]]) -> None:
        """Store an engine's list of models: names with the same `root` are one model, but an adapter is another."""
        if pool not in self._said:
            return
        for each in models:
            name, root = each.get("id"), each.get("root")
            if not isinstance(name, str) or not isinstance(root, str) or each.get("parent") or name == root:
                continue
            if self._roots.get((pool, name)) != root and len(self._roots) < MAX_MODELS:
                self._roots[pool, name] = root
                self._found.clear()

    def _combine(self, pool: str, model: str) -> TemplateFacts:
        if pool not in self._said:
            return PLAIN
        root = self._roots.get((pool, model), "")
        facts = self._shown.get((pool, model)) or family_facts(model) or family_facts(root) or PLAIN
        said = self._said[pool]
        if said is not None:
            facts = _said_over(said, facts)
        return msgspec.structs.replace(facts, root=root) if root else facts


def _renders(pool: Pool) -> bool:
    """Return False for a provider: how it renders is unknown, so prefixes are matched as they are sent."""
    return pool.kind is PoolKind.ENGINE


def _said_over(said: Template, facts: TemplateFacts) -> TemplateFacts:
    """Return `facts` overridden by the configured template `said`."""
    changes: dict[str, Any] = {
        "order": said.order,
        "drops_reasoning": said.drops_reasoning,
        "drops_thoughts": said.drops_thoughts,
        "ignores_reasoning": said.ignores_reasoning,
        "moves_system": said.moves_system,
        "dated": said.dated,
        "none_drops_tools": said.none_drops_tools,
        "keeps_billing": said.keeps_billing,
        "headless": None if said.arguments_without_effect is None else frozenset(said.arguments_without_effect),
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return msgspec.structs.replace(facts, **given)

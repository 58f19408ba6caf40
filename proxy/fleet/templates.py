"""The facts of every model's chat template: as configured, as shown by the engines, or its family's default.

A prompt has one key for all engines of a pool. If they render differently, the key is made so that what two prompts
share in it is shared at each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import msgspec

from proxy.config.schema import Config, Pool, PoolKind, Template
from proxy.fleet.template_families import family_facts
from proxy.model import TemplateFacts, ToolOrder

log = logging.getLogger("cairn.templates")

PLAIN: Final = TemplateFacts()
"""Tools first and nothing left out: the order of the dialects themselves."""

MAX_MODELS: Final = 1_024
"""Models remembered; model names come from clients."""


class Templates:
    """Facts by pool and model. One per worker. Every change is synchronous; nothing here opens a socket."""

    def __init__(self, config: Config) -> None:
        self._said: dict[str, Template | None] = {}
        self._shown: dict[tuple[str, str], dict[str, TemplateFacts]] = {}
        self._doubted: set[tuple[str, str, str]] = set()  # pool, model, engine
        self._roots: dict[tuple[str, str], dict[str, str]] = {}
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

    def wants_probe(self, pool: str, model: str, engine: str) -> bool:
        """Return whether an engine of the pool should be asked how it renders."""
        if pool not in self._said:
            return False
        return engine not in self._shown.get((pool, model), ()) or (pool, model, engine) in self._doubted

    def doubt(self, pool: str, engine: str) -> None:
        """Have an engine asked again about all its models; until it answers, what it showed before counts."""
        for (of_pool, model), known in self._shown.items():
            if of_pool == pool and engine in known:
                self._doubted.add((pool, model, engine))

    def shown(self, pool: str, model: str, engine: str, facts: TemplateFacts) -> None:
        """Store the facts that an engine of the pool showed when it was asked."""
        known = self._shown.get((pool, model))
        if known is None:
            if len(self._shown) >= MAX_MODELS:
                return
            known = self._shown[pool, model] = {}
        self._doubted.discard((pool, model, engine))
        if known.get(engine) == facts:
            return
        known[engine] = facts
        self._found.clear()
        if any(each != facts for each in known.values()):
            log.warning(
                "pool %s: engines render prompts of %s differently (%s unlike %s); only what all of them share is "
                "expected to be cached. Serve one template per pool.",
                pool,
                model,
                engine,
                next(name for name, each in known.items() if each != facts),
            )

    def mixed_models(self, pool: str) -> int:
        """Count the models of a pool that its engines render differently."""
        shown = [known.values() for (of_pool, _), known in self._shown.items() if of_pool == pool]
        return sum([any(each != next(iter(known)) for each in known) for known in shown])

    def keep(self, engines: Mapping[str, Collection[str]]) -> None:
        """Forget what engines showed that are gone; `engines` are those in force by pool."""
        for (pool, model), known in list(self._shown.items()):
            in_force = engines.get(pool, ())
            gone = [name for name in known if name not in in_force]
            if len(gone) == len(known):
                continue  # the last known template is a better guess than its family's
            for name in gone:
                del self._shown[pool, model][name]
                self._doubted.discard((pool, model, name))
                self._found.clear()
        for (pool, model), roots in list(self._roots.items()):
            gone = [name for name in roots if name not in engines.get(pool, ())]
            if len(gone) < len(roots):
                for name in gone:
                    self._set_root(pool, model, name, "")

    def listed(self, pool: str, engine: str, models: Sequence[Mapping[str, Any]]) -> None:
        """Store an engine's list of models: names with the same `root` are one model, but an adapter is another."""
        if pool not in self._said:
            return
        roots = {each["id"]: _root_of(each) for each in models if isinstance(each.get("id"), str)}
        for (of_pool, name), known in list(self._roots.items()):
            if of_pool == pool and engine in known:
                roots.setdefault(name, "")
        for name, root in roots.items():
            self._set_root(pool, name, engine, root)

    def _set_root(self, pool: str, name: str, engine: str, root: str) -> None:
        """Store the root of a model's name at an engine; empty if there is none."""
        known = self._roots.get((pool, name), {})
        if known.get(engine, "") == root:
            return
        self._found.clear()
        if root and (known or len(self._roots) < MAX_MODELS):
            self._roots.setdefault((pool, name), known)[engine] = root
        elif known.pop(engine, None) is not None and not known:
            del self._roots[pool, name]

    def _root(self, pool: str, name: str) -> str:
        """Return the root of a model's name; empty if no engine states one, or if they state different ones."""
        roots = set(self._roots.get((pool, name), {}).values())
        return roots.pop() if len(roots) == 1 else ""

    def _combine(self, pool: str, model: str) -> TemplateFacts:
        if pool not in self._said:
            return PLAIN
        root = self._root(pool, model)
        shown = self._shown.get((pool, model))
        facts = common_facts(list(shown.values())) if shown else family_facts(model) or family_facts(root) or PLAIN
        said = self._said[pool]
        if said is not None:
            facts = _said_over(said, facts)
        return msgspec.structs.replace(facts, root=root) if root else facts


def common_facts(shown: Sequence[TemplateFacts]) -> TemplateFacts:
    """Return facts by which prompts have in common what they have in common at each of several engines, or less.

    Billing lines are left out unless all engines render them: an engine that does reuses nothing of such a session
    either way, and the others do.
    """
    first = shown[0]
    if all(each == first for each in shown):
        return first
    orders = {each.order for each in shown}
    heads = {(each.order, each.system_last, each.splits_systems, each.developer_in_place) for each in shown}
    order = first.order
    if len(orders) > 1:
        order = ToolOrder.TOOLS_LAST if ToolOrder.TOOLS_LAST in orders else ToolOrder.TOOLS_FIRST
    headless = frozenset.intersection(*[each.headless for each in shown])
    return TemplateFacts(
        order=order,
        joins_head=len(heads) > 1,
        splits_systems=all(each.splits_systems for each in shown),
        system_last=any(each.system_last for each in shown),
        developer_in_place=all(each.developer_in_place for each in shown),
        rewrites_turns=any(each.rewrites_turns for each in shown),
        drops_reasoning=any(each.drops_reasoning for each in shown),
        drops_thoughts=any(each.drops_thoughts for each in shown),
        ignores_reasoning=all(each.ignores_reasoning for each in shown),
        moves_system=any(each.moves_system for each in shown),
        dated=any(each.dated for each in shown),
        none_drops_tools=any(each.none_drops_tools for each in shown),
        headless=headless,
        late_arguments=frozenset.intersection(*[each.headless | each.late_arguments for each in shown]) - headless,
        keeps_billing=all(each.keeps_billing for each in shown),
        messages_drop_billing=any(each.messages_drop_billing for each in shown),
    )


def _root_of(model: Mapping[str, Any]) -> str:
    """Return the name of the model of which this entry is another name; empty for an adapter."""
    root = model.get("root")
    return root if isinstance(root, str) and not model.get("parent") and root != model["id"] else ""


def _renders(pool: Pool) -> bool:
    """Return False for a provider: how it renders is unknown, so prefixes are matched as they are sent."""
    return pool.kind is PoolKind.ENGINE


def _said_over(said: Template, facts: TemplateFacts) -> TemplateFacts:
    """Return `facts` overridden by the configured template `said`."""
    late = facts.late_arguments if said.arguments_in_turns is None else frozenset(said.arguments_in_turns)
    headless = facts.headless.difference(said.arguments_in_turns or ())
    if said.arguments_without_effect is not None:
        headless = frozenset(said.arguments_without_effect)
    changes: dict[str, Any] = {
        "order": said.order,
        "joins_head": None if said.order is None else False,
        "system_last": said.system_last,
        "drops_reasoning": said.drops_reasoning,
        "drops_thoughts": said.drops_thoughts,
        "ignores_reasoning": said.ignores_reasoning,
        "moves_system": said.moves_system,
        "dated": said.dated,
        "none_drops_tools": said.none_drops_tools,
        "keeps_billing": said.keeps_billing,
        "messages_drop_billing": None if said.keeps_billing is None else False,
        "headless": headless,
        "late_arguments": late - headless,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return msgspec.structs.replace(facts, **given)

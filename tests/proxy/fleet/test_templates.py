"""Which facts count: the configuration's, then an engine's own, then the family's."""

from __future__ import annotations

import pytest

from proxy.config.schema import Config, Pool, PoolKind, Replica, Template
from proxy.fleet.template_families import family_facts
from proxy.fleet.templates import PLAIN, Templates
from proxy.model import TemplateFacts, ToolOrder


def templates(template: Template | None = None, kind: PoolKind = PoolKind.ENGINE) -> Templates:
    pool = Pool("pool", (Replica("http://h"),), kind=kind, template=template)
    return Templates(Config(pools=(pool,)))


@pytest.mark.parametrize(
    ("model", "order", "drops"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", ToolOrder.SYSTEM_FIRST, False),
        ("qwen3-coder-30b", ToolOrder.SYSTEM_FIRST, True),
        ("deepseek-ai/DeepSeek-V3.1", ToolOrder.SYSTEM_FIRST, True),
        ("zai-org/GLM-4.6", ToolOrder.TOOLS_FIRST, True),
        ("mistralai/Mistral-Small", ToolOrder.TOOLS_LAST, False),
    ],
)
def test_a_known_family_has_a_default(model, order, drops):
    facts = templates().of("pool", model)
    assert (facts.order, facts.drops_reasoning) == (order, drops)


def test_an_unknown_model_is_taken_as_it_is_sent():
    assert templates().of("pool", "my-own") is PLAIN
    assert family_facts("my-own") is None


def test_what_an_engine_shows_counts_before_the_family_and_what_is_configured_before_both():
    known = templates(Template(dated=True, arguments_without_effect=("thinking",)))
    assert known.wants_probe("pool", "qwen3")
    known.shown("pool", "qwen3", TemplateFacts(moves_system=True))
    assert not known.wants_probe("pool", "qwen3")
    facts = known.of("pool", "qwen3")
    assert facts == TemplateFacts(moves_system=True, dated=True, headless=frozenset({"thinking"}))
    known.set_config(Config(pools=(Pool("pool", (Replica("http://h"),)),)))
    assert known.of("pool", "qwen3") == TemplateFacts(moves_system=True)


def test_a_provider_is_not_asked_and_its_prompts_are_keyed_as_they_are_sent():
    known = templates(kind=PoolKind.PROVIDER)
    assert not known.wants_probe("pool", "qwen3")
    assert known.of("pool", "qwen3") is PLAIN


def test_names_of_one_root_are_one_model_and_an_adapter_is_its_own():
    known = templates()
    known.listed("elsewhere", [{"id": "chat", "root": "/models/qwen3"}])
    known.listed(
        "pool",
        [
            {"id": "chat", "root": "/models/qwen3"},
            {"id": "code", "root": "/models/qwen3"},
            {"id": "sql", "root": "/adapters/sql", "parent": "chat"},
            {"id": 5, "root": None},
        ],
    )
    assert known.of("pool", "chat") == known.of("pool", "code")
    assert known.of("pool", "chat").root == "/models/qwen3"
    assert known.of("pool", "chat").drops_reasoning
    assert known.of("pool", "sql").root == ""


def test_the_memory_of_models_is_bounded():
    known = templates()
    for number in range(3_000):
        known.of("pool", f"model-{number}")
    assert len(known._found) <= 1_024  # noqa: SLF001 - internal state that no public name shows

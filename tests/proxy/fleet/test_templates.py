"""Which facts count: the configuration's, then an engine's own, then the family's."""

from __future__ import annotations

import pytest

from proxy.config.schema import Config, Pool, PoolKind, Replica, Template
from proxy.fleet.template_families import family_facts
from proxy.fleet.templates import PLAIN, Templates, common_facts
from proxy.model import TemplateFacts, ToolOrder


def templates(template: Template | None = None, kind: PoolKind = PoolKind.ENGINE) -> Templates:
    pool = Pool("pool", (Replica("http://h"),), kind=kind, template=template)
    return Templates(Config(pools=(pool,)))


@pytest.mark.parametrize(
    ("model", "order", "drops"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", ToolOrder.SYSTEM_FIRST, False),
        ("qwen3-32b", ToolOrder.SYSTEM_FIRST, True),
        ("qwen3-coder-30b", ToolOrder.SYSTEM_FIRST, False),
        ("Qwen/Qwen3.5-4B", ToolOrder.TOOLS_FIRST, True),
        ("deepseek-ai/DeepSeek-V3.2", ToolOrder.SYSTEM_FIRST, True),
        ("deepseek-ai/DeepSeek-V3.1", ToolOrder.SYSTEM_FIRST, False),
        ("google/gemma-4-31B-it", ToolOrder.SYSTEM_FIRST, True),
        ("MiniMaxAI/MiniMax-M3", ToolOrder.SYSTEM_FIRST, False),
        ("moonshotai/Kimi-K3", ToolOrder.TOOLS_FIRST, False),
        ("zai-org/GLM-4.6", ToolOrder.TOOLS_FIRST, True),
        ("mistralai/Mistral-Small", ToolOrder.TOOLS_LAST, False),
        ("mistralai/Mistral-Nemo-Instruct-2407", ToolOrder.TOOLS_LAST, False),
        ("mistralai/Devstral-Small-2507", ToolOrder.SYSTEM_FIRST, False),
        ("moonshotai/Kimi-K2-Instruct", ToolOrder.TOOLS_FIRST, False),
        ("google/gemma-3-27b-it", ToolOrder.SYSTEM_FIRST, False),
    ],
)
def test_a_known_family_has_a_default(model, order, drops):
    facts = templates().of("pool", model)
    assert (facts.order, facts.drops_reasoning) == (order, drops)


def test_a_systems_place_that_is_configured_counts_before_the_family():
    """Older models of Mistral's render the system message with the last user message."""
    assert templates().of("pool", "mistral-7b").system_last
    assert not templates(Template(system_last=False)).of("pool", "mistral-7b").system_last
    assert templates(Template(system_last=True)).of("pool", "my-own").system_last


def test_an_unknown_model_is_taken_as_it_is_sent():
    assert templates().of("pool", "my-own") is PLAIN
    assert family_facts("my-own") is None


def test_an_argument_that_is_said_to_have_no_effect_is_no_part_of_the_turns_either():
    known = templates(Template(arguments_without_effect=("enable_thinking",)))
    facts = known.of("pool", "glm-4.6")
    assert (facts.headless, facts.late_arguments) == (frozenset({"enable_thinking"}), frozenset({"thinking"}))


@pytest.mark.parametrize(
    ("said", "headless", "late"),
    [
        ({"arguments_in_turns": ("thinking", "x")}, {"enable_thinking", "documents"}, {"thinking", "x"}),
        ({"arguments_in_turns": ()}, {"enable_thinking", "thinking", "documents"}, set()),
        ({"arguments_in_turns": ("x", "y"), "arguments_without_effect": ("y",)}, {"y"}, {"x"}),
        ({"arguments_in_turns": ("x",), "arguments_without_effect": ()}, set(), {"x"}),
    ],
)
def test_an_argument_that_is_said_to_be_in_turns_is_there_whatever_the_family_does(said, headless, late):
    facts = templates(Template(**said)).of("pool", "qwen3")
    assert (facts.headless, facts.late_arguments) == (headless, late)


def test_what_an_engine_shows_counts_before_the_family_and_what_is_configured_before_both():
    known = templates(Template(dated=True, arguments_without_effect=("thinking",)))
    assert known.wants_probe("pool", "qwen3", "h")
    known.shown("pool", "qwen3", "h", TemplateFacts(moves_system=True))
    assert not known.wants_probe("pool", "qwen3", "h")
    facts = known.of("pool", "qwen3")
    assert facts == TemplateFacts(moves_system=True, dated=True, headless=frozenset({"thinking"}))
    known.set_config(Config(pools=(Pool("pool", (Replica("http://h"),)),)))
    assert known.of("pool", "qwen3") == TemplateFacts(moves_system=True)


SYSTEM_FIRST = TemplateFacts(order=ToolOrder.SYSTEM_FIRST)


def test_engines_that_render_differently_have_in_common_what_each_of_them_shares(caplog):
    """The log names both; once the one that differs is gone, the other counts alone."""
    known = templates()
    known.shown("pool", "m", "a", TemplateFacts())
    known.shown("pool", "m", "b", TemplateFacts())
    assert not known.of("pool", "m").joins_head
    assert not caplog.records
    known.shown("pool", "m", "c", SYSTEM_FIRST)
    assert known.of("pool", "m").joins_head
    assert "engines render prompts of m differently (c unlike a)" in caplog.text
    assert (known.mixed_models("pool"), known.mixed_models("other")) == (1, 0)
    assert known.wants_probe("pool", "m", "d")
    known.keep({"pool": {"c", "d"}})
    assert known.of("pool", "m") == SYSTEM_FIRST
    assert known.mixed_models("pool") == 0
    known.keep({"pool": {"d"}})
    assert known.of("pool", "m") == SYSTEM_FIRST, "the last known template is a better guess than none"


def test_an_order_that_is_configured_holds_for_all_engines():
    known = templates(Template(order=ToolOrder.SYSTEM_FIRST))
    known.shown("pool", "m", "a", TemplateFacts())
    known.shown("pool", "m", "b", SYSTEM_FIRST)
    assert known.of("pool", "m") == SYSTEM_FIRST


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ({"drops_reasoning": True}, {"ignores_reasoning": True}, {"drops_reasoning": True}),
        ({"drops_thoughts": True}, {}, {"drops_thoughts": True}),
        ({"ignores_reasoning": True}, {}, {}),
        ({"moves_system": True, "dated": True}, {}, {"moves_system": True, "dated": True}),
        ({"rewrites_turns": True}, {}, {"rewrites_turns": True}),
        ({"keeps_billing": True}, {}, {}),
        ({"none_drops_tools": False}, {}, {}),
        ({"headless": frozenset("ab")}, {"headless": frozenset("bc")}, {"headless": frozenset("b")}),
        ({"headless": frozenset("ab")}, {"late_arguments": frozenset("bc")}, {"late_arguments": frozenset("b")}),
        ({"late_arguments": frozenset("ab")}, {"late_arguments": frozenset("b")}, {"late_arguments": frozenset("b")}),
        ({"order": ToolOrder.TOOLS_LAST}, {}, {"order": ToolOrder.TOOLS_LAST, "joins_head": True}),
        ({"order": ToolOrder.SYSTEM_FIRST}, {}, {"joins_head": True}),
        ({"system_last": True}, {}, {"system_last": True, "joins_head": True}),
        ({"splits_systems": True}, {}, {"joins_head": True}),
        ({"developer_in_place": True}, {}, {"joins_head": True}),
    ],
)
def test_the_common_facts_expect_no_more_than_either_engine_shares(one, other, common):
    shown = [TemplateFacts(**one), TemplateFacts(**other)]
    assert common_facts(shown) == common_facts(shown[::-1]) == TemplateFacts(**common)
    assert common_facts(shown[:1] * 2) == shown[0]


def test_a_provider_is_not_asked_and_its_prompts_are_keyed_as_they_are_sent():
    known = templates(kind=PoolKind.PROVIDER)
    assert not known.wants_probe("pool", "qwen3", "h")
    assert known.of("pool", "qwen3") is PLAIN


def test_names_of_one_root_are_one_model_and_an_adapter_is_its_own():
    known = templates()
    known.listed("elsewhere", "h", [{"id": "chat", "root": "/models/qwen3"}])
    known.listed(
        "pool",
        "h",
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
        known.shown("pool", f"model-{number}", "h", PLAIN)
    assert len(known._shown) == 1_024  # noqa: SLF001 - the same
    assert len(known._found) <= 1_024  # noqa: SLF001 - internal state that no public name shows


def test_the_memory_of_roots_is_bounded_and_those_that_are_known_stay():
    """Engines list as many names as they are configured with."""
    known = templates()
    known.listed("pool", "h", [{"id": f"name-{number}", "root": "/m"} for number in range(3_000)])
    roots = [known.of("pool", f"name-{number}").root for number in (0, 1_023, 1_024, 2_999)]
    assert roots == ["/m", "/m", "", ""]


def test_a_root_is_an_engines_own_and_changes_with_it():
    """Engines that state different roots for a name share it with no other; one that is gone has no say."""
    known = templates()
    known.listed("pool", "a", [{"id": "chat", "root": "/old"}])
    known.listed("pool", "b", [{"id": "chat", "root": "/new"}])
    known.listed("pool", "c", [{"id": "chat", "root": "chat"}])
    assert known.of("pool", "chat").root == ""
    known.listed("pool", "a", [{"id": "chat", "root": "/new"}])
    assert known.of("pool", "chat").root == "/new"
    known.listed("pool", "a", [{"id": "other"}])
    known.keep({"pool": {"a", "b"}})
    assert known.of("pool", "chat").root == "/new"
    known.listed("pool", "b", [])
    assert known.of("pool", "chat").root == ""


def test_an_engine_in_doubt_is_asked_again_and_its_old_answer_counts_until_then():
    known = templates()
    known.shown("pool", "m", "a", SYSTEM_FIRST)
    known.shown("pool", "m", "b", SYSTEM_FIRST)
    known.doubt("pool", "a")
    assert (known.wants_probe("pool", "m", "a"), known.wants_probe("pool", "m", "b")) == (True, False)
    assert known.of("pool", "m") == SYSTEM_FIRST
    known.shown("pool", "m", "a", TemplateFacts())
    assert not known.wants_probe("pool", "m", "a")
    assert known.of("pool", "m").joins_head

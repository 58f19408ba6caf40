"""Facts about the chat templates of known model families, as published with the models. Pure.

These are only defaults: the configuration and the answers of an engine take precedence.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

from proxy.model import TemplateFacts, ToolOrder

_SWITCHES: Final = frozenset({"enable_thinking", "thinking"})
_UNUSED: Final = _SWITCHES | {"documents"}

_QWEN: Final = TemplateFacts(
    order=ToolOrder.SYSTEM_FIRST, ignores_reasoning=True, none_drops_tools=False, splits_systems=True
)
_THINKS_IN_TEXT: Final = TemplateFacts(  # the field is not known, only marks in the text are
    order=ToolOrder.SYSTEM_FIRST,
    ignores_reasoning=True,
    drops_thoughts=True,
    none_drops_tools=False,
    headless=_UNUSED,
    splits_systems=True,
)
_KEEPS_REASONING: Final = TemplateFacts(order=ToolOrder.SYSTEM_FIRST, none_drops_tools=False, splits_systems=True)
_GEMMA4: Final = TemplateFacts(
    order=ToolOrder.SYSTEM_FIRST, drops_reasoning=True, none_drops_tools=False, splits_systems=True
)
_QWEN3: Final = TemplateFacts(
    order=ToolOrder.SYSTEM_FIRST,
    drops_reasoning=True,
    drops_thoughts=True,
    none_drops_tools=False,
    headless=_UNUSED,
    splits_systems=True,
)
_GLM: Final = TemplateFacts(drops_reasoning=True, drops_thoughts=True, none_drops_tools=False, headless=_UNUSED)
_GLM_MARKED: Final = TemplateFacts(  # a switch is written into every user message
    drops_reasoning=True,
    drops_thoughts=True,
    none_drops_tools=False,
    headless=frozenset({"documents"}),
    late_arguments=_SWITCHES,
)
_DEEPSEEK: Final = TemplateFacts(
    order=ToolOrder.SYSTEM_FIRST,
    drops_reasoning=True,
    drops_thoughts=True,
    moves_system=True,
    none_drops_tools=False,
    headless=_UNUSED,
)
_DEEPSEEK_TEXT: Final = TemplateFacts(
    order=ToolOrder.SYSTEM_FIRST,
    ignores_reasoning=True,
    drops_thoughts=True,
    moves_system=True,
    none_drops_tools=False,
    headless=_UNUSED,
)
_LLAMA: Final = TemplateFacts(
    order=ToolOrder.SYSTEM_FIRST,
    ignores_reasoning=True,
    dated=True,
    none_drops_tools=False,
    splits_systems=True,
)
_MISTRAL: Final = TemplateFacts(order=ToolOrder.TOOLS_LAST, ignores_reasoning=True, none_drops_tools=False)
_MISTRAL_OLD: Final = TemplateFacts(
    order=ToolOrder.TOOLS_LAST, ignores_reasoning=True, none_drops_tools=False, system_last=True
)
_GPT_OSS: Final = TemplateFacts(
    order=ToolOrder.SYSTEM_FIRST, drops_reasoning=True, dated=True, none_drops_tools=False, splits_systems=True
)
_KIMI: Final = TemplateFacts(ignores_reasoning=True, none_drops_tools=False, headless=_UNUSED)
_TOOLS_FIRST: Final = TemplateFacts(none_drops_tools=False)

FAMILIES: Final = (
    ("*qwen3.5*", _GLM),
    ("*qwen3-coder*", _QWEN),
    ("*qwen3*", _QWEN3),
    ("*qwq*", _THINKS_IN_TEXT),
    ("*qwen*", _QWEN),
    ("*hermes*", _QWEN),
    ("*glm-4.5*", _GLM_MARKED),
    ("*glm-4.6*", _GLM_MARKED),
    ("*glm-4*", _GLM),
    ("*glm-5*", _GLM),
    ("*deepseek-v3.2*", _DEEPSEEK),
    ("*deepseek-v4*", _DEEPSEEK),
    ("*deepseek*", _DEEPSEEK_TEXT),
    ("*gpt-oss*", _GPT_OSS),
    ("*nemotron-nano-v2*", _THINKS_IN_TEXT),
    ("*nemotron*", _QWEN3),
    ("*llama-3*", _LLAMA),
    ("*llama3*", _LLAMA),
    ("*devstral*", _QWEN),
    ("*ministral-3*", _QWEN),
    ("*mistral-nemo*", _MISTRAL_OLD),
    ("*mistral-7b*", _MISTRAL_OLD),
    ("*mixtral*", _MISTRAL_OLD),
    ("*mistral*", _MISTRAL),
    ("*kimi-k3*", _TOOLS_FIRST),
    ("*kimi*", _KIMI),
    ("*command-*", _TOOLS_FIRST),
    ("*minimax-m1*", _QWEN),
    ("*minimax-m3*", _KEEPS_REASONING),
    ("*minimax-m*", _QWEN3),
    ("*gemma-4*", _GEMMA4),
    ("*gemma*", _QWEN),
    ("*granite*", _QWEN),
    ("*seed-oss*", _KEEPS_REASONING),
    ("*phi-4*", _QWEN),
    ("*mimo*", _QWEN),
    ("*lfm2*", _QWEN),
)
"""Patterns of model names in lower case; the first that matches counts."""


def family_facts(model: str) -> TemplateFacts | None:
    """Return the facts of the family that `model` (its served name or its own) belongs to, None if it is unknown."""
    name = model.lower()
    return next((facts for pattern, facts in FAMILIES if fnmatchcase(name, pattern)), None)

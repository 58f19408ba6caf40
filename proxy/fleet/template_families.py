"""Facts about the chat templates of known model families, as published with the models. Pure.

These are only defaults: the configuration and the answers of an engine take precedence.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

from proxy.model import TemplateFacts, ToolOrder

_SWITCHES: Final = frozenset({"enable_thinking", "thinking"})

_QWEN: Final = TemplateFacts(order=ToolOrder.SYSTEM_FIRST, ignores_reasoning=True, none_drops_tools=False)
_QWEN3: Final = TemplateFacts(
    order=ToolOrder.SYSTEM_FIRST,
    drops_reasoning=True,
    drops_thoughts=True,
    none_drops_tools=False,
    headless=_SWITCHES,
)
_GLM: Final = TemplateFacts(drops_reasoning=True, drops_thoughts=True, none_drops_tools=False, headless=_SWITCHES)
_DEEPSEEK: Final = TemplateFacts(
    order=ToolOrder.SYSTEM_FIRST,
    drops_reasoning=True,
    drops_thoughts=True,
    none_drops_tools=False,
    headless=_SWITCHES,
)
_LLAMA: Final = TemplateFacts(
    order=ToolOrder.SYSTEM_FIRST, ignores_reasoning=True, dated=True, none_drops_tools=False
)
_MISTRAL: Final = TemplateFacts(order=ToolOrder.TOOLS_LAST, ignores_reasoning=True, none_drops_tools=False)
_GPT_OSS: Final = TemplateFacts(
    order=ToolOrder.SYSTEM_FIRST, drops_reasoning=True, dated=True, none_drops_tools=False
)

FAMILIES: Final = (
    ("*qwen3*", _QWEN3),
    ("*qwq*", _QWEN3),
    ("*qwen*", _QWEN),
    ("*hermes*", _QWEN),
    ("*glm-4*", _GLM),
    ("*glm-5*", _GLM),
    ("*deepseek*", _DEEPSEEK),
    ("*gpt-oss*", _GPT_OSS),
    ("*llama-3*", _LLAMA),
    ("*llama3*", _LLAMA),
    ("*mistral*", _MISTRAL),
)
"""Patterns of model names in lower case; the first that matches counts."""


def family_facts(model: str) -> TemplateFacts | None:
    """Return the facts of the family that `model` (its served name or its own) belongs to, None if it is unknown."""
    name = model.lower()
    return next((facts for pattern, facts in FAMILIES if fnmatchcase(name, pattern)), None)

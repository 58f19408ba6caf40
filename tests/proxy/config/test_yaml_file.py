"""Reading YAML: the fast parser gives what the other one gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
import yaml

from proxy.config import yaml_file
from tests.support.operations import operations

PARTS = (
    *"ab:-[]{},#&*!|>'\"?%@`~\n\t\\",
    *(": ", ":\n", "\n  ", "\n- ", "- ", ", ", " #", "!!str ", "|\n  ", ">-\n ", "<<: *a", "&a ", "*a", "? "),
    *("\r\n", "\x85", "\u2028", "\ufeff", "\x7f", "\x00", "ä", "😀", "---\n", "...\n", "0123", "1:20", "null", "yes"),
    *("2026-13-01", ".inf", "a: {b: 1}\n", "c:\n  - d: 1\n    e: 2\n", "f: &x [1]\n", "g: *x\n", "h: 'i'\n"),
)
needs_libyaml = pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")


def outcome(text: str) -> Any:
    """The tree, or the message that a reader sees."""
    try:
        return repr(yaml_file._tree(text))  # noqa: SLF001 - the same is asked of both parsers
    except (yaml.YAMLError, ValueError) as error:
        return yaml_file._problem(error)  # noqa: SLF001


@needs_libyaml
@pytest.mark.parametrize("seed", range(4))
def test_both_parsers_give_the_same_trees_and_messages(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whatever is in the file: a restart with another build of PyYAML reads no other configuration."""
    chosen = random.Random(seed)
    texts = ["".join(chosen.choices(PARTS, k=chosen.randint(1, 9))) for _ in range(1500)]
    fast = [outcome(text) for text in texts]
    monkeypatch.setattr(yaml_file, "_FAST", None)
    for text, found in zip(texts, fast, strict=True):
        assert outcome(text) == found, text


@needs_libyaml
def test_a_large_file_is_parsed_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser in Python takes two seconds for five thousand clients, at the start and at each reload."""
    text = "clients:\n" + "".join(f"- name: client-{number}\n  key_sha256: {'0' * 64}\n" for number in range(200))
    work = operations(lambda: outcome(text))
    monkeypatch.setattr(yaml_file, "_FAST", None)
    assert operations(lambda: outcome(text)) > 4 * work


@pytest.mark.parametrize("text", ["[" * 3_000_000, "{a: " * 900_000, "- " * 2_000_000])
def test_a_deep_file_ends_no_process(text: str) -> None:
    """Libyaml's nodes are composed by recursion in C, where nothing but the stack's end would stop it."""
    with pytest.raises((yaml.YAMLError, RecursionError)):
        yaml_file._tree(text)  # noqa: SLF001 - a file of four megabytes

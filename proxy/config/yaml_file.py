"""Read a configuration file."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from proxy.config.files import read_at_most
from proxy.errors import ConfigError, shortened

_FILE_BYTES_AT_MOST = 4 * 1024 * 1024  # the file is read into memory
_READ_DIFFERENTLY = re.compile(r"[\t!?\ufeff]|[|>][-+\d]*#")  # by the two parsers: found by comparing them
_NESTING_AT_MOST = 50  # levels that libyaml's parser reads; the other one says what is wrong with a deeper file

_ADVICE = {
    "mapping values are not allowed": "; quote a value with a colon in it, and indent settings of one section alike",
    "'\\t'": "; indent with spaces, not with tabs",
    "cannot start any token": "; quote a value that begins with this character",
    "expected alphabetic or numeric character": "; quote a value that begins with `*` or `&`",
    "unexpected end of stream": "; a quote is not closed",
    "expected '<document start>'": "; write settings as `name: value`, indented below their section",
    "another document": "; a configuration is one document, without `---` lines",
    "undefined alias": "; quote a value that begins with `*`, or define the anchor before",
}
"""Advice, by a part of the YAML parser's message."""


class _UniqueKeys(SafeConstructor):
    """Also refuses a key given twice; by itself YAML's safe loader would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a name is expected here", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Loader(_UniqueKeys, yaml.SafeLoader):
    """PyYAML's parser in Python: its messages and positions are those that are shown."""


def _fast_loader() -> type[yaml.Loader] | None:
    """Return the same loader with libyaml's parser, eight times as fast; None if PyYAML was built without it."""
    parser = getattr(yaml, "CSafeLoader", None)
    if parser is None:
        return None

    class Fast(_UniqueKeys, parser):  # type: ignore[misc, valid-type]
        """It composes nodes by recursion in C, which nothing but this bounds."""

        depth = 0

        def descend_resolver(self, *_: object) -> None:
            self.depth += 1
            if self.depth > _NESTING_AT_MOST:
                raise yaml.YAMLError

        def ascend_resolver(self) -> None:
            self.depth -= 1

    return Fast


_FAST = _fast_loader()


def read(file: Path) -> dict[str, Any]:
    """Return the tree in `file`; an empty file is an empty tree.

    Raises:
        ConfigError: the file cannot be read, or is not a YAML mapping.
    """
    try:
        content = read_at_most(file, _FILE_BYTES_AT_MOST + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or type(error).__name__}") from None
    if len(content) > _FILE_BYTES_AT_MOST:
        raise ConfigError(f"{file} is larger than {_FILE_BYTES_AT_MOST} bytes")
    try:
        tree = _tree(content.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{file} is not YAML: {_problem(error)}") from None
    except RecursionError:
        raise ConfigError(f"{file} is nested too deeply") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("$: expected a mapping of settings", param="$")
    return tree


def _tree(text: str) -> Any:
    """Return what `text` contains. Raises yaml.YAMLError, ValueError and RecursionError."""
    if _FAST is not None and not _READ_DIFFERENTLY.search(text):
        with suppress(yaml.YAMLError, ValueError):  # the other loader's message has the words and places known here
            return yaml.load(text, Loader=_FAST)  # noqa: S506 - a subclass of the safe loader
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of the safe loader


def _problem(error: Exception) -> str:
    """Describe what is wrong and where, without YAML's quotation from the file, which may contain a secret."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"it contains the control character {error.character:#04x}"
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return "it contains a date or a number that does not exist"
    what = str(getattr(error, "problem", None) or type(error).__name__)
    advice = next((words for part, words in _ADVICE.items() if part in what), "")
    return f"{shortened(what)} (line {mark.line + 1}, column {mark.column + 1}){advice}"

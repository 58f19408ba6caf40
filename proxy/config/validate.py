"""Convert an untyped tree to the configuration's types, and find everything that is wrong in it at once. Pure.

Every problem is the path of a setting and a text that describes what is expected. No text repeats a value that could
be a secret.
"""

from __future__ import annotations

import difflib
import enum
import math
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

import msgspec

from proxy.config.schema import Config, Section, has_mark, make_secret, types_of

Problem = tuple[str, str]
"""The path of a setting, and what is wrong with it."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMG]i?B?|B)")
_UNITS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "ki": 1024, "Mi": 1024**2, "Gi": 1024**3}
_PATH_IN_MESSAGE = re.compile(r"(?P<text>.*) - at `(?:key` in `)?\$(?P<path>[^`]*)`", re.DOTALL)
SIZE_FORM = "expected a number of bytes such as 33554432, 32MB or 32MiB"

_NUL = "\0"
_TYPE = re.compile(r"`(\w+(?: \| \w+)*)`")
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "list": "a list",
    "object": "a mapping of settings",
    "dict": "a mapping of settings",
    "null": "nothing",
}
_FORMS = {
    "invalid RFC3339": "expected a date such as 2026-01-31",
    "invalid decimal": "expected an amount such as 1.25, without a currency",
}
"""Plain messages, by the beginning of msgspec's own."""

_LARGEST_ADVISED = 1e15  # no setting may be larger, and a float shows all digits of a smaller one

_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?(ms|s|sec|m|min|h|d)")
_DURATIONS = {"ms": 0.001, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}

_Section = TypeVar("_Section", bound=Section)


def convert(tree: Any, section: type[_Section]) -> _Section:
    """Return `tree` as a `section`; call it only if `problems` finds none."""
    return msgspec.convert(_with_sizes(tree, section), section, dec_hook=make_secret)


def problems(tree: Any, section: type[Section] = Config, path: str = "$") -> Iterator[Problem]:
    """Yield everything in `tree` that does not fit the types of `section`, in the order of the tree."""
    if not isinstance(tree, dict):
        yield path, _in_words_of_a_section(tree)
        return
    types = types_of(section)
    for name, value in tree.items():
        if name in types:
            yield from _field_problems(value, section, name, types[name], f"{path}.{name}")
        else:
            yield f"{path}.{name}", "there is no such setting" + near_miss(str(name), types)
    for name in _required(section):
        if name not in tree:
            yield path, f"the setting `{name}` is missing"


@cache
def _required(section: type[Section]) -> tuple[str, ...]:
    """Return the fields without a default. Finding them takes 0.3 ms, which a thousand replicas would need each."""
    return tuple(field.name for field in msgspec.structs.fields(section) if field.required)


def near_miss(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean ...?` if one of `known` resembles `name` or begins with it, else an empty text.

    A `prefix` that all names have is left out of the comparison, in which it would make all of them alike.
    """
    name = name.removeprefix(prefix)
    names = [each.removeprefix(prefix) for each in known]
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    found = found or [each for each in names if each.startswith(f"{name}_")]
    return f"; did you mean `{prefix}{found[0]}`?" if found else ""


def size_bytes(text: str) -> int | None:
    """Return the number of bytes of a size, or None if `text` is not one.

    >>> [size_bytes(text) for text in ("1024", "32MB", "1.5 GiB", "64k", "much")]
    [None, 32000000, 1610612736, 64000, None]
    """
    found = _SIZE.fullmatch(text)
    return round(float(found[1]) * _UNITS[found[2].removesuffix("B")]) if found else None


def _field_problems(value: Any, section: type[Section], name: str, annotation: Any, path: str) -> Iterator[Problem]:
    inner = _unmarked(annotation)
    if (nested := _section_in(inner)) is not None and not (value is None and nested is not inner):
        yield from problems(value, nested, path)
        return
    element = _element_section(inner)
    if element is not None and isinstance(value, list):
        inside = [found for at, each in enumerate(value) for found in problems(each, element, f"{path}[{at}]")]
        if inside:
            yield from inside
            return
        value = [_with_sizes(each, element) for each in value]
    if has_mark(section, name, "size") and isinstance(value, str):
        size = size_bytes(value)
        if size is None:
            yield path, SIZE_FORM
            return
        value = size
    if isinstance(value, list) and element is None and is_list(annotation):
        each_type = get_args(inner)[0]
        inside = [found for at, each in enumerate(value) for found in _wrong(each, each_type, f"{path}[{at}]")]
        if inside:
            yield from inside
            return
    yield from _wrong(value, annotation, path)


def _wrong(value: Any, annotation: Any, path: str) -> Iterator[Problem]:
    """Yield the problem of a value that contains no section, if it has one."""
    if isinstance(value, str) and _NUL in value:  # no path, host, name or key may contain one
        yield path, "contains a null character"
        return
    try:
        msgspec.convert(value, annotation, dec_hook=make_secret)
    except msgspec.ValidationError as error:
        yield path + _split(str(error))[0], explained(error, value, annotation)


def explained(error: msgspec.ValidationError, value: Any, annotation: Any) -> str:
    """Return what is wrong with `value`, which is not of the type `annotation`."""
    text = _split(str(error))[1]
    if is_list(annotation) and isinstance(value, list):  # the problem is one of its elements
        annotation = get_args(_unmarked(annotation))[0]
    return _enum_text(value, _unmarked(annotation)) or _form_text(text, annotation) or in_words(text, value)


def is_list(annotation: Any) -> bool:
    """Return whether a setting of this type is a list."""
    return get_origin(_unmarked(annotation)) is tuple


def _with_sizes(tree: Any, section: type[Section]) -> Any:
    """Return `tree` with every size written as a number."""
    if not isinstance(tree, dict):
        return tree
    types = types_of(section)
    return {
        name: _with_size(value, section, name, types[name]) if name in types else value
        for name, value in tree.items()
    }


def _with_size(value: Any, section: type[Section], name: str, annotation: Any) -> Any:
    inner = _unmarked(annotation)
    element = _element_section(inner)
    if isinstance(value, str) and has_mark(section, name, "size"):
        return size_bytes(value)
    if (nested := _section_in(inner)) is not None:
        return _with_sizes(value, nested)
    if element is not None and isinstance(value, list):
        return [_with_sizes(each, element) for each in value]
    return value


def _unmarked(annotation: Any) -> Any:
    """Return the type inside `Annotated`."""
    return getattr(annotation, "__origin__", annotation) if hasattr(annotation, "__metadata__") else annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _section_in(annotation: Any) -> type[Section] | None:
    """Return the section that a setting of this type is, or may be if it is not left out; None if it is none."""
    choices = () if get_origin(annotation) is tuple else get_args(annotation)
    return next((kind for kind in (annotation, *choices) if _is_section(kind)), None)


def _element_section(annotation: Any) -> type[Section] | None:
    """Return the section of which `annotation` is a tuple, or None."""
    if get_origin(annotation) is not tuple:
        return None
    element = get_args(annotation)[0]
    return element if _is_section(element) else None


def _enum_text(value: Any, annotation: Any) -> str | None:
    """Return a message for a value that an enum does not have; None if the type is not an enum."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
            values = [member.value for member in kind]
            return f"expected one of {', '.join(values)}" + (
                near_miss(value, values) if isinstance(value, str) else ""
            )
    return None


def _form_text(text: str, annotation: Any) -> str | None:
    """Return a description of the valid form in place of a regular expression, if the type has one."""
    if "matching regex" not in text:
        return None
    for part in (annotation, *get_args(annotation)):
        for meta in getattr(part, "__metadata__", ()):
            if form := (getattr(meta, "extra", None) or {}).get("form"):
                return f"expected {form}"
    return None


def in_words(text: str, value: Any) -> str:
    """Put msgspec's message in plain words, with advice if `value` suggests any.

    >>> in_words("expected `float`, got `str`", "5m")
    'expected a number, got text; durations are in seconds: 300'
    >>> in_words("expected `int`, got `null`", None)
    'expected a whole number, got nothing; give a value, or remove the line'
    >>> in_words("expected `int | null`, got `str`", "5e5")
    'expected a whole number, got text; write it as 500000'
    >>> in_words("expected `str`, got `bool`", False)
    'expected text, got true or false; put it in quotes'
    """
    for beginning, words in _FORMS.items():
        if text.startswith(beginning):
            return words
    named = _TYPE.sub(_type_in_words, text)
    if "got `null`" in text:
        return f"{named}; give a value, or remove the line"
    if isinstance(value, str) and "got `str`" in text:
        return named + _advice(text, value)
    if isinstance(value, int | float) and "expected `str" in text:  # YAML reads no, on and 0123 as other than text
        return f"{named}; put it in quotes"
    return named


def _type_in_words(found: re.Match[str]) -> str:
    """Return the name of a type, or of the types of a union. A setting that may be left out is a union with null."""
    names = found[1].split(" | ")
    wanted = [name for name in names if name != "null"] if len(names) > 1 else names
    return " or ".join(_TYPES.get(name, f"`{name}`") for name in wanted)


def _in_words_of_a_section(tree: Any) -> str:
    """Return what is wrong with something else in place of a section."""
    if tree is None:
        return "expected a mapping of settings, got nothing; give its settings, or remove the line"
    try:
        msgspec.convert(tree, dict)
    except msgspec.ValidationError as error:
        return in_words(_split(str(error))[1], None)
    return "expected a mapping of settings"


def _advice(text: str, value: str) -> str:
    """Return what to do about a text in place of a value of another type."""
    if "expected `bool" in text:
        return "; write true or false, without quotes"
    if "expected `array" in text:
        return "; write [a, b], or one `- ` a line"
    if found := _DURATION.fullmatch(value.strip()):
        return f"; durations are in seconds: {float(found[1]) * _DURATIONS[found[2]]:g}"
    if value.strip().isdigit():
        return "; remove the quotes"
    number = _number(value.strip())
    return f"; write it as {number}" if number else ""


def _number(text: str) -> str:
    """Return a number that YAML reads as text (`5e5`, `500k`, `500,000`) as it should be written; else ""."""
    size = size_bytes(text)
    try:
        number = float(text.replace(",", "")) if size is None else float(size)
    except ValueError:
        return ""
    if not math.isfinite(number) or abs(number) >= _LARGEST_ADVISED:
        return ""
    return str(int(number)) if number.is_integer() else repr(number)


def _split(message: str) -> tuple[str, str]:
    """Split msgspec's message into the path below the value that was converted, and the text."""
    match = _PATH_IN_MESSAGE.fullmatch(message)
    where, text = (match["path"], match["text"]) if match else ("", message)
    return where, text[:1].lower() + text[1:]

"""Settings from environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from proxy.config.schema import RETIRED, Config, Section, has_mark, make_secret
from proxy.config.validate import SIZE_FORM, Problem, explained, is_list, near_miss, size_bytes

SHORT_NAMES = {
    "CAIRN_HOST": ("server", "host"),
    "CAIRN_PORT": ("server", "port"),
    "CAIRN_WORKERS": ("server", "workers"),
    "CAIRN_OPEN": ("server", "open"),
    "CAIRN_ADMIN_HOST": ("admin", "host"),
    "CAIRN_ADMIN_PORT": ("admin", "port"),
    "CAIRN_ADMIN_TOKEN": ("admin", "token"),
    "CAIRN_REDIS": ("redis", "url"),
    "CAIRN_LOG_LEVEL": ("log", "level"),
}
OTHER_NAMES = frozenset({"CAIRN_CONFIG", "CAIRN_UPSTREAM"})
# a Kubernetes service named `cairn` adds these to every pod beside it, including CAIRN_PORT=tcp://10.0.0.1:80
_KUBERNETES_NAME = re.compile(r"CAIRN_(SERVICE_(HOST|PORT)|PORT_\d).*")

Path = tuple[str, str]


class FromEnvironment(NamedTuple):
    """Settings by section and field, problems by variable, and warnings."""

    values: dict[Path, object]
    problems: list[Problem]
    warnings: list[str]


def process_environment() -> dict[str, str]:
    """Return a copy of this process's environment."""
    return dict(os.environ)  # noqa: TID251 - the one place


def read(environ: Mapping[str, str]) -> FromEnvironment:
    """Return the settings that the variables CAIRN_... contain. Of one setting only one variable may be set."""
    found = FromEnvironment({}, [], [])
    named: dict[Path, str] = {}
    for name, text in sorted(environ.items()):
        if not name.startswith("CAIRN_") or name in OTHER_NAMES or _KUBERNETES_NAME.fullmatch(name):
            continue
        if name == "CAIRN_PORT" and "://" in text:
            found.warnings.append("CAIRN_PORT is a Kubernetes service link and is ignored; set CAIRN_SERVER__PORT")
        elif name in SHORT_NAMES or "__" in name:
            section, _, field = name.removeprefix("CAIRN_").lower().partition("__")
            path = SHORT_NAMES.get(name, (section, field))
            first = named.setdefault(path, name)
            if first != name:
                found.problems.append((name, f"{first} is set too and means the same; set one of them only"))
            _add(found, name, text, path)
        else:
            found.warnings.append(f"{name} is not a setting and is ignored{_meant(name)}")
    return found


def _meant(name: str) -> str:
    """Return what an unknown variable may mean, or "". Two underscores follow the name of a section."""
    for long_name in _all_names():
        if long_name.replace("__", "_") == name:
            return f"; did you mean `{long_name}`?"
    setting = name.removeprefix("CAIRN_").lower()
    if setting in Config.__struct_fields__:
        return f"; `{setting}` is set in the file"
    return near_miss(name, (*SHORT_NAMES, *OTHER_NAMES), prefix="CAIRN_")


def _add(found: FromEnvironment, name: str, text: str, path: Path) -> None:
    """Add the value of variable `name` as the type of the setting at `path`."""
    if path in RETIRED:
        found.warnings.append(f"{name} is ignored: {RETIRED[path]}")
        return
    section = {field.name: field.type for field in msgspec.structs.fields(Config)}.get(path[0])
    is_section = isinstance(section, type) and issubclass(section, Section)
    types = {field.name: field.type for field in msgspec.structs.fields(section)} if is_section else {}  # type: ignore[arg-type]
    if not is_section or path[1] not in types:
        found.problems.append((name, "there is no such setting" + near_miss(name, _all_names(), prefix="CAIRN_")))
        return
    value: object = text
    if not text.strip() and not is_list(types[path[1]]):
        found.problems.append((name, "is empty; give it a value, or remove the variable"))
        return
    if has_mark(section, path[1], "size"):  # type: ignore[arg-type]
        size = size_bytes(text)
        if size is None and not text.strip().removeprefix("-").isdigit():
            found.problems.append((name, SIZE_FORM))
            return
        value = text if size is None else size
    elif is_list(types[path[1]]):
        value = [part for part in re.split(r"[,\s]+", text) if part]
    try:
        found.values[path] = msgspec.convert(value, types[path[1]], strict=False, dec_hook=make_secret)
    except msgspec.ValidationError as error:
        found.problems.append((name, explained(error, value, types[path[1]])))


def _all_names() -> list[str]:
    """Return the long names of all settings that a variable can set."""
    names = []
    for top in msgspec.structs.fields(Config):
        if isinstance(top.type, type) and issubclass(top.type, Section):
            names += [f"CAIRN_{top.name}__{field.name}".upper() for field in msgspec.structs.fields(top.type)]
    return names

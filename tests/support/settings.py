"""Every setting of the schema, each with a configuration that differs from a base in it.

The settings are found by enumeration, so that no new one is forgotten. Only one whose values have a form of their
own, or that is valid only beside another one, needs an entry here.
"""

from __future__ import annotations

import copy
import datetime
import enum
import types
import typing
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import trustme
import yaml

from proxy.config.load import load
from proxy.config.schema import Config, Secret, Section, types_of

BASE: Mapping[str, Any] = {
    "redis": {"url": "redis://127.0.0.1:1"},
    "pools": [
        {
            "name": "own",
            "models": ["own-a", "own-*"],
            "template": {"order": "tools_first"},
            "replicas": [
                {"name": "r0", "url": "http://127.0.0.1:9", "key": "first-key", "capacity_tokens": 5_000},
                {"name": "r1", "url": "http://127.0.0.1:10", "key": "first-key"},
            ],
        },
        {
            "name": "cloud",
            "kind": "provider",
            "models": ["gpt-a"],
            "default": True,
            "replicas": [{"name": "r2", "url": "http://127.0.0.1:11", "key": "second-key"}],
        },
    ],
    "clients": [{"name": "alpha", "key_sha256": "1" * 64}, {"name": "beta", "key_sha256": "2" * 64}],
    "prices": [
        {"model": "own-a", "input": 1, "output": 2, "tiers": [{"above_prompt_tokens": 99, "input": 2, "output": 3}]}
    ],
}
"""A configuration with one of everything."""

_MORE = ("pools.1.kind", "pools.0.replicas.1.capacity_tokens")
"""Settings of further elements of a list; otherwise only those of the first are changed."""

_VALUES: Mapping[str, object] = {
    "key_sha256": "3" * 64,
    "models": ["own-b"],
    "engine_paths": ["/tokenize"],
    "allowed_paths": ["/v1/files"],
    "cors_origins": ["https://chat.example.com"],
    "retry_statuses": [500],
    "sample_ratio": 0.5,
    "url": "http://127.0.0.1:12",
    "api_url": "https://127.0.0.1:13",
    "endpoint": "http://127.0.0.1:14",
    "redis.url": "redis://127.0.0.1:2",
    "host": "127.0.0.2",
    "service_tier": "flex",
    "currency": "EUR",
    "url_env": "A_URL",
    "url_file": "url",
    "ca_file": "ca.pem",
}
"""Values by path or name, where none can be made from the type."""

_NO_TOKEN_PRICES = {f"prices.0.{name}": None for name in ("input", "output", "tiers")}
_BESIDE: Mapping[str, Mapping[str, object]] = {
    "redis.url_env": {"redis.url": None},
    "redis.url_file": {"redis.url": None},
    "pools.0.kind": {"pools.0.replicas.0.capacity_tokens": None},
    "pools.0.default": {"pools.1.default": None},
    "pools.0.replicas.0.selector": {"pools.0.replicas.0.url": "kubernetes+http://service:80"},
    "pools.0.replicas.0.key_env": {"pools.0.replicas.0.key": None},
    "pools.0.replicas.0.key_file": {"pools.0.replicas.0.key": None},
    "prices.0.usd_per_unit": {"prices.0.currency": "EUR"},
    "prices.0.usd_per_gpu_hour": _NO_TOKEN_PRICES,
    "prices.0.gpus_per_replica": {**_NO_TOKEN_PRICES, "prices.0.usd_per_gpu_hour": 1},
}
"""Further changes by the path of a setting; None removes a value."""


def paths() -> list[str]:
    """The path of every setting, as `pools.0.replicas.0.url`."""
    return [*_paths(Config, ""), *_MORE]


def base(folder: Path) -> Config:
    """The configuration in which one setting is changed at a time."""
    return _loaded(BASE, folder)


def changed(path: str, folder: Path, value: object = None) -> Config:
    """The same configuration with another value of the setting at `path`, which is found if none is given."""
    tree = copy.deepcopy(dict(BASE))
    name = path.rpartition(".")[2]
    if value is None:
        value = _VALUES.get(path, _VALUES.get(name))
    if value is None:
        value = _other(_type_at(path), at(base(folder), path))
    for each, wanted in {**_BESIDE.get(path, {}), path: value}.items():
        _put(tree, each, wanted)
    return _loaded(tree, folder)


def kinds(path: str) -> list[Any]:
    """The types of the setting at `path`."""
    return list(_kinds(_type_at(path)))


def at(config: Config, path: str) -> Any:
    """The value at `path`; None where a section on the way is missing."""
    found: Any = config
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part, None)
    return found


def _paths(section: type[Section], before: str) -> Iterator[str]:
    for name, annotation in types_of(section).items():
        inside, is_list = _section_in(annotation)
        if inside is None:
            yield before + name
        else:
            yield from _paths(inside, f"{before}{name}.{'0.' if is_list else ''}")


def _section_in(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section that a setting is, may be or is a list of, and whether it is a list."""
    for kind in _kinds(annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind, False
        if get_origin(kind) is tuple and (found := _section_in(get_args(kind)[0])[0]) is not None:
            return found, True
    return None, False


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types of a union, without what annotates them."""
    bare = getattr(annotation, "__origin__", annotation) if hasattr(annotation, "__metadata__") else annotation
    if isinstance(bare, types.UnionType) or get_origin(bare) is typing.Union:
        for each in get_args(bare):
            yield from _kinds(each)
    else:
        yield bare


def _type_at(path: str) -> Any:
    section: type[Section] = Config
    *sections, name = [part for part in path.split(".") if not part.isdigit()]
    for part in sections:
        inside, _ = _section_in(types_of(section)[part])
        assert inside is not None
        section = inside
    return types_of(section)[name]


def _other(annotation: Any, now: Any) -> object:
    """Another value than `now` of this type."""
    kind = next(each for each in _kinds(annotation) if each is not types.NoneType)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(str(member.value) for member in kind if member is not now)
    made: dict[Any, Any] = {
        bool: lambda: not now,
        int: lambda: (now or 2) + 5,
        float: lambda: (now or 3) / 2,
        Decimal: lambda: float(now or 3) + 1,
        datetime.date: lambda: datetime.date(2020, 1, 1),
        Secret: lambda: "a-new-secret",
        str: lambda: "A_SECRET",  # a name, a pattern, a variable and a file in one
    }
    make = made.get(kind, (lambda: ["other"]) if get_origin(kind) is tuple else None)
    assert make is not None, f"tests/support/settings.py has no value for {annotation}"
    return make()


def _put(tree: Any, path: str, value: object) -> None:
    *sections, name = path.split(".")
    for part in sections:
        tree = tree[int(part)] if part.isdigit() else tree.setdefault(part, {})
    if value is None:
        tree.pop(name, None)
    else:
        tree[name] = value


def _loaded(tree: Mapping[str, Any], folder: Path) -> Config:
    """Read `tree` as a file in `folder`, beside the files and variables that the values here name."""
    (folder / "A_SECRET").write_text("a-new-secret")
    (folder / "url").write_text("redis://127.0.0.1:2")
    (folder / "ca.pem").write_bytes(_certificate())
    file = folder / "cairn.yaml"
    file.write_text(yaml.safe_dump(tree).replace("ca.pem", str(folder / "ca.pem")))
    return load(file, {"A_SECRET": "a-new-secret", "A_URL": "redis://127.0.0.1:2"}).config


@cache
def _certificate() -> bytes:
    return trustme.CA().cert_pem.bytes()

"""Decide what a reload changes in a running Cairn, and what waits for a restart. Pure.

A field is changed only if the schema marks it `LIVE`; everything else was built into sockets, processes or objects
at the start.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from proxy.config.checks import exposure
from proxy.config.schema import Config, Section, has_mark
from proxy.errors import ConfigError


def taken_over(old: Config, new: Config, *, own_store: bool) -> tuple[Config, tuple[str, ...]]:
    """Return the configuration to continue with, and the paths of changes that need a restart.

    With `own_store` the URL of Redis is that of the private store, which no file contains.

    Raises:
        ConfigError: together with what waits for a restart, the new settings would let strangers in. A file that
            moves a port to loopback may have keys without clients; but the port stays open until the restart.
    """
    if own_store and new.redis.url is None:
        new = replace(new, redis=replace(new.redis, url=old.redis.url))
    waiting: list[str] = []
    for field in msgspec.structs.fields(Config):
        if has_mark(Config, field.name, "live"):
            continue
        was, wanted = getattr(old, field.name), getattr(new, field.name)
        kept = {name: getattr(was, name) for name in was.__struct_fields__ if not is_live(type(was), name)}
        waiting += [f"$.{field.name}.{name}" for name, value in kept.items() if value != getattr(wanted, name)]
        new = replace(new, **{field.name: replace(wanted, **kept)})
    if problems := [(path, f"{text}; restart to apply all changes") for path, text in exposure(new)]:
        raise ConfigError.of(problems)
    return new, tuple(waiting)


def is_live(section: type[Section], name: str) -> bool:
    """Return whether a reload changes this field."""
    return has_mark(section, name, "live")

"""What a reload changes in a running Cairn, and what stays as it is until a restart.

Pure. A setting that is not named here as live was built into sockets, processes or objects at the start, so that a
new one is never taken for live by mistake. It must not know how anything is taken over.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from proxy.config.schema import Config, Contexts, Queueing, Section


def _all_but(section: type[Section], *fixed: str) -> frozenset[str]:
    return frozenset(section.__struct_fields__) - {*fixed}


LIVE: Mapping[str, frozenset[str]] = {
    "server": frozenset({"open", "drain_accept_seconds", "drain_seconds"}),
    "admin": frozenset({"token", "token_env", "token_file"}),
    "redis": frozenset(),
    "tenants": frozenset(),
    "upstream": frozenset(),
    "routing": frozenset(),
    "queue": _all_but(Queueing),
    "contexts": _all_but(Contexts, "max_context_bytes"),
    "log": frozenset(),
}
"""By section. What stands beside the sections (pools, clients, tenancy, prices) is live as a whole."""


def taken_over(old: Config, new: Config, *, own_store: bool) -> tuple[Config, tuple[str, ...]]:
    """The configuration to go on with, and the paths of what is new and has to wait for a restart.

    With `own_store` the address of Redis is that of the private one, which no file names.
    """
    if own_store and new.redis.url is None:
        new = replace(new, redis=replace(new.redis, url=old.redis.url))
    waiting: list[str] = []
    for name, live in LIVE.items():
        was, wanted = getattr(old, name), getattr(new, name)
        kept = {field: getattr(was, field) for field in was.__struct_fields__ if field not in live}
        waiting += [f"$.{name}.{field}" for field, value in kept.items() if value != getattr(wanted, field)]
        new = replace(new, **{name: replace(wanted, **kept)})
    return new, tuple(waiting)

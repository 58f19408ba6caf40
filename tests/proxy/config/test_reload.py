"""The changes that a reload applies at once, and those that it reports as needing a restart."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from proxy.config.reload import is_live, taken_over
from proxy.config.schema import (
    Admin,
    Client,
    Config,
    Contexts,
    Pool,
    Queueing,
    Redis,
    Replica,
    Routing,
    Secret,
    SecretUrl,
    Section,
    Server,
    Tenancy,
    Upstream,
)
from proxy.errors import ConfigError
from tests.support import settings


def test_only_what_the_schema_marks_is_live() -> None:
    """A new setting is never taken for live by mistake."""
    live = {
        f"{top.name}.{field.name}"
        for top in msgspec.structs.fields(Config)
        if isinstance(top.type, type) and issubclass(top.type, Section)
        for field in msgspec.structs.fields(top.type)
        if is_live(top.type, field.name)
    }
    assert {name for name in live if not name.startswith(("admission.", "contexts.", "queue."))} == {
        "server.open",
        "server.drain_accept_seconds",
        "server.drain_seconds",
        "admin.token",
        "admin.token_env",
        "admin.token_file",
        "tenants.disclosure",
    }
    assert "contexts.max_context_bytes" not in live
    assert {"contexts.total_bytes", "queue.max_waiting"} <= live


@pytest.mark.parametrize("path", settings.paths())
def test_every_setting_is_taken_or_named_and_never_half(path: str, tmp_path: Path) -> None:
    """Nothing else changes with it. A secret that has another source is named with both."""
    old, new = settings.base(tmp_path), settings.changed(path, tmp_path)
    assert settings.at(new, path) != settings.at(old, path)
    taken, waiting = taken_over(old, new, own_store=False)
    if waiting:
        assert f"$.{path}" in waiting
        assert {each.removesuffix("_env").removesuffix("_file") for each in waiting} == {
            f"$.{path}".removesuffix("_env").removesuffix("_file")
        }
        assert taken == old
    else:
        assert taken == new


def test_what_is_live_is_taken_and_nothing_waits() -> None:
    """Pools, clients, tenancy, the queue's limits, the admin token, drains and all but one setting of contexts."""
    new = Config(
        pools=(Pool(name="p", replicas=(Replica("http://h"),)),),
        clients=(Client(name="c", key_sha256="0" * 64),),
        tenancy=Tenancy.ISOLATED,
        queue=Queueing(max_waiting=3),
        admin=Admin(token=Secret("t")),
        server=Server(drain_seconds=1),
        contexts=Contexts(total_bytes=1, warm_replicas=5, memory_bytes=7, grace_seconds=9),
    )
    assert taken_over(Config(), new, own_store=False) == (new, ())


def test_what_was_built_in_stays_and_is_named() -> None:
    """Each by its path, and no value of it."""
    old = Config(upstream=Upstream(max_retries=1))
    new = Config(
        server=Server(workers=3, drain_seconds=1),
        redis=Redis(url=SecretUrl("redis://:pw@h")),
        upstream=Upstream(max_retries=2, idle_seconds=7),
        routing=Routing(min_shareable_bytes=1),
        contexts=Contexts(max_context_bytes=2048, max_tags=1),
    )
    config, waiting = taken_over(old, new, own_store=False)
    assert config == replace(old, server=Server(drain_seconds=1), contexts=Contexts(max_tags=1))
    assert set(waiting) == {
        "$.server.workers",
        "$.redis.url",
        "$.upstream.max_retries",
        "$.upstream.idle_seconds",
        "$.routing.min_shareable_bytes",
        "$.contexts.max_context_bytes",
    }


def test_the_private_stores_address_is_no_setting() -> None:
    """Nobody wrote it, so nothing of it has changed; a Redis that is configured later has to wait."""
    old = Config(redis=Redis(url=SecretUrl("unix:///own"), folder="f"))
    assert taken_over(old, Config(redis=Redis(folder="f")), own_store=True) == (old, ())
    new = Config(redis=Redis(url=SecretUrl("redis://h"), folder="f"))
    assert taken_over(old, new, own_store=True) == (old, ("$.redis.url",))


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        (
            Config(server=Server(host="0.0.0.0")),
            Config(pools=(Pool(name="p", replicas=(Replica("http://h", key=Secret("k")),)),)),
            "$.server.host",
        ),
        (Config(admin=Admin(host="0.0.0.0", token=Secret("t"))), Config(), "$.admin.host"),
    ],
    ids=["keys", "token"],
)
def test_a_file_that_is_safe_only_after_a_restart_is_refused(old: Config, new: Config, path: str) -> None:
    """It moves a port to loopback, where no clients or token are needed; until a restart the port stays open."""
    with pytest.raises(ConfigError, match="restart to apply all changes") as refused:
        taken_over(old, new, own_store=False)
    assert [problem[0] for problem in refused.value.problems] == [path]

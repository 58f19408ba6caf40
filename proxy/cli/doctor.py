"""`cairn doctor`: check a configuration against the endpoints, Redis, the clock and the limits of this machine."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from cache import why_unsafe
from proxy.cli import exit_codes as exits
from proxy.cli.endpoint import ask, key_headers
from proxy.cli.terminal import print_sentence
from proxy.config.data_folder import can_be_made, nearest_existing
from proxy.errors import ConfigError
from proxy.patterns import matches_any

if TYPE_CHECKING:
    from proxy.config.schema import Config, Pool, Replica

_FILE = click.Path(path_type=Path, dir_okay=False)
_CLOCK_SECONDS = 5.0  # difference from Redis's clock that makes expiry times visibly wrong
_REDIS_SECONDS = 5.0
_FREE_BYTES = 1024**3
_WORDS = {True: "ok  ", None: "warn", False: "FAIL"}


class Finding(NamedTuple):
    """The result of one check: True is fine, None a warning, False a failure; the text includes what to do."""

    is_good: bool | None
    text: str


@click.command("doctor", short_help="Check a configuration, and say what to fix.")
@click.option("--config", "file", type=_FILE, help="The configuration file.  [env: CAIRN_CONFIG]")
def doctor(file: Path | None) -> None:
    """Check a configuration against the endpoints, Redis, the clock and file limits; exit 1 if a check fails."""
    from proxy.config.load import load, process_environment

    try:
        loaded = load(file, process_environment())
    except ConfigError as error:
        where = f"{file}: " if file is not None else ""
        exits.fail(*[where + line for line in error.lines] or [error.message], code=exits.MISUSED)
    has_failed = False
    findings = [Finding(None, warning) for warning in loaded.warnings]
    for found in (*findings, *check(loaded.config)):
        print_sentence(f"{_WORDS[found.is_good]}  {found.text}", indent="      ")
        has_failed = has_failed or found.is_good is False
    if has_failed:
        raise SystemExit(exits.FAILED)


def check(config: Config) -> Iterator[Finding]:
    """Yield the findings of all checks, one after another."""
    if not config.pools:
        yield Finding(False, "no pool is configured: give --upstream URL to cairn serve, or name pools in the file")
    for pool in config.pools:
        for replica in pool.replicas:
            yield from _replica(pool, replica, config)
    yield asyncio.run(_redis(config)) if config.redis.url is not None else _folder(config)
    yield from _ports(config)
    yield _descriptors(config)


def _replica(pool: Pool, replica: Replica, config: Config) -> Iterator[Finding]:
    name = f"replica {replica.label}"
    if replica.is_service:
        yield Finding(None, f"{name} is found through the Kubernetes API and is not checked here; see /readyz")
        return
    for url in _urls(replica):
        headers = {} if replica.key is None else key_headers(replica.key.reveal(), replica.auth, url)
        found = ask(url, headers, config.upstream.ca_file)
        if found.problem is not None:
            needs_client_key = replica.key is None and "refuses the key" in found.problem
            if needs_client_key:
                yield Finding(None, f"{name} needs a key, and none is configured: every client must send its own")
            else:
                yield Finding(False, f"{name} {found.problem}")
            continue
        served = [model for model in found.models if matches_any(model, pool.models)]
        if found.models and not served:
            listed = ", ".join(found.models[:5])
            yield Finding(False, f"{name} serves {listed}, none of which matches the models of pool {pool.name}")
            continue
        what = f" ({found.engine})" if found.engine else ""
        yield Finding(True, f"{name} answers{what}: {', '.join(served[:5]) or 'no model is listed'}")
    if replica.is_followed and not list(_urls(replica)):
        yield Finding(False, f"{name}: the name does not resolve; check it, and the resolver of this machine")


def _urls(replica: Replica) -> Iterator[str]:
    """Yield the URL, or those at each address of a followed name."""
    if not replica.is_followed:
        yield replica.url
        return
    host, _, rest = replica.url.partition("://")[2].partition(":")
    port, slash, path = rest.partition("/")
    try:
        found = socket.getaddrinfo(host, int(port or 80), type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return
    for address in sorted({str(each[4][0]) for each in found}):
        shown = f"[{address}]" if ":" in address else address
        yield f"http://{shown}:{port or 80}{slash}{path}"


async def _redis(config: Config) -> Finding:
    from cache import CacheError, open_store
    from proxy.clock import SystemClock
    from proxy.tasks import Tasks

    assert config.redis.url is not None  # noqa: S101 - the caller checked
    tasks, clock = Tasks(), SystemClock()
    store = open_store(config.redis.url.reveal(), clock=clock, tasks=tasks, limit_seconds=_REDIS_SECONDS)
    try:
        await store.start()
        started_seconds = clock.monotonic()
        seconds, _ = await store.execute("TIME")
        took_seconds = clock.monotonic() - started_seconds
    except CacheError as error:
        return Finding(False, f"redis does not answer: {error}; check redis.url, its password and the network")
    finally:
        await store.close()
        await tasks.close()
    off_seconds = abs(int(seconds) - clock.unix())
    if off_seconds > _CLOCK_SECONDS:
        return Finding(
            None, f"this machine's clock is {off_seconds:.0f} s off that of Redis; synchronise both by NTP"
        )
    if took_seconds > config.redis.operation_seconds:
        text = f"redis took {took_seconds * 1e3:.0f} ms, longer than redis.operation_seconds allows; raise that"
        return Finding(None, text)
    return Finding(True, f"redis answers in {took_seconds * 1e3:.1f} ms, and the clocks agree")


def _folder(config: Config) -> Finding:
    """Check the folder of the private Valkey."""
    folder = Path(config.redis.folder or ".")
    existing = nearest_existing(folder)
    if not can_be_made(folder):
        return Finding(False, f"{existing} is not writable, so the private Valkey cannot start; set redis.folder")
    if problem := why_unsafe(folder):
        return Finding(
            False, f"{problem}, so the private Valkey does not use {folder}; remove that, or set redis.folder"
        )
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < max(_FREE_BYTES, 2 * config.redis.max_memory_bytes):
        return Finding(None, f"{existing} has only {free_bytes // 1024**2} MiB free for the private Valkey")
    return Finding(True, f"no Redis is configured: a private Valkey keeps its files in {folder}")


def _ports(config: Config) -> Iterator[Finding]:
    for name, host, port in (
        ("server", config.server.host, config.server.port),
        ("admin", config.admin.host, config.admin.port),
    ):
        try:
            with socket.create_server(
                (host.strip("[]"), port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
            ):
                yield Finding(True, f"{name} port {port} is free")
        except (OSError, UnicodeError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                yield Finding(None, f"{name} port {port} on {host} is in use; fine if this Cairn is running")
                continue
            why = "not a host name" if isinstance(error, UnicodeError) else _reason(error)
            yield Finding(False, f"cannot listen on {host} port {port}: {why}; check {name}.host and {name}.port")


def _reason(error: OSError) -> str:
    """Return the system's words; those of `create_server` repeat the address."""
    number = error.errno or 0
    return os.strerror(number) if number > 0 else str(error.strerror).partition(" (while")[0]


def _descriptors(config: Config) -> Finding:
    """Check the limit of open files: each client connection needs one, and so does its request to a replica."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    needed = 2 * config.server.max_connections + 256
    if hard != resource.RLIM_INFINITY and hard < needed:
        text = (
            f"open files are limited to {hard:,}, and {config.server.max_connections:,} connections need {needed:,}"
        )
        return Finding(None, f"{text}: raise the limit (LimitNOFILE, ulimit -n), or lower server.max_connections")
    return Finding(True, "the limit of open files is high enough")

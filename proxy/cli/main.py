"""The commands and their exit codes: 0 success, 1 failure, 2 a mistake in the configuration or on the command line.

A user's mistake is reported in a line on standard error, without a traceback. A command imports what it needs when it
runs, so that `cairn --version` does not wait for a web server to load.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from proxy.cli import exit_codes as exits
from proxy.cli.config import config
from proxy.cli.contexts import contexts
from proxy.cli.doctor import doctor
from proxy.cli.init import init
from proxy.cli.prices import prices
from proxy.cli.savings import savings
from proxy.cli.top import top
from proxy.errors import CairnError, ConfigError
from proxy.version import own_version

if TYPE_CHECKING:
    from proxy.config.load import Config, Loaded
    from proxy.supervisor.supervisor import Parts

_FILE = click.Path(path_type=Path, dir_okay=False)
_PORT = click.IntRange(0, 65_535)
_EPILOG = """\b
Examples:
  cairn serve --upstream http://10.0.0.7:8000 --upstream http://10.0.0.8:8000
  cairn serve --config cairn.yaml --workers 4 --redis redis://cache:6379
  cairn check-config cairn.yaml

A flag beats the environment (CAIRN_HOST, CAIRN_PORT, CAIRN_ADMIN_PORT, CAIRN_UPSTREAM, CAIRN_REDIS, CAIRN_WORKERS,
CAIRN_CONFIG, and CAIRN_SECTION__SETTING for any other, such as CAIRN_SERVER__DRAIN_SECONDS), which beats the file.
"""


def data_path() -> str:
    """Return whether the data path was compiled when Cairn was installed: `compiled` or `interpreted`."""
    spec = find_spec("proxy.pipeline.pipeline")
    is_compiled = spec is not None and spec.origin is not None and spec.origin.endswith(tuple(EXTENSION_SUFFIXES))
    return "compiled" if is_compiled else "interpreted"


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(own_version(), prog_name="cairn", message=f"%(prog)s %(version)s ({data_path()})")
def cli() -> None:
    """Cairn sends each prompt to the replica that has its prefix cached, and shows what that saves."""
    # commands report failures themselves; without a handler, Python writes warnings to standard error as well
    logging.getLogger("cairn").addHandler(logging.NullHandler())


@cli.command(epilog=_EPILOG, short_help="Serve one or more upstreams.")
@click.option("--config", "file", type=_FILE, help="The configuration file.  [env: CAIRN_CONFIG]")
@click.option("--host", help="Address to serve on.  [default: 127.0.0.1]")
@click.option("--port", type=_PORT, help="Port to serve on.  [default: 8080]")
@click.option("--admin-port", type=_PORT, help="Port of health, readiness and metrics.  [default: 8090]")
@click.option(
    "--upstream",
    "upstreams",
    multiple=True,
    metavar="URL",
    help="URL of a replica, with or without /v1. Several make one pool, which replaces those of the file. "
    "An https URL with a public name counts as a provider, all others as engines.",
)
@click.option(
    "--redis", metavar="URL", help="Redis that all proxies share. Without it Cairn starts a private Valkey."
)
@click.option("--workers", type=click.IntRange(1, 256), help="Number of worker processes.  [default: 1]")
@click.option(
    "--open",
    "is_open",
    is_flag=True,
    default=None,
    help="Allow anyone who reaches the port to use the replicas' keys.",
)
def serve(
    file: Path | None,
    host: str | None,
    port: int | None,
    admin_port: int | None,
    upstreams: tuple[str, ...],
    redis: str | None,
    workers: int | None,
    is_open: bool | None,
) -> None:
    """Serve one or more upstreams until Ctrl-C or SIGTERM; a second one ends it at once.

    SIGHUP reloads the configuration.
    """
    from proxy.config.load import SecretUrl, load, process_environment

    environ = process_environment()
    if file is None and environ.get("CAIRN_CONFIG"):
        file = Path(environ["CAIRN_CONFIG"])
    flags: dict[tuple[str, str], object] = {
        ("server", "host"): host,
        ("server", "port"): port,
        ("server", "workers"): workers,
        ("server", "open"): is_open,
        ("admin", "port"): admin_port,
        ("redis", "url"): SecretUrl(redis) if redis is not None else None,
    }

    def read() -> Loaded:
        loaded = load(file, environ, flags, upstreams)
        if not loaded.config.pools:
            raise ConfigError("nothing to serve: give --upstream URL, or a file with pools by --config")
        return loaded

    try:
        loaded = read()
    except ConfigError as error:
        _fail(error, exits.MISUSED, file)
    for warning in loaded.warnings:
        click.echo(f"cairn: {warning}", err=True)
    sys.exit(_supervise(loaded.config, environ, read, file))


def _supervise(config: Config, environ: Mapping[str, str], read: Callable[[], Loaded], file: Path | None) -> int:
    from proxy import logs
    from proxy.config.load import secrets_of
    from proxy.supervisor.supervisor import Supervisor

    log = logs.set_up(config.log.level.value, secrets_of(config))

    def read_again() -> Loaded:
        loaded = read()
        log.redact(secrets_of(loaded.config))  # before anything can log them
        return loaded

    async def run() -> int:
        return await Supervisor(config, _parts(config, environ, read_again, file)).run()

    try:
        return asyncio.run(run())
    except CairnError as error:
        _fail(error, code=exits.FAILED)
    finally:
        log.stop()


def _parts(config: Config, environ: Mapping[str, str], read: Callable[[], Loaded], file: Path | None) -> Parts:
    from cache import EmbeddedError, EmbeddedValkey
    from proxy.clock import SystemClock
    from proxy.config.load import worker_environment
    from proxy.supervisor.supervisor import Parts

    clock = SystemClock()
    return Parts(
        worker_command=(sys.executable, "-P", "-m", "proxy", "worker"),
        environment=worker_environment(config, environ) | _import_path(environ),
        reload=read,
        private_store=lambda folder, size_bytes: EmbeddedValkey(folder, clock=clock, max_memory_bytes=size_bytes),
        store_errors=(EmbeddedError,),
        clock=clock,
        version=own_version(),
        started=lambda *addresses: _report_started(environ, *addresses),
        file=file,
    )


def _import_path(environ: Mapping[str, str]) -> dict[str, str]:
    """Return a variable that lets a worker find the packages of a checkout, which `-P` keeps off its path."""
    root = Path(__file__).resolve().parents[2]
    if root.name in ("site-packages", "dist-packages"):
        return {}
    return {"PYTHONPATH": ":".join(filter(None, (environ.get("PYTHONPATH"), str(root))))}


def _report_started(environ: Mapping[str, str], address: str, admin_address: str) -> None:
    from proxy.supervisor.service_manager import READY, notify

    notify(environ.get("NOTIFY_SOCKET"), READY)
    with suppress(OSError):  # standard error may be a pipe that nobody reads, or a file on a full disk
        click.echo(f"cairn: serving on {address}/v1, admin on {admin_address}", err=True)


@cli.command("check-config", short_help="Print the complete configuration of FILE.")
@click.argument("file", type=_FILE)
def check_config(file: Path) -> None:
    """Print the complete configuration of FILE and the environment, with secrets as ***; exit 2 if it is invalid."""
    from proxy.config.load import as_yaml, load, process_environment

    try:
        loaded = load(file, process_environment())
    except ConfigError as error:
        _fail(error, exits.MISUSED, file)
    for warning in loaded.warnings:
        click.echo(f"cairn: {warning}", err=True)
    click.echo(as_yaml(loaded.config), nl=False)


cli.add_command(config)
cli.add_command(contexts)
cli.add_command(doctor)
cli.add_command(init)
cli.add_command(prices)
cli.add_command(savings)
cli.add_command(top)


@cli.command(hidden=True)
@click.option("--control", type=int, required=True)
@click.option("--listen", required=True)
@click.option("--parent", type=int, required=True)
@click.option("--handover", type=int)
def worker(control: int, listen: str, parent: int, handover: int | None) -> None:
    """Run one worker. Only the supervisor starts it."""
    from importlib import import_module

    from proxy.worker.process import run

    run_worker = import_module("proxy.worker.lifecycle").run_worker
    sys.exit(run(control, [int(descriptor) for descriptor in listen.split(",")], parent, run_worker, handover))


def _fail(error: CairnError, code: int, file: Path | None = None) -> NoReturn:
    """Print one line per problem, and exit."""
    lines = error.lines if isinstance(error, ConfigError) else ()
    where = "" if file is None else f"{file}: "
    exits.fail(*[where + line if line.startswith("$") else line for line in lines or [error.message]], code=code)

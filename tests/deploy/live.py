"""A real Prometheus, started from deploy/'s files, that scrapes a real `cairn serve` under a little traffic."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.queries import DEPLOY, PROMETHEUS
from tests.support.openai_upstream import Failure, OpenAIUpstream
from tests.support.valkey import free_port

ROOT = DEPLOY.parent
TOKEN = "for-this-test"
LIMIT_SECONDS = 60.0  # bounds the time of a failure
SCRAPE_INTERVAL = "300ms"  # in place of 15 s, so that rates exist within seconds
BATCHES = 3
PIECES = ("stone upon stone " * 500,) * 30  # more than a socket takes at once, so that there is a time between tokens
DOCUMENT = "A cairn is a pile of stones that marks a path for those who come after. " * 120


@dataclass
class Scripted:
    """Upstreams in a separate loop and thread."""

    engines: tuple[OpenAIUpstream, OpenAIUpstream]
    provider: OpenAIUpstream

    @property
    def all(self) -> tuple[OpenAIUpstream, ...]:
        """Each of them."""
        return (*self.engines, self.provider)

    def fail(self, *failures: Failure) -> None:
        """The next behaviour of the engines; empty: serve."""
        for engine in self.engines:
            engine.failures[:] = failures


@contextlib.contextmanager
def scripted_upstreams() -> Iterator[Scripted]:
    """Two engines and a provider."""
    upstreams = Scripted(
        (OpenAIUpstream(pieces=PIECES), OpenAIUpstream(pieces=PIECES)),
        OpenAIUpstream(models=("gpt-4o", "unheard-of"), pieces=PIECES),
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def wait(step: Callable[[OpenAIUpstream], Any]) -> None:
        for upstream in upstreams.all:
            asyncio.run_coroutine_threadsafe(step(upstream), loop).result(LIMIT_SECONDS)

    try:
        wait(lambda upstream: upstream.__aenter__())
        yield upstreams
        wait(lambda upstream: upstream.__aexit__())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(LIMIT_SECONDS)
        loop.close()


@dataclass
class Run:
    """The parts that the tests examine."""

    prometheus: str
    cairn: str
    admin: str
    asked: int = 0
    scrape: str = ""
    folder: Path = field(default_factory=Path)

    def api(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of Prometheus's API."""
        url = f"{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with contextlib.closing(_open(url)) as answer:
            return json.load(answer)["data"]

    def query(self, query: str) -> list[Any]:
        """An instant query's rows."""
        found = self.api("query", query=query)
        assert found["resultType"] == "vector", query
        return list(found["result"])

    def scrapes(self) -> float:
        """How often Cairn was scraped well."""
        rows = self.query('sum_over_time(up{job="cairn"}[5m])')
        return float(rows[0]["value"][1]) if rows else 0.0

    def counted(self) -> float:
        """Requests that Prometheus knows of."""
        rows = self.query("sum(cairn_requests_total)")
        return float(rows[0]["value"][1]) if rows else 0.0

    def wait_for_scrapes(self, more: int) -> None:
        """Wait until this many more are there."""
        wanted = self.scrapes() + more
        _until(lambda: self.scrapes() >= wanted, "scrapes")


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Run]:
    """Cairn and Prometheus after some traffic; both end with the block."""
    with contextlib.ExitStack() as stack:
        upstreams = stack.enter_context(scripted_upstreams())
        (folder / "token").write_text(TOKEN)
        address, admin = stack.enter_context(_cairn(folder, upstreams))
        prometheus = stack.enter_context(_prometheus(folder, admin))
        run = Run(prometheus, address, admin, folder=folder)
        run.wait_for_scrapes(1)
        for number in range(BATCHES):
            run.asked += _traffic(address, upstreams, number)
            run.wait_for_scrapes(2)
        _until(lambda: run.counted() >= run.asked, "the last counts")  # workers report four times a second
        with contextlib.closing(_open(f"{admin}/metrics", TOKEN)) as answer:
            run.scrape = answer.read().decode()
        yield run


def cairn_config(folder: Path, upstreams: Scripted) -> dict[str, Any]:
    """deploy/cairn.yaml with this machine's addresses, a Valkey of its own, and replicas small enough to evict."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "cairn.yaml").read_text())
    config["server"] |= {"host": "127.0.0.1", "port": 0, "drain_accept_seconds": 0}
    config["admin"] |= {"host": "127.0.0.1", "port": 0, "token_file": str(folder / "token")}
    config["redis"] = {"folder": str(folder / "valkey")}
    config["upstream"] = {"backoff_seconds": 0.05, "backoff_max_seconds": 0.1}
    engines = config["pools"][0]
    engines["models"] = ["test-model"]
    for replica, engine in zip(engines["replicas"], upstreams.engines, strict=True):
        replica |= {"url": engine.url, "capacity_tokens": 3000, "prefill_tokens_per_second": 4000}
    provider = {"name": "provider", "kind": "provider", "models": list(upstreams.provider.models)}
    config["pools"].append({**provider, "replicas": [{"name": "provider", "url": upstreams.provider.url}]})
    config["prices"].append({"model": "gpt-4o", "input": "2.5", "cached_read": "1.25", "output": "10"})
    return config


@contextlib.contextmanager
def _cairn(folder: Path, upstreams: Scripted) -> Iterator[tuple[str, str]]:
    file = folder / "cairn.yaml"
    file.write_text(yaml.safe_dump(cairn_config(folder, upstreams)))
    with _process(folder / "cairn.log", sys.executable, "-m", "proxy", "serve", "--config", str(file)) as log:

        def addresses() -> re.Match[str] | None:
            return re.search(r"serving on (\S+)/v1, admin on (\S+)", log.read_text())

        _until(addresses, "the proxy", log)
        found = addresses()
        assert found is not None
        yield found[1], found[2]


@contextlib.contextmanager
def _prometheus(folder: Path, admin: str) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    shutil.copy(PROMETHEUS / "alerts.yml", folder)
    text = (PROMETHEUS / "prometheus.yml").read_text()
    for old, new in (
        ("cairn:8090", admin.removeprefix("http://")),
        ("localhost:9090", address),
        ("/run/secrets/cairn_admin_token", str(folder / "token")),
        ("interval: 15s", f"interval: {SCRAPE_INTERVAL}"),
        ("scrape_timeout: 5s", f"scrape_timeout: {SCRAPE_INTERVAL}"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "prometheus.yml").write_text(text)
    flags = (
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    )
    with _process(folder / "prometheus.log", "prometheus", *flags) as log:
        _until(lambda: _answers(f"http://{address}/-/ready"), "Prometheus", log)
        yield f"http://{address}"


@contextlib.contextmanager
def _process(log: Path, *command: str) -> Iterator[Path]:
    """A process that writes to `log` and is ended with the block."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=dict(os.environ),  # noqa: TID251
        )
    try:
        yield log
    finally:
        process.terminate()
        try:
            process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(LIMIT_SECONDS)


def _traffic(address: str, upstreams: Scripted, batch: int) -> int:
    """Requests of every kind that a panel shows; how many."""
    chat, texts = "/v1/chat/completions", [f"{batch}/{number}" for number in range(3)]
    engine, provider = "test-model", "gpt-4o"
    for text in texts:
        _ask(address, chat, _body(engine, text, stream=True))
        _ask(address, chat, _body(engine, text, stream=False))
        _ask(address, chat, _body(provider, text, stream=True))
    _ask(address, chat, _body(engine, "another document " * 600 + str(batch), stream=False))  # evicts
    _ask(address, chat, _body("unheard-of", "without a price", stream=False))
    _ask(address, chat, b"{not JSON")
    reset = Failure(cut_after_chunks=0)  # twice: the first, on a connection that had been idle, is no retry yet
    for failures in ((reset, reset), (Failure(status=500),), (Failure(cut_after_chunks=2),)):
        upstreams.fail(*failures)
        _ask(address, chat, _body(engine, "failing", stream=True))
    upstreams.fail()
    return 3 * len(texts) + 6


def _body(model: str, text: str, *, stream: bool) -> bytes:
    messages = [{"role": "system", "content": DOCUMENT}, {"role": "user", "content": text}]
    return json.dumps({"model": model, "stream": stream, "messages": messages}).encode()


def _ask(address: str, path: str, body: bytes) -> None:
    parts = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=LIMIT_SECONDS)
    try:
        connection.request("POST", path, body, {"content-type": "application/json"})
        with contextlib.suppress(http.client.HTTPException, OSError):  # an answer that is broken off is meant to be
            connection.getresponse().read()
    finally:
        connection.close()


def _open(url: str, token: str | None = None) -> http.client.HTTPResponse:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - loopback
    answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=LIMIT_SECONDS)  # noqa: S310
    return answer


def _answers(url: str) -> bool:
    try:
        _open(url).close()
    except OSError:
        return False
    return True


def _until(holds: Callable[[], object], what: str, log: Path | None = None) -> None:
    """Ask again and again: other processes have no event to wait for."""
    end = time.monotonic() + LIMIT_SECONDS  # noqa: TID251
    while not holds():
        assert time.monotonic() < end, f"{what} did not come: {log.read_text()[-2000:] if log else ''}"  # noqa: TID251
        time.sleep(0.03)

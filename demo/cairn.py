"""Start Cairn for the demo: its configuration, its command, waiting until it is ready, and the hints to print."""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from demo.processes import Child, StartFailed, python
from demo.shapes import SLOT_TOKENS, SLOTS
from proxy.clock import Clock

READY_SECONDS = 30.0  # for Valkey and the workers; usually one second
POLL_SECONDS = 0.05


def configuration(state: Path, engines: list[str]) -> dict[str, Any]:
    """Return the settings that differ from the defaults, for the engines at these URLs if there are any.

    No load balancer needs time to notice the end of this Cairn, so it drains at once. In front of local engines the
    store is in `state`, whose content `start` deletes: new engines have empty caches.
    """
    config: dict[str, Any] = {"server": {"drain_accept_seconds": 0, "drain_seconds": 5}}
    if engines:
        replicas = [
            {"name": f"replica-{number}", "url": url, "capacity_tokens": SLOTS * SLOT_TOKENS}
            for number, url in enumerate(engines, start=1)
        ]
        config["pools"] = [{"name": "demo", "replicas": replicas}]
        config["redis"] = {"folder": str(state / "valkey")}
    return config


def start(options: argparse.Namespace, state: Path, logs: Path, engines: list[str], upstreams: list[str]) -> Child:
    """Start `cairn serve` in front of the engines, or of the upstreams; it ends with this process."""
    if engines:
        shutil.rmtree(state / "valkey", ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    written = state / "demo.yaml"  # JSON is YAML
    written.write_text(json.dumps(configuration(state, engines), indent=2) + "\n", encoding="utf-8")
    command = python("demo.tether", *python("proxy", "serve", "--config", str(written)))
    command += ["--host", options.host, "--port", str(options.port), "--admin-port", str(options.admin_port)]
    for url in upstreams:
        command += ["--upstream", url]
    return Child("Cairn", command, logs / "cairn.log")


def wait_until_ready(child: Child, admin_url: str, clock: Clock) -> None:
    """Return when /readyz of the admin port answers 200. Raises `StartFailed` if it does not in time."""
    pause = threading.Event()
    until_seconds = clock.monotonic() + READY_SECONDS
    while not _is_ready(admin_url):
        if not child.running:
            raise StartFailed(child.report("did not start"))
        if clock.monotonic() > until_seconds:
            raise StartFailed(child.report(f"was not ready within {READY_SECONDS:.0f} s"))
        pause.wait(POLL_SECONDS)


def _is_ready(admin_url: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(admin_url).netloc, timeout=1)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def local_hint(address: str, model: str) -> str:
    """Explain the local model and give a command to try."""
    return (
        "The local model has random weights, so its text makes no sense; its caching and these times are real.\n\n"
        f"Try it:\n{_curl(address, model)}"
    )


def upstream_hint(address: str, upstreams: list[str]) -> str:
    """Give a command to try with the user's upstreams, to which only health checks were sent."""
    key = '-H "Authorization: Bearer $OPENAI_API_KEY"'
    return (
        f"Cairn forwards to {', '.join(upstreams)}, and has only checked their health so far.\n\n"
        f"Try it, with a model that is served there, and a key if it needs one:\n{_curl(address, 'MODEL', key)}"
    )


def addresses(address: str, admin_address: str, logs: Path) -> str:
    """List the addresses and the logs, and say how to stop."""
    return (
        f"\nAPI base URL       {address}/v1\n"
        f"Status page        {admin_address}/\n"
        f"Metrics            {admin_address}/metrics\n"
        f"Logs               {logs}\n\n"
        "Serving. Ctrl-C stops everything."
    )


def _curl(address: str, model: str, *options: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16})
    return " ".join(
        [
            "  curl -i",
            f"{address}/v1/chat/completions",
            *options,
            "-H 'Content-Type: application/json'",
            f"-d '{body}'",
        ]
    )

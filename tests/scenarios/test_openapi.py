"""Requests made up from the OpenAPI documents by schemathesis: no 500, and answers as the documents say.

`--openapi-examples 200` asks more of each operation than a run of all tests has time for, its boundary cases too.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from tests.support.served import Served, served

KEY = "sk-openapi"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "ignored_auth",
)
FEW_EXAMPLES = 2  # as many as a run of all tests has time for
RUN_SECONDS = 600


@pytest.mark.timeout(RUN_SECONDS)
async def test_the_client_port_answers_as_its_document_says(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Before an upstream that takes what is JSON and refuses the rest."""
    async with _lenient_upstream() as upstream, _cairn(tmp_path, upstream) as cairn:
        document = f"{cairn.admin}/openapi/client.json"
        await _schemathesis(tmp_path, pytestconfig, document, cairn.url.removesuffix("/v1"))


@pytest.mark.timeout(RUN_SECONDS)
async def test_the_admin_port_answers_as_its_document_says(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Without the stream of the status page, which has no end."""
    async with _lenient_upstream() as upstream, _cairn(tmp_path, upstream) as cairn:
        document = f"{cairn.admin}/openapi/admin.json"
        await _schemathesis(tmp_path, pytestconfig, document, cairn.admin, "--exclude-path", "/events")


async def _schemathesis(folder: Path, config: pytest.Config, document: str, url: str, *options: str) -> None:
    examples = config.getoption("--openapi-examples")
    phases = "examples,fuzzing" if examples <= FEW_EXAMPLES else "examples,coverage,fuzzing"
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")), "run", document, "--url", url,
        "--header", f"Authorization: Bearer {KEY}",
        "--checks", ",".join(CHECKS),
        "--phases", phases,
        "--max-examples", str(examples),
        "--mode", "all",
        "--generation-database", "none",
        "--seed", "1",
        "--request-timeout", "20",
        "--warnings", "off",
        "--continue-on-failure",
        "--no-color",
        *options,
        cwd=folder,  # it leaves a cache of what failed
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-6000:]


@asynccontextmanager
async def _cairn(folder: Path, upstream: str) -> AsyncIterator[Served]:
    """One that knows one client, whose key the admin port takes for its token."""
    config = {
        "admin": {"token": KEY},
        "clients": [{"name": "tester", "key_sha256": sha256(KEY.encode()).hexdigest()}],
        "pools": [{"name": "engines", "replicas": [{"url": upstream}]}],
    }
    path = folder / "cairn.yaml"
    path.write_text(yaml.safe_dump(config))
    async with served(["--config", str(path)], folder) as running:
        yield running


@asynccontextmanager
async def _lenient_upstream() -> AsyncIterator[str]:
    """Answers 200 to everything but malformed JSON; yields its base URL."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        if request.content_type != "application/json" or not body:
            return _json({"object": "list", "data": []})
        try:
            fields = json.loads(body)
        except ValueError:
            return _json({"error": {"message": "no JSON", "type": "invalid_request_error"}}, 400)
        if isinstance(fields, dict) and fields.get("stream") is True:
            return web.Response(body=b"data: {}\n\ndata: [DONE]\n\n", content_type="text/event-stream")
        return _json({"id": "made-1", "object": "thing"})

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=json.dumps(value).encode(), content_type="application/json")

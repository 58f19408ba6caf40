"""Ask an endpoint what it is: which models it serves, and which engine it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from proxy.cli.http_client import Answer, BadUrl, HttpClient, NoAnswer

TIMEOUT_SECONDS = 5.0
_ENGINES = {b"vllm:": "vLLM", b"sglang:": "SGLang", b"llamacpp:": "llama.cpp"}
_ENGINE_NAMES = {"llamacpp": "llama.cpp", "vllm": "vLLM", "sglang": "SGLang"}


class Endpoint(NamedTuple):
    """An endpoint's report. `problem` is None if it lists its models; `engine` is empty if it is not known."""

    url: str
    models: tuple[str, ...] = ()
    engine: str = ""
    problem: str | None = None


def ask(url: str, headers: Mapping[str, str], ca_file: str | None = None) -> Endpoint:
    """Ask the endpoint with this base URL, with or without `/v1`."""
    base = url.rstrip("/")
    path = urlsplit(base).path
    has_version = any(part[:1] == "v" and part[1:2].isdigit() for part in path.split("/"))
    try:
        client = HttpClient(base, headers, TIMEOUT_SECONDS, ca_file)
        answer = client.request("GET", "/models" if has_version else "/v1/models")
    except BadUrl:
        return Endpoint(url, problem="is not a URL of http or https")
    except NoAnswer as error:
        return Endpoint(url, problem=f"does not answer ({error}): check the address, and that the server runs")
    if answer.status in (401, 403):
        return Endpoint(
            url, problem=f"refuses the key (status {answer.status}): set key_env or key_file of the replica"
        )
    models = _models(answer)
    if models is None:
        return Endpoint(url, problem=f"answers {answer.status} without a list of models: is this an OpenAI API?")
    return Endpoint(url, models, _engine(client, path, answer))


def _models(answer: Answer) -> tuple[str, ...] | None:
    try:
        return tuple(str(model["id"]) for model in json.loads(answer.body)["data"]) if answer.status == 200 else None
    except (ValueError, KeyError, TypeError):
        return None


def _engine(client: HttpClient, path: str, listed: Answer) -> str:
    """Return the engine's name, from the owner of its models or from its metrics; empty if neither shows it."""
    owner = str(json.loads(listed.body)["data"][0].get("owned_by", "")) if b'"owned_by"' in listed.body else ""
    if owner in _ENGINE_NAMES:
        return _ENGINE_NAMES[owner]
    client.path = path.rstrip("/").removesuffix("/v1")
    try:
        page = client.request("GET", "/metrics")
    except NoAnswer:
        return ""
    return next((name for mark, name in _ENGINES.items() if page.status == 200 and mark in page.body), "")

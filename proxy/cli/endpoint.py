"""Ask an endpoint what it is: which models it serves, and which engine it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from proxy.cli.http_client import Answer, BadKey, BadUrl, HttpClient, NoAnswer

if TYPE_CHECKING:
    from proxy.config.schema import Auth

TIMEOUT_SECONDS = 5.0
BAD_KEY = "was not asked: the key contains a control character, such as a line end"
_NAME_LENGTH_MOST = 256  # as the configuration's own limit
_ENGINES = {b"vllm:": "vLLM", b"sglang:": "SGLang", b"llamacpp:": "llama.cpp"}
_ENGINE_NAMES = {"llamacpp": "llama.cpp", "vllm": "vLLM", "sglang": "SGLang"}


class Endpoint(NamedTuple):
    """An endpoint's report. `problem` is None if it lists its models; `engine` is empty if it is not known."""

    url: str
    models: tuple[str, ...] = ()
    engine: str = ""
    problem: str | None = None


def key_headers(key: str, auth: Auth | None, url: str) -> dict[str, str]:
    """Return the headers that carry `key`, as a running Cairn sends them to this URL."""
    from proxy.config.credentials import auth_header, default_headers_of

    host = urlsplit(url).hostname or ""
    name, value = auth_header(key, auth, host)
    return {name: value} | {each.decode(): other.decode() for each, other in default_headers_of(auth, host)}


def ask(url: str, headers: Mapping[str, str], ca_file: str | None = None) -> Endpoint:
    """Ask the endpoint with this base URL, with or without `/v1`."""
    try:
        base = url.rstrip("/")
        path = urlsplit(base).path
        has_version = any(part[:1] == "v" and part[1:2].isdigit() for part in path.split("/"))
        client = HttpClient(base, headers, TIMEOUT_SECONDS, ca_file)
        answer = client.request("GET", "/models" if has_version else "/v1/models")
    except (BadUrl, ValueError):
        return Endpoint(url, problem="is not a URL of http or https")
    except BadKey:
        return Endpoint(url, problem=BAD_KEY)
    except NoAnswer as error:
        return Endpoint(url, problem=f"does not answer ({error}): check the address, and that the server runs")
    if answer.status in (401, 403):
        return Endpoint(
            url, problem=f"refuses the key (status {answer.status}): set key_env or key_file of the replica"
        )
    listed = _models(answer)
    if listed is None:
        return Endpoint(url, problem=f"answers {answer.status} without a list of models: is this an OpenAI API?")
    models = [name for model in listed if isinstance(name := model.get("id"), str) and _is_name(name)]
    owner = str(listed[0].get("owned_by", "")) if listed else ""
    return Endpoint(url, tuple(dict.fromkeys(models)), _engine(client, path, owner))


def _models(answer: Answer) -> list[dict[str, Any]] | None:
    """Return the entries of a list of models; None if the answer is something else."""
    try:
        entries = json.loads(answer.body)["data"] if answer.status == 200 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else None


def _is_name(text: str) -> bool:
    """Return whether a configuration may contain `text` as the name of a model."""
    return 0 < len(text) <= _NAME_LENGTH_MOST and text.isprintable() and text == text.strip()


def _engine(client: HttpClient, path: str, owner: str) -> str:
    """Return the engine's name, from the owner of its models or from its metrics; empty if neither shows it."""
    if owner in _ENGINE_NAMES:
        return _ENGINE_NAMES[owner]
    client.path = path.rstrip("/").removesuffix("/v1")
    try:
        page = client.request("GET", "/metrics")
    except NoAnswer:
        return ""
    return next((name for mark, name in _ENGINES.items() if page.status == 200 and mark in page.body), "")

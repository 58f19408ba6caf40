"""Decide from method and path which endpoint a request is for and who may use it. Pure.

Every decision is made on the normalised path, which is also the one that the upstream gets.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote

import msgspec

from proxy.errors import NotFound
from proxy.model import Access, Endpoint
from proxy.patterns import matches_any
from proxy.wire.paths import origin_form, split_target

_PROMPTS = {
    "chat/completions": Endpoint.CHAT,
    "completions": Endpoint.COMPLETIONS,
    "responses": Endpoint.RESPONSES,
    "messages": Endpoint.MESSAGES,
    "embeddings": Endpoint.EMBEDDINGS,
}
_INFERENCE = frozenset(
    {
        "audio/speech",
        "audio/transcriptions",
        "audio/translations",
        "classify",
        "fim/completions",
        "images/edits",
        "images/generations",
        "images/variations",
        "messages/count_tokens",
        "moderations",
        "ocr",
        "pooling",
        "rerank",
        "responses/compact",
        "responses/input_tokens",
        "score",
    }
)
"""Paths under /v1 that run a model named in the body and create no object."""

_COMPUTING = frozenset({path.rpartition("/")[2] for path in _INFERENCE}) | {
    "apply-template", "chat", "completion", "completions", "countTokens", "detokenize", "embed", "embedContent",
    "embedding", "embeddings", "encode", "generate", "generateContent", "generate_stream", "infill", "invocations",
    "predict", "similarity", "streamGenerateContent", "tokenize",
}  # fmt: skip
"""Last parts of engines' own paths (vLLM, SGLang, TGI, TEI, llama.cpp, Ollama, Google) that only compute."""

COLLECTIONS = (
    "batches",
    "chat/completions",
    "containers",
    "conversations",
    "files",
    "messages/batches",
    "responses",
    "uploads",
    "videos",
)
"""Paths under /v1 whose POST creates an object that its creator then uses by id."""

_READ_WHOLE = frozenset({"batches", "containers", "conversations", "messages/batches", "uploads", "videos"})
"""Collections whose creation is read before it is sent: it names models, or objects that the client must own."""

_CONTENT = re.compile(r"files/.*|uploads/[^/]+/parts")
"""The paths below an object whose body is content of a file. Any other body is read: it may name other objects."""

_ENGINES: Final = "engines/"  # OpenAI's old prefix, which some clients still use: the model is part of the path
_DEPLOYMENTS: Final = "/openai/deployments/"  # Azure's prefix: the model is part of the path
_EXTENSIONS: Final = "extensions/"  # Azure's older path of chats about documents: extensions/chat/completions
_MODEL_WITH_SLASHES = re.compile(
    r"(?:/v1)?/models/((?:[A-Za-z0-9_~@:-][A-Za-z0-9._~@:-]*%2[Ff])+[A-Za-z0-9_~@:-][A-Za-z0-9._~@:-]*)"
)
"""The path of one model whose name has slashes, as SDKs encode it (`org%2Fname`). An encoded slash is ambiguous: some
servers decode it first, so that the reader of requests treats both spellings alike. No part may begin with a dot."""

_DEFAULT_VERSION: Final = "/v1"
LIVENESS = frozenset({"/", "/health", "/healthz", "/api/hello"})
_LIVENESS_METHODS = frozenset({"GET", "HEAD"})
_WITHOUT_BODY = frozenset({"DELETE", "GET", "HEAD", "OPTIONS"})  # a body has no meaning here
_GUESSED_LENGTH_MOST: Final = 128  # characters of an unknown path that is compared with the known ones
_NEARLY_EQUAL: Final = 0.8  # least difflib ratio; below it guesses are far-fetched
KNOWN_PATHS = sorted([f"/v1/{path}" for path in {*_PROMPTS, *_INFERENCE, *COLLECTIONS, "models", "caching"}])
_FIRST_SEGMENTS = frozenset({path.split("/")[0] for path in {*_PROMPTS, *COLLECTIONS, "models", "caching"}}) | {
    "audio",
    "images",
    "moderations",
}
"""First segments that are served without /v1 too; engines' own paths at the root need the configuration."""


class Route(msgspec.Struct, frozen=True, gc=False):
    """The meaning of a method and target.

    `target` is the normalised path with the query. `model` is the model that the path names, `object_id` the object.
    `reads_body` is false if the body may pass before all of it is read. `may_have_effects` is true of an engine's own
    path unless it is known that it only computes.
    """

    endpoint: Endpoint
    target: str
    access: Access = Access.INFERENCE
    model: str | None = None
    object_id: str | None = None
    reads_body: bool = True
    may_have_effects: bool = False


_ROUTES = {f"/v1/{path}": Route(endpoint, f"/v1/{path}") for path, endpoint in _PROMPTS.items()}


class Routes:
    """The paths of the client port, as configured.

    Args:
        engine_paths: paths outside /v1 that are passed to engines, as patterns such as `/tokenize`.
        allowed_paths: paths under /v1 beyond inference that clients may use with a replica's own key, as patterns.
        admin_port: the port of the status page, named in the answer to an unknown path.
    """

    def __init__(
        self, engine_paths: Sequence[str] = (), allowed_paths: Sequence[str] = (), admin_port: int | None = None
    ) -> None:
        self._engine_paths = tuple(engine_paths)
        self._allowed_paths = tuple(allowed_paths)
        self._admin_port = admin_port

    def route(self, method: str, target: str) -> Route:
        """Return the meaning of `method` and a request target as it was sent.

        Raises:
            BadRequest: the target is ambiguous or malformed.
            NotFound: nothing is served at this path; the message names the most similar path.
        """
        if method == "POST" and (known := _ROUTES.get(target)):
            return known
        if "%2" in target and (named := _MODEL_WITH_SLASHES.fullmatch(target)) and method in _LIVENESS_METHODS:
            return Route(Endpoint.OTHER, f"/v1/models/{named[1]}", model=unquote(named[1]), reads_body=False)
        path, query = split_target(target)
        if method == "TRACE":  # it would show the client what was sent to the upstream: the replica's key
            raise self._unknown(method, path)
        if path.startswith(_DEPLOYMENTS) and matches_any(path, self._engine_paths):
            return self._if_allowed(_deployment(method, path, query), path)
        versioned = _versioned(path)
        if versioned is not None and not (versioned != path and matches_any(path, self._engine_paths)):
            return self._under_version(method, versioned, query)
        if matches_any(path, self._engine_paths):
            if method == "POST":
                return Route(Endpoint.INFERENCE, path + query, may_have_effects=not _only_computes(path))
            return Route(Endpoint.OTHER, path + query, Access.CONFIGURED, reads_body=False)
        raise self._unknown(method, path)

    def _under_version(self, method: str, path: str, query: str) -> Route:
        target = path + query
        name = path.removeprefix("/v1/")
        if method == "POST":
            if endpoint := _PROMPTS.get(name):
                return Route(endpoint, target)
            if name.startswith(_ENGINES) and (engine := _engine(name, target)) is not None:
                return engine
            if name in _INFERENCE:
                return Route(Endpoint.INFERENCE, target)
        if name == "models" and method in _LIVENESS_METHODS:
            return Route(Endpoint.MODELS, target, reads_body=False)
        if name == "caching" or name.startswith("caching/"):
            return Route(Endpoint.CACHING, target)
        if name.startswith("models/") and method in ("GET", "HEAD"):
            return Route(Endpoint.OTHER, target, model=unquote(name.removeprefix("models/")), reads_body=False)
        return self._if_allowed(_of_collection(method, name, target), path)

    def _if_allowed(self, route: Route, path: str) -> Route:
        """Return `route`, open to clients that share a key if the configuration allows its path.

        What is sent to a path of administration is read: it may name objects of others.
        """
        is_open = route.access in (Access.INFERENCE, Access.CREATE)
        if not is_open and matches_any(path, self._allowed_paths):
            reads = route.reads_body or route.access is Access.ADMINISTRATION
            return msgspec.structs.replace(route, access=Access.CONFIGURED, reads_body=reads)
        return route

    def _unknown(self, method: str, path: str) -> NotFound:
        message = f"Nothing is served at this path for {method}."
        if len(path) <= _GUESSED_LENGTH_MOST and (likely := _likely(path.lower())):
            message += f" Did you mean {likely}?"
        if self._admin_port:
            message += f" Cairn's status page is on the admin port, {self._admin_port}."
        return NotFound(message, code="unknown_path")


def _only_computes(path: str) -> bool:
    """Return True if the end of an engine's own path says that it only runs a model, so that it may be repeated."""
    last = path.rpartition("/")[2]
    return last.rpartition(":")[2] in _COMPUTING or path.endswith("/v1/messages")


def _likely(path: str) -> str | None:
    """Return the known path that `path` ends with, else one that it is nearly equal to, if there is one."""
    if path.rstrip("/") == _DEFAULT_VERSION:
        return f"{_DEFAULT_VERSION}/models"
    names = {known.removeprefix("/v1/"): known for known in KNOWN_PATHS}
    ends = [name for name in names if path.endswith(f"/{name}")]
    near = difflib.get_close_matches(path.removeprefix("/v1/").strip("/"), names, 1, _NEARLY_EQUAL)
    name = max(ends, key=len, default=None) or next(iter(near), None)
    return None if name is None else names[name]


def is_liveness(method: str, path: str) -> bool:
    """Return True if the request only asks whether anything answers here; this needs no key."""
    if method not in _LIVENESS_METHODS:
        return False
    path = origin_form(path)
    return path in LIVENESS or path.rstrip("/") in LIVENESS


def _versioned(path: str) -> str | None:
    """Return `path` with exactly one leading /v1, or None if it does not belong under /v1."""
    if not path.startswith("/v1/"):
        return f"/v1{path}" if path[1:].split("/", 1)[0] in _FIRST_SEGMENTS else None
    while path.startswith("/v1/v1/"):
        path = path.removeprefix(_DEFAULT_VERSION)
    return path


def _deployment(method: str, path: str, query: str) -> Route:
    """Return the route of an Azure path: the segment after the prefix is the model, the rest the endpoint.

    What does not run the model, such as DELETE of the deployment itself, is administration.
    """
    model, _, name = path.removeprefix(_DEPLOYMENTS).partition("/")
    endpoint = _endpoint_of(name.removeprefix(_EXTENSIONS)) if method == "POST" else None
    if endpoint is None:
        return Route(Endpoint.OTHER, path + query, Access.ADMINISTRATION, model=unquote(model), reads_body=False)
    return Route(endpoint, path + query, model=unquote(model))


def _engine(name: str, target: str) -> Route | None:
    """Return the route of an old OpenAI path, `engines/MODEL/ENDPOINT`; None if its endpoint runs no model."""
    model, _, path = name.removeprefix(_ENGINES).partition("/")
    endpoint = _endpoint_of(path)
    return None if endpoint is None else Route(endpoint, target, model=unquote(model))


def _endpoint_of(name: str) -> Endpoint | None:
    """Return the endpoint of a path below a model's own path, None if it runs no model."""
    return _PROMPTS.get(name, Endpoint.INFERENCE if name in _INFERENCE else None)


def _of_collection(method: str, name: str, target: str) -> Route:
    """Return the route of a collection, or of one of its objects and the paths below it."""
    for collection in COLLECTIONS:
        if name == collection:
            if method != "POST":
                return Route(Endpoint.OTHER, target, Access.LIST, reads_body=False)
            return Route(Endpoint.OTHER, target, Access.CREATE, reads_body=name in _READ_WHOLE)
        if name.startswith(f"{collection}/"):
            object_id = unquote(name.removeprefix(f"{collection}/").split("/", 1)[0])
            if not (collection == "responses" and object_id == "input_tokens"):
                reads = method not in _WITHOUT_BODY and not _CONTENT.fullmatch(name)
                return Route(Endpoint.OTHER, target, Access.OBJECT, object_id=object_id, reads_body=reads)
    return Route(Endpoint.OTHER, target, Access.ADMINISTRATION, reads_body=False)

"""Read the OpenAPI documents and add what operations of a kind have in common.

`client.yaml` and `admin.yaml` are the only source. Their operations name a kind (`x-kind`); the responses that all
operations of that kind can give are added here, with the operation's id and Cairn's version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from proxy.version import own_version

PATHS: Final = {"/openapi/client.json": "client.yaml", "/openapi/admin.json": "admin.yaml"}
"""The documents by the path at which the admin port serves them."""

METHODS: Final = ("get", "put", "post", "delete")

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, if PyYAML was built with it
_FOLDER = Path(__file__).parent
_RELAYED_STATUSES = (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 502, 503, 504)
_OWN_STATUSES = (400, 401, 403, 404, 408, 413, 429, 500, 503)
_PORT_STATUSES = (401, 403)


def document(path: str) -> dict[str, Any]:
    """Return the document that is served at `path`, one of `PATHS`. It is read from the disk."""
    found: dict[str, Any] = yaml.load((_FOLDER / PATHS[path]).read_text("utf-8"), _LOADER)  # noqa: S506 - both are safe
    found["info"]["version"] = own_version()
    for route, item in found["paths"].items():
        for method in METHODS:
            if method in item:
                _complete(route, method, item[method])
    return found


def encoded(path: str) -> bytes:
    """Return the document that is served at `path` as JSON."""
    return msgspec.json.encode(document(path))


def _complete(route: str, method: str, operation: dict[str, Any]) -> None:
    """Add the id and the responses that are common to the operation's kind."""
    operation["operationId"] = f"{method}{_words(route)}"
    kind = operation.pop("x-kind", "")
    responses: dict[str, Any] = {**_COMMON[kind], **operation.get("responses", {})}
    operation["responses"] = dict(sorted(responses.items()))
    if kind in ("open", "page"):
        operation["security"] = []


def _words(route: str) -> str:
    return "".join(word[:1].upper() + word[1:] for word in route.replace("_", "/").split("/")).translate(_NO_SIGNS)


def _each(statuses: tuple[int, ...], name: str) -> dict[str, Any]:
    return {str(status): {"$ref": f"#/components/responses/{name}"} for status in statuses}


_NO_SIGNS = str.maketrans("", "", "{}.")
_COMMON: dict[str, dict[str, Any]] = {
    "": _each(_PORT_STATUSES, "Refused"),
    "page": _each(_PORT_STATUSES, "Refused"),
    "open": _each((200,), "Alive"),
    "own": _each(_OWN_STATUSES, "OwnError"),
    "relayed": _each((200,), "Relayed") | _each(_RELAYED_STATUSES, "Error"),
    "generation": _each((200,), "Generated") | _each(_RELAYED_STATUSES, "Error"),
}

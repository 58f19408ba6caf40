"""Answers of the admin port: their one form, and the choice of a coding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
from aiohttp import web

HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
"""What each answer of the port has that says nothing else."""

_GZIP_NAMES: Final = ("gzip", "x-gzip")


def json_answer(status: int, content: object, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a whole answer with `content` as JSON, which nobody may store."""
    body = msgspec.json.encode(content)
    return web.Response(
        status=status, body=body, content_type="application/json", headers={**HEADERS, **(headers or {})}
    )


def accepts_gzip(request: web.BaseRequest) -> bool:
    """Return whether the client accepts gzip, in any of the header's lines, and not with the weight 0."""
    weights: dict[str, bool] = {}
    for each in ",".join(request.headers.getall("Accept-Encoding", ())).split(","):
        coding, *parameters = [part.strip().lower() for part in each.split(";")]
        weights[coding] = not any(_is_zero(parameter) for parameter in parameters)
    named = [weights[name] for name in _GZIP_NAMES if name in weights]
    return any(named) if named else weights.get("*", False)


def _is_zero(parameter: str) -> bool:
    """Return whether a parameter of a coding is the weight 0, as `q=0` or `q=0.000`."""
    name, _, value = parameter.partition("=")
    return name.strip() == "q" and value.strip().rstrip("0") in ("", "0.", ".")

"""Answers of the admin port: errors in one form, also where aiohttp makes its own, and the choice of a coding."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import web

log = logging.getLogger("cairn.admin")

_OURS_FROM: Final = 500  # statuses that are not the client's fault
_HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
_GZIP_NAMES: Final = ("gzip", "x-gzip")


class AdminProtocol(web.RequestHandler):
    """aiohttp's protocol of one connection.

    Of a request that cannot be read aiohttp's own page repeats what was sent, in plain text.
    """

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the answer to a request that cannot be read or whose handler failed; the connection then ends.

        Raises ConnectionError if an answer has begun.
        """
        if isinstance(exc, web.RequestPayloadError):
            status = 400
        elif status >= _OURS_FROM and exc is not None and not isinstance(exc, ConnectionError):  # the client left
            log.error("a request to the admin port failed inside Cairn", exc_info=exc)
        super().handle_error(request, status, exc, message)
        response = json_answer(status, {"error": HTTPStatus(status).phrase.lower()})
        response.force_close()
        return response


def json_answer(status: int, content: object, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a whole answer with `content` as JSON, which nobody may store."""
    body = msgspec.json.encode(content)
    return web.Response(
        status=status, body=body, content_type="application/json", headers={**_HEADERS, **(headers or {})}
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

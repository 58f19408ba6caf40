"""The `Expect` header on the admin port.

aiohttp's own handler repeats an expectation that it does not know in its answer, and fails with a 500 if that is not
UTF-8. It serves every target for which no handler is registered, so `AnyTarget` registers one for all others.
"""

from __future__ import annotations

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler

from proxy.admin.answers import json_answer


async def meet_expectation(request: web.Request) -> web.StreamResponse | None:
    """Write `100 Continue` if the client waits for it; return the refusal of any other expectation."""
    if request.version != HttpVersion11:
        return None
    if request.headers.get("Expect", "").lower() != "100-continue":
        return json_answer(417, {"error": "only the expectation 100-continue is supported"})
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # or the response would count as begun
    return None


class AnyTarget(web.PlainResource):
    """Matches each method and target that no other resource matches, even `*`. Register it last."""

    def __init__(self, handler: Handler) -> None:
        super().__init__("/")
        self._only = self.add_route("*", handler, expect_handler=meet_expectation)

    async def resolve(self, request: web.Request) -> tuple[web.UrlMappingMatchInfo | None, set[str]]:  # noqa: ARG002
        """Match every request."""
        return web.UrlMappingMatchInfo({}, self._only), set()

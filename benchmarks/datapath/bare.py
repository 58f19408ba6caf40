"""The yardstick: a pass-through on aiohttp's server and aiohttp's client with uvloop, as one writes it in an hour.

No feature at all: no health, no retry, no usage, no metric, no log; replicas in turn. Bodies are read whole and
answers relayed piece by piece.

python -m benchmarks.datapath.bare --port 9000 --upstream http://127.0.0.1:9001 [--upstream ...]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Awaitable, Callable

import aiohttp
import uvloop
from aiohttp import web

_MAX_BODY_BYTES = 64 << 20
_DROPPED = frozenset({"host", "content-length", "connection", "keep-alive", "transfer-encoding", "te", "upgrade"})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_handler(session: aiohttp.ClientSession, upstreams: list[str]) -> Handler:
    """Return a handler that passes each request to the next upstream."""
    turns = itertools.cycle(upstreams)

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        kept = [(name, value) for name, value in request.headers.items() if name.lower() not in _DROPPED]
        url = next(turns) + request.path_qs
        async with session.request(request.method, url, data=body or None, headers=kept) as upstream:
            answer = web.StreamResponse(status=upstream.status)
            for name, value in upstream.headers.items():
                if name.lower() not in _DROPPED:
                    answer.headers.add(name, value)
            answer.content_length = upstream.content_length
            await answer.prepare(request)
            async for piece in upstream.content.iter_any():
                await answer.write(piece)
            await answer.write_eof()
            return answer

    return handle


async def pass_through(upstreams: list[str]) -> web.Application:
    """Return the application of the pass-through."""
    application = web.Application(client_max_size=_MAX_BODY_BYTES)

    async def with_session(_: web.Application):  # type: ignore[no-untyped-def]  # noqa: ANN202
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
            application.router.add_route("*", "/{path:.*}", make_handler(session, upstreams))
            yield

    application.cleanup_ctx.append(with_session)
    return application


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", action="append", required=True)
    args = parser.parse_args()
    loop = uvloop.new_event_loop()
    web.run_app(pass_through(args.upstream), host="127.0.0.1", port=args.port, access_log=None, print=None, loop=loop)


if __name__ == "__main__":
    main()

"""Compare how nginx and aiohttp, as installed, handle the same hostile input: `python -m
tests.hostile.client.compare`.

For each case it prints the statuses of the answers and, as `.` or `>`, whether the connection ended or went on. Only
the cases in which one of them differs from what Cairn must do are shown. Without nginx on PATH it is left out.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from aiohttp import web

from tests.hostile.client.inputs import BODY_BYTES_MOST, CASES, Case
from tests.hostile.client.test_inputs import send

STATUS = re.compile(rb"HTTP/1\.\d (\d{3})")
WAIT_SECONDS = 0.7  # longer than the servers wait for a head or a body that stops
NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/log crit;
events {{ worker_connections 64; }}
http {{
  access_log off; client_max_body_size {body}; client_header_timeout 300ms; client_body_timeout 300ms;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi; lingering_timeout 100ms;
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{behind}; }} }}
}}
"""


@asynccontextmanager
async def aiohttp_server() -> AsyncIterator[int]:
    """An aiohttp server that reads bodies and answers 200."""

    async def answer(request: web.BaseRequest) -> web.Response:
        await request.read()
        return web.Response(text="served")

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


@asynccontextmanager
async def nginx_server(behind: int) -> AsyncIterator[int]:
    """An nginx that passes everything to the port `behind`."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = write_configuration(folder, port, behind)
        process = await asyncio.create_subprocess_exec("nginx", "-p", folder, "-c", file)
        try:
            await asyncio.sleep(0.5)
            yield port
        finally:
            process.terminate()
            await process.wait()


def write_configuration(folder: str, port: int, behind: int) -> str:
    """Write nginx's configuration file; gives its path."""
    file = Path(folder, "nginx.conf")
    file.write_text(NGINX.format(folder=folder, port=port, behind=behind, body=BODY_BYTES_MOST))
    return str(file)


async def outcome(port: int, case: Case) -> str:
    """Statuses, then `.` if the connection ended or `>` if it went on."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got, end = b"", ">"
    try:
        await send(writer, case)
        async with asyncio.timeout(WAIT_SECONDS):
            while piece := await reader.read(65_536):
                got += piece
            end = "."
    except TimeoutError:
        pass
    except ConnectionError:
        end = "."
    finally:
        writer.close()
    return shortened([status.decode() for status in STATUS.findall(got)]) + end


def shortened(statuses: list[str]) -> str:
    """Equal neighbours as a number and a sign."""
    parts: list[list[str]] = []
    for status in statuses:
        if parts and parts[-1][0] == status:
            parts[-1].append(status)
        else:
            parts.append([status])
    return " ".join(part[0] if len(part) == 1 else f"{len(part)}x{part[0]}" for part in parts)


async def main() -> None:
    async with AsyncExitStack() as stack:
        ports = {"aiohttp": await stack.enter_async_context(aiohttp_server())}
        if shutil.which("nginx"):
            ports["nginx"] = await stack.enter_async_context(nginx_server(ports["aiohttp"]))
        print(f"{'':45} {'Cairn':>14}", *[f"{name:>14}" for name in ports])  # noqa: T201
        differing = dict.fromkeys(ports, 0)
        names = list(CASES)
        for first in range(0, len(names), 16):
            some = names[first : first + 16]
            results = await asyncio.gather(
                *[asyncio.gather(*[outcome(port, CASES[name]) for port in ports.values()]) for name in some]
            )
            for name, others in zip(some, results, strict=True):
                case = CASES[name]
                expected = shortened([str(status) for status in case.statuses]) + (
                    "." if case.ends or case.leaves else ">"
                )
                for server, other in zip(ports, others, strict=True):
                    differing[server] += other != expected
                if any(other != expected for other in others):
                    print(f"{name:45} {expected:>14}", *[f"{other:>14}" for other in others])  # noqa: T201
        print(f"{len(CASES)} cases; other outcomes: {differing}")  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main())

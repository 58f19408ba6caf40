"""Start vLLM servers on the CPU, from an environment that `make .build/vllm/.done` prepared."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import aiohttp

from benchmarks.common.processes import ROOT, Running, StartFailed, free_port
from benchmarks.vllm.model import CONTEXT_TOKENS, NAME, make_model

FOLDER = ROOT / ".build" / "vllm"
START_SECONDS = 300.0  # imports of three processes; on a busy machine they take minutes
_QUIET_TRIES = 120
_QUIET_SECONDS = 0.5

_ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "",  # compiling vLLM's modules takes a minute of each start
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_SERVER_DEV_MODE": "1",  # offers /reset_prefix_cache, since a start takes a minute or more
    "TOKENIZERS_PARALLELISM": "false",
}


def is_installed() -> bool:
    """Return True if the environment with vLLM exists."""
    return (FOLDER / ".done").exists()


async def start_engines(count: int, options: list[str], folder: Path, stack: ExitStack) -> list[int]:
    """Start `count` servers with one thread each and return their ports when they answer. They end with `stack`.

    `options` are added to the command line. Raises StartFailed.
    """
    model, running = make_model(FOLDER / "model"), {}
    for number in range(count):
        port = free_port()
        command = [str(FOLDER / "bin" / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--served-model-name", NAME, "--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager"]
        command += ["--max-model-len", str(CONTEXT_TOKENS), "--enable-prompt-tokens-details"]
        running[port] = Running(f"vllm-{number}", [*command, *options], folder, _ENVIRONMENT)
        stack.callback(running[port].stop)
    for port, engine in running.items():
        await engine.answers(port, "/health", START_SECONDS)
    return list(running)


async def empty_caches(ports: Sequence[int]) -> None:
    """Let each engine forget all prompts, once it has nothing to do. Raises StartFailed if it stays busy."""
    async with aiohttp.ClientSession() as http:
        for port in ports:
            for _ in range(_QUIET_TRIES):
                async with http.get(f"http://127.0.0.1:{port}/metrics") as page:
                    busy = [float(value) for value in _REQUESTS.findall(await page.read())]
                if not any(busy):
                    async with http.post(f"http://127.0.0.1:{port}/reset_prefix_cache") as answer:
                        if answer.status == 200:
                            break
                await asyncio.sleep(_QUIET_SECONDS)
            else:
                raise StartFailed(f"the engine at port {port} does not become quiet")


_REQUESTS = re.compile(rb"^vllm:num_requests_(?:running|waiting)\{.*\} ([0-9.]+)", re.MULTILINE)

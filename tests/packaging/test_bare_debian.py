"""From a wheel to a first answer in a Debian that has nothing but Python, made by debootstrap.

The wheel is the one of plain Python, as pip takes it where no wheel for the platform exists.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from shutil import which

import aiohttp
import pytest

from tests.packaging.serving import read_until
from tests.packaging.test_image import PACKAGES
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.valkey import free_port

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".build" / "image"
INSIDE = Path(__file__).with_name("bare.sh")
SECONDS_AT_MOST = 180  # half a minute on an idle machine; tests share theirs

pytestmark = [
    pytest.mark.image,
    pytest.mark.skipif(os.getuid() != 0, reason="mounts need root"),
    pytest.mark.skipif(which("debootstrap") is None, reason="needs debootstrap"),
]


@pytest.fixture(scope="module")
def debian() -> Path:
    """The root folder of a minimal Debian."""
    base = WORK / "base"
    if not (base / "usr" / "bin" / "python3").exists():
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(base)]
        subprocess.run(command, check=True, capture_output=True)
    return base


async def test_a_wheel_answers_in_a_bare_debian(debian: Path, wheel: Path) -> None:
    """With the commands of docs/installing.md, Cairn is installed there, starts, and answers its first request."""
    port, admin_port = free_port(), free_port()
    async with OpenAIUpstream() as upstream, aiohttp.ClientSession() as client, asyncio.timeout(SECONDS_AT_MOST):
        process = await asyncio.create_subprocess_exec(
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", str(INSIDE)),
            *(str(debian), str(wheel), upstream.url, str(port), str(admin_port)),
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            await read_until(process, b"is ready")
            body = {"model": "test-model", "messages": [{"role": "user", "content": "Hello"}]}
            answer = await client.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
            assert answer.status == 200
            assert (await answer.json())["choices"][0]["message"]["content"] == "Hello, world"
        finally:
            process.kill()
            await process.wait()

"""The wheel on each Python that Cairn supports: the lock has wheels for it, and Cairn starts and answers.

A Python that is not installed comes with the Debian of that name, made by debootstrap.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import aiohttp
import pytest

from tests.packaging.serving import ends_cleanly, read_until
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.valkey import free_port

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".build" / "image"
DEBIAN_WITH = {"3.13": "trixie", "3.14": "testing"}
SECONDS_AT_MOST = 120  # the first start compiles a thousand modules to bytecode; tests share their machine

pytestmark = [
    pytest.mark.image,
    pytest.mark.skipif(os.getuid() != 0, reason="mounts need root"),
]


@dataclass(frozen=True, slots=True)
class Python:
    """A way to run Python, and the folder that it sees as its root."""

    command: tuple[str, ...]
    root: Path


def find_python(version: str) -> Python:
    """Return a Python of `version`: one of PATH or pyenv, else that of a Debian. Skips the test without any."""
    installed = Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
    for candidate in (which(f"python{version}"), *map(str, installed)):
        if candidate and _runs([candidate, "--version"], version):
            return Python((candidate,), Path("/"))
    debian = DEBIAN_WITH.get(version)
    if debian is None or which("debootstrap") is None:
        pytest.skip(f"there is no Python {version}")
    root = WORK / f"python{version}"
    if not (root / "usr" / "bin" / f"python{version}").exists():
        command = ["debootstrap", "--variant=minbase", "--include=python3", debian, str(root)]
        subprocess.run(command, check=True, capture_output=True)
    return Python(("chroot", str(root), f"/usr/bin/python{version}"), root)


def _runs(command: list[str], version: str) -> bool:
    return f"Python {version}." in subprocess.run(command, capture_output=True, text=True, check=False).stdout


def install(wheel: Path, version: str, folder: Path) -> None:
    """Install the wheel and the locked packages, wheels only, into `folder`."""
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--python-version", version]
    uv += ["--only-binary", ":all:", "--target", str(folder)]
    for what in (["--require-hashes", "-r", str(ROOT / "requirements" / "otel.txt")], ["--no-deps", str(wheel)]):
        subprocess.run([*uv, *what], check=True)


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
async def test_a_wheel_answers_on(version: str, wheel: Path, tmp_path: Path) -> None:
    """Cairn becomes ready without a warning of Python, gives an answer, and ends cleanly."""
    python = find_python(version)
    folder = (tmp_path if python.root == Path("/") else python.root) / "opt" / "cairn"
    install(wheel, version, folder)
    inside = f"/{folder.relative_to(python.root)}"
    environ = {
        "PATH": "/usr/sbin:/usr/bin:/bin",
        "PYTHONPATH": inside,
        "PYTHONWARNINGS": "default",
        "XDG_DATA_HOME": "/tmp",
    }
    port, admin_port = free_port(), free_port()
    async with OpenAIUpstream() as upstream, aiohttp.ClientSession() as client, asyncio.timeout(SECONDS_AT_MOST):
        process = await asyncio.create_subprocess_exec(
            *(*python.command, "-P", "-m", "proxy", "serve", "--upstream", upstream.url),
            *("--port", str(port), "--admin-port", str(admin_port)),
            env={**environ, "CAIRN_SERVER__DRAIN_ACCEPT_SECONDS": "0"},
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert b"Warning" not in await read_until(process, b"serving on")
            body = {"model": "test-model", "messages": [{"role": "user", "content": "Hello"}]}
            answer = await client.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
            assert (await answer.json())["choices"][0]["message"]["content"] == "Hello, world"
            assert await ends_cleanly(process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

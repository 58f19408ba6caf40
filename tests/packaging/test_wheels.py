"""The wheels that `make test` builds: installed without a network, each runs and has all of its files.

Their dependencies come from the environment of the tests, by a .pth file, since nothing may be fetched here.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.packaging.serving import ends_cleanly, read_until

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".build" / "wheels"
START_SECONDS = 60
BUILT = {path.stem.split("-")[2] == "py3": path for path in WHEELS.glob("*.whl")}

pytestmark = pytest.mark.skipif(len(BUILT) != 2, reason="`make test` builds the wheels first")
KINDS = pytest.mark.parametrize("pure", [True, False], ids=["pure", "compiled"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Environments into which the wheels were installed, by whether they are pure."""
    return {pure: _install(wheel, tmp_path_factory.mktemp("environment")) for pure, wheel in BUILT.items()}


def _install(wheel: Path, folder: Path) -> Path:
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, str(wheel)], check=True, cwd=folder)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@KINDS
def test_an_installed_wheel_says_whether_it_is_compiled(installed: dict[bool, Path], pure: bool) -> None:
    """`cairn --version` has the version of the wheel and its kind."""
    command = [str(installed[pure] / "bin" / "cairn"), "--version"]
    version = BUILT[pure].name.split("-")[1]
    said = subprocess.run(command, cwd=installed[pure], capture_output=True, text=True, check=True).stdout
    assert said == f"cairn {version} ({'interpreted' if pure else 'compiled'})\n"


@KINDS
async def test_an_installed_wheel_serves_and_stops(installed: dict[bool, Path], pure: bool, tmp_path: Path) -> None:
    """`cairn serve` becomes ready with the wheel's files alone, and ends cleanly on SIGTERM."""
    process = await asyncio.create_subprocess_exec(
        str(installed[pure] / "bin" / "cairn"),
        *("serve", "--port", "0", "--admin-port", "0", "--upstream", "http://127.0.0.1:9"),
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "XDG_DATA_HOME": str(tmp_path), "CAIRN_SERVER__DRAIN_ACCEPT_SECONDS": "0"},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(START_SECONDS):
            await read_until(process, b"serving on")
            assert await ends_cleanly(process)
    finally:
        if process.returncode is None:
            process.kill()


@KINDS
def test_a_wheel_holds_cairn_and_nothing_else(pure: bool) -> None:
    """The packages, their libraries, the page's files and the license are in it; tests, benchmarks and C are not."""
    names = zipfile.ZipFile(BUILT[pure]).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name and not name.startswith("cairn_")}
    assert tops == {"cache", "proxy"}
    for page in (ROOT / "proxy" / "admin" / "status").glob("*.[hjc][ts]*"):
        assert f"proxy/admin/status/{page.name}" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert pure is not any(name.endswith(".so") for name in names)
    assert not any(name.endswith(".c") for name in names)


def test_what_a_user_installs_is_small() -> None:
    """The demo's packages are only in its extra."""
    wheel = zipfile.ZipFile(BUILT[True])
    metadata = message_from_bytes(wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))))
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    plain = {each.name for each in required if each.marker is None or each.marker.evaluate({"extra": ""})}
    demo = {each.name for each in required if each.marker and each.marker.evaluate({"extra": "demo"})} - plain
    assert demo == {"xllamacpp", "gguf", "tokenizers", "numpy"}
    locked = (ROOT / "requirements" / "runtime.txt").read_text()
    assert not [name for name in demo if f"\n{name}==" in locked]

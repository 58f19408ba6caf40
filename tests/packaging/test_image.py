"""The container image: built by buildah on a base that debootstrap makes, and run without root, home or capabilities.

A base from debootstrap stands in for the one from a registry, by the Dockerfile's build argument.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import pytest

from benchmarks.common.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".build" / "image"
BOX = Path(__file__).with_name("box.sh")
BUILDAH = ["buildah", "--root", str(WORK / "storage"), "--runroot", str(WORK / "run"), "--storage-driver", "vfs"]
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
USER = 10001
READY_SECONDS = 10  # three on an idle machine; tests share theirs
POLL_SECONDS = 0.05
LAYER_BYTES_AT_MOST = 100_000_000

pytestmark = [
    pytest.mark.image,
    pytest.mark.skipif(os.getuid() != 0, reason="mounts need root"),
    pytest.mark.skipif(not all(map(which, ("buildah", "debootstrap"))), reason="needs buildah and debootstrap"),
]


def buildah(*arguments: str) -> str:
    """Run buildah and return its output."""
    environ = {**os.environ, "BUILDAH_ISOLATION": "chroot"}  # noqa: TID251
    run = subprocess.run([*BUILDAH, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout.strip()


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """The root folder of the built image."""
    base = WORK / "base"
    if not (base / "usr" / "bin" / "python3").exists():
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(base)]
        subprocess.run(command, check=True, capture_output=True)
    empty = buildah("from", "scratch")
    buildah("add", "--quiet", empty, str(base), "/")
    buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", empty)
    buildah("commit", "--quiet", "--rm", empty, "cairn-base")
    buildah(
        *("bud", "--pull-never", "--quiet", "--file", "deploy/Dockerfile"),
        *("--ignorefile", "deploy/Dockerfile.dockerignore", "--build-arg", "PYTHON_IMAGE=localhost/cairn-base"),
        *("--volume", "/etc/ssl/certs:/etc/ssl/certs:ro", "--format", "docker", "--tag", "cairn", "."),
    )
    container = buildah("from", "--pull-never", "localhost/cairn")
    mounted = Path(buildah("mount", container))
    (mounted / "etc" / "cairn").mkdir(exist_ok=True)  # where a runtime mounts the configuration
    yield mounted
    buildah("rm", container)


@contextmanager
def running(image: Path, folder: Path, ports: tuple[int, int]) -> Iterator[subprocess.Popen[str]]:
    """Run the image's command with a read-only root, as a user without name, home or capabilities."""
    state, config = folder / "state", folder / "config"
    state.mkdir()
    os.chown(state, USER, USER)
    config.mkdir(mode=0o755)
    pools = [{"name": "local", "replicas": [{"url": "http://127.0.0.1:9"}]}]
    server = {"port": ports[0], "drain_accept_seconds": 0}
    (config / "cairn.yaml").write_text(json.dumps({"server": server, "admin": {"port": ports[1]}, "pools": pools}))
    command = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "bash",
        str(BOX),
        *map(str, (image, state, config)),
    ]
    process = subprocess.Popen(
        [*command, "cairn", "serve", "--config", "/etc/cairn/cairn.yaml"], stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        for child in children_of(process.pid):  # the kernel does not: it forgets to when the child changes its user
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()


def children_of(pid: int) -> list[int]:
    """Return the process ids of the children of `pid`, none if it has ended."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


def is_ready(port: int) -> bool:
    """Return whether /readyz of the admin port answers 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def comes_true_within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Ask `holds` every 50 ms until it is true or the time is over."""
    pause = threading.Event()
    return any(holds() or pause.wait(POLL_SECONDS) for _ in range(int(seconds / POLL_SECONDS)))


def test_it_becomes_ready_and_drains(image: Path, tmp_path: Path) -> None:
    """With a read-only root and a state folder it becomes ready, writes there only, and drains on SIGTERM."""
    ports = (free_port(), free_port())
    with running(image, tmp_path, ports) as process:
        assert comes_true_within(READY_SECONDS, lambda: is_ready(ports[1]))
        assert [path.name for path in (tmp_path / "state").iterdir()] == [f"valkey-{ports[0]}"]
        os.kill(children_of(process.pid)[0], signal.SIGTERM)
        _, written = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "draining" in written


def test_its_health_check_passes_while_it_runs_and_fails_otherwise(image: Path, tmp_path: Path) -> None:
    """The command of HEALTHCHECK, run inside, on the admin port that the image exposes."""
    inspected = json.loads(buildah("inspect", "--type", "image", "localhost/cairn"))
    kind, *check = inspected["Docker"]["config"]["Healthcheck"]["Test"]
    assert kind == "CMD"
    inside = ["chroot", str(image), "/usr/bin/env", "-i", "PATH=/opt/cairn/bin:/usr/bin:/bin", *check]

    def passes() -> bool:
        return subprocess.run(inside, capture_output=True, check=False).returncode == 0

    assert not passes()
    with running(image, tmp_path, (free_port(), 8090)):
        assert comes_true_within(10, passes)


def test_it_runs_compiled_as_a_numeric_user(image: Path) -> None:
    """Kubernetes can see that it is not root, and the data path is compiled."""
    inspected = json.loads(buildah("inspect", "--type", "image", "localhost/cairn"))["Docker"]["config"]
    assert inspected["User"] == f"{USER}:{USER}"
    assert inspected["StopSignal"] == "SIGTERM"
    said = subprocess.run(
        ["chroot", str(image), "/opt/cairn/bin/cairn", "--version"], capture_output=True, text=True, check=True
    )
    assert "(compiled)" in said.stdout


def test_what_it_adds_to_its_base_is_small(image: Path) -> None:
    """It contains neither the demo nor a compiler."""
    size = sum(path.lstat().st_size for path in (image / "opt" / "cairn").rglob("*") if not path.is_dir())
    assert size < LAYER_BYTES_AT_MOST
    assert not (image / "opt" / "build").exists()
    assert not (image / "usr" / "bin" / "gcc").exists()
    assert not list((image / "opt" / "cairn").rglob("*llama*"))

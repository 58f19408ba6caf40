"""The container image: built by buildah on a base that debootstrap makes, and run by crun as a user without rights.

A base from debootstrap stands in for the one from a registry, by the Dockerfile's build argument.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.valkey import free_port

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".build" / "image"
CRUN = ["unshare", "--mount", "bash", str(Path(__file__).with_name("crun.sh"))]
BUILDAH = ["buildah", "--root", str(WORK / "storage"), "--runroot", str(WORK / "run"), "--storage-driver", "vfs"]
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
USER = 10001
READY_SECONDS = 10  # 1.5 on an idle machine; tests share theirs
POLL_SECONDS = 0.05
IMAGE_BYTES_AT_MOST = 150_000_000
CAIRN_BYTES_AT_MOST = 100_000_000

pytestmark = [
    pytest.mark.image,
    pytest.mark.skipif(os.getuid() != 0, reason="mounts need root"),
    pytest.mark.skipif(
        not all(map(which, ("buildah", "debootstrap", "crun"))), reason="needs buildah, debootstrap, crun"
    ),
]


@dataclass(frozen=True, slots=True)
class Image:
    """The unpacked image, and its configuration as Docker writes it."""

    root: Path
    config: dict[str, Any]


def buildah(*arguments: str) -> str:
    """Run buildah and return its output."""
    environ = {**os.environ, "BUILDAH_ISOLATION": "chroot"}  # noqa: TID251
    run = subprocess.run([*BUILDAH, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout.strip()


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The built image."""
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
    inspected = json.loads(buildah("inspect", "--type", "image", "localhost/cairn"))
    yield Image(Path(buildah("mount", container)), inspected["Docker"]["config"])
    buildah("rm", container)


class Container:
    """A container of the image: its root is read-only, and it has no capabilities, no home and the host's network."""

    def __init__(self, image: Image, folder: Path, command: Sequence[str]) -> None:
        self._crun = [*CRUN, "--root", str(folder / "crun")]
        self._folder = folder
        mounts = [_mount("/proc", "proc"), _mount("/dev", "tmpfs"), _mount("/tmp", "tmpfs", "mode=1777")]
        mounts += [_mount("/var/lib/cairn", str(folder / "state"), "bind", "rw")]
        mounts += [_mount("/etc/cairn", str(folder / "config"), "bind", "ro")]
        user, _, group = image.config["User"].partition(":")
        process = {
            "args": [*image.config["Entrypoint"], *command],
            "env": image.config["Env"],
            "cwd": image.config["WorkingDir"],
            "user": {"uid": int(user), "gid": int(group)},
            "capabilities": {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")},
            "noNewPrivileges": True,
        }
        specification = {
            "ociVersion": "1.0.2",
            "process": process,
            "root": {"path": str(image.root), "readonly": True},
            "mounts": mounts,
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc")]},
        }
        (folder / "config.json").write_text(json.dumps(specification))

    def start(self) -> subprocess.Popen[str]:
        """Run the command; what it writes goes to the process's standard error."""
        command = [*self._crun, "run", "--bundle", str(self._folder), "cairn"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def kill(self, signal_name: str) -> None:
        """Send a signal to the first process in it."""
        subprocess.run([*self._crun, "kill", "cairn", signal_name], check=False, capture_output=True)

    def passes(self, command: Sequence[str]) -> bool:
        """Return whether `command`, run in it, exits with 0."""
        return (
            subprocess.run([*self._crun, "exec", "cairn", *command], check=False, capture_output=True).returncode == 0
        )


def _mount(place: str, source: str, *options: str) -> dict[str, Any]:
    kind = "bind" if "bind" in options else source
    return {"destination": place, "type": kind, "source": source, "options": list(options)}


@contextmanager
def running(image: Image, folder: Path, ports: tuple[int, int]) -> Iterator[tuple[Container, subprocess.Popen[str]]]:
    """Run the image's own command, with a configuration that has these ports."""
    state, config = folder / "state", folder / "config"
    state.mkdir()
    os.chown(state, USER, USER)
    config.mkdir(mode=0o755)
    pools = [{"name": "local", "replicas": [{"url": "http://127.0.0.1:9"}]}]
    server = {"port": ports[0], "drain_accept_seconds": 0}
    (config / "cairn.yaml").write_text(json.dumps({"server": server, "admin": {"port": ports[1]}, "pools": pools}))
    container = Container(image, folder, image.config["Cmd"])
    process = container.start()
    try:
        yield container, process
    finally:
        container.kill("KILL")
        process.kill()
        process.communicate()


def output_of(image: Image, folder: Path, *command: str) -> str:
    """Run `cairn` with other arguments in a container; returns what it printed."""
    for name in ("state", "config"):
        (folder / name).mkdir()
    output, errors = Container(image, folder, command).start().communicate(timeout=30)
    assert output, errors
    return output


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


def test_it_becomes_ready_and_drains(image: Image, tmp_path: Path) -> None:
    """With a read-only root and a state folder it becomes ready, writes there only, and drains on SIGTERM."""
    ports = (free_port(), free_port())
    with running(image, tmp_path, ports) as (container, process):
        assert comes_true_within(READY_SECONDS, lambda: is_ready(ports[1]))
        assert [path.name for path in (tmp_path / "state").iterdir()] == [f"valkey-{ports[0]}"]
        container.kill("TERM")
        _, written = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "draining: requests may finish" in written
        assert "without a store" not in written


def test_its_health_check_passes_while_it_runs_and_fails_otherwise(image: Image, tmp_path: Path) -> None:
    """The command of HEALTHCHECK, run inside, on the admin port that the image exposes and on another."""
    kind, *check = image.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    elsewhere = [part.replace("8090", "9") for part in check]
    with running(image, tmp_path, (free_port(), 8090)) as (container, _):
        assert comes_true_within(READY_SECONDS, lambda: container.passes(check))
        assert not container.passes(elsewhere)


def test_it_runs_compiled_as_a_numeric_user(image: Image, tmp_path: Path) -> None:
    """Kubernetes can see that it is not root, and the data path is compiled."""
    assert image.config["User"] == f"{USER}:{USER}"
    assert image.config["StopSignal"] == "SIGTERM"
    assert "(compiled)" in output_of(image, tmp_path, "--version")


def test_it_is_small_and_has_nothing_else_in_it(image: Image) -> None:
    """It contains no demo, compiler, pip or shell; each source of Cairn and its packages is byte-compiled."""
    assert size_of(image.root) < IMAGE_BYTES_AT_MOST
    assert size_of(image.root / "opt" / "cairn") < CAIRN_BYTES_AT_MOST
    names = {path.name for path in image.root.rglob("*")}
    assert not names & {"gcc", "sh", "bash", "pip", "apt", "perl", "llama_cpp", "xllamacpp"}
    assert {"cairn", "valkey-server", "plotly.min.js", "ca-certificates.crt"} <= names
    sources = list((image.root / "opt" / "cairn" / "lib").rglob("*.py"))
    compiled = [path for path in sources if list(path.parent.glob(f"__pycache__/{path.stem}.cpython-*.pyc"))]
    assert len(compiled) == len(sources) > 1000


def test_its_debian_packages_are_named_for_scanners(image: Image) -> None:
    """Each library that was copied has its package's version in status.d, and its licence in /usr/share/doc."""
    described = list((image.root / "var" / "lib" / "dpkg" / "status.d").iterdir())
    assert {"libc6", "libssl3", "zlib1g"} <= {path.name for path in described}
    for path in described:
        assert re.search(r"^Version: \S+$", path.read_text(), re.M)
        assert (image.root / "usr" / "share" / "doc" / path.name).exists()


def test_its_bill_of_materials_names_every_package(image: Image) -> None:
    """All packages of the lock, in the locked versions, with licences."""
    check_bill_of_materials(image.root / "opt" / "cairn" / "sbom.cdx.json")


def test_a_release_has_a_bill_of_materials() -> None:
    """`make sbom` writes one for those who install the wheel."""
    written = ROOT / "dist" / "cairn_proxy.cdx.json"
    written.unlink(missing_ok=True)
    subprocess.run(["make", "--quiet", "--old-file", ".venv/.dev", "sbom"], cwd=ROOT, check=True, capture_output=True)
    check_bill_of_materials(written)


def check_bill_of_materials(path: Path) -> None:
    """Compare the file with requirements/otel.txt."""
    written = json.loads(path.read_text())
    assert written["metadata"]["component"]["name"] == "cairn-proxy"
    assert written["bomFormat"] == "CycloneDX"
    components: dict[str, Any] = {canonicalize_name(each["name"]): each for each in written["components"]}
    for name, version in locked_packages("otel"):
        assert components[name]["version"] == version
        assert components[name]["licenses"], name
        assert components[name]["purl"] == f"pkg:pypi/{name}@{version}"


def locked_packages(requirements: str) -> Iterator[tuple[str, str]]:
    """Yield name and version of each package of a file of requirements/ that is installed on this system."""
    for line in (ROOT / "requirements" / f"{requirements}.txt").read_text().splitlines():
        requirement = Requirement(line.rstrip("\\ ")) if "==" in line else None
        if requirement is not None and (requirement.marker is None or requirement.marker.evaluate()):
            yield canonicalize_name(requirement.name), next(iter(requirement.specifier)).version


def size_of(folder: Path) -> int:
    """Return the bytes of the files in `folder`, each file once."""
    files = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({(each.st_dev, each.st_ino): each.st_size for each in files}.values())

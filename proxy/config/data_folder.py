"""The folder for the files of the private Valkey, unless the configuration names one."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class DataFolder(NamedTuple):
    """A folder, and a warning if its files may not last; the warning is empty otherwise."""

    path: Path
    warning: str = ""


def data_folder(environ: Mapping[str, str], port: int) -> DataFolder:
    """Return the folder of the proxy that serves `port`; it need not exist yet.

    `XDG_DATA_HOME` decides, and then the home directory. Containers and services often run as a user without a home,
    or with a home that cannot be written. Cairn then uses a temporary folder, since without a store it would share no
    index between workers and keep no totals. Its name contains the user, so that users do not collide, and stays the
    same, so that totals and contexts outlast a restart. If another user was first to make it, it is not used
    (`cache.why_unsafe`).
    """
    name = f"valkey-{port}"
    if given := environ.get("XDG_DATA_HOME"):
        return DataFolder(Path(given) / "cairn" / name)
    home = environ.get("HOME")
    if home:
        folder = _in_home(Path(home))
        if can_be_made(folder):
            return DataFolder(folder / name)
    temporary = Path(tempfile.gettempdir()) / f"cairn-{os.getuid()}-{name}"
    problem = f"the home directory {home} is not writable" if home else "HOME is not set"
    advice = f"the files of the private Valkey are in {temporary}, which may be emptied when the machine restarts"
    return DataFolder(temporary, f"{problem}: {advice}; set redis.folder or XDG_DATA_HOME to a folder that lasts")


def _in_home(home: Path) -> Path:
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "Cairn"
    return home / ".local" / "share" / "cairn"


def can_be_made(folder: Path) -> bool:
    """Return whether this process may make `folder`, or write to it if it exists."""
    return os.access(nearest_existing(folder), os.W_OK | os.X_OK)


def nearest_existing(folder: Path) -> Path:
    """Return `folder`, or the deepest of its parents that exists and that this process may see."""
    return next((path for path in (folder, *folder.parents) if os.path.exists(path)), Path("/"))

"""Check that nobody else can put files where a private Valkey keeps its own."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def why_unsafe(folder: Path, user: int | None = None) -> str:
    """Return why another user may have made `folder`, or could write to it; empty if none could.

    This matters only below a directory that everybody may write to, such as /tmp: there another user can be first to
    make a folder with a predictable name, even for root. Above it, the operator has decided who may write.

    Args:
        folder: the folder; it need not exist yet.
        user: number of the user who will use it; None for this process's.

    Raises:
        OSError: the folder cannot be examined.
    """
    owner = os.geteuid() if user is None else user
    whole = folder.absolute()
    is_exposed = False
    for path in (*reversed(whole.parents), whole):
        try:
            found = path.lstat() if is_exposed else path.stat()
        except FileNotFoundError:
            return ""
        if is_exposed and (problem := _problem(found, owner, is_last=path == whole)):
            return f"{path} {problem}"
        is_exposed = is_exposed or bool(found.st_mode & stat.S_IWOTH)
    return ""


def _problem(found: os.stat_result, owner: int, *, is_last: bool) -> str:
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if found.st_uid != owner and (is_last or found.st_uid != 0):
        return f"belongs to another user ({found.st_uid})"
    others_write = found.st_mode & (stat.S_IWOTH | (stat.S_IWGRP if is_last else 0))
    if others_write and (is_last or not found.st_mode & stat.S_ISVTX):  # if sticky, what is in it cannot be replaced
        return "can be written to by other users"
    return ""

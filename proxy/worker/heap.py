"""Tell glibc when to keep freed memory and when to return it. With another C library nothing is changed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, Final

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_MMAP_FROM_BYTES: Final = 32 * 1024 * 1024  # the largest value that glibc accepts; larger blocks are unmapped at once
_KEPT_FREE_BYTES: Final = 64 * 1024 * 1024  # freed memory kept at the end of the heap while bodies come and go
_KEPT_AT_TRIM_BYTES: Final = 8 * 1024 * 1024  # of it when the heap is trimmed; getting the rest back takes 6 ms


def keep_freed_memory() -> None:
    """Let glibc keep the pages of freed bodies; otherwise each body of 2 MB causes 390 page faults, 0.2 ms.

    All threads share one heap. Otherwise each thread that long bodies are read in has its own, with its own freed
    memory, and as such threads start only when all others are busy, a worker would grow in steps for days.
    """
    set_option = _of_libc("mallopt")
    if set_option is not None:
        set_option(_M_ARENA_MAX, 1)  # Python's lock already lets only one thread allocate at a time
        set_option(_M_MMAP_THRESHOLD, _MMAP_FROM_BYTES)
        set_option(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)


def return_freed_memory() -> None:
    """Return the freed pages between blocks in use, which glibc never does by itself, and all but 8 MB at the end.

    Bodies and what is kept of requests lie in one heap, so that without this a third of it can be such gaps, and one
    burst of large bodies would be kept for good. It takes up to 10 ms, without Python's lock.
    """
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(_KEPT_AT_TRIM_BYTES))


def _of_libc(name: str) -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None

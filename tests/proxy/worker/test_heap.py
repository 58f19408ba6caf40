"""The settings of glibc's heap."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_HEAPS_WITH_THREADS = """
import ctypes, os, tempfile, threading
from proxy.worker.heap import keep_freed_memory

if {is_set}:
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
together = threading.Barrier(4)

def hold():
    held = bytearray(100_000)
    together.wait()
    together.wait()
    del held

threads = [threading.Thread(target=hold) for _ in range(3)]
for thread in threads:
    thread.start()
together.wait()
with tempfile.TemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fdopen(os.dup(file.fileno()), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    file.seek(0)
    print(file.read().count(b"<heap nr="))
together.wait()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="sets options of glibc")
def test_threads_allocate_from_the_heap_that_the_event_loop_uses() -> None:
    """Threads that hold memory at the same time have one heap in all, and one each where nothing is set."""
    heaps = [
        int(subprocess.check_output([sys.executable, "-c", _HEAPS_WITH_THREADS.format(is_set=is_set)]))
        for is_set in (True, False)
    ]
    assert heaps[0] == 1
    assert heaps[1] > 1

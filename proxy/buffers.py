"""Allocate buffers without filling them with zeros first, which takes 20 us for half a megabyte.

Until a buffer is filled it contains whatever the memory held before, so the caller must fill all of it before
anything reads it. It uses CPython's C interface, because no class offers this, and is not compiled: mypyc does
not support ctypes.
"""

from __future__ import annotations

import ctypes

_make = ctypes.pythonapi.PyByteArray_FromStringAndSize
_make.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)
_make.restype = ctypes.py_object


def uninitialized_bytearray(length: int) -> bytearray:
    """Return a bytearray of `length` bytes with arbitrary values. Raises MemoryError."""
    buffer: bytearray = _make(None, length)
    return buffer

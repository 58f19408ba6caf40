"""Find the offset of a raw value in the body from which it was decoded.

msgspec's `Raw` values point into the body, but Python cannot ask for their offset. A search for their bytes might
find an equal text elsewhere, so the two memory addresses are subtracted, which is exact and takes 2 us for any
size.
"""

from __future__ import annotations

import ctypes

import msgspec

from proxy.model import Body


class _Buffer(ctypes.Structure):
    """`Py_buffer` of the stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_Buffer),)
_release_buffer.restype = None


def _address(value: Body | memoryview | msgspec.Raw) -> int:
    buffer = _Buffer()
    _get_buffer(value, ctypes.byref(buffer), 0)
    address: int = buffer.buf or 0
    _release_buffer(ctypes.byref(buffer))
    return address


def span_of(body: Body, part: memoryview | msgspec.Raw) -> tuple[int, int]:
    """Return start and end of `part`, a view into `body`, as offsets in bytes; raise ValueError if it is not one."""
    start = Offsets(body).of(part)
    if start < 0:
        raise ValueError("the part does not lie in this body")
    return start, start + len(memoryview(part))


class Offsets:
    """Finds the offsets of many parts of one body, whose own address is looked up once."""

    __slots__ = ("_address", "_size_bytes")

    def __init__(self, body: Body) -> None:
        self._address = _address(body)
        self._size_bytes = len(body)

    def of(self, part: memoryview | msgspec.Raw) -> int:
        """Return the offset of `part`; -1 if it is not a view into the body."""
        start = _address(part) - self._address
        return start if 0 <= start <= self._size_bytes - len(memoryview(part)) else -1

"""Room without zeros."""

from proxy.buffers import uninitialized_bytearray


def test_it_is_a_bytearray_of_that_length_to_be_filled() -> None:
    """As any other, once it is full."""
    for length in (0, 1, 4_096, 3_000_000):
        room = uninitialized_bytearray(length)
        assert type(room) is bytearray
        assert len(room) == length
        room[:] = b"x" * length
        assert room == bytearray(b"x" * length)

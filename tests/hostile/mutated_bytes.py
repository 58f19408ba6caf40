"""Change bytes of a message at random."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def change_at(random: Random, message: bytearray, at: int, inserted: Sequence[bytes]) -> None:
    """Change, insert, leave out or double bytes of `message` at one place; `inserted` are pieces to choose from."""
    kind = random.randrange(4)
    if kind == 0:
        message[at : at + 1] = bytes([random.randrange(256)])
    elif kind == 1:
        message[at:at] = random.choice(inserted)
    elif kind == 2:
        del message[at : at + random.randrange(1, 20)]
    else:
        message[at:at] = message[at : at + random.randrange(1, 200)]

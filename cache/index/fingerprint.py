"""Data type of a prompt as the index sees it: its boundaries and the chained hashes there."""

from __future__ import annotations

from array import array

import msgspec

MediaPart = tuple[int, int, int]
"""Start and end of an image, sound or file, in bytes from the start of the prompt, and its estimated tokens."""


class Fingerprint(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The boundaries of one prompt: `hashes` (array 'Q', chained) and `ends` (array 'I', bytes from its start).

    `media` are its parts, in order, whose tokens do not follow from their bytes.
    """

    hashes: array[int]
    ends: array[int]
    media: tuple[MediaPart, ...] = ()

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def size_bytes(self) -> int:
        """Bytes up to the last boundary, which are all of them."""
        return self.ends[-1] if self.ends else 0

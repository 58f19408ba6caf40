"""Data type of a prompt as the index sees it: its boundaries and the chained hashes there."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Final

from mypy_extensions import mypyc_attr

MediaPart = tuple[int, int, int]
"""Start and end of an image, sound or file, in bytes from the start of the prompt, and its estimated tokens."""


@mypyc_attr(acyclic=True)
@dataclass(init=False, eq=False)
class Fingerprint:
    """The boundaries of one prompt: `hashes` (array 'Q', chained) and `ends` (array 'I', bytes from its start).

    `media` are its parts, in order, whose tokens do not follow from their bytes.
    """

    hashes: Final[array[int]]
    ends: Final[array[int]]
    media: Final[tuple[MediaPart, ...]]

    def __init__(
        self,
        hashes: array[int],
        ends: array[int],
        media: tuple[MediaPart, ...] = (),
    ) -> None:
        self.hashes = hashes
        self.ends = ends
        self.media = media

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def size_bytes(self) -> int:
        """Bytes up to the last boundary, which are all of them."""
        return self.ends[-1] if self.ends else 0

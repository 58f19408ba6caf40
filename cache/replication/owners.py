"""What lives on one replica: responses, files and whatever else an upstream made and named, by id.

Pure and bounded, the oldest forgotten first; the journal shares it. It must not know what the things are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

OWNERS_AT_MOST = 65_536
"""Ids remembered, some 10 MB; a forgotten one is asked for wherever least is to do."""

ID_CHARACTERS_AT_MOST = 256


class ObjectLocations:
    """Ids to the names of the replicas where they were made."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    def of(self, made_id: str) -> str | None:
        """The replica where `made_id` was made, None where nobody knows."""
        return self._names.get(made_id)

    def in_path(self, path: str) -> str | None:
        """The replica of the first segment of `path` that is a known id."""
        if not self._names:
            return None
        for segment in path.split("/"):
            if name := self._names.get(segment):
                return name
        return None

    def learn(self, made_id: str, name: str) -> bool:
        """`made_id` was made at the replica `name`; False where that was known, or cannot be an id."""
        if not 0 < len(made_id) <= ID_CHARACTERS_AT_MOST or self._names.get(made_id) == name:
            return False
        self._names.pop(made_id, None)
        self._names[made_id] = name
        if len(self._names) > OWNERS_AT_MOST:
            del self._names[next(iter(self._names))]
        return True

    def chunks(self, size: int) -> Iterator[dict[str, str]]:
        """All of it, the oldest first, in parts of at most `size`; changes in between may or may not be in it."""
        rest = iter(tuple(self._names.items()))
        while part := dict(islice(rest, size)):
            yield part

"""Map the ids of objects that upstreams made (responses, files) to the names of replicas.

Pure and bounded; the oldest ids are forgotten first. The journal shares the map among workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

OWNERS_AT_MOST = 65_536
"""Ids remembered unless configured, about 10 MB; a request for a forgotten one goes to the least loaded replica."""

ID_CHARACTERS_AT_MOST = 256


class ObjectLocations:
    """Maps object ids to the names of the replicas that have them."""

    def __init__(self) -> None:
        self._most = OWNERS_AT_MOST
        self._names: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    def limit(self, most: int) -> None:
        """Set the number of ids that are remembered, before there are any."""
        self._most = most

    def of(self, made_id: str) -> str | None:
        """Return the name of the replica that has `made_id`, None if unknown."""
        return self._names.get(made_id)

    def in_path(self, path: str) -> str | None:
        """Return the name of the replica for the first segment of `path` that is a known id."""
        if not self._names:
            return None
        for segment in path.split("/"):
            if name := self._names.get(segment):
                return name
        return None

    def learn(self, made_id: str, name: str) -> bool:
        """Remember that `made_id` is on the replica `name`; return False if that is known or the id is not valid."""
        if not 0 < len(made_id) <= ID_CHARACTERS_AT_MOST or self._names.get(made_id) == name:
            return False
        if not made_id.isprintable():  # lone surrogates, which cannot be encoded, are not printable
            return False
        self._names.pop(made_id, None)
        self._names[made_id] = name
        if len(self._names) > self._most:
            del self._names[next(iter(self._names))]
        return True

    def chunks(self, size: int) -> Iterator[dict[str, str]]:
        """Yield all entries, oldest first, in parts of at most `size`. Changes made meanwhile may be missing."""
        rest = iter(tuple(self._names.items()))
        while part := dict(islice(rest, size)):
            yield part

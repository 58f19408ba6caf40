"""What lives on one replica: responses, files and whatever else an upstream made and named, by id.

Bounded, the oldest forgotten first. It must not know what the things are. `publish` tells the other workers.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

OWNERS_AT_MOST = 65_536
"""Ids remembered, some 10 MB; a forgotten one is asked for wherever least is to do."""

_ID_BYTES_AT_MOST = 256


class _Made(msgspec.Struct, gc=False):
    id: str | None = None


_decode_made = msgspec.json.Decoder(_Made).decode


class Owners:
    """Ids to replica names. `publish(id, name)` is called for each that was learned here."""

    def __init__(self, publish: Callable[[str, str], None]) -> None:
        self._publish = publish
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

    def learn(self, made_id: str, name: str) -> None:
        """`made_id` was made at the replica `name`; the others are told."""
        if 0 < len(made_id) <= _ID_BYTES_AT_MOST and self._names.get(made_id) != name:
            self.heard(made_id, name)
            self._publish(made_id, name)

    def learn_from(self, answer: bytes, name: str) -> None:
        """The same, with the id read from the JSON object that told of it; anything else is passed over."""
        try:
            made_id = _decode_made(answer).id
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if made_id:
            self.learn(made_id, name)

    def heard(self, made_id: str, name: str) -> None:
        """Another worker learned it."""
        self._names.pop(made_id, None)
        self._names[made_id] = name
        if len(self._names) > OWNERS_AT_MOST:
            del self._names[next(iter(self._names))]

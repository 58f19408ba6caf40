"""Find what stored contexts name: objects of an upstream, and models in their tools. Remembered by their digest."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from cache import Content
from proxy.wire.named_models import further_models
from proxy.wire.references import Reference, references

LONG_IF_DECODED_BYTES: Final = 256 * 1024
"""Length from which a body is read in a thread if it may have to be decoded whole, at up to 0.3 s per MB."""

REMEMBERED_AT_MOST: Final = 1024  # contexts; most name nothing


class Names(NamedTuple):
    """The objects and models that a context names; None if that cannot be read."""

    objects: frozenset[Reference] | None
    models: tuple[str, ...] | None


class InsertedNames:
    """The names in stored contexts, read once for each. One per worker."""

    def __init__(self) -> None:
        self._known: dict[bytes, Names] = {}
        self._reads_aside = asyncio.Semaphore(1)  # several threads would take the interpreter from the loop in turn

    async def of(self, content: Content) -> Names:
        """Return what the tools and messages of a context name. Raises BadRequest if it has too many values."""
        names = self._known.get(content.digest)
        if names is None:
            if content.size_bytes < LONG_IF_DECODED_BYTES:
                names = _names(content)
            else:
                async with self._reads_aside:
                    names = await asyncio.to_thread(_names, content)
            if len(self._known) >= REMEMBERED_AT_MOST:
                self._known.clear()
            self._known[content.digest] = names
        return names


def _names(content: Content) -> Names:
    tools = content.tools or b"[]"
    models = further_models(b'{"tools":%b}' % tools, b"")
    objects = references(b'{"tools":%b,"messages":[%b]}' % (tools, content.messages), (tools,))
    return Names(objects, None if models is None else tuple(models))

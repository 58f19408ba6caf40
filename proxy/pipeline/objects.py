"""Remember which replica has each object that a client created, and count background responses once.

A background response is answered at once and finished later. Its tokens are counted when a GET or a stream first
brings them, at any worker; that they were counted is shared like the location of the object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Protocol

from cache import ObjectLocations
from proxy.fleet.pools import ServedPool
from proxy.model import Access, Endpoint
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.reader import checked_keys, object_key
from proxy.records import Call, Prompt
from proxy.wire.item_ids import StreamedItemIds, item_ids
from proxy.wire.schemas import DECODE_ERRORS, CreatedObject, decode_created, decode_raw_members
from proxy.wire.sse import StreamTap
from proxy.wire.usage import created_object, read_response

_RESPONSE_ID = re.compile(rb'data: ?\{[^{}\[\]]*?"response"\s*:\s*\{[^{}\[\]]*?"id"\s*:\s*"([^"\\]+)"')
"""The id of the response in its first event. An object or array before it may be the client's own, in which it could
write anything, so nothing is found behind one: the event is then decoded."""

_CHUNK_ID = re.compile(rb'data: ?\{[^{}\[\]]*?"id"\s*:\s*"([^"\\]+)"')
"""The id of a chat completion in its first chunk."""

_NEW_OBJECT = re.compile(r"/v1/[^/]+")
_IN_BACKGROUND = re.compile(rb'"background"\s*:\s*true')
_STREAM_STARTS: Final = (b"event:", b"data:")
_READ_METHODS = frozenset({"GET", "POST"})
_RESPONSES_PATH: Final = "/v1/responses/"
_BATCHES_PATH: Final = "/v1/batches/"

# constants: the member of an enum is looked up in Python
_RESPONSES: Final = Endpoint.RESPONSES
_OTHER: Final = Endpoint.OTHER


def _id_in_event(opening: bytes, *, of_chat: bool) -> str | None:
    """Return the id in the first whole event of a stream that has one; None if there is none yet."""
    for line in opening.split(b"\n")[:-1]:
        if not line.startswith(b"data:"):
            continue
        try:
            event = line[5:] if of_chat else decode_raw_members(line[5:]).get("response")
            made = None if event is None else decode_created(event)
        except DECODE_ERRORS:
            continue
        if made is not None and isinstance(made.id, str) and made.id:
            return made.id
    return None


class ObjectJournal(Protocol):
    """The journal, as far as it shares the places of objects."""

    @property
    def locations(self) -> ObjectLocations:
        """The replicas where objects were created, by `object_key`."""
        ...

    def own(self, made_id: str, replica: int) -> None:
        """Share that an object was created at a replica."""
        ...


class CreatedObjects:
    """Learns the locations of objects from responses. One per worker."""

    def __init__(self, journal: ObjectJournal) -> None:
        self._journal = journal

    @staticmethod
    def may_tell(call: Call, prompt: Prompt | None = None) -> bool:
        """Return True if the response to `call`, which has this prompt, may be about an object."""
        return call.method in _READ_METHODS and (
            call.endpoint is _RESPONSES
            or (call.endpoint is _OTHER and call.access is not Access.INFERENCE)
            or (prompt is not None and prompt.is_stored)
        )

    def note(self, exchange: Exchange, body: bytes) -> None:
        """Learn from the whole body of a successful response; a background response gives the exchange its usage."""
        call = exchange.call
        if call.method == "GET" and call.target.startswith(_RESPONSES_PATH) and call.object_id:
            self._count_once(exchange, body, call.object_id)
            if call.target.partition("?")[0] == _RESPONSES_PATH + call.object_id:
                self._own_items(exchange, body)
        elif (created := created_object(body)) is None:
            return
        elif call.method == "POST":
            self._note_created(exchange, created, body)
        elif call.target == f"{_BATCHES_PATH}{call.object_id}":
            # of the bodies that are read, only these name new objects; the content of a file could name any
            for object_id in created.file_ids():
                self._own(exchange, object_id)

    def _note_created(self, exchange: Exchange, created: CreatedObject, body: bytes) -> None:
        for object_id in created.ids():
            if exchange.has_checked_lines and exchange.pool is not None and exchange.attempt is not None:
                for key in checked_keys(exchange.call.tenant, exchange.pool, object_id):
                    self._journal.own(key, exchange.attempt.replica)
            self._own(exchange, object_id)
        if exchange.call.endpoint is Endpoint.RESPONSES:
            self._own_items(exchange, body)
            if created.background is True and exchange.usage is None:
                self._note_background(exchange, created)

    def note_opening(self, exchange: Exchange, opening: bytes) -> bool:
        """Learn from the first bytes of a stream whose result is kept as an object; False if they show no id yet."""
        of_chat = exchange.call.endpoint is Endpoint.CHAT
        found = _CHUNK_ID.search(opening) if of_chat else _RESPONSE_ID.search(opening)
        object_id = _id_in_event(opening, of_chat=of_chat) if found is None else found[1].decode(errors="replace")
        if object_id is None:
            return False
        self._own(exchange, object_id)
        if not of_chat and _IN_BACKGROUND.search(opening):
            exchange.background_id = object_id
            self._mark(exchange, "background", object_id)
        return True

    def note_items(self, exchange: Exchange, ids: Iterable[str]) -> None:
        """Learn the ids of items of a response, which a later request of the same client may name."""
        for item_id in ids:
            self._own(exchange, item_id)

    @staticmethod
    def wants_items(exchange: Exchange) -> bool:
        """Return True if the ids of a response's items are checked later, since only Cairn knows whose they are."""
        return exchange.pool is not None and exchange.pool.shares_key

    def note_end(self, exchange: Exchange) -> None:
        """Learn from the end of a stream: if it brought the usage of a background response, that is now counted."""
        if exchange.background_id is not None and exchange.usage is not None:
            self._mark(exchange, "counted", exchange.background_id)

    def _own_items(self, exchange: Exchange, body: bytes) -> None:
        if self.wants_items(exchange):
            streamed = body.lstrip().startswith(_STREAM_STARTS)
            self.note_items(exchange, StreamedItemIds().feed(body) if streamed else item_ids(body))

    def _note_background(self, exchange: Exchange, created: CreatedObject) -> None:
        for object_id in created.ids():
            exchange.background_id = object_id
            self._mark(exchange, "background", object_id)

    def _count_once(self, exchange: Exchange, body: bytes, object_id: str) -> None:
        if not self._is_marked(exchange, "background", object_id) or self._is_marked(exchange, "counted", object_id):
            return
        if body.lstrip().startswith(_STREAM_STARTS):
            tap = StreamTap(Endpoint.RESPONSES)
            tap.feed(body)
            exchange.usage, exchange.model = tap.usage, tap.result().model
        else:
            read = read_response(body, Endpoint.RESPONSES)
            exchange.usage, exchange.model = read.usage, read.model
        if exchange.usage is not None:
            self._mark(exchange, "counted", object_id)

    def _own(self, exchange: Exchange, key: str, prefix: str = "") -> None:
        if exchange.attempt is not None and exchange.pool is not None:
            name = object_key(exchange.call.tenant, exchange.pool, key)
            if self._is_for_all(exchange, exchange.pool):
                name = key  # where it is, but not whose
            self._journal.own(prefix + name, exchange.attempt.replica)

    def _is_for_all(self, exchange: Exchange, pool: ServedPool) -> bool:
        """Return True if the operator opened the path to all clients, so that a response may name anyone's object.

        A file in a vector store, for example, has the id of the file that was put there. What is new comes from a
        path such as /v1/vector_stores.
        """
        call = exchange.call
        if call.access is not Access.CONFIGURED:
            return False
        if call.object_id:
            return self._journal.locations.of(object_key(call.tenant, pool, call.object_id)) is None
        return _NEW_OBJECT.fullmatch(call.target.partition("?")[0]) is None

    def _mark(self, exchange: Exchange, mark: str, object_id: str) -> None:
        self._own(exchange, object_id, f"{mark}:")

    def _is_marked(self, exchange: Exchange, mark: str, object_id: str) -> bool:
        if exchange.pool is None:
            return False
        name = object_key(exchange.call.tenant, exchange.pool, object_id)
        return self._journal.locations.of(f"{mark}:{name}") is not None

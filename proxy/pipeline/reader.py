"""Phase 2: find out which model and which objects a request is about, check them, and choose the pool.

At a replica whose key is not the client's own, this is all that separates clients: a model that a client may not use,
an object of another client and a path that is neither inference nor an object are refused here.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from cache import ObjectLocations
from proxy.errors import BadRequest, Forbidden, NotFound, UnknownObject
from proxy.fleet.pools import Pools, ServedPool
from proxy.model import Access, Body, Endpoint
from proxy.patterns import matches_any
from proxy.pipeline.admission import check_model
from proxy.pipeline.batch_files import CheckedFile
from proxy.pipeline.dispatch import Upload
from proxy.pipeline.exchange import Exchange, TakesLong
from proxy.pipeline.inserted_names import LONG_IF_DECODED_BYTES, InsertedNames
from proxy.records import Call, Prompt, Tenant
from proxy.wire import multipart, named_models
from proxy.wire import request as wire_request
from proxy.wire.batch_lines import line_models, line_references
from proxy.wire.cache_salt import salted_by
from proxy.wire.decode import content_encoding
from proxy.wire.json_cuts import text_with_keys
from proxy.wire.references import (
    CONTINUING,
    FURTHER,
    REFERENCES_MOST,
    Reference,
    first_object_id,
    form_references,
    has_members,
    has_members_in_other_case,
    item_references,
    listed_items,
    may_refer,
    references,
)

LONG_BYTES: Final = 4 * 1024 * 1024
"""Length from which a body is read in a thread: 32 MB take a tenth of a second, and more if they are an attack."""

_COMMAS_INLINE: Final = 50_000
"""Most commas of a body whose outermost keys are looked at on the event loop: with as many keys this takes 10 ms."""

_EMBEDDINGS: Final = Endpoint.EMBEDDINGS
_INFERENCE: Final = Endpoint.INFERENCE
_RESPONSES: Final = Endpoint.RESPONSES
_FILES: Final = "/v1/files"
_BATCHES: Final = "/v1/batches"
_VIDEOS: Final = "/v1/videos"
_MESSAGE_BATCHES: Final = "/v1/messages/batches"
_RUNNING: Final = frozenset({_VIDEOS, _MESSAGE_BATCHES})  # whose creation runs models that its body names
_RESPONSES_PATH: Final = "/v1/responses/"
_FILE_PATHS: Final = "/v1/files/"
_KEEPING: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS"})  # methods that leave a file's content as it is
_CONTENT_PATHS: Final = ("/v1/containers/", "/v1/uploads/")  # below which forms bring content that runs nothing
_FURTHER_ELSEWHERE: Final = FURTHER | CONTINUING
_URL_ENCODED: Final = b"application/x-www-form-urlencoded"


class RequestReader:
    """Reads requests. One per worker.

    Args:
        pools: the pools in force.
        number_of: returns the number of a replica by its name, None if there is none of that name.
        lists: returns whether a replica of a pool, given by its name, lists a model.
        locations: the replicas where objects were created, by the keys of `object_key`.
        allowed_paths: patterns of paths that every client may use at any replica.
    """

    def __init__(
        self,
        pools: Pools,
        number_of: Callable[[str], int | None],
        lists: Callable[[str, str], bool],
        locations: ObjectLocations,
        allowed_paths: Sequence[str] = (),
    ) -> None:
        self._pools = pools
        self._number_of = number_of
        self._lists = lists
        self._locations = locations
        self._allowed_paths = tuple(allowed_paths)
        self._inserted = InsertedNames()
        self._checks_aside = asyncio.Semaphore(1)  # several threads would take the interpreter from the loop in turn

    @property
    def _checks_objects(self) -> bool:
        return any(pool.shares_key for pool in self._pools.all)

    def read(self, exchange: Exchange) -> None:
        """Set the exchange's prompt, model, pool, edits and pinned replica.

        Raises:
            BadRequest: the body cannot be read.
            Forbidden: the client may not use this model or path.
            NotFound: no pool serves the model, or the client has created no such object.
            TakesLong: it must be called in a thread, with `exchange.is_read_aside` set.
        """
        if len(exchange.call.body) >= LONG_IF_DECODED_BYTES and not exchange.is_read_aside:
            self._check_duration(exchange.call)
        endpoint = exchange.call.endpoint
        if endpoint.is_generation or endpoint is _EMBEDDINGS:
            self._read_prompt(exchange)
        elif endpoint is _INFERENCE:
            self._read_model(exchange)
        elif exchange.call.path_model is not None:
            self._read_model_path(exchange, exchange.call.path_model)
        else:
            self._read_path(exchange)

    def _check_duration(self, call: Call) -> None:
        """Raise TakesLong if reading this body could block the event loop for long."""
        endpoint = call.endpoint
        reads_spans = endpoint.is_generation or endpoint is _EMBEDDINGS
        if len(call.body) >= LONG_BYTES or call.tenant.is_limited or not reads_spans:
            raise TakesLong
        if self._checks_objects:
            text = text_with_keys(call.body)
            if text.count(b",") > _COMMAS_INLINE or may_refer(text) or has_members(text, _unread(call)):
                raise TakesLong

    async def check_inserted(self, exchange: Exchange) -> None:
        """Check what the stored context names that was inserted into the prompt, as if the client had sent it.

        Its upload was not checked so: it may have come from another client of the tenant, or be meant for another
        pool. Raises BadRequest, Forbidden and UnknownObject.
        """
        stored, pool, tenant = exchange.stored, exchange.pool, exchange.call.tenant
        if stored is None or pool is None or not (pool.shares_key or tenant.is_limited):
            return
        named = await self._inserted.of(stored.content)
        if tenant.is_limited:
            _check_models(tenant, named.models)
        if pool.shares_key:
            if named.objects is None:
                raise BadRequest(
                    "The stored context has a member twice that names an object, names more than "
                    f"{REFERENCES_MOST:,} objects, or writes letters as escapes."
                )
            self._check_owned(exchange.call, pool, named.objects)

    def checked(self, exchange: Exchange, upload: Upload, news: Callable[[], Awaitable[None]]) -> Upload:
        """Return an upload that passes; a file is checked meanwhile, so that it can be the input of a batch.

        `news` waits for what other workers have announced. Raises BadRequest and Forbidden.
        """
        call, pool = exchange.call, exchange.pool
        if pool is None or not pool.shares_key or call.access is not Access.CREATE or _path(call) != _FILES:
            return upload
        is_limited = call.tenant.is_limited
        if content_encoding(call.headers):
            if is_limited:
                raise _unreadable()
            return upload  # it cannot be read as it passes, and so cannot be the input of a batch

        def on_checked() -> None:
            exchange.has_checked_lines = True

        pieces = CheckedFile(
            upload.pieces,
            _content_type(call),
            lambda line: self._check_line(call, pool, line),
            on_checked,
            unreadable=_unreadable() if is_limited else BadRequest("The form cannot be read."),
            must_be_read=is_limited,
            room=upload.room,
            news=news,
            aside=self._checks_aside,
        )
        return dataclasses.replace(upload, pieces=pieces)

    def _check_line(self, call: Call, pool: ServedPool, line: bytes) -> None:
        """Raise CairnError if the client may not send the request of this line of a file."""
        if call.tenant.is_limited:
            _check_models(call.tenant, line_models(line))
        named = line_references(line)
        if named is None:
            raise BadRequest(
                "it is not valid JSON in UTF-8 with a request as its body, is for a path that runs no model, has a "
                f"member twice that names an object, names more than {REFERENCES_MOST:,} objects, or writes letters "
                "as escapes."
            )
        self._check_owned(call, pool, named)

    # -- paths with a model in the body

    def _read_prompt(self, exchange: Exchange) -> None:
        call = exchange.call
        prompt = wire_request.read(call.body, call.endpoint, model=call.path_model)
        exchange.prompt = prompt
        exchange.model = prompt.model or None
        pool = exchange.pool = self._pool_for(call, exchange.model)
        if call.tenant.is_limited:
            _check_further_models(call)
        if pool.shares_key:
            self._check_references(call, pool, prompt.referring, _continued(call, prompt), _unread(call))
        if self._locations:
            exchange.pinned_replica = self._number_in(pool, self._named_in(call, prompt))
        if pool.sends_cache_salt and pool.isolated:
            exchange.edits = (salted_by(prompt.body, call.tenant.id.encode()),)

    def _named_in(self, call: Call, prompt: Prompt) -> str | None:
        """Return the name of the replica that has what a prompt continues, else a file or container that it uses."""
        named = prompt.pinned_to or wire_request.first_file_id(call.body)
        if not named and prompt.names:
            named = prompt.names[0][1]
        if not named and prompt.referring:
            named = first_object_id(prompt.referring)
        return self._locate(call.tenant, named) if named else None

    def _read_model(self, exchange: Exchange) -> None:
        call = exchange.call
        content_type = _content_type(call)
        exchange.model = call.path_model or named_models.model_of(call.body, content_type)
        pool = exchange.pool = self._pool_for(call, exchange.model)
        if call.tenant.is_limited:
            _check_further_models(call)
        if pool.shares_key:
            self._check_named_objects(call, pool)
        if self._locations and call.target.startswith(_RESPONSES_PATH):  # what it compacts is at one replica
            name = self._located(call.tenant, references(call.body, (call.body,)))
            exchange.pinned_replica = self._number_in(pool, name)

    def _pool_for(self, call: Call, model: str | None) -> ServedPool:
        """Return the pool that serves `model`; without a model the only pool, whose upstream then decides."""
        if model is not None:
            check_model(call.tenant, model)
            return self._pools.serving(model)
        if call.tenant.is_limited or len(self._pools.all) != 1:
            if multipart.is_form(_content_type(call)):
                raise BadRequest("The form has no field `model` that can be read.", param="model")
            raise BadRequest("model is missing", param="model")
        return self._pools.all[0]

    def _check_references(
        self,
        call: Call,
        pool: ServedPool,
        members: Iterable[memoryview | Body],
        known: Iterable[Reference],
        unread: frozenset[str] = frozenset(),
    ) -> Iterable[Reference]:
        _check_charset(call)
        found = references(call.body, members, unread)
        if found is None:
            raise BadRequest(
                "The body is not valid JSON in UTF-8, has a member twice that names an object, names more than "
                f"{REFERENCES_MOST:,} objects, or writes letters as escapes."
            )
        named = (*known, *found)
        self._check_owned(call, pool, named)
        return named

    def _check_owned(self, call: Call, pool: ServedPool, named: Iterable[Reference]) -> None:
        for reference in named:
            shared = matches_any(f"/v1/{reference.collection}/{reference.object_id}", self._allowed_paths)
            if not shared and self._locations.of(object_key(call.tenant, pool, reference.object_id)) is None:
                raise _unknown_object()

    def _check_named_objects(self, call: Call, pool: ServedPool) -> Iterable[Reference]:
        """Return the objects that a body which is not a prompt names.

        Raises UnknownObject if the client may not use one of them, Forbidden if one is the input of a batch and was
        not checked as such, and BadRequest.
        """
        content_type = _content_type(call)
        if not call.body:
            return ()
        if multipart.is_form(content_type):
            _check_charset(call)
            in_form = form_references(call.body, content_type)
            if in_form is None:
                raise BadRequest("The form cannot be read.")
            self._check_owned(call, pool, in_form)
            named: Iterable[Reference] = in_form
        elif content_type[: len(_URL_ENCODED)].lower() == _URL_ENCODED:
            raise BadRequest("Send the body with the content-type application/json or multipart/form-data.")
        else:
            named = self._check_references(call, pool, (call.body,), item_references(listed_items(call.body)))
        if inputs := [each for each in named if each.is_input]:
            self._check_input(call, pool, inputs)
        return named

    # -- paths of a model

    def _read_model_path(self, exchange: Exchange, model: str) -> None:
        call = exchange.call
        exchange.model = model
        check_model(call.tenant, model)
        pool = exchange.pool = self._pools.serving(model)
        if not pool.shares_key:
            return
        if call.access is not Access.INFERENCE:
            self._check_access(call, pool)
        elif "/" in model and not self._is_model(call, pool, model):
            raise NotFound("No such model is served here; GET /v1/models lists those that are.", param="model")

    def _is_model(self, call: Call, pool: ServedPool, model: str) -> bool:
        """Return whether a text with a slash is the name of a model, and not of something that lies below a model."""
        is_allowed = not call.tenant.is_limited and matches_any(_path(call), self._allowed_paths)
        return is_allowed or model in pool.models or self._lists(pool.name, model)

    # -- paths with an object, or with neither

    def _read_path(self, exchange: Exchange) -> None:
        call = exchange.call
        name = self._named_location(call)
        pool = self._pool_of(name) or self._pool_of_created(call) or self._pools.default
        if pool is None:
            raise NotFound(
                "This path names no model, and no pool is the default; the operator can mark one with default: true.",
                code="no_default_pool",
            )
        exchange.pool = pool
        exchange.pinned_replica = self._number_in(pool, name)
        if pool.shares_key:
            self._check_access(call, pool)

    def _named_location(self, call: Call) -> str | None:
        """Return the name of the replica that has the object which the path or, for a batch, the body names."""
        if call.object_id is not None:
            return self._locate(call.tenant, call.object_id)
        if call.access is Access.CREATE:
            return self._located(call.tenant, references(call.body, (call.body,)) if call.body else None)
        if not self._locations:
            return None
        segments = call.target.partition("?")[0].split("/")
        return next(filter(None, (self._locate(call.tenant, segment) for segment in segments if segment)), None)

    def _check_access(self, call: Call, pool: ServedPool) -> None:
        """Raise Forbidden or NotFound if the client may not use this path with a key that is not its own."""
        access, limited = call.access, call.tenant.is_limited
        if access is Access.CREATE:
            self._check_creation(call, pool)
        elif access is Access.INFERENCE:
            return
        elif access is Access.CONFIGURED and not limited:
            self._check_named_objects(call, pool)
        elif call.object_id is None:
            raise _not_available(call)
        elif self._locations.of(object_key(call.tenant, pool, call.object_id)) is None:
            raise _unknown_object()
        elif call.target.startswith(_FILE_PATHS) and call.method not in _KEEPING:
            raise _not_available(call)  # its new content would not be checked as the input of a batch
        else:
            self._check_named_objects(call, pool)
            if limited and call.body and not call.target.startswith(_CONTENT_PATHS):
                _check_further_models(call)

    def _check_creation(self, call: Call, pool: ServedPool) -> None:
        named = self._check_named_objects(call, pool)
        if call.tenant.is_limited:
            _check_models(call.tenant, _created_models(call))
        if _path(call) == _BATCHES:
            self._check_input(call, pool, [each for each in named if each.collection == "files"])

    def _check_input(self, call: Call, pool: ServedPool, files: Sequence[Reference]) -> None:
        """Raise Forbidden unless all files of a new batch were checked when they were uploaded."""
        if call.tenant.is_limited:
            if not files or not all(self._is_checked(call.tenant, pool, each, of_client=True) for each in files):
                raise Forbidden(
                    "This key may use only some models, and those of the batch's input file are not known. Send the "
                    "file to /v1/files in one request, with purpose batch and this key; files that /v1/uploads "
                    "assembled from parts cannot be checked.",
                    param="input_file_id",
                    code="model_not_allowed",
                )
        elif not all(self._is_checked(call.tenant, pool, each, of_client=False) for each in files):
            raise Forbidden(
                "The objects that the batch's input file names are not known. Send the file to /v1/files in one "
                "request, with purpose batch and not compressed; files that /v1/uploads assembled from parts cannot "
                "be checked.",
                param="input_file_id",
                code="input_not_checked",
            )

    def _is_checked(self, tenant: Tenant, pool: ServedPool, file: Reference, *, of_client: bool) -> bool:
        """Return True if a file was checked for this client, or at least for another one of its tenant."""
        of_one, of_any = checked_keys(tenant, pool, file.object_id)
        return self._locations.of(of_one if of_client else of_any) is not None

    # -- locations of objects

    def _locate(self, tenant: Tenant, object_id: str) -> str | None:
        """Return the name of the replica at which the client's object was created."""
        return self._locations.of(f"{tenant.id}/{object_id}") or self._locations.of(object_id)

    def _located(self, tenant: Tenant, found: Iterable[Reference] | None) -> str | None:
        """Return the name of the replica that has one of the objects that a body refers to."""
        return next(filter(None, (self._locate(tenant, each.object_id) for each in found or ())), None)

    def _pool_of_created(self, call: Call) -> ServedPool | None:
        """Return the pool of the model that a new object runs, None if its body names none."""
        if call.access is not Access.CREATE or _path(call) not in _RUNNING:
            return None
        models = _running_models(call)
        if not models:
            return None
        for model in models:
            check_model(call.tenant, model)
        return self._pools.serving(models[0])

    def _pool_of(self, name: str | None) -> ServedPool | None:
        number = None if name is None else self._number_of(name)
        if number is None:
            return None
        pool_name = self._pools.backends[number].pool
        return next((pool for pool in self._pools.all if pool.name == pool_name), None)

    def _number_in(self, pool: ServedPool, name: str | None) -> int | None:
        """Return the number of the replica `name` if it belongs to `pool`."""
        number = None if name is None else self._number_of(name)
        return number if number is not None and self._pools.backends[number].pool == pool.name else None


def object_key(tenant: Tenant, pool: ServedPool, object_id: str) -> str:
    """Return the key of an object's location in memory. If clients share a key, it includes the owner."""
    return f"{tenant.id}/{object_id}" if pool.shares_key else object_id


def checked_keys(tenant: Tenant, pool: ServedPool, object_id: str) -> tuple[str, str]:
    """Return the keys by which it is remembered that all lines of a file were checked.

    The first is of the client that uploaded it, which may use every model that it names, the second of its tenant, to
    which every object belongs that it names.
    """
    key = object_key(tenant, pool, object_id)
    return f"checked:{tenant.client}:{key}", f"checked:{key}"


def _continued(call: Call, prompt: Prompt) -> list[Reference]:
    """Return the response and conversation that a prompt continues, its container, and the earlier items in it."""
    found = [Reference(*name) for name in prompt.names]
    if call.endpoint is _RESPONSES:
        found += item_references(prompt.spans[prompt.tool_spans + prompt.system_spans :])
        if has_members_in_other_case(call.body):  # another `input`, for servers that ignore letter case
            found += item_references(listed_items(call.body))
    return found


def _unread(call: Call) -> frozenset[str]:
    """Return the outermost members that may name an object and that the reader of a prompt passes over."""
    return FURTHER if call.endpoint is _RESPONSES else _FURTHER_ELSEWHERE


def _check_models(tenant: Tenant, models: Iterable[str] | None) -> None:
    """Raise Forbidden if a limited client may not use one of `models`, or if they cannot be read (None)."""
    if models is None:
        raise _unreadable()
    for model in models:
        check_model(tenant, model)


def _check_further_models(call: Call) -> None:
    _check_models(call.tenant, named_models.further_models(call.body, _content_type(call)))
    _check_models(call.tenant, named_models.query_models(call.target))


def _created_models(call: Call) -> Iterable[str] | None:
    """Return the models that the new object will use, None if they cannot be read."""
    path = _path(call)
    content_type = _content_type(call)
    if path == _MESSAGE_BATCHES:
        return named_models.batch_request_models(call.body)
    if path == _VIDEOS and named_models.model_of(call.body, content_type) is None:
        return None
    if path == _FILES or not call.body:  # a file is checked as it passes
        return ()
    return named_models.further_models(call.body, content_type)


def _running_models(call: Call) -> list[str]:
    """Return the models that a new video or batch of messages names."""
    if _path(call) == _VIDEOS:
        model = named_models.model_of(call.body, _content_type(call))
        return [] if model is None else [model]
    return sorted(named_models.batch_request_models(call.body) or ())


def _path(call: Call) -> str:
    return call.target.partition("?")[0]


def _content_type(call: Call) -> bytes:
    """Return the body's content type. Raises BadRequest if there are several: the upstream might use another one."""
    types = [value for name, value in call.headers if name == b"content-type"]
    if len(types) > 1:
        raise BadRequest("content-type is given twice")
    return types[0] if types else b""


def _check_charset(call: Call) -> None:
    """Raise BadRequest if the upstream might read other names of objects in the body than are read here."""
    if any(name == b"content-type" and named_models.hides_names(value) for name, value in call.headers):
        raise BadRequest("The body must be sent in UTF-8.")


def _not_available(call: Call) -> Forbidden:
    if call.access is Access.CONFIGURED:  # the operator opened it, but not to this key
        why = "is not allowed with a key that may use only some models."
    else:
        why = (
            "is not allowed with a key of the operator that clients share; the operator can allow it in "
            "server.allowed_paths."
        )
    return Forbidden(f"{call.method} at this path {why}", code="path_not_allowed")


def _unreadable() -> Forbidden:
    return Forbidden(
        "This key may use only some models, and those of this request cannot be read.",
        param="model",
        code="model_not_allowed",
    )


def _unknown_object() -> UnknownObject:
    return UnknownObject("The request names an object that does not exist.")

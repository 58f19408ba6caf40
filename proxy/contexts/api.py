"""The API of stored contexts and tags under /v1/caching: each call returns one JSON object."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import msgspec

from cache import CacheError, ContextRow, ContextStatus, Draft, Tag, Trust
from proxy.config.schema import Contexts as Settings
from proxy.contexts import bodies, failures, objects
from proxy.contexts.bodies import Page, Upload
from proxy.contexts.ports import ManagedContexts, ServingPools, TokenPredictor, TokenValue, Warmer
from proxy.contexts.warming import WarmingFailed
from proxy.errors import BadRequest, NotFound, TooLarge
from proxy.model import Body as RequestBody
from proxy.pipeline.admission import check_model
from proxy.pipeline.inserted_names import LONG_IF_DECODED_BYTES
from proxy.records import Call, Tenant
from proxy.tasks import Tasks
from proxy.wire.contexts import CONTEXT_ID, TAG, Reference

ROOT = "/v1/caching"
TAGS = f"{ROOT}/refs/tags"
_ID_BYTES = 16
_FILTERED_AT_ONCE = 100

Body = dict[str, Any]
Handler = Callable[[Call], Awaitable[Body]]


class ContextApi:
    """Answers the calls. One per worker."""

    def __init__(
        self,
        store: ManagedContexts,
        pools: ServingPools,
        tokens: TokenPredictor,
        valuing: TokenValue,
        warming: Warmer,
        settings: Settings,
        tasks: Tasks,
    ) -> None:
        self._store = store
        self._pools = pools
        self._tokens = tokens
        self._valuing = valuing
        self._warming = warming
        self._settings = settings
        self._tasks = tasks

    def adopt(self, settings: Settings) -> None:
        """Use other settings for new contexts."""
        self._settings = settings

    async def answer(self, call: Call) -> bytes:
        """Return the JSON body of the response. Raises CairnError."""
        try:
            return msgspec.json.encode(await self._handler(call)(call))
        except CacheError as error:
            raise failures.shown(error) from None

    def _handler(self, call: Call) -> Handler:
        path = call.target.partition("?")[0].rstrip("/")
        method = call.method
        if path == ROOT:
            handlers: dict[str, Handler] = {"POST": self._create, "GET": self._list}
        elif path == TAGS:
            handlers = {"POST": self._set_tag, "GET": self._list_tags}
        elif path.startswith(f"{TAGS}/"):
            handlers = self._of_tag(path[len(TAGS) + 1 :])
        elif path.startswith(f"{ROOT}/") and "/" not in path[len(ROOT) + 1 :]:
            handlers = self._of_context(path[len(ROOT) + 1 :])
        else:
            handlers = {}
        if method not in handlers:
            raise NotFound(f"There is nothing at this path for {method}.", code="unknown_path")
        return handlers[method]

    def _of_context(self, name: str) -> dict[str, Handler]:
        if not CONTEXT_ID.fullmatch(name):
            raise failures.unknown()
        return {
            "GET": lambda call: self._get(call, name),
            "PUT": lambda call: self._change(call, name),
            "DELETE": lambda call: self._delete(call, name),
        }

    def _of_tag(self, rest: str) -> dict[str, Handler]:
        name, _, more = rest.partition("/")
        tag = unquote(name)
        if not TAG.fullmatch(tag):
            raise failures.unknown()
        if more == "content":
            return {"GET": lambda call: self._content_of_tag(call, tag)}
        if more:
            return {}
        return {"GET": lambda call: self._get_tag(call, tag), "DELETE": lambda call: self._delete_tag(call, tag)}

    # --- contexts

    async def _create(self, call: Call) -> Body:
        upload = await self._read_upload(call.body)
        check_model(call.tenant, upload.model)
        pool = self._pools.serving(upload.model)
        size = len(upload.messages) + len(upload.tools)
        if size > self._settings.max_context_bytes:
            raise TooLarge(
                f"A context must have at most {self._settings.max_context_bytes:,} bytes; this one has {size:,}."
            )
        warms = 0 if pool.is_provider else self._settings.warm_replicas
        per_token = self._valuing.usd_per_token(upload.model, pool)
        draft = self._draft(upload, ContextStatus.PENDING if warms else ContextStatus.READY, size, per_token)
        row = await self._store.create(call.tenant.id, draft, await self._trust(call.tenant))
        if warms:
            self._tasks.start(self._warm(call, upload, row, warms, per_token), "warming")
        return objects.context_object(row, await self._store.content(call.tenant.id, row), self._store.now())

    async def _read_upload(self, body: RequestBody) -> Upload:
        """Read the body of a creation, a long one in a thread: 16 MB of small parts take .5 s. Raises BadRequest."""
        if len(body) < LONG_IF_DECODED_BYTES:
            return bodies.read_upload(body)
        return await asyncio.to_thread(bodies.read_upload, body)

    def _draft(self, upload: Upload, status: ContextStatus, size: int, usd_per_token: float) -> Draft:
        tokens = round(self._tokens.predict(upload.model, size, upload.media))
        ttl_seconds: float | None = upload.ttl_seconds
        if ttl_seconds is None and upload.expired_at is None:
            ttl_seconds = self._settings.default_ttl_seconds
        return Draft(
            id=f"cache-{secrets.token_hex(_ID_BYTES)}",
            model=upload.model,
            tools=upload.tools,
            messages=upload.messages,
            bounds=upload.bounds,
            ttl_seconds=ttl_seconds,
            expires_unix_seconds=upload.expired_at,
            status=status,
            tokens=tokens,
            value_usd=tokens * usd_per_token,
            name=upload.name,
            description=upload.description,
            metadata=upload.metadata,
            tags=upload.tags,
            media=tuple([(item.kind, item.size_bytes) for item in upload.media]),
        )

    async def _warm(self, call: Call, upload: Upload, row: ContextRow, replicas: int, usd_per_token: float) -> None:
        """Warm a context and store the outcome. If Redis does not take it, the context stays pending until it expires
        as abandoned."""
        tokens, problem = 0, None
        try:
            tokens = await self._warming.warm(
                call.tenant,
                call.headers,
                upload.model,
                Reference(row.id),
                ends_with_user=upload.ends_with_user,
                replicas=replicas,
            )
        except WarmingFailed as error:
            problem = (error.kind, error.message)
        for last in (False, True):
            try:
                await self._store.finish(call.tenant.id, row.id, tokens, tokens * usd_per_token, problem)
                return
            except CacheError:
                if last:
                    return

    async def _list(self, call: Call) -> Body:
        tenant = call.tenant.id
        page = bodies.read_page(call.target.partition("?")[2])
        ids, backwards = _cut(await self._store.ids(tenant), page)
        found: list[ContextRow] = []
        for start in range(0, len(ids), _FILTERED_AT_ONCE):
            rows = await self._store.some_rows(tenant, ids[start : start + _FILTERED_AT_ONCE])
            found += [row for row in rows if page.metadata.items() <= row.metadata.items()]
            if len(found) > page.limit:
                break
        shown = found[: page.limit]
        if backwards:
            shown.reverse()
        now = self._store.now()
        return objects.listing(
            [objects.context_object(row, None, now) for row in shown], more=len(found) > page.limit
        )

    async def _get(self, call: Call, context_id: str) -> Body:
        row = await self._store.row(call.tenant.id, context_id)
        return objects.context_object(row, await self._store.content(call.tenant.id, row), self._store.now())

    async def _change(self, call: Call, context_id: str) -> Body:
        change = bodies.read_change(call.body)
        row = await self._store.update(
            call.tenant.id,
            context_id,
            metadata=change.metadata,
            ttl_seconds=change.ttl_seconds,
            expires_unix_seconds=change.expired_at,
            trust=await self._trust(call.tenant),
        )
        return objects.context_object(row, await self._store.content(call.tenant.id, row), self._store.now())

    async def _delete(self, call: Call, context_id: str) -> Body:
        await self._store.delete(call.tenant.id, context_id)
        return objects.deleted_context(context_id)

    async def _trust(self, tenant: Tenant) -> Trust:
        return Trust.LISTED if tenant.is_listed else await self._store.trust_of(tenant.id)

    # --- tags

    async def _set_tag(self, call: Call) -> Body:
        tag, context_id = bodies.read_tagging(call.body)
        if context_id is None:
            raise failures.unknown()
        return objects.tag_object(await self._store.set_tag(call.tenant.id, tag, context_id))

    async def _list_tags(self, call: Call) -> Body:
        page = bodies.read_page(call.target.partition("?")[2])
        tags: dict[str, Tag] = {tag.tag: tag for tag in await self._store.tags(call.tenant.id)}
        names, backwards = _cut(list(tags), page)
        shown = names[: page.limit]
        if backwards:
            shown.reverse()
        return objects.listing([objects.tag_object(tags[name]) for name in shown], more=len(names) > page.limit)

    async def _get_tag(self, call: Call, tag: str) -> Body:
        return objects.tag_object(await self._store.tag(call.tenant.id, tag))

    async def _content_of_tag(self, call: Call, tag: str) -> Body:
        return await self._get(call, (await self._store.tag(call.tenant.id, tag)).context_id)

    async def _delete_tag(self, call: Call, tag: str) -> Body:
        await self._store.delete_tag(call.tenant.id, tag)
        return objects.deleted_tag(tag)


def _cut(oldest_first: list[str], page: Page) -> tuple[list[str], bool]:
    """Return the names that a page may hold, nearest to its cursor first, and whether that is the reverse order."""
    names = oldest_first[::-1] if page.newest_first else oldest_first
    start, end = 0, len(names)
    for param, cursor in (("after", page.after), ("before", page.before)):
        if cursor is None:
            continue
        if cursor not in names:
            raise BadRequest(f"{param} must name an object of this list.", param=param)
        if param == "after":
            start = names.index(cursor) + 1
        else:
            end = names.index(cursor)
    backwards = page.before is not None and page.after is None
    kept = names[start:end]
    return (kept[::-1] if backwards else kept), backwards

"""The objects of /v1/caching, ready to be encoded as JSON. Pure. Stored messages and tools keep their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw

from cache import Content, ContextRow, ContextStatus, Tag

OWNER = "tenant"
"""Value of `owned_by`: clients see only their own objects, and names of tenants are never sent."""

_INTERRUPTED = ("server_error", "Warming was interrupted; the context can be used.")


def context_object(row: ContextRow, content: Content | None, now_unix_seconds: float) -> dict[str, Any]:
    """Return a context, without its messages and tools if `content` is None, as in lists."""
    status = row.status(now_unix_seconds)
    shown: dict[str, Any] = {
        "id": row.id,
        "status": status.value,
        "object": "context_cache_object",
        "created_at": int(row.created_unix_seconds),
        "expired_at": int(row.expires_unix_seconds),
        "tokens": row.tokens,
        "model": row.head.model,
        "name": row.head.name,
        "description": row.head.description,
        "metadata": row.metadata,
        "bytes": row.head.content_bytes,
        "worth": row.worth,  # USD per second and stored byte; the context with the least is discarded first
        "worth_usd_per_hour": row.saving_usd_per_hour,
    }
    if content is not None:
        shown["messages"] = Raw(b"[%b]" % content.messages)
        shown["tools"] = Raw(content.tools or b"[]")
    if status is ContextStatus.ERROR:
        kind, message = row.problem or _INTERRUPTED
        shown["error"] = {"type": kind, "message": message}
    return shown


def tag_object(tag: Tag) -> dict[str, Any]:
    """Return a tag."""
    return {
        "cache_id": tag.context_id,
        "created_at": int(tag.created_unix_seconds),
        "object": "cache_object.tag",
        "owned_by": OWNER,
        "tag": tag.tag,
    }


def deleted_context(context_id: str) -> dict[str, Any]:
    """Return the result of deleting a context."""
    return {"deleted": True, "id": context_id, "object": "context_cache_object.deleted"}


def deleted_tag(tag: str) -> dict[str, Any]:
    """Return the result of deleting a tag, whether it existed or not."""
    return {"deleted": True, "object": "cache_object.tag.deleted", "tag": tag}


def listing(rows: Sequence[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """Return one page of a list."""
    return {"object": "list", "data": rows, "has_more": more}


def checked_response(model: str | None, created_unix_seconds: float, *, stream: bool) -> tuple[bytes, bytes]:
    """Return the body of a dry run, a completion without choices and tokens, and its content type."""
    answer: dict[str, Any] = {
        "id": "chatcmpl-dry-run",
        "object": "chat.completion.chunk" if stream else "chat.completion",
        "created": int(created_unix_seconds),
        "model": model,
        "choices": [],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }
    encoded = msgspec.json.encode(answer)
    if stream:
        return b"data: " + encoded + b"\n\ndata: [DONE]\n\n", b"text/event-stream; charset=utf-8"
    return encoded, b"application/json"

"""Fetch and read the model list of one replica."""

from __future__ import annotations

from typing import Any

import msgspec

from proxy.errors import BadResponse
from proxy.fleet.pools import ReplicaEndpoint
from proxy.fleet.served_models import Listing
from proxy.records import Call
from proxy.upstream import UpstreamClient
from proxy.wire.headers import upstream_head
from proxy.wire.schemas import DECODE_ERRORS

_LIST_AT_MOST_BYTES = 8 * 1024 * 1024


class _Listing(msgspec.Struct):
    data: list[dict[str, Any]] = []


class _Model(msgspec.Struct):
    id: Any = None
    aliases: Any = None
    owned_by: Any = None
    parent: Any = None
    max_model_len: Any = None


class _Page(msgspec.Struct):
    """A list of models, of which only what tells something is decoded: it may have thousands of entries."""

    data: list[_Model]
    has_more: Any = None  # of Anthropic
    next_page_token: Any = None
    nextPageToken: Any = None  # noqa: N815 - of Google


_decode_listing = msgspec.json.Decoder(_Listing).decode
_decode_page = msgspec.json.Decoder(_Page).decode


def read_models(page: bytes) -> list[dict[str, Any]] | None:
    """Return the entries of a model list, None if `page` is not one."""
    try:
        return _decode_listing(page).data
    except DECODE_ERRORS:
        return None


def read_listing(page: bytes) -> tuple[tuple[str, ...], Listing] | None:
    """Return the names in a model list and what they say of the replica, None if `page` is not a list.

    If it is only the first page, it does not tell what the replica lacks.
    """
    try:
        listed = _decode_page(page)
    except DECODE_ERRORS:
        return None
    is_whole = not (listed.has_more or listed.next_page_token or listed.nextPageToken)
    return tuple([str(model.id) for model in listed.data]), Listing(listed.data, is_whole=is_whole)


async def fetch_models(
    client: UpstreamClient, endpoint: ReplicaEndpoint, call: Call | None = None
) -> list[dict[str, Any]]:
    """Return the entries of `GET /v1/models` at one replica, asked with its own key or with the caller's.

    Raises:
        UpstreamError: the replica did not respond, or not with a model list.
    """
    head = upstream_head(
        call.headers if call is not None else (),
        request_id=call.request_id if call is not None else "models",
        credential=endpoint.credential,
        drop_credentials=endpoint.drops_credentials,
        identity=True,
    )
    response = await client.request(endpoint.origin, b"GET", b"/v1/models", head, repeatable=True)
    try:
        body = await response.read(_LIST_AT_MOST_BYTES)
    finally:
        response.abort()
    if response.status != 200:
        raise BadResponse(f"The upstream answered the list of models with status {response.status}.")
    models = read_models(body)
    if models is None:
        raise BadResponse("The upstream's list of models cannot be read.")
    return models

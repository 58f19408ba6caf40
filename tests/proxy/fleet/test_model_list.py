"""The model list of one replica."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.errors import BadResponse
from proxy.fleet.model_list import fetch_models
from proxy.fleet.pools import ReplicaEndpoint
from proxy.upstream import Origin


class Replica:
    """Answers every request alike, and keeps what it was asked."""

    def __init__(self, status: int, page: bytes) -> None:
        self.status = status
        self._page = page
        self.asked: list[tuple[bytes, bytes]] = []
        self.headers: dict[bytes, bytes] = {}
        self.ended = False

    async def request(self, origin: Origin, method: bytes, target: bytes, headers: Any, **more: Any) -> Replica:
        self.asked.append((method, target))
        self.headers = dict(headers)
        return self

    async def read(self, most_bytes: int) -> bytes:
        return self._page

    def abort(self) -> None:
        self.ended = True


async def fetched(replica: Replica) -> list[dict[str, Any]]:
    """The list, as a replica with a key gives it."""
    origin = Origin.parse("http://a")
    endpoint = ReplicaEndpoint("a", "p", "http://a", origin, credential=(b"authorization", b"Bearer own"))
    return await fetch_models(replica, endpoint)  # type: ignore[arg-type]


async def test_the_entries_are_as_the_replica_lists_them_and_it_is_asked_with_its_own_key() -> None:
    replica = Replica(200, b'{"object":"list","data":[{"id":"a","root":"r"},{"id":"b"}]}')
    assert await fetched(replica) == [{"id": "a", "root": "r"}, {"id": "b"}]
    assert replica.asked == [(b"GET", b"/v1/models")]
    assert replica.headers[b"authorization"] == b"Bearer own"
    assert replica.ended


@pytest.mark.parametrize(
    ("status", "page", "message"),
    [(401, b'{"data":[]}', "status 401"), (200, b"<html>", "cannot be read"), (200, b'{"data":7}', "cannot be read")],
)
async def test_what_is_no_list_is_an_error_of_the_upstream(status: int, page: bytes, message: str) -> None:
    """Its connection is given back or closed."""
    replica = Replica(status, page)
    with pytest.raises(BadResponse, match=message):
        await fetched(replica)
    assert replica.ended

"""Keep track of Kubernetes EndpointSlices: which endpoints are ready, from a list and later events. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import msgspec

GONE: Final = 410
"""HTTP status, and code of an error event: the events after a version are lost, so everything is listed anew."""

_HTTP: Final = "http"  # if there are several ports and none is chosen, the one of this name is used


class Endpoint(NamedTuple):
    """An endpoint that takes requests. `zone` is empty if it is not known."""

    address: str
    port: int
    zone: str = ""


class _Metadata(msgspec.Struct, frozen=True, rename="camel"):
    name: str = ""
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _Port(msgspec.Struct, frozen=True):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class _Conditions(msgspec.Struct, frozen=True):
    ready: bool | None = None
    terminating: bool | None = None


class _Endpoint(msgspec.Struct, frozen=True):
    addresses: tuple[str, ...] = ()
    conditions: _Conditions | None = None
    zone: str | None = None


class Slice(msgspec.Struct, frozen=True, rename="camel"):
    """One EndpointSlice: some endpoints of a Service, of one family of addresses, with the same ports."""

    metadata: _Metadata
    address_type: str = ""
    endpoints: tuple[_Endpoint, ...] | None = None
    ports: tuple[_Port, ...] | None = None


class SliceList(msgspec.Struct, frozen=True):
    """A page of the list. `metadata` has the version from which to watch, and the token of the next page."""

    metadata: _Metadata
    items: tuple[Slice, ...] | None = None

    @property
    def next_page(self) -> str:
        """Token of the next page, empty if this is the last."""
        return self.metadata.continue_

    @property
    def version(self) -> str:
        """Version of the list."""
        return self.metadata.resource_version


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


class _Bookmark(msgspec.Struct, frozen=True):
    metadata: _Metadata


class _Status(msgspec.Struct, frozen=True):
    code: int = 0
    message: str = ""


class WatchError(Exception):
    """The API server ended a watch with an error. `is_expired` means that everything must be listed anew."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message or f"code {code}")
        self.is_expired = code == GONE


class SliceTable:
    """The slices as of `version`."""

    def __init__(self) -> None:
        self.version = ""
        self._slices: dict[str, Slice] = {}

    def replace(self, slices: Iterable[Slice], version: str) -> None:
        """Take over a whole list."""
        self._slices = {each.metadata.name: each for each in slices}
        self.version = version

    def apply(self, line: bytes) -> None:
        """Apply one event of a watch. A bookmark changes only the version; unknown kinds change nothing.

        Raises WatchError for an error event, and msgspec.DecodeError if `line` is not an event.
        """
        event = msgspec.json.decode(line, type=_Event)
        if event.type == "ERROR":
            status = msgspec.json.decode(event.object, type=_Status)
            raise WatchError(status.code, status.message)
        if event.type == "BOOKMARK":
            self._advance(msgspec.json.decode(event.object, type=_Bookmark).metadata)
        elif event.type in ("ADDED", "MODIFIED"):
            changed = msgspec.json.decode(event.object, type=Slice)
            self._slices[changed.metadata.name] = changed
            self._advance(changed.metadata)
        elif event.type == "DELETED":
            metadata = msgspec.json.decode(event.object, type=_Bookmark).metadata
            self._slices.pop(metadata.name, None)
            self._advance(metadata)

    def endpoints(self, port: str) -> tuple[Endpoint, ...]:
        """Return the ready endpoints, sorted.

        A pod with addresses of both families is in two slices; it is one replica, by its IPv4 address.

        Args:
            port: number or name of the port. Empty means the only one, or the one that is named `http`.
        """
        by_type: dict[str, set[Endpoint]] = {}
        for each in self._slices.values():
            by_type.setdefault(each.address_type, set()).update(_ready(each, port))
        return tuple(sorted(by_type.get("IPv4") or by_type.get("IPv6") or ()))

    def _advance(self, metadata: _Metadata) -> None:
        if metadata.resource_version:
            self.version = metadata.resource_version


def _ready(each: Slice, port: str) -> Iterable[Endpoint]:
    number = _port_of(each.ports or (), port)
    if number is None:
        return
    for endpoint in each.endpoints or ():
        conditions = endpoint.conditions or _Conditions()
        # an unknown readiness counts as ready, as the API's documentation asks for
        if conditions.ready is not False and not conditions.terminating and _is_address(endpoint.addresses):
            yield Endpoint(endpoint.addresses[0], number, endpoint.zone or "")


def _is_address(addresses: tuple[str, ...]) -> bool:
    """Return True if the first address, by which an endpoint is reached, is a valid IP address."""
    try:
        return bool(addresses and ipaddress.ip_address(addresses[0]))
    except ValueError:
        return False


def _port_of(ports: tuple[_Port, ...], wanted: str) -> int | None:
    """Return the number of the port named `wanted` (see `SliceTable.endpoints`), None if there is none."""
    numbers: Mapping[str, int] = {
        each.name or "": each.port for each in ports if each.port is not None and (each.protocol or "TCP") == "TCP"
    }
    if wanted.isdigit():
        # a headless Service may have no ports at all: then any is open
        return int(wanted) if not numbers or int(wanted) in numbers.values() else None
    if wanted:
        return numbers.get(wanted)
    return next(iter(numbers.values())) if len(numbers) == 1 else numbers.get(_HTTP)

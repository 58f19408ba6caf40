"""Which endpoints of the slices take requests."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from proxy.fleet.endpoint_slices import Endpoint, Slice, SliceTable, WatchError
from tests.support.kubernetes import slice_of


def table(*slices: dict[str, Any]) -> SliceTable:
    """A table of these slices."""
    found = SliceTable()
    found.replace(msgspec.convert(list(slices), list[Slice]), "10")
    return found


def addresses(*slices: dict[str, Any], port: str = "http") -> list[str]:
    """Address and port of each ready endpoint."""
    return [f"{each.address}:{each.port}" for each in table(*slices).endpoints(port)]


def test_only_ready_endpoints_count() -> None:
    """Unready and terminating ones are left out; an unknown readiness counts as ready."""
    found = addresses(
        slice_of("a", "10.0.0.1"),
        slice_of("b", "10.0.0.2", ready=False),
        slice_of("c", "10.0.0.3", terminating=True),
        slice_of("d", "10.0.0.4", ready=None),
    )
    assert found == ["10.0.0.1:8000", "10.0.0.4:8000"]


@pytest.mark.parametrize(
    ("port", "found"),
    [("http", ["10.0.0.1:8000"]), ("9090", ["10.0.0.1:9090"]), ("metrics", ["10.0.0.1:9090"]), ("grpc", []),
     ("1234", []), ("", ["10.0.0.1:8000"]), ("udp", [])],
)  # fmt: skip
def test_a_port_is_found_by_number_or_name(port: str, found: list[str]) -> None:
    """Without a choice the one named http is meant; a port of UDP never is."""
    ports = [{"name": "metrics", "port": 9090}, {"name": "http", "port": 8000}]
    ports.append({"name": "udp", "port": 5353, "protocol": "UDP"})
    assert addresses(slice_of("a", "10.0.0.1", ports=ports), port=port) == found


def test_a_single_port_needs_no_choice_and_a_service_without_ports_a_number() -> None:
    """A headless Service may name no port."""
    assert addresses(slice_of("a", "10.0.0.1", ports=[{"name": "", "port": 80}]), port="") == ["10.0.0.1:80"]
    assert addresses(slice_of("a", "10.0.0.1", ports=None), port="8000") == ["10.0.0.1:8000"]
    assert addresses(slice_of("a", "10.0.0.1", ports=[]), port="") == []


def test_a_pod_with_addresses_of_both_families_is_one_replica() -> None:
    """Its IPv4 address counts; with IPv6 alone that does. A name is no address."""
    four, six = slice_of("a", "10.0.0.1"), slice_of("b", "fd00::1", family="IPv6")
    assert addresses(four, six) == ["10.0.0.1:8000"]
    assert addresses(six) == ["fd00::1:8000"]
    assert addresses(slice_of("c", "example.com", family="FQDN"), slice_of("d", "not-an-address")) == []


def test_an_endpoint_in_two_slices_counts_once_and_keeps_its_zone() -> None:
    """Slices may overlap while endpoints move between them."""
    one = slice_of("a", "10.0.0.1", zone="eu-1")
    assert table(one, one | {"metadata": {"name": "b"}}).endpoints("http") == (Endpoint("10.0.0.1", 8000, "eu-1"),)


def test_events_change_the_table_and_a_bookmark_only_its_version() -> None:
    """The version of the last event is where the next watch begins."""
    found = table(slice_of("a", "10.0.0.1"))

    def apply(kind: str, thing: dict[str, Any]) -> list[str]:
        found.apply(json.dumps({"type": kind, "object": thing}).encode())
        return [endpoint.address for endpoint in found.endpoints("http")]

    assert apply("ADDED", slice_of("b", "10.0.0.2", version="11")) == ["10.0.0.1", "10.0.0.2"]
    assert apply("MODIFIED", slice_of("a", "10.0.0.3", version="12")) == ["10.0.0.2", "10.0.0.3"]
    assert apply("BOOKMARK", {"kind": "EndpointSlice", "metadata": {"resourceVersion": "20"}})[0] == "10.0.0.2"
    assert found.version == "20"
    assert apply("DELETED", slice_of("b", version="21")) == ["10.0.0.3"]
    assert found.version == "21"
    assert apply("SOMETHING", {"new": True}) == ["10.0.0.3"]


def test_an_error_event_says_whether_everything_must_be_listed_anew() -> None:
    """410 means that; anything else is reported."""
    with pytest.raises(WatchError) as caught:
        SliceTable().apply(b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}')
    assert caught.value.is_expired
    with pytest.raises(WatchError, match="boom") as caught:
        SliceTable().apply(b'{"type":"ERROR","object":{"kind":"Status","code":500,"message":"boom"}}')
    assert not caught.value.is_expired

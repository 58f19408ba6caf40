"""Measure the resources that a proxy holds when all its clients are gone, and compare two moments."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.common import cpu, metrics_page, sockets
from benchmarks.common.processes import get

# Gauges of Cairn that must be zero when nothing is under way. One that the page has not is shown and not judged.
_ZERO_GAUGES = (
    "cairn_in_flight_requests",
    "cairn_upstream_in_flight",
    "cairn_upstream_queued",
    "cairn_upstream_pending_tokens",
)


@dataclass(frozen=True, slots=True)
class Moment:
    """Resources of the proxy at one moment; None if this system cannot show them."""

    resident_bytes: int
    client_sockets: int | None
    upstream_sockets: int | None
    other_descriptors: Mapping[str, int] | None  # by kind; without the sockets that the store has too
    gauges: Mapping[str, float | None]  # of those that must be zero, over all labels; None: not on the page
    upstream_connections: int
    upstream_streams: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the verdict."""

    what: str
    before: str
    after: str
    right: bool


def _kind(link: str) -> str:
    return link.partition(":")[0] if ":" in link else "file"


async def look(
    pids: Sequence[int], store_pids: Sequence[int], port: int, side_port: int | None, upstream_ports: Sequence[int]
) -> Moment:
    """Read the processes, the metrics page and the upstream's count.

    The store keeps a bounded pool of connections, opened when that many commands first run at once. Each is a socket
    of the Valkey too; these are subtracted.
    """
    open_sockets = [one for pid in pids for one in sockets.tcp_sockets(pid) if one.state != sockets.LISTENING]
    links = [link for pid in pids for link in (cpu.descriptors(pid) or {}).values()]
    can_tell = cpu.descriptors(pids[0]) is not None
    clients = sum(one.local_port == port for one in open_sockets)
    upstreams = sum(one.remote_port in upstream_ports for one in open_sockets)
    kinds = Counter(_kind(link) for link in links)
    kept = sum(_kind(link) == "socket" for pid in store_pids for link in (cpu.descriptors(pid) or {}).values())
    kinds["socket"] -= clients + upstreams + kept
    page = (await get(side_port, "/metrics"))[1] if side_port else b""
    series = metrics_page.parse(page.decode())
    found = {name: metrics_page.gauges_named(series, name) for name in _ZERO_GAUGES}
    counted = json.loads((await get(upstream_ports[0], "/bench/stats"))[1])
    return Moment(
        resident_bytes=sum(map(cpu.resident_bytes, pids)),
        client_sockets=clients if can_tell else None,
        upstream_sockets=upstreams if can_tell else None,
        other_descriptors=dict(kinds) if can_tell else None,
        gauges={name: sum(map(abs, values.values())) if values else None for name, values in found.items()},
        upstream_connections=counted["open_connections"] - 1,  # the one that asks
        upstream_streams=counted["open_streams"],
    )


def compare(before: Moment, after: Moment, growth_allowed: float) -> list[Finding]:
    """Return the verdict on two quiet moments, the first after a tenth of the run and the second at its end."""
    growth = after.resident_bytes / before.resident_bytes - 1
    findings = [
        Finding(
            f"memory, at most {growth_allowed:+.0%}",
            f"{before.resident_bytes / (1 << 20):.1f} MB",
            f"{after.resident_bytes / (1 << 20):.1f} MB ({growth:+.1%})",
            growth <= growth_allowed,
        ),
        Finding(
            "streams open at the upstream", *_both(before, after, "upstream_streams"), after.upstream_streams == 0
        ),
    ]
    findings += [
        Finding(name, _told(before.gauges.get(name)), _told(value), not value) for name, value in after.gauges.items()
    ]
    if after.client_sockets is None or after.other_descriptors is None or before.other_descriptors is None:
        return findings
    kinds = sorted({*before.other_descriptors, *after.other_descriptors})
    findings += [
        Finding("connections of clients", *_both(before, after, "client_sockets"), after.client_sockets == 0),
        Finding(
            "connections to the upstream, as many as it knows",
            f"{before.upstream_sockets} of {before.upstream_connections}",
            f"{after.upstream_sockets} of {after.upstream_connections}",
            after.upstream_sockets == after.upstream_connections,
        ),
    ]
    for kind in kinds:
        counts = (before.other_descriptors.get(kind, 0), after.other_descriptors.get(kind, 0))
        findings.append(Finding(f"other descriptors: {kind}", f"{counts[0]}", f"{counts[1]}", counts[1] <= counts[0]))
    return findings


def _told(value: float | None) -> str:
    return "not on the page" if value is None else f"{value:g}"


def _both(before: Moment, after: Moment, name: str) -> tuple[str, str]:
    return str(getattr(before, name)), str(getattr(after, name))

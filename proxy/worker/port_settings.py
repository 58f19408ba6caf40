"""The settings of the client port, taken from the configuration. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

from proxy.config.schema import Config, Server
from proxy.downstream.limits import Limits

_AROUND_CONTEXT_BYTES: Final = 128 * 1024
"""Bytes besides messages and tools: names, descriptions, metadata and white space of a context's upload."""


class PortSettings(msgspec.Struct, frozen=True):
    """The section `server`, the limits that follow from it, and the most bytes that a context's upload may have."""

    server: Server
    limits: Limits
    max_upload_bytes: int


def port_settings(config: Config) -> PortSettings:
    """Return the settings of the client port for a configuration."""
    server = config.server
    uploads = min(server.max_body_bytes, config.contexts.max_context_bytes + _AROUND_CONTEXT_BYTES)
    return PortSettings(server=server, limits=limits_of(server), max_upload_bytes=uploads)


def limits_of(settings: Server) -> Limits:
    """Return the limits of the client port for the section `server`."""
    return Limits(
        head_bytes=settings.max_head_bytes,
        header_line_bytes=settings.max_header_bytes,
        head_seconds=settings.head_seconds,
        keepalive_seconds=settings.keepalive_seconds,
        write_seconds=settings.write_seconds,
        body_seconds=settings.body_seconds,
        body_bytes=settings.max_body_bytes,
        body_bytes_per_second=settings.min_body_bytes_per_second,
        connections=settings.max_connections,
        connections_per_address=settings.max_connections_per_address,
        head_bytes_in_flight=settings.max_in_flight_head_bytes,
        body_bytes_in_flight=settings.max_in_flight_bytes,
    )

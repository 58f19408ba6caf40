"""Rows about errors that a worker reports for the status page. Data types only."""

from __future__ import annotations

import msgspec


class ErrorRow(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Errors of the last hour with the same client, model and reason. `client` is the tenant's name, or empty."""

    client: str
    model: str
    reason: str
    count: int
    last_unix_seconds: float

"""Traces of a worker's requests: the export, the spans of running requests, and a pipeline that is traced."""

from __future__ import annotations

from functools import partial

from proxy.clock import Clock
from proxy.config.schema import Telemetry
from proxy.telemetry.export import TraceExport
from proxy.telemetry.phases import traced_pipeline
from proxy.telemetry.tracing import AddressOf, Tracing


class Traces:
    """The traces of one worker. `instance` is its name among all workers of all proxies."""

    def __init__(self, settings: Telemetry, instance: str, clock: Clock, address_of: AddressOf) -> None:
        self._export = TraceExport(settings, instance)
        self._tracing = Tracing(self._export.tracer, clock, address_of)
        self.pipeline = partial(traced_pipeline, self._tracing)  # in place of `Pipeline`: its phases are traced

    @property
    def running(self) -> int:
        """Number of requests that have begun and are not settled."""
        return self._tracing.running

    async def close(self) -> None:
        """Send the remaining spans, for a short time."""
        await self._export.close()

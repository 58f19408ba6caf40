"""What a worker needs for its traces: the export, the spans of running requests, and a pipeline that is traced."""

from __future__ import annotations

from proxy.clock import Clock
from proxy.config.schema import Telemetry
from proxy.pipeline.pipeline import Admitting, ModelListing, Pipeline, Planning, Reading, Relaying
from proxy.pipeline.stored_contexts import StoredContexts
from proxy.telemetry.export import TraceExport
from proxy.telemetry.phases import SettlingToOutcome, traced_pipeline
from proxy.telemetry.tracing import AddressOf, Tracing


class Traces:
    """One per worker. `instance` is the worker's name among all workers of all proxies."""

    def __init__(self, settings: Telemetry, instance: str, clock: Clock, address_of: AddressOf) -> None:
        self._export = TraceExport(settings, instance)
        self._tracing = Tracing(self._export.tracer, clock, address_of)

    @property
    def running(self) -> int:
        """Number of requests that have begun and are not settled."""
        return self._tracing.running

    def pipeline(
        self,
        reader: Reading,
        planner: Planning,
        relay: Relaying,
        models_endpoint: ModelListing,
        settlement: SettlingToOutcome,
        contexts: StoredContexts,
        cold_turns: Admitting,
    ) -> Pipeline:
        """Return a pipeline whose phases are traced."""
        return traced_pipeline(
            self._tracing, reader, planner, relay, models_endpoint, settlement, contexts, cold_turns
        )

    async def close(self) -> None:
        """Send the remaining spans, for a short time."""
        await self._export.close()

"""Wrappers that time the pipeline's phases. Each calls the object that it wraps, and notes the time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from proxy.pipeline.exchange import Exchange
from proxy.pipeline.pipeline import Admitting, ModelListing, Pipeline, Planning, Reading, Relaying
from proxy.pipeline.stored_contexts import StoredContexts
from proxy.records import Outcome, Tenant
from proxy.routing.cold_turn import Verdict
from proxy.telemetry.tracing import Phase, Tracing

if TYPE_CHECKING:
    from proxy.downstream.response import Downstream
    from proxy.pipeline.dispatch import Upload

WAIT_SECONDS_LEAST = 0.001
"""A request that was delayed by less did not wait: it was only examined."""


class SettlingToOutcome(Protocol):
    """Phase 8, by `Settlement`."""

    def settle(self, exchange: Exchange) -> Outcome:
        """Learn from a finished request, count and log it."""
        ...


def traced_pipeline(
    tracing: Tracing,
    reader: Reading,
    planner: Planning,
    relay: Relaying,
    models_endpoint: ModelListing,
    settlement: SettlingToOutcome,
    contexts: StoredContexts,
    cold_turns: Admitting,
) -> Pipeline:
    """Return a pipeline whose phases are traced."""
    return Pipeline(
        TracedReader(reader, tracing),
        TracedPlanner(planner, tracing),
        TracedRelay(relay, tracing),
        TracedModels(models_endpoint, tracing),
        TracedSettlement(settlement, tracing),
        TracedContexts(contexts, tracing),
        TracedTurns(cold_turns, tracing),
    )


class TracedReader:
    """Times phase 2."""

    def __init__(self, inner: Reading, tracing: Tracing) -> None:
        self._inner = inner
        self._tracing = tracing

    def read(self, exchange: Exchange) -> None:
        """Read the request, and note the time."""
        started_seconds = self._tracing.now()
        try:
            self._inner.read(exchange)
        finally:
            self._tracing.mark(exchange, Phase.READ, started_seconds)

    async def check_inserted(self, exchange: Exchange) -> None:
        """Check what an inserted context names; this belongs to no phase of its own."""
        await self._inner.check_inserted(exchange)

    def checked(self, exchange: Exchange, upload: Upload, news: Callable[[], Awaitable[None]]) -> Upload:
        """Pass on: a body is read while it is relayed."""
        return self._inner.checked(exchange, upload, news)


class TracedPlanner:
    """Times phases 4 to 6."""

    def __init__(self, inner: Planning, tracing: Tracing) -> None:
        self._inner = inner
        self._tracing = tracing

    def fingerprint(self, exchange: Exchange) -> None:
        """Hash the prompt, and note the time."""
        started_seconds = self._tracing.now()
        try:
            self._inner.fingerprint(exchange)
        finally:
            self._tracing.mark(exchange, Phase.FINGERPRINT, started_seconds)

    def look_up(self, exchange: Exchange) -> None:
        """Look the prompt up, and note the time."""
        started_seconds = self._tracing.now()
        try:
            self._inner.look_up(exchange)
        finally:
            self._tracing.mark(exchange, Phase.LOOK_UP, started_seconds)

    def plan(self, exchange: Exchange) -> None:
        """Order the replicas, and note the time."""
        started_seconds = self._tracing.now()
        try:
            self._inner.plan(exchange)
        finally:
            self._tracing.mark(exchange, Phase.PLAN, started_seconds)

    def note_answered(self, exchange: Exchange) -> None:
        """Pass on."""
        self._inner.note_answered(exchange)


class TracedRelay:
    """Times phase 7, and sends the trace's context to the upstream."""

    def __init__(self, inner: Relaying, tracing: Tracing) -> None:
        self._inner = inner
        self._tracing = tracing

    async def run(self, exchange: Exchange, downstream: Downstream, upload: Upload | None = None) -> None:
        """Relay, and note the time. Raises the relay's errors."""
        started_seconds = self._tracing.now()
        self._tracing.begin_relay(exchange)
        try:
            await self._inner.run(exchange, downstream, upload)
        finally:
            self._tracing.mark(exchange, Phase.RELAY, started_seconds)

    def accompany(self, exchange: Exchange, downstream: Downstream) -> None:
        """Pass on."""
        self._inner.accompany(exchange, downstream)

    def release(self, exchange: Exchange) -> None:
        """Pass on."""
        self._inner.release(exchange)


class TracedModels:
    """Times the list of models, which takes the place of the relay and asks several replicas."""

    def __init__(self, inner: ModelListing, tracing: Tracing) -> None:
        self._inner = inner
        self._tracing = tracing

    def merges_for(self, tenant: Tenant) -> bool:
        """Pass on."""
        return self._inner.merges_for(tenant)

    async def answer(self, exchange: Exchange, client: Downstream) -> None:
        """Write the list, and note the time. Raises UpstreamError."""
        started_seconds = self._tracing.now()
        self._tracing.begin_relay(exchange)
        try:
            await self._inner.answer(exchange, client)
        finally:
            self._tracing.mark(exchange, Phase.RELAY, started_seconds)


class TracedContexts:
    """Times phase 3."""

    def __init__(self, inner: StoredContexts, tracing: Tracing) -> None:
        self._inner = inner
        self._tracing = tracing

    async def answer(self, exchange: Exchange, client: Downstream) -> None:
        """Pass on."""
        await self._inner.answer(exchange, client)

    async def expand(self, exchange: Exchange) -> None:
        """Insert the context, and note the time. Raises CairnError."""
        started_seconds = self._tracing.now()
        try:
            await self._inner.expand(exchange)
        finally:
            self._tracing.mark(exchange, Phase.EXPAND, started_seconds)

    def tell_checked(self, exchange: Exchange, client: Downstream) -> None:
        """Pass on."""
        self._inner.tell_checked(exchange, client)

    def settle(self, exchange: Exchange) -> None:
        """Pass on."""
        self._inner.settle(exchange)


class TracedTurns:
    """Times the wait of a cold turn, if there is one."""

    def __init__(self, inner: Admitting, tracing: Tracing) -> None:
        self._inner = inner
        self._tracing = tracing

    def admit(self, exchange: Exchange) -> Awaitable[None] | None:
        """Return what to await if the request must wait, which also notes the time. Raises CairnError."""
        wait = self._inner.admit(exchange)
        return None if wait is None else self._timed(exchange, wait)

    async def _timed(self, exchange: Exchange, wait: Awaitable[None]) -> None:
        started_seconds = self._tracing.now()
        try:
            await wait
        finally:
            if self._tracing.now() - started_seconds >= WAIT_SECONDS_LEAST:
                self._tracing.mark(exchange, Phase.WAIT, started_seconds)

    def judge(self, exchange: Exchange) -> Verdict | None:
        """Pass on."""
        return self._inner.judge(exchange)

    def settle(self, exchange: Exchange) -> None:
        """Pass on."""
        self._inner.settle(exchange)


class TracedSettlement:
    """Times phase 8, and ends the trace."""

    def __init__(self, inner: SettlingToOutcome, tracing: Tracing) -> None:
        self._inner = inner
        self._tracing = tracing

    def settle(self, exchange: Exchange) -> Outcome:
        """Settle, and make the spans."""
        tracing, started_seconds = self._tracing, self._tracing.now()
        trace = tracing.take(exchange)
        outcome = self._inner.settle(exchange)
        tracing.finish(trace, exchange, outcome, started_seconds)
        return outcome

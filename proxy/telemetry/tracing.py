"""The traces of the requests in progress: one begins with a request's first phase and ends when it is settled.

Only the request's own span and that of the relay exist while the request runs, since the upstream must receive the
second one's id. All others are made from the times of the phases when the request is settled.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import replace
from typing import Final, NamedTuple

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from proxy.clock import Clock
from proxy.pipeline.exchange import Exchange
from proxy.records import Call, Outcome
from proxy.telemetry import attributes

_CONTEXT_HEADERS: Final = (b"traceparent", b"tracestate")
_NANOSECONDS: Final = 1_000_000_000

AddressOf = Callable[[int], tuple[str, int] | None]
"""Returns the host and port of a replica, by its number."""


class Phase(enum.StrEnum):
    """The phases of a request; the value is the span's name, except for the relay, which is named by its model."""

    ADMIT = "admit"
    READ = "read"
    EXPAND = "expand"
    FINGERPRINT = "fingerprint"
    LOOK_UP = "look up"
    PLAN = "plan"
    WAIT = "wait"  # at the cold gate, between plan and relay
    RELAY = "relay"
    SETTLE = "settle"


class Mark(NamedTuple):
    """A phase that is over, by the monotonic clock."""

    phase: Phase
    started_seconds: float
    ended_seconds: float


class RequestTrace:
    """The trace of one request. If it is not sampled, nothing is kept of its phases."""

    __slots__ = (
        "context",
        "has_parent",
        "is_sampled",
        "marks",
        "relay",
        "relay_started_seconds",
        "root",
        "unix_offset",
    )

    def __init__(self, root: Span, *, has_parent: bool, unix_offset_seconds: float) -> None:
        self.root = root
        self.context: Context = set_span_in_context(root)
        self.has_parent = has_parent  # the client sent a valid traceparent
        self.is_sampled: bool = root.is_recording()
        self.unix_offset = unix_offset_seconds  # added to a monotonic time gives a Unix time
        self.marks: list[Mark] = []
        self.relay: Span | None = None
        self.relay_started_seconds = 0.0

    def unix_ns(self, monotonic_seconds: float) -> int:
        """Return a time as the SDK wants it: nanoseconds since 1970."""
        return int((monotonic_seconds + self.unix_offset) * _NANOSECONDS)


class Tracing:
    """Makes the spans of a worker's requests.

    Args:
        tracer: makes a span, and decides with its sampler whether it is recorded.
        clock: dates the spans.
        address_of: returns the address of a replica.
    """

    def __init__(self, tracer: Tracer, clock: Clock, address_of: AddressOf) -> None:
        self._tracer = tracer
        self._clock = clock
        self._address_of = address_of
        self._propagator = TraceContextTextMapPropagator()
        self._running: dict[Exchange, RequestTrace] = {}
        self.now = clock.monotonic

    @property
    def running(self) -> int:
        """Number of requests that have begun and are not settled."""
        return len(self._running)

    def mark(self, exchange: Exchange, phase: Phase, started_seconds: float) -> None:
        """Note that `phase` is over. An explanation is not a request and is not traced."""
        if exchange.only_explained:
            return
        trace = self._trace_of(exchange)
        if trace.is_sampled:
            trace.marks.append(Mark(phase, started_seconds, self.now()))

    def begin_relay(self, exchange: Exchange) -> None:
        """Begin the relay's span, and put its id into the headers that the upstream will receive."""
        trace = self._trace_of(exchange)
        if trace.is_sampled:
            started_seconds = trace.relay_started_seconds = self.now()
            trace.relay = self._tracer.start_span(
                attributes.inference_span_name(exchange.call, exchange.model),
                context=trace.context,
                kind=SpanKind.CLIENT,
                start_time=trace.unix_ns(started_seconds),
            )
            sent = trace.relay.get_span_context()
        elif trace.has_parent:
            return  # the header is passed on unchanged, so that the upstream's spans have an existing parent
        else:
            sent = trace.root.get_span_context()  # has the flag that the trace is not sampled
        exchange.call = replace(exchange.call, headers=_with_context(exchange.call, sent, trace.has_parent))

    def take(self, exchange: Exchange) -> RequestTrace:
        """Return the trace of a request that is about to be settled; it is no longer kept here."""
        return self._running.pop(exchange, None) or self._begin(exchange.call)

    def finish(self, trace: RequestTrace, exchange: Exchange, outcome: Outcome, settling_seconds: float) -> None:
        """Make the spans of a request whose settlement began at `settling_seconds`, and end its own."""
        if not trace.is_sampled:
            return
        call, root = exchange.call, trace.root
        if call.read_seconds >= call.received_seconds:
            self._add_span(trace, Mark(Phase.ADMIT, call.received_seconds, call.read_seconds))
        for mark in trace.marks:
            if mark.phase is Phase.RELAY:
                self._end_relay(trace, exchange, outcome, mark.ended_seconds)
            else:
                self._add_span(trace, mark)
        self._add_span(trace, Mark(Phase.SETTLE, settling_seconds, self.now()))
        root.set_attributes(attributes.server_attributes(call, outcome))
        if error := attributes.error_type(outcome):
            root.set_status(Status(StatusCode.ERROR, error))
        root.end(trace.unix_ns(self.now()))

    def _trace_of(self, exchange: Exchange) -> RequestTrace:
        found = self._running.get(exchange)
        if found is None:
            found = self._running[exchange] = self._begin(exchange.call)
        return found

    def _begin(self, call: Call) -> RequestTrace:
        carrier: dict[str, str] = {}
        for name, value in call.headers:
            if name in _CONTEXT_HEADERS:
                key, text = name.decode(), value.decode("latin-1")
                # several lines of tracestate form one list; several of traceparent are invalid
                carrier[key] = f"{carrier[key]},{text}" if key in carrier else text
        parent = self._propagator.extract(carrier) if carrier else Context()
        offset_seconds = self._clock.unix() - self.now()
        root = self._tracer.start_span(
            attributes.server_span_name(call),
            context=parent,
            kind=SpanKind.SERVER,
            start_time=int((call.received_seconds + offset_seconds) * _NANOSECONDS),
        )
        has_parent = bool(carrier) and get_current_span(parent).get_span_context().is_valid
        return RequestTrace(root, has_parent=has_parent, unix_offset_seconds=offset_seconds)

    def _add_span(self, trace: RequestTrace, mark: Mark) -> None:
        span = self._tracer.start_span(
            mark.phase.value,
            context=trace.context,
            start_time=trace.unix_ns(mark.started_seconds),
            attributes={"cairn.phase": mark.phase.value},
        )
        span.end(trace.unix_ns(mark.ended_seconds))

    def _end_relay(self, trace: RequestTrace, exchange: Exchange, outcome: Outcome, ended_seconds: float) -> None:
        relay = trace.relay
        if relay is None:
            return
        address = None if outcome.replica is None else self._address_of(outcome.replica.id)
        relay.set_attribute("cairn.phase", Phase.RELAY.value)
        relay.set_attributes(
            attributes.inference_attributes(
                exchange.call, outcome, exchange.prompt, trace.relay_started_seconds, address
            )
        )
        for failure in exchange.tried:
            relay.add_event("cairn.retry", {"cairn.replica": failure.name, "error.type": failure.reason})
        if error := attributes.error_type(outcome, client_errors=True):
            relay.set_status(Status(StatusCode.ERROR, error))
        relay.end(trace.unix_ns(ended_seconds))


def _with_context(call: Call, sent: SpanContext, has_parent: bool) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers with `sent` as the parent of the upstream's spans.

    `tracestate` belongs to the trace of a valid `traceparent`; without one it is dropped.
    """
    parent = f"00-{sent.trace_id:032x}-{sent.span_id:016x}-{int(sent.trace_flags):02x}".encode()
    dropped = _CONTEXT_HEADERS[:1] if has_parent else _CONTEXT_HEADERS
    kept = [pair for pair in call.headers if pair[0] not in dropped]
    return (*kept, (b"traceparent", parent))

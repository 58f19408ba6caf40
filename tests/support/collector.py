"""A collector of traces: OTLP over HTTP, on a thread, decoded by the protocol's own messages."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

Value = str | int | float | bool


@dataclass
class Collector:
    """Spans by name, in the order of their arrival, with what came around them."""

    port: int
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, Value]] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)
    raw: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    def named(self, name: str) -> Span:
        """The one span of this name."""
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def receive(self, body: bytes) -> None:
        """Decode one export."""
        message = ExportTraceServiceRequest.FromString(body)
        self.raw.append(body)
        for group in message.resource_spans:
            self.resources.append(values(group.resource.attributes))
            for scope in group.scope_spans:
                self.spans.extend(scope.spans)


def values(attributes: Iterable[KeyValue]) -> dict[str, Value]:
    """Attributes as a mapping."""
    return {each.key: _value(each.value) for each in attributes}


def _value(value: AnyValue) -> Value:
    found: Value = getattr(value, value.WhichOneof("value") or "string_value")
    return found


@contextmanager
def collector(status: int = 200, location: str | None = None) -> Iterator[Collector]:
    """A collector on a free port that answers with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["content-encoding"] == "gzip":
                body = gzip.decompress(body)
            received.paths.add(self.path)
            received.tokens.add(self.headers["authorization"] or "")
            if status == 200:
                received.receive(body)
            self.send_response(status)
            if location is not None:
                self.send_header("location", location)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received = Collector(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

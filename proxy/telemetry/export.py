"""Send finished spans to a collector, by OTLP over HTTP, from the SDK's own thread.

The thread collects spans in a bounded queue; if the collector is slow or away, spans are lost and no request waits.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Final
from urllib.parse import urlsplit

import requests
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Tracer

from proxy.config.schema import Telemetry
from proxy.version import own_version

QUEUED_SPANS_AT_MOST: Final = 8192  # about 900 requests, 16 MB; further spans are lost
BATCH_SPANS: Final = 512
BATCH_SECONDS: Final = 2.0
EXPORT_SECONDS: Final = 5.0  # for one batch, with its retries
CLOSE_SECONDS: Final = 2.0  # how long the end of a worker waits for the last batch
ATTRIBUTE_CHARACTERS: Final = 512
_DEFAULT_PATH: Final = "/v1/traces"


class TraceExport:
    """The SDK's tracer and the thread behind it. `instance` names this worker in every span."""

    def __init__(self, settings: Telemetry, instance: str) -> None:
        session = requests.Session()
        session.trust_env = False  # no proxy and no password that the configuration does not name
        token = settings.token
        exporter = OTLPSpanExporter(
            endpoint=spans_url(settings.endpoint or ""),
            certificate_file=settings.ca_file,
            headers=None if token is None else {"authorization": f"Bearer {token.reveal()}"},
            timeout=EXPORT_SECONDS,
            compression=Compression.Gzip,
            session=session,
        )
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            resource=Resource.create(
                {
                    "service.name": settings.service_name,
                    "service.version": own_version(),
                    "service.instance.id": instance,
                }
            ),
            span_limits=SpanLimits(max_attribute_length=ATTRIBUTE_CHARACTERS),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=QUEUED_SPANS_AT_MOST,
                schedule_delay_millis=BATCH_SECONDS * 1000,
                max_export_batch_size=BATCH_SPANS,
            )
        )
        self.tracer: Tracer = self._provider.get_tracer("cairn")

    async def close(self) -> None:
        """Send the remaining spans, for at most `CLOSE_SECONDS`; those not taken by then are lost."""
        ended: Future[None] = Future()

        def shut_down() -> None:
            self._provider.shutdown()
            ended.set_result(None)

        # not in the loop's executor, for which the process would wait
        threading.Thread(target=shut_down, name="last-spans", daemon=True).start()
        await asyncio.wait([asyncio.wrap_future(ended)], timeout=CLOSE_SECONDS)


def spans_url(endpoint: str) -> str:
    """Return the URL for spans: that of the configuration, with the standard path if it has none."""
    return endpoint.rstrip("/") + _DEFAULT_PATH if urlsplit(endpoint).path in ("", "/") else endpoint

"""A whole worker inside the test's own loop: real sockets, a real store where one is named, no processes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from proxy.config.schema import Config, Log, Pool, Redis, Replica, Routing, SecretUrl, Server
from proxy.control.channel import WorkerControl
from proxy.control.messages import WorkerReport
from proxy.metrics import definitions as metrics
from proxy.metrics.definitions import Labels, Spec
from proxy.metrics.exposition import Exposition
from proxy.worker.lifecycle import Worker


class Heard:
    """Takes a worker's reports in place of the supervisor."""

    def __init__(self) -> None:
        self.exposition = Exposition()
        self.last: WorkerReport | None = None

    def report(self, report: WorkerReport) -> bool:
        self.exposition.apply(0, report.counts)
        self.last = report
        return True


class Cairn:
    """A running worker with its base URL and what it counted."""

    def __init__(self, worker: Worker, heard: Heard, port: int) -> None:
        self.worker = worker
        self.heard = heard
        self.port = port

    @property
    def url(self) -> str:
        """The base URL for an SDK."""
        return f"http://127.0.0.1:{self.port}/v1"

    def count(self, spec: Spec, labels: Labels | None = None) -> float:
        """A counter's value by now."""
        self.worker.reporter.report()
        return self.heard.exposition.value(spec, labels)

    def tokens(self, kind: str) -> float:
        """Tokens of one type, over all models and upstreams."""
        self.worker.reporter.report()
        return self.heard.exposition.total(metrics.TOKENS, 2, kind)


def config_for(
    urls: Sequence[str],
    redis_url: str | None = None,
    *,
    min_shareable_bytes: int = 256,
    redis_seconds: float = 1.0,
    pools: Sequence[Pool] = (),
    **sections: Any,
) -> Config:
    """A configuration with one engine pool of `urls`, and no access log.

    An operation on Redis may take `redis_seconds`, since a busy machine often takes longer than the usual 50 ms.
    """
    pool = Pool(name="engines", replicas=tuple(Replica(url) for url in urls)) if urls else None
    return Config(
        server=sections.pop("server", Server(port=0)),
        redis=Redis(url=SecretUrl(redis_url) if redis_url else None, operation_seconds=redis_seconds),
        pools=(*([pool] if pool else []), *pools),
        routing=Routing(min_shareable_bytes=min_shareable_bytes),
        log=Log(access=False),
        **sections,
    )


@asynccontextmanager
async def running(config: Config, prepare: Callable[[Worker], None] | None = None) -> AsyncIterator[Cairn]:
    """A worker that serves on a free port of the loopback until the block ends."""
    heard = Heard()
    worker = await Worker.build(config, cast("WorkerControl", heard))
    if prepare is not None:
        prepare(worker)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    # uvloop, on which Cairn is served, sets this on each connection; the standard loop, on which tests run, does not,
    # and each streamed response on a kept connection would wait 40 ms for the client's delayed acknowledgement
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    port: int = listening.getsockname()[1]
    try:
        await worker.start([listening])
        yield Cairn(worker, heard, port)
    finally:
        async with asyncio.timeout(60):
            await worker.close()
        listening.close()

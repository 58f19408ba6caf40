"""Run a worker: start its parts in order, serve until told to drain, and stop the parts in the reverse order."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Sequence

from cache import (
    SharedSecret,
    StoreState,
)
from proxy.config.schema import Config
from proxy.control.channel import WorkerControl
from proxy.fleet.template_probe import TemplateProber
from proxy.worker import from_config
from proxy.worker.composition import build
from proxy.worker.explain import Explainer
from proxy.worker.heap import return_freed_memory
from proxy.worker.http_server import HttpServer
from proxy.worker.maintenance import Maintenance
from proxy.worker.sections import Parts

_SECRET_SECONDS = 2.0  # how long the start waits for the shared secret


async def run_worker(config: Config, listening: Sequence[socket.socket], control: WorkerControl) -> None:
    """Serve on `listening` until told to drain."""
    worker = await Worker.build(config, control)
    control.on_explain = lambda question: worker.explainer.explain(question, worker.http_server.authenticator)
    control.on_reload = worker.live.reconfigure
    control.on_models = worker.live.name_models
    try:
        await worker.start(listening)
        freeze_garbage()
        if control.handover is not None:
            control.handover.start(worker.http_server.adopt)
        await control.send_ready()
        finish_seconds = await control.wait_for_drain()
        await worker.http_server.stop(finish_seconds)
    finally:
        await worker.close()


class Worker:
    """Everything that one worker consists of, and the order in which it starts and stops.

    The store, the index and the journal start first (the journal waits until it has caught up with the others), then
    the replicas, then the client port. They stop in the reverse order.
    """

    def __init__(self, parts: Parts) -> None:
        built, requests = parts.built, parts.requests
        self.basics = built.basics
        self.memory = built.memory
        self.replicas = built.replicas
        self.sharing = built.sharing
        self.accounting = built.accounting
        self.contexts = built.contexts
        self.requests = requests
        self.health = parts.health
        self.reporter = parts.reporter
        self.live = parts.live
        self.explainer = Explainer(requests.pipeline, requests.routes, built.basics.clock)
        self.maintenance = Maintenance(
            built.memory.index, built.basics.recorder, built.basics.clock, return_freed_memory
        )

    @classmethod
    async def build(cls, config: Config, control: WorkerControl, *, access_log_descriptor: int = 1) -> Worker:
        """Build a worker; it does not serve before `start`."""
        return cls(await build(config, control, access_log_descriptor=access_log_descriptor))

    @property
    def http_server(self) -> HttpServer:
        """The client port."""
        return self.requests.http_server

    async def start(self, listening: Sequence[socket.socket]) -> None:
        """Start to serve."""
        store, loops = self.memory.store, self.basics.loops
        await store.start()
        await self._share_secret()
        self.sharing.baseline.follow(self.memory.index.replicas())
        await self.sharing.journal.start()
        await self.sharing.load_broadcast.start()
        await self.replicas.discovery.begin()
        await self.health.begin()
        await self.contexts.store.start()
        loops.keep(self.replicas.discovery.run, "discovery")
        loops.keep(self.health.run, "health")
        loops.keep(self._template_prober().run, "template prober")
        loops.keep(self.maintenance.run, "maintenance")
        loops.keep(self.reporter.run, "reporter")
        loops.keep(self.accounting.totals.run, "totals")
        await self.http_server.start(listening)

    def _template_prober(self) -> TemplateProber:
        replicas, limits = self.replicas, from_config.upstream_limits(self.live.config.upstream)
        return TemplateProber(replicas.client, replicas.pools, replicas.templates, self.basics.clock, limits)

    async def _share_secret(self) -> None:
        """Adopt the secret by which all proxies name tenants. Until Redis answers, this worker uses its own."""
        if self.live.config.tenants.secret is not None:
            return
        shared = SharedSecret(self.memory.store, self.live.adopt_secret)
        self.basics.loops.keep(shared.run, "tenant secret")
        if self.memory.store.state is StoreState.AVAILABLE:
            # other workers would not find a context stored under this worker's own secret
            agreed = self.basics.tasks.start(shared.agreed.wait(), "tenant secret agreed")
            await asyncio.wait([agreed], timeout=_SECRET_SECONDS)

    async def close(self) -> None:
        """Stop in the reverse order, after a last report of what was counted."""
        await self.http_server.stop(0)
        await self.basics.loops.close()
        self.reporter.report()
        await self.accounting.totals.close()
        await self.contexts.store.close()
        await self.sharing.load_broadcast.close()
        await self.sharing.journal.close()
        await self.replicas.discovery.close()
        await self.replicas.client.close()
        await self.memory.store.close()
        await self.basics.tasks.close()
        if self.requests.traces is not None:
            await self.requests.traces.close()
        if self.accounting.access_log is not None:
            self.accounting.access_log.close()


def freeze_garbage() -> None:
    """Exempt all present objects from garbage collection, and make collections rare.

    A full collection over a large index is a pause of tens of milliseconds; requests create hardly any cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)

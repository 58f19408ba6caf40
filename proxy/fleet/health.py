"""Asks replicas how they are, beside the requests: whether one that failed is back, what an engine can hold, what it
serves, and whether it is still the same process.

What is heard goes to the fleet, the index and the model names. It must not know requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cache import Journal
from proxy.clock import Clock
from proxy.errors import UpstreamError
from proxy.fleet import Fleet
from proxy.fleet.engine_facts import EngineFacts, read_llama_props, read_metrics, read_sglang_server
from proxy.fleet.model_list import fetch_models
from proxy.fleet.pools import Pools, ReplicaEndpoint
from proxy.metrics.model_labels import ModelNames
from proxy.tasks import Tasks
from proxy.upstream import Limits, UpstreamClient

TICK_SECONDS = 0.25
"""How often it is looked whether a back-off is over."""

FACTS_SECONDS = 15.0
"""How often engines are asked for their facts: a restart is noticed by requests much sooner."""

BEGIN_SECONDS = 1.0
"""How long the start waits for engines that do not answer."""

_PAGE_AT_MOST_BYTES = 4 * 1024 * 1024
_FACT_PAGES = (
    (b"/metrics", read_metrics),
    (b"/props", read_llama_props),
    (b"/get_server_info", read_sglang_server),
)


class HealthChecker:
    """One per worker."""

    def __init__(
        self,
        client: UpstreamClient,
        pools: Pools,
        fleet: Fleet,
        journal: Journal,
        names: ModelNames,
        tasks: Tasks,
        clock: Clock,
        limits: Limits,
        limits_changed: Callable[[], None],
        always_reports_usage: Callable[[int], None],
    ) -> None:
        self._client = client
        self._fleet = fleet
        self._journal = journal
        self._names = names
        self._tasks = tasks
        self._clock = clock
        self._limits = limits
        self._limits_changed = limits_changed
        self._always_reports_usage = always_reports_usage
        self._started: dict[int, float] = {}
        self._capacity_tokens: dict[int, int] = {}
        self.pools = pools

    async def begin(self) -> None:
        """Learn what can be learned at once, so that the first requests are served by what is known."""
        learning = [self._tasks.start(self.learn(number), "engine facts") for number in self.pools.served]
        if learning:
            await asyncio.wait(learning, timeout=BEGIN_SECONDS)

    async def run(self) -> None:
        """Probe until cancelled."""
        next_facts_seconds = self._clock.monotonic() + FACTS_SECONDS
        while True:
            now_seconds = self._clock.monotonic()
            for number in self._fleet.probes(now_seconds):
                self._tasks.start(self.probe(number), "probe")
            if now_seconds >= next_facts_seconds:
                next_facts_seconds = now_seconds + FACTS_SECONDS
                for number in self.pools.served:
                    self._tasks.start(self.learn(number), "engine facts")
            await asyncio.sleep(TICK_SECONDS)

    async def probe(self, number: int) -> None:
        """Ask a replica whose back-off is over for its models; any answer at all means that it is back."""
        backend = self.pools.backends.get(number)
        if backend is None:
            return
        try:
            await self._page(backend, b"/v1/models")
        except UpstreamError:
            self._fleet.failed(number, self._clock.monotonic(), unreachable=True)
        else:
            self._fleet.answered(number)

    async def learn(self, number: int) -> None:
        """Take in what an engine says of itself; whatever it does not answer is left as it is."""
        backend = self.pools.backends[number]
        try:
            listed = await fetch_models(self._client, backend)
            self._names.add(str(model.get("id")) for model in listed)
            if not backend.is_provider:
                self._apply(number, backend, await self._facts(backend))
        except UpstreamError:
            return

    async def _facts(self, backend: ReplicaEndpoint) -> EngineFacts:
        facts = EngineFacts()
        for path, read in _FACT_PAGES:
            status, page = await self._page(backend, path)
            if status == 200:
                facts = facts.joined(read(page))
        return facts

    def _apply(self, number: int, backend: ReplicaEndpoint, facts: EngineFacts) -> None:
        if facts.capacity_tokens is not None and backend.capacity_tokens is None:
            self._tell_capacity(number, facts.capacity_tokens, facts.slots)
        if facts.in_flight_limit is not None:
            self._fleet.set_limit(number, facts.in_flight_limit)
            self._limits_changed()
        if facts.tells_timings:
            self._always_reports_usage(number)
        started = facts.started_unix_seconds
        if started is not None:
            before = self._started.setdefault(number, started)
            if started > before:
                self._started[number] = started
                self._fleet.restarted(number)
                self._journal.new_epoch(number)

    def _tell_capacity(self, number: int, tokens: int, slots: int | None) -> None:
        """Say it when it is new, since what the answers teach from there on would be undone by saying it again.

        A worker that starts among others says it only where their index has no budget for the replica yet.
        """
        first = number not in self._capacity_tokens
        if self._capacity_tokens.get(number) == tokens:
            return
        self._capacity_tokens[number] = tokens
        self._journal.set_capacity(number, tokens, slots)
        if not (first and self._journal.knows_budget(number)):
            self._journal.set_budget(number, tokens)

    async def _page(self, backend: ReplicaEndpoint, path: bytes) -> tuple[int, bytes]:
        headers = () if backend.credential is None else (backend.credential,)
        response = await self._client.request(backend.origin, b"GET", path, headers, limits=self._limits)
        try:
            return response.status, await response.read(_PAGE_AT_MOST_BYTES)
        finally:
            response.abort()

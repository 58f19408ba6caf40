"""Check replicas independently of requests: whether one responds, what it can hold, and whether it was restarted.

A replica that cannot be resolved or connected to, that is still loading its model, or that is frozen gets no request.
Facts about an engine are passed to `Findings`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import Final, Protocol

from proxy.clock import Clock
from proxy.errors import BadResponse, ConnectFailed, PoolTimeout, ResetBeforeResponse, UpstreamError
from proxy.fleet.breaker import Cause
from proxy.fleet.engine_facts import EngineFacts, read_llama_props, read_metrics, read_sglang_server, read_version
from proxy.fleet.findings import Found
from proxy.fleet.fleet import Fleet
from proxy.fleet.http_client import PooledClient
from proxy.fleet.learned_limit import LEAST_LIMIT
from proxy.fleet.model_list import read_listing
from proxy.fleet.pools import Pools, ReplicaEndpoint
from proxy.fleet.silence import Silence
from proxy.logs import REPLICAS
from proxy.tasks import Tasks
from proxy.upstream import Limits, UpstreamResponse

log = logging.getLogger(REPLICAS)

TICK_SECONDS = 0.25
"""Interval of the check for back-offs that are over."""

FACTS_SECONDS = 15.0
"""Interval of asking engines for their facts. Requests notice a restart much sooner."""

LOAD_SECONDS = 2.0
"""Interval of asking a busy engine that states no limit of concurrent requests how many run and wait in it."""

BEGIN_SECONDS = 1.0
"""Longest time for which the start waits for engines that do not respond."""

_PAGE_AT_MOST_BYTES = 8 * 1024 * 1024
_FACT_PAGES = (
    (b"/metrics", read_metrics),
    (b"/props", read_llama_props),
    (b"/get_server_info", read_sglang_server),
    (b"/version", read_version),
)
_UNAVAILABLE: Final = 503
_LOADING = re.compile(rb"loading|starting|warming|initializ|not (?:yet )?ready|not (?:yet )?loaded", re.IGNORECASE)
"""The words of engines that will serve their model soon: llama.cpp, SGLang, TGI, Triton."""

_NAMED_AT_MOST: Final = 4  # models in the log line of a replica


class Findings(Protocol):
    """Applies the findings of a check: `proxy.fleet.findings.EngineFindings`."""

    def apply(self, number: int, endpoint: ReplicaEndpoint, found: Found, now_seconds: float) -> None:
        """Take over what was found at a replica."""
        ...

    def observe_load(self, number: int, facts: EngineFacts, now_seconds: float) -> None:
        """Take over how many requests run and wait at a replica."""
        ...


class HealthChecker:
    """Checks all replicas. One per worker.

    `limits` bound each question to a replica. `busy_seconds` is for how long one that has work may answer none.
    """

    def __init__(
        self,
        client: PooledClient,
        pools: Pools,
        fleet: Fleet,
        findings: Findings,
        tasks: Tasks,
        clock: Clock,
        limits: Limits,
        busy_seconds: float,
    ) -> None:
        self._client = client
        self._pools = pools
        self._fleet = fleet
        self._findings = findings
        self._tasks = tasks
        self._clock = clock
        self._limits = limits
        self._busy_seconds = busy_seconds
        self._found: dict[int, Found] = {}
        self._silences: dict[int, Silence] = {}
        self._checking: set[int] = set()
        self._unanswered_at_start: set[int] = set()  # were logged as such, so that their first answer is logged too

    async def begin(self) -> None:
        """Check every replica once and log what was found, so that the first requests are served accordingly."""
        known: frozenset[int] = frozenset()
        while new := self._pools.served - known:  # more than once if engines turn out to be several ranks
            known = self._pools.served
            checks = [self._tasks.start(self.check(number), "health check") for number in new]
            await asyncio.wait(checks, timeout=BEGIN_SECONDS)
        for number in sorted(self._pools.served):
            if number not in self._found and self._fleet.cause(number) is None:
                self._unanswered_at_start.add(number)
            if self._fleet.cause(number) is None:  # that a replica is down was logged when it was found
                log.info("%s", self.describe(number))

    async def run(self) -> None:
        """Check until cancelled."""
        next_facts_seconds = self._clock.monotonic() + FACTS_SECONDS
        next_load_seconds = self._clock.monotonic() + LOAD_SECONDS
        while True:
            now_seconds = self._clock.monotonic()
            if now_seconds >= next_load_seconds:
                next_load_seconds = now_seconds + LOAD_SECONDS
                for number in self._busy():
                    self._tasks.start(self.check_load(number), "engine load check")
            for number in (*self._fleet.probes(now_seconds), *self._silent()):
                self._tasks.start(self.check(number), "health check")
            if now_seconds >= next_facts_seconds:
                next_facts_seconds = now_seconds + FACTS_SECONDS
                for number in self._pools.served:
                    if number in self._fleet and not self._fleet.is_probed(number):
                        self._tasks.start(self.check(number), "health check")
            await asyncio.sleep(TICK_SECONDS)

    def replicas_changed(self, joined: Sequence[int]) -> None:
        """Check new replicas at once."""
        for number in joined:
            self._tasks.start(self.check(number), "health check")

    def replica_forgotten(self, number: int, endpoint: ReplicaEndpoint) -> None:  # noqa: ARG002
        """Drop what was found at a replica that is gone for good."""
        self._found.pop(number, None)
        self._silences.pop(number, None)
        self._unanswered_at_start.discard(number)

    async def check(self, number: int) -> None:
        """Ask a replica for its models, and an engine for its facts. Facts that are not reported stay as they are."""
        endpoint = self._pools.backends.get(number)
        if endpoint is None or number in self._checking:
            return
        self._checking.add(number)
        try:
            await self._check(number, endpoint)
        finally:
            self._checking.discard(number)

    async def _check(self, number: int, endpoint: ReplicaEndpoint) -> None:
        sent_seconds = self._clock.monotonic()
        try:
            status, page = await self._page(endpoint, b"/v1/models")
        except (ConnectFailed, ResetBeforeResponse, BadResponse) as error:
            self._silences.pop(number, None)
            self._down(number, error.message)
            return
        except UpstreamError as error:
            if number in self._fleet:
                self._fleet.abandon_trial(number)
                if not isinstance(error, PoolTimeout):  # otherwise it was never asked
                    self._unanswered(number, endpoint, sent_seconds)
            return
        self._silences.pop(number, None)
        if number not in self._fleet:
            return
        if status == _UNAVAILABLE and _LOADING.search(page[:4096]) is not None:
            self._down(number, "it is loading its model", Cause.LOADING)
            return
        self._fleet.reached(number)
        read = read_listing(page) if status == 200 else None
        self._fleet.listed(number, None if read is None else read[1])
        await self._learn(number, endpoint, None if read is None else read[0])

    def _silent(self) -> list[int]:
        """Return the replicas to be asked again: they left a health check unanswered and are not known to be down."""
        return [
            number
            for number in self._silences
            if number in self._fleet and number not in self._checking and not self._fleet.is_probed(number)
        ]

    def _unanswered(self, number: int, endpoint: ReplicaEndpoint, sent_seconds: float) -> None:
        """Note that a check sent at `sent_seconds` was not answered in time."""
        if endpoint.is_provider:
            return  # has many machines behind one address, and may list models slowly
        received_seconds = self._client.received_seconds(endpoint.origin)
        if received_seconds >= sent_seconds:
            self._silences.pop(number, None)
            return
        now_seconds = self._clock.monotonic()
        silence = self._silences.get(number)
        if silence is None or received_seconds >= silence.since_seconds:
            silence = Silence(sent_seconds, now_seconds + self._fleet.sent_seconds(number, now_seconds))
            self._silences[number] = silence
        silence.checks += 1
        has_work = self._fleet.has_work(number)
        if silence.shows_a_frozen_replica(now_seconds, has_work=has_work, busy_seconds=self._busy_seconds):
            silent_seconds = now_seconds - silence.since_seconds
            self._down(number, f"no health check was answered for {silent_seconds:.0f} s", Cause.SILENT)

    def _busy(self) -> list[int]:
        """Return the replicas that report no limit of concurrent requests and may be near it."""
        return [
            number
            for number, found in self._found.items()
            if found.facts.waiting is not None
            and found.facts.in_flight_limit is None
            and number in self._fleet
            and self._fleet.own_in_flight(number) >= LEAST_LIMIT // 2
        ]

    async def check_load(self, number: int) -> None:
        """Ask an engine how many requests run and wait in it."""
        endpoint = self._pools.backends.get(number)
        if endpoint is None:
            return
        try:
            status, page = await self._page(endpoint, b"/metrics")
        except UpstreamError:
            return  # requests and the next health check will show what is wrong
        if status == 200 and number in self._fleet:
            facts = read_metrics(page)
            facts = facts if endpoint.ranks == 1 else facts.per_rank(endpoint.ranks)
            self._findings.observe_load(number, facts, self._clock.monotonic())

    async def _learn(self, number: int, endpoint: ReplicaEndpoint, names: tuple[str, ...] | None) -> None:
        try:
            facts = EngineFacts() if endpoint.is_provider else await self._facts(endpoint)
        except UpstreamError:
            return
        if number in self._fleet:
            found = self._found[number] = Found(names, facts)
            self._findings.apply(number, endpoint, found, self._clock.monotonic())
            if number in self._unanswered_at_start:
                self._unanswered_at_start.discard(number)
                log.info("%s", self.describe(number))

    def describe(self, number: int) -> str:
        """Return one line about a replica: its address and what was found there."""
        endpoint = self._pools.backends[number]
        start = f"replica {endpoint.name} (pool {endpoint.pool})"
        cause = self._fleet.cause(number)
        if cause is not None:
            return f"{start} is down: {cause.value}"
        found = self._found.get(number)
        if found is None:
            return f"{start} has not responded yet"
        return f"{start} is up: {', '.join(_facts_in_words(found, endpoint)) or 'it reports nothing about itself'}"

    def _down(self, number: int, reason: str, cause: Cause = Cause.UNREACHABLE) -> None:
        if number in self._fleet:
            self._fleet.unreachable(number, self._clock.monotonic(), reason, cause)

    async def _facts(self, endpoint: ReplicaEndpoint) -> EngineFacts:
        facts = EngineFacts()
        for path, read in _FACT_PAGES:
            status, page = await self._page(endpoint, path)
            if status == 200:
                facts = facts.joined(read(page))
        return facts if endpoint.ranks == 1 else facts.per_rank(endpoint.ranks)

    async def _page(self, endpoint: ReplicaEndpoint, path: bytes) -> tuple[int, bytes]:
        headers = endpoint.default_headers
        if endpoint.credential is not None:
            headers = (*headers, endpoint.credential)
        response = await self._client.request(
            endpoint.origin, b"GET", path, headers, limits=self._limits, repeatable=True
        )
        try:
            return response.status, await _read(response)
        finally:
            response.abort()


async def _read(response: UpstreamResponse) -> bytes:
    """Return a page, empty if it is too long: that shows nothing about the replica."""
    pieces: list[bytes] = []
    size = 0
    while size <= _PAGE_AT_MOST_BYTES and (piece := await response.next_chunk()):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces) if size <= _PAGE_AT_MOST_BYTES else b""


def _facts_in_words(found: Found, endpoint: ReplicaEndpoint) -> list[str]:
    facts = found.facts
    words = []
    if facts.engine is not None:
        words.append(f"{facts.engine} {facts.version or ''}".rstrip())
    if found.models is not None:
        shown = ", ".join(name[:64] for name in found.models[:_NAMED_AT_MOST])
        more = len(found.models) - _NAMED_AT_MOST
        words.append(f"models {shown}{f' and {more} more' if more > 0 else ''}" if shown else "no models")
    capacity = endpoint.capacity_tokens or facts.capacity_tokens
    if capacity is not None:
        words.append(f"capacity {capacity:,} tokens")
    if facts.in_flight_limit is not None:
        words.append(f"{facts.in_flight_limit} requests at once")
    if facts.has_template:
        words.append("chat template known")
    return words

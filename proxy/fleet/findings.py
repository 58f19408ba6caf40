"""Apply what a health check found at an engine: to the fleet, the index and the names of models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec

from proxy.fleet.engine_facts import EngineFacts
from proxy.fleet.fleet import Fleet
from proxy.fleet.learned_limit import LearnedLimit
from proxy.fleet.pools import ReplicaEndpoint


class Found(msgspec.Struct, frozen=True):
    """Facts that a replica reports about itself. `models` is None if it does not list them."""

    models: tuple[str, ...] | None
    facts: EngineFacts


class Journal(Protocol):
    """The part of `cache.Journal` that takes facts about engines."""

    def knows_budget(self, replica: int) -> bool: ...
    def set_budget(self, replica: int, tokens: int) -> None: ...
    def set_capacity(self, replica: int, tokens: int, slots: int | None) -> None: ...
    def new_epoch(self, replica: int) -> None: ...


class ModelNames(Protocol):
    """Model names that may become metric labels."""

    def add(self, names: Iterable[str]) -> None: ...


class Queues(Protocol):
    """The queues before replicas."""

    def update(self) -> None: ...


class UsageReports(Protocol):
    """Receives the replicas that report usage without being asked."""

    def always_reports_usage(self, replica: int) -> None: ...


class Ranks(Protocol):
    """The part of `proxy.fleet.discovery.Discovery` that takes the number of data-parallel ranks."""

    def ranks_found(self, endpoint: ReplicaEndpoint, ranks: int) -> bool:
        """Note the ranks of an engine. Return True if other replicas have replaced `endpoint`."""
        ...


class EngineFindings:
    """Applies findings. One per worker."""

    def __init__(
        self,
        fleet: Fleet,
        journal: Journal,
        model_names: ModelNames,
        queues: Queues,
        usage_reports: UsageReports,
        ranks: Ranks,
    ) -> None:
        self._fleet = fleet
        self._journal = journal
        self._model_names = model_names
        self._queues = queues
        self._usage_reports = usage_reports
        self._ranks = ranks
        self._started: dict[int, float] = {}
        self._rooms: dict[int, tuple[int, int | None]] = {}  # capacity in tokens, and slots, by replica
        self._limits: dict[int, LearnedLimit] = {}
        self._urls: dict[int, str] = {}

    def apply(self, number: int, endpoint: ReplicaEndpoint, found: Found, now_seconds: float) -> None:
        """Take over what was found at a replica."""
        facts = found.facts
        if self._urls.setdefault(number, endpoint.url) != endpoint.url:  # another engine has its name now
            self._urls[number] = endpoint.url
            self._forget_limit(number)
        if found.models is not None:
            self._model_names.add(found.models)
        if facts.ranks is not None and self._ranks.ranks_found(endpoint, facts.ranks):
            return  # the ranks are new replicas, each of which is checked
        if facts.capacity_tokens is not None and endpoint.capacity_tokens is None:
            self._set_capacity(number, facts.capacity_tokens, facts.slots)
        if facts.in_flight_limit is not None:
            self._fleet.set_limit(number, facts.in_flight_limit)
            self._queues.update()
        else:
            self.observe_load(number, facts, now_seconds)
        if facts.tells_timings:
            self._usage_reports.always_reports_usage(number)
        if facts.started_unix_seconds is not None:
            self._note_start(number, facts.started_unix_seconds)

    def observe_load(self, number: int, facts: EngineFacts, now_seconds: float) -> None:
        """Learn the limit of an engine that states none from how many requests run and wait in it."""
        if facts.running is None or facts.waiting is None:
            return
        learned = self._limits.setdefault(number, LearnedLimit())
        before = learned.value
        if learned.observe(facts.running, facts.waiting, now_seconds) != before:
            self._fleet.set_limit(number, learned.value)
            self._queues.update()

    def forget(self, number: int) -> None:
        """Drop what is known of a replica that is gone for good."""
        self._limits.pop(number, None)
        self._started.pop(number, None)
        self._rooms.pop(number, None)
        self._urls.pop(number, None)

    def _note_start(self, number: int, started_unix_seconds: float) -> None:
        """Start a new epoch if the engine was restarted: its cache is empty."""
        before = self._started.setdefault(number, started_unix_seconds)
        if started_unix_seconds > before:
            self._started[number] = started_unix_seconds
            if number in self._limits:
                self._forget_limit(number)
            self._fleet.restarted(number)
            self._journal.new_epoch(number)

    def _forget_limit(self, number: int) -> None:
        self._limits.pop(number, None)
        self._fleet.set_limit(number, None)
        self._queues.update()

    def _set_capacity(self, number: int, tokens: int, slots: int | None) -> None:
        """Set a budget and slots when they are new: setting them again would undo what was learned from responses.

        A worker that starts among others sets it only if their index has no budget for the replica yet. A budget is
        lost when a configured capacity is taken back.
        """
        first, knows_budget = number not in self._rooms, self._journal.knows_budget(number)
        if self._rooms.get(number) == (tokens, slots) and knows_budget:
            return
        self._rooms[number] = (tokens, slots)
        self._journal.set_capacity(number, tokens, slots)
        if not (first and knows_budget):
            self._journal.set_budget(number, tokens)

"""Admission of whole sessions: a rule that knows each session's id and end, unlike all others.

A session is admitted to the replica with most room if its first prompt fits beside the sessions that are there, keeps
its part of the cache until it ends, and has all its turns served there. The others wait in order of arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from benchmarks.agents.loop import Program
from benchmarks.fleet.simulation import Send
from benchmarks.fleet.trace import Request


class WholePrograms:
    """The rule. `program_of` returns the session of a request."""

    def __init__(self, replicas: int, capacity_tokens: int, program_of: Callable[[Request], Program]) -> None:
        self._capacity_tokens = capacity_tokens
        self._program_of = program_of
        self._reserved: list[dict[int, int]] = [{} for _ in range(replicas)]  # tokens by session
        self._replica_of: dict[int, int] = {}
        self._waiting: deque[tuple[Request, Send]] = deque()

    def route(self, request: Request, now: float, send: Send) -> None:
        program = self._program_of(request)
        replica = self._replica_of.get(program.number)
        if replica is None:
            self._waiting.append((request, send))
            self._admit(now)
        else:
            self._reserved[replica][program.number] = request.input_tokens
            send(replica, float(request.input_tokens), now)

    def started(self, request: Request, now: float) -> None:
        """Do nothing: the engines' queues are first in, first out."""

    def first_token(self, request: Request, replica: int, cached_tokens: int, now: float) -> None:
        """Do nothing: nothing is learned from responses."""

    def ended(self, request: Request, replica: int, now: float) -> None:
        program = self._program_of(request)
        if program.is_last:
            del self._reserved[replica][program.number], self._replica_of[program.number]
            self._admit(now)

    def _admit(self, now: float) -> None:
        while self._waiting:
            request, send = self._waiting[0]
            used = [sum(reserved.values()) for reserved in self._reserved]
            replica = used.index(min(used))
            if used[replica] and used[replica] + request.input_tokens > self._capacity_tokens:
                return
            self._waiting.popleft()
            number = self._program_of(request).number
            self._replica_of[number] = replica
            self._reserved[replica][number] = request.input_tokens
            send(replica, float(request.input_tokens), now)

"""Agents' sessions for the live replay: tools in common, one of several system prompts, and turns at fixed times."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from random import Random

from benchmarks.engines.scenarios import AgentLoad
from benchmarks.engines.sessions import Session, tools, words
from benchmarks.engines.templates import BYTES_PER_TOKEN, Template, decode_chat, render
from benchmarks.fleet.trace import Request
from benchmarks.replay.engines import blocks_of
from benchmarks.replay.texts import MODEL
from cache import Fingerprint

OUTPUT_TOKENS = 16
QUESTION_TOKENS = 120


class AgentBodies:
    """The bodies of the sessions' requests by number."""

    def __init__(self, bodies: Sequence[bytes]) -> None:
        self._bodies = bodies

    def body(self, request: Request) -> bytes:
        """Return the JSON of a streamed chat request."""
        return self._bodies[request.number]


def agents(load: AgentLoad, template: Template, turn_seconds: float) -> tuple[list[Request], AgentBodies]:
    """Return the requests of `load` in order of arrival and their bodies.

    The turns of a session are `turn_seconds` apart. Blocks and tokens are those of the prompts as `template` renders
    them.
    """
    random, arrivals = Random(7), []
    for number in range(load.sessions):
        talk, start = _session(load, number), random.random() * load.seconds
        for turn in range(load.turns):
            arrivals.append((start + turn * turn_seconds, talk.ask(QUESTION_TOKENS)))
            talk.answered(OUTPUT_TOKENS)
    arrivals.sort()
    requests = []
    for number, (seconds, body) in enumerate(arrivals):
        text = render(decode_chat(body), template)
        requests.append(Request(number, seconds, len(text) // BYTES_PER_TOKEN, OUTPUT_TOKENS, blocks_of(text), _NONE))
    return requests, AgentBodies([body for _, body in arrivals])


_NONE = Fingerprint(array("Q"), array("I"))


def _session(load: AgentLoad, number: int) -> Session:
    fields = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": OUTPUT_TOKENS}
    system = words(f"kind {number % load.kinds}", load.system_tokens)
    return Session(f"agent {number}", system, tools("search", load.tool_tokens), **{**fields, "model": MODEL})

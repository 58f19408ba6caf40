"""Sessions as a closed loop needs them: turns with chained blocks, and the pause before each.

They are made up (`synthetic`), or come from a file: one turn a line with a `session_id` and a `delay` in
milliseconds, as AIPerf replays them, or a trace in Mooncake's form, whose conversations are found by their prefixes.
"""

from __future__ import annotations

import gzip
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, count
from math import log, sqrt
from pathlib import Path
from random import Random

import msgspec

from benchmarks.fleet.trace import BLOCK_TOKENS, BYTES_PER_TOKEN, Request
from cache.index.fingerprint import Fingerprint
from cache.index.hashing import chain_root


class Skewed(msgspec.Struct, frozen=True):
    """A lognormal distribution, by its mean and median."""

    mean: float
    median: float

    def draw(self, random: Random) -> float:
        """Draw a value."""
        return random.lognormvariate(log(self.median), sqrt(2.0 * log(self.mean / self.median)))


COMMON_TOKENS = 32_000
GROUPS = 100
GROUP_TOKENS = 10_000
GROUP_SKEW = 0.6
CONTEXT_TOKENS = 200_000
"""A session ends when its next prompt would be longer."""

OWN_TOKENS = Skewed(15_000, 5_000)
"""A first prompt's tokens beyond what it shares: 54,000 tokens in all in the mean."""

NEW_TOKENS = Skewed(6_000, 4_000)
"""Tokens of a turn after the last answer."""

OUTPUT_TOKENS = Skewed(1_000, 800)
FEWEST_OUTPUT_TOKENS = 30
TOOL_PAUSE_SECONDS = Skewed(5.0, 2.0)
PERSON_PAUSE_SECONDS = Skewed(30.0, 15.0)
PERSON_SHARE = 0.3
SHORTEST_PAUSE = 0.2
"""Pauses become shorter as the context grows, down to this share of those at its beginning."""

END_SHARE = 0.05
END_GROWTH = 0.5
"""A session ends before a turn with probability `END_SHARE`, and half of it more with a full context."""


class Turn(msgspec.Struct, frozen=True):
    """One request of a session. `pause_seconds` lies between the end of the last answer and this request."""

    pause_seconds: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    block_tokens: int = BLOCK_TOKENS

    def request(self, number: int, now: float) -> Request:
        """Return the turn as the simulated fleet takes it."""
        ends = [self.block_tokens * BYTES_PER_TOKEN * (place + 1) for place in range(len(self.blocks))]
        ends[-1] = self.input_tokens * BYTES_PER_TOKEN
        fingerprint = Fingerprint(array("Q", self.blocks), array("I", ends))
        return Request(number, now, self.input_tokens, self.output_tokens, self.blocks, fingerprint)


Session = tuple[Turn, ...]


def synthetic(sessions: int, seed: int = 1) -> list[Session]:
    """Coding agents' sessions: a prompt common to all, a repository's common to its group, and a growing rest.

    Sizes, pauses and ends have the distributions of the coding agents' sessions that AIPerf generates.
    """
    random = Random(seed)
    heavier = list(accumulate(1.0 / (rank + 1) ** GROUP_SKEW for rank in range(GROUPS)))
    made = []
    for number in range(sessions):
        group = bisect_left(heavier, random.random() * heavier[-1])
        made.append(tuple(_turns(number, group, random)))
    return made


def _turns(number: int, group: int, random: Random) -> Iterator[Turn]:
    common, group_blocks = COMMON_TOKENS // BLOCK_TOKENS, GROUP_TOKENS // BLOCK_TOKENS
    chain = Chain()
    chain.extend((b"common", place) for place in range(common))
    chain.extend((b"group%d" % group, place) for place in range(group_blocks))
    tokens, pause, own = _first_tokens(random), 0.0, b"session%d" % number
    for turn in count():
        whole = tokens // BLOCK_TOKENS
        chain.extend((own, place) for place in range(len(chain), whole))
        # the last block is not full, so the next turn's block in its place is another
        last = () if tokens % BLOCK_TOKENS == 0 else (chain.after(b"part%d.%d" % (number, turn)),)
        output = max(int(OUTPUT_TOKENS.draw(random)), FEWEST_OUTPUT_TOKENS)
        yield Turn(pause, tokens, output, (*chain, *last))
        pause = _pause_seconds(tokens, random)
        tokens += output + max(int(NEW_TOKENS.draw(random)), 1)
        ends = END_SHARE * (1.0 + END_GROWTH * tokens / CONTEXT_TOKENS)
        if tokens >= CONTEXT_TOKENS or random.random() < ends:
            return


def _first_tokens(random: Random) -> int:
    shared = COMMON_TOKENS + GROUP_TOKENS
    while (tokens := shared + max(int(OWN_TOKENS.draw(random)), 1)) >= CONTEXT_TOKENS:
        pass
    return tokens


def _pause_seconds(tokens: int, random: Random) -> float:
    pause = PERSON_PAUSE_SECONDS if random.random() < PERSON_SHARE else TOOL_PAUSE_SECONDS
    full = tokens / CONTEXT_TOKENS
    return pause.draw(random) * (1.0 - (1.0 - SHORTEST_PAUSE) * full)


class Chain(list[int]):
    """Chained hashes, which grow as the session does."""

    def extend(self, blocks: Iterable[tuple[bytes, int]]) -> None:  # type: ignore[override]
        for name, place in blocks:
            self.append(self.after(b"%s/%d" % (name, place)))

    def after(self, name: bytes) -> int:
        """Return the hash of a block of this name after the present last one."""
        return chain_root([(self[-1] if self else 0).to_bytes(8, "little"), name])


class _Line(msgspec.Struct):
    """A line of either form; `timestamp` and `delay` are milliseconds."""

    input_length: int
    output_length: int
    hash_ids: list[int]
    timestamp: float | None = None
    session_id: str | int | None = None
    delay: float = 0.0


def read_sessions(path: Path) -> list[Session]:
    """Return the sessions of a .jsonl or .jsonl.gz file, in order of their first turn.

    Raises ValueError if a line has fewer hash ids than its tokens need.
    """
    decoder = msgspec.json.Decoder(_Line)
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        rows = [decoder.decode(line) for line in lines if line.strip()]
    grouped = _by_id(rows) if any(row.session_id is not None for row in rows) else _by_prefix(rows)
    return [tuple(_turn(row, pause) for row, pause in session) for session in grouped]


def _by_id(rows: Sequence[_Line]) -> list[list[tuple[_Line, float]]]:
    sessions: dict[str | int | None, list[tuple[_Line, float]]] = {}
    for place, row in enumerate(rows):
        name = row.session_id if row.session_id is not None else f"line {place}"
        sessions.setdefault(name, []).append((row, row.delay / 1_000))
    return list(sessions.values())


def _by_prefix(rows: Sequence[_Line]) -> list[list[tuple[_Line, float]]]:
    """Group requests: one continues the request whose whole blocks (all but the last, at least two) begin it."""
    sessions: list[list[tuple[_Line, float]]] = []
    ends: dict[tuple[int, ...], int] = {}  # the whole blocks of a session's last turn, to its place in `sessions`
    for row in sorted(rows, key=lambda row: row.timestamp or 0.0):
        ids = tuple(row.hash_ids)
        known = next((ids[:n] for n in range(len(ids), 1, -1) if ids[:n] in ends), None)
        if known is None:
            sessions.append([(row, 0.0)])
            place = len(sessions) - 1
        else:
            place = ends.pop(known)
            last = sessions[place][-1][0]
            pause = max((row.timestamp or 0.0) - (last.timestamp or 0.0), 0.0) / 1_000
            sessions[place].append((row, pause))
        ends[ids[:-1] if len(ids) > 2 else ids] = place
    return sessions


def _turn(row: _Line, pause_seconds: float) -> Turn:
    needed = max(-(-row.input_length // BLOCK_TOKENS), 1)
    if len(row.hash_ids) < needed:
        raise ValueError(f"{row.input_length} tokens need {needed} hash ids, a line has {len(row.hash_ids)}")
    chain = Chain()
    for block in row.hash_ids[:needed]:
        chain.append(chain.after(block.to_bytes(16, "little", signed=True)))
    return Turn(pause_seconds, max(row.input_length, 1), max(row.output_length, 1), tuple(chain))


def again(session: Session, cycle: int, shared: frozenset[int]) -> Session:
    """Return the session once more as another's: its own blocks change, those in `shared` stay.

    Only for files with fewer sessions than a run needs; in cycle 0 it is the session itself.
    """
    if not cycle:
        return session
    return tuple(
        msgspec.structs.replace(turn, blocks=tuple(_renamed(block, cycle, shared) for block in turn.blocks))
        for turn in session
    )


def _renamed(block: int, cycle: int, shared: frozenset[int]) -> int:
    return block if block in shared else block ^ (0x9E3779B97F4A7C15 * cycle & (1 << 64) - 1)


def shared_blocks(sessions: Sequence[Session]) -> frozenset[int]:
    """Return the blocks that more than one session has."""
    counts: Counter[int] = Counter()
    for session in sessions:
        counts.update({block for turn in session for block in turn.blocks})
    return frozenset(block for block, count in counts.items() if count > 1)


def unshared_tokens(sessions: Sequence[Session], shared: frozenset[int]) -> float:
    """Return the mean tokens of a turn that no other session has. `shared` is `shared_blocks(sessions)`."""
    own = turns = 0
    for session in sessions:
        for turn in session:
            own += sum(1 for block in turn.blocks if block not in shared)
            turns += 1
    return own * BLOCK_TOKENS / max(turns, 1)

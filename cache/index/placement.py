"""Data types of the index's verbs: matches, placements, feedback, figures."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from mypy_extensions import mypyc_attr

from cache.index.fingerprint import Fingerprint


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Held:
    """Part of a prompt that a replica holds: `tokens` are reused, `unused_tokens` held at its end but not reused."""

    blocks: Final[int]
    size_bytes: Final[int]
    tokens: Final[int]
    unused_tokens: Final[int]

    def __init__(
        self,
        blocks: int,
        size_bytes: int,
        tokens: int,
        unused_tokens: int = 0,
    ) -> None:
        self.blocks = blocks
        self.size_bytes = size_bytes
        self.tokens = tokens
        self.unused_tokens = unused_tokens


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Match:
    """Lookup result for a prompt. `held` has the replicas that hold any of it.

    `known_*` is the deepest part that any replica holds. If that is not all, `evicted_from` is the replica that held
    more until it was dropped for room (-1 if none), and `diverged` means that other prompts continue differently
    there.
    """

    held: Final[dict[int, Held]]
    known_blocks: Final[int]
    known_bytes: Final[int]
    known_tokens: Final[int]
    evicted_from: Final[int]
    diverged: Final[bool]

    def __init__(
        self,
        held: dict[int, Held],
        known_blocks: int = 0,
        known_bytes: int = 0,
        known_tokens: int = 0,
        evicted_from: int = -1,
        diverged: bool = False,
    ) -> None:
        self.held = held
        self.known_blocks = known_blocks
        self.known_bytes = known_bytes
        self.known_tokens = known_tokens
        self.evicted_from = evicted_from
        self.diverged = diverged

    @property
    def evicted(self) -> bool:
        """True if more was held until it was dropped for room."""
        return self.evicted_from >= 0


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Placement:
    """A prompt routed to a replica, which held `held_blocks` of it, worth `predicted_tokens`, before.

    `stamp` is the time in seconds, `source` a number that identifies the tenant. `held_tokens` are held, of which the
    engine reuses `predicted_tokens`. `exact` means that this count was reported and not interpolated, `whole` that an
    earlier prompt ended there, `forks` that other prompts continue differently from there. `proved` means that a
    response of this epoch showed that it was computed, `confident` that in addition the last placement over its
    deepest part is not in flight. `tolerance_tokens` is the size of the last held block, `allowance_tokens` what the
    engine generated after it and may have cached. `reuse_tokens` is a lower bound of the tokens placed at the replica
    since it last used this prompt: an engine that evicts the oldest first still has the prompt if its cache holds
    that many.
    """

    id: Final[int]
    replica: Final[int]
    epoch: Final[int]
    fingerprint: Final[Fingerprint]
    stamp: Final[float]
    held_blocks: Final[int]
    held_tokens: Final[int]
    predicted_tokens: Final[int]
    proved: Final[bool]
    confident: Final[bool]
    exact: Final[bool]
    whole: Final[bool]
    forks: Final[bool]
    tolerance_tokens: Final[int]
    allowance_tokens: Final[int]
    reuse_tokens: Final[int]
    source: Final[int]

    def __init__(  # noqa: PLR0913 - one for each field
        self,
        id: int,
        replica: int,
        epoch: int,
        fingerprint: Fingerprint,
        stamp: float,
        held_blocks: int = 0,
        held_tokens: int = 0,
        predicted_tokens: int = 0,
        proved: bool = False,
        confident: bool = False,
        exact: bool = False,
        whole: bool = False,
        forks: bool = False,
        tolerance_tokens: int = 0,
        allowance_tokens: int = 0,
        reuse_tokens: int = 0,
        source: int = 0,
    ) -> None:
        self.id = id
        self.replica = replica
        self.epoch = epoch
        self.fingerprint = fingerprint
        self.stamp = stamp
        self.held_blocks = held_blocks
        self.held_tokens = held_tokens
        self.predicted_tokens = predicted_tokens
        self.proved = proved
        self.confident = confident
        self.exact = exact
        self.whole = whole
        self.forks = forks
        self.tolerance_tokens = tolerance_tokens
        self.allowance_tokens = allowance_tokens
        self.reuse_tokens = reuse_tokens
        self.source = source


class FeedbackKind(enum.StrEnum):
    """Conclusion that the index drew from a response."""

    NOTHING = "nothing"  # the upstream did not report, or is a provider, or the prediction was not confident
    STALE = "stale"  # routed under a past epoch, hence ignored
    RIGHT = "right"
    RECOUNTED = "recounted"  # the tokens of a fork were counted wrongly, or the engine does not share there
    FORK = "fork"  # far less than predicted at a fork: one more such response corrects its count
    TAIL = "tail"  # less than a whole earlier prompt, which was rendered differently or is not reused to its end
    EVICTED = "evicted"  # the engine has evicted a whole earlier prompt; several such shrink the budget
    LESS = "less"  # evicted once more: the budget shrinks
    MORE = "more"  # the budget may grow
    SUSPECT = "suspect"  # nothing cached of a whole earlier prompt: one more such response means a restart
    RESTARTED = "restarted"


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Feedback:
    """Comparison of the prediction with the report. `error_tokens` is reported minus predicted, None if not reported.

    `epoch` and `budget_tokens` are decisions for all proxies, None if there are none.
    """

    predicted_tokens: Final[int]
    error_tokens: Final[int | None]
    learnt: Final[FeedbackKind]
    epoch: Final[int | None]
    budget_tokens: Final[int | None]

    def __init__(
        self,
        predicted_tokens: int,
        error_tokens: int | None,
        learnt: FeedbackKind,
        epoch: int | None = None,
        budget_tokens: int | None = None,
    ) -> None:
        self.predicted_tokens = predicted_tokens
        self.error_tokens = error_tokens
        self.learnt = learnt
        self.epoch = epoch
        self.budget_tokens = budget_tokens


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class ReplicaStats:
    """Figures of one replica. `evicted_blocks` counts since the process began."""

    blocks: Final[int]
    tokens: Final[int]
    budget_tokens: Final[int]
    epoch: Final[int]
    evicted_blocks: Final[int]

    def __init__(
        self,
        blocks: int,
        tokens: int,
        budget_tokens: int,
        epoch: int,
        evicted_blocks: int,
    ) -> None:
        self.blocks = blocks
        self.tokens = tokens
        self.budget_tokens = budget_tokens
        self.epoch = epoch
        self.evicted_blocks = evicted_blocks


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class IndexStats:
    """Figures of the whole index. `size_bytes` is an estimate of its memory."""

    blocks: Final[int]
    nodes: Final[int]
    residencies: Final[int]
    size_bytes: Final[int]

    def __init__(
        self,
        blocks: int,
        nodes: int,
        residencies: int,
        size_bytes: int,
    ) -> None:
        self.blocks = blocks
        self.nodes = nodes
        self.residencies = residencies
        self.size_bytes = size_bytes

"""Data types of the index's verbs: matches, placements, feedback, figures."""

from __future__ import annotations

import enum

import msgspec

from cache.index.fingerprint import Fingerprint


class Held(msgspec.Struct, frozen=True, gc=False):
    """How much of a prompt a replica holds."""

    blocks: int
    size_bytes: int
    tokens: int


class Match(msgspec.Struct, frozen=True, gc=False):
    """What is known of a prompt. `held` has the replicas that hold any of it.

    `known_*` is the deepest part that any replica holds. If that is not all, `evicted` means that more was held until
    it was dropped for room, and `diverged` that other prompts go on differently from there.
    """

    held: dict[int, Held]
    known_blocks: int = 0
    known_bytes: int = 0
    known_tokens: int = 0
    evicted: bool = False
    diverged: bool = False


class Placement(msgspec.Struct, frozen=True, gc=False):
    """A prompt routed to a replica, which held `held_blocks` of it, worth `predicted_tokens`, before.

    `stamp` is the time in seconds. `exact` means that the prediction is a reported count and not interpolated.
    `confident` means that an answer of this epoch proved it, and that the last placement over its deepest part is not
    in flight. `tolerance_tokens` is the size of the last held block, `allowance_tokens` what the engine generated
    after it and may have cached.
    """

    id: int
    replica: int
    epoch: int
    fingerprint: Fingerprint
    stamp: float
    held_blocks: int = 0
    predicted_tokens: int = 0
    confident: bool = False
    exact: bool = False
    tolerance_tokens: int = 0
    allowance_tokens: int = 0


class FeedbackKind(enum.StrEnum):
    """What an answer taught the index."""

    NOTHING = "nothing"  # the upstream did not report, or is a provider, or the prediction was not confident
    STALE = "stale"  # routed under a past epoch, hence ignored
    RIGHT = "right"
    RECOUNTED = "recounted"  # the tokens of a fork were interpolated wrongly
    LESS = "less"  # the tail is dropped, the budget may shrink
    MORE = "more"  # the budget may grow
    SUSPECT = "suspect"  # a confident prediction with nothing cached: one more means a restart
    RESTARTED = "restarted"


class Feedback(msgspec.Struct, frozen=True, gc=False):
    """Predicted against reported. `error_tokens` is reported minus predicted, None if nothing was reported.

    `epoch` and `budget_tokens` are decisions for all proxies, None if there is none to take.
    """

    predicted_tokens: int
    error_tokens: int | None
    learnt: FeedbackKind
    epoch: int | None = None
    budget_tokens: int | None = None


class ReplicaStats(msgspec.Struct, frozen=True, gc=False):
    """Figures of one replica. `evicted_blocks` counts since the process began."""

    blocks: int
    tokens: int
    budget_tokens: int
    epoch: int
    evicted_blocks: int


class IndexStats(msgspec.Struct, frozen=True, gc=False):
    """Figures of the whole index. `size_bytes` is an estimate of its memory."""

    blocks: int
    nodes: int
    residencies: int
    size_bytes: int

"""Data types of the index's verbs: matches, placements, feedback, figures."""

from __future__ import annotations

import enum

import msgspec

from cache.index.fingerprint import Fingerprint


class Held(msgspec.Struct, frozen=True, gc=False):
    """Part of a prompt that a replica holds: `tokens` are reused, `unused_tokens` held at its end but not reused."""

    blocks: int
    size_bytes: int
    tokens: int
    unused_tokens: int = 0


class Match(msgspec.Struct, frozen=True, gc=False):
    """Lookup result for a prompt. `held` has the replicas that hold any of it.

    `known_*` is the deepest part that any replica holds. If that is not all, `evicted_from` is the replica that held
    more until it was dropped for room (-1 if none), and `diverged` means that other prompts continue differently
    there.
    """

    held: dict[int, Held]
    known_blocks: int = 0
    known_bytes: int = 0
    known_tokens: int = 0
    evicted_from: int = -1
    diverged: bool = False

    @property
    def evicted(self) -> bool:
        """True if more was held until it was dropped for room."""
        return self.evicted_from >= 0


class Placement(msgspec.Struct, frozen=True, gc=False):
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

    id: int
    replica: int
    epoch: int
    fingerprint: Fingerprint
    stamp: float
    held_blocks: int = 0
    held_tokens: int = 0
    predicted_tokens: int = 0
    proved: bool = False
    confident: bool = False
    exact: bool = False
    whole: bool = False
    forks: bool = False
    tolerance_tokens: int = 0
    allowance_tokens: int = 0
    reuse_tokens: int = 0
    source: int = 0


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


class Feedback(msgspec.Struct, frozen=True, gc=False):
    """Comparison of the prediction with the report. `error_tokens` is reported minus predicted, None if not reported.

    `epoch` and `budget_tokens` are decisions for all proxies, None if there are none.
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

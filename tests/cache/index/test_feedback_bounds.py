"""The index's memory of a replica, by which later responses are judged, is bounded."""

from __future__ import annotations

from cache.index.feedback import MAX_EVICTIONS
from cache.index.prefix_index import PrefixIndex
from tests.support.workers import prompt


def test_evictions_that_decide_nothing_are_not_remembered_for_ever() -> None:
    """A replica that never has what was predicted, over hundreds of different prompts."""
    index = PrefixIndex(origin=1)
    for round_number in range(3):
        for seed in range(60):
            placement = index.place(0, prompt(seed, 6_000), 5_000, float(round_number))
            index.answered(placement, 5_000, 100, 10, float(round_number))
    assert len(index._replica(0).evictions) <= MAX_EVICTIONS  # noqa: SLF001 - internal state that no public name shows

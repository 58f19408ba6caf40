"""The trace benchmark counts what it says it counts."""

from __future__ import annotations

from benchmarks.fleet.trace import make_request
from benchmarks.retention.policies import POLICIES, least_recent, run


def test_only_leading_segments_save_and_room_is_kept() -> None:
    """The second request shares its first segment; the third finds it only where there is room for it."""
    requests = [make_request(n, float(n), 1024, 1, ids) for n, ids in enumerate(([1, 2], [1, 3], [4, 5], [1, 2]))]
    plenty, little = run(requests, least_recent, 100), run(requests, least_recent, 2)
    assert (plenty.saved_tokens, plenty.tokens) == (512 + 1024, 4096)
    assert little.saved_tokens == 512
    assert set(POLICIES) == {"worth per byte", "LRU", "LFU"}

"""Token counts along a prompt with media."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import pytest

from cache.index.fingerprint import Fingerprint, MediaPart
from cache.index.nodes import Node, Step
from cache.index.token_counts import estimate, learn_tokens


class CountedMedia(tuple[MediaPart, ...]):
    """Media that count how often one of them is looked at."""

    looks = 0

    def __getitem__(self, at: Any) -> Any:
        self.looks += 1
        return super().__getitem__(at)

    def __iter__(self) -> Iterator[MediaPart]:
        for part in super().__iter__():
            self.looks += 1
            yield part


def test_counts_follow_text_and_media_and_a_boundary_inside_a_picture_gets_a_part_of_it() -> None:
    """400 bytes of text and two pictures of 100 bytes; a picture has 50 tokens, a byte of text a quarter."""
    ends = array("I", [100, 150, 200, 400, 450, 600])
    media = ((100, 200, 50), (400, 500, 50))
    fingerprint = Fingerprint(array("Q", range(len(ends))), ends, media)
    assert estimate(fingerprint, None, 200.0).tolist() == [25, 50, 75, 125, 150, 200]


@pytest.mark.parametrize("count", [10, 1000])
def test_each_medium_is_looked_at_a_few_times_however_many_there_are(count: int) -> None:
    """Prompts with 20,000 pictures took seconds, since all of them were added up for every boundary."""
    ends = array("I", range(1000, 1000 * (count + 1), 1000))
    media = CountedMedia((end - 1000, end - 500, 10) for end in ends)
    fingerprint = Fingerprint(array("Q", range(count)), ends, media)
    estimate(fingerprint, None, 10.0 * count)
    assert media.looks <= 8 * count


def test_a_report_looks_at_each_medium_a_few_times_however_many_forks_the_prompt_has() -> None:
    """A client can make a fork at each picture, by prompts that end there."""
    count = 300
    media = CountedMedia((1000 * i, 1000 * i + 500, 10) for i in range(count))
    steps: list[Step] = []
    for i in range(count):
        node = Node(None, array("Q", [i]), array("I", [1000 * (i + 1)]), array("I", [20]), {})
        steps.append(Step(node, 1, i, 20 * i))
    learn_tokens(steps, 25 * count, media)
    assert sum(step.node.tokens[-1] for step in steps) - steps[-1].node.tokens[-1] > 20 * (count - 1)
    assert media.looks <= 8 * count

"""Token counts along a chain: interpolated by bytes when a prompt is placed, corrected by upstreams' reports.

Pure arithmetic on the tree's nodes. A reported count is fixed at a pin; between pins counts follow the bytes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice
from typing import Final

from cache.index.fingerprint import Fingerprint, MediaPart
from cache.index.nodes import Node, Step

MAX_PROMPT_TOKENS = 2**30
"""Higher counts that an upstream reports are clamped to this: counts are 32 bits wide."""

TOKENS_PER_BYTE: Final = 0.25
"""Of text, if nothing better can be computed."""

MAX_FORKS_RECOUNTED: Final = 64
"""Children of a recounted node that are corrected with it; the others are corrected by their own next answers."""


def estimate(fingerprint: Fingerprint, last: Step | None, prompt_tokens: float) -> array[int]:
    """Interpolate the counts of the boundaries below `last`, from its end on, up to `prompt_tokens` for them all."""
    ends, depth = fingerprint.ends, last.depth if last else 0
    known_tokens, known_bytes = (last.tokens, last.node.ends[last.blocks - 1]) if last else (0, 0)
    prompt_tokens = min(max(prompt_tokens, 0.0), MAX_PROMPT_TOKENS)
    if (
        ends[depth] <= known_bytes
    ):  # two chains with equal hashes and different lengths: one of them was damaged in Redis
        known_bytes = ends[depth - 1]
    if fingerprint.media:
        return _beside_media(fingerprint, depth, known_bytes, prompt_tokens - known_tokens)
    rate = (prompt_tokens - known_tokens) / (ends[-1] - known_bytes)
    if rate <= 0:
        rate = prompt_tokens / ends[-1]
    return array("I", [int((end - known_bytes) * rate + 0.5) for end in ends[depth:].tolist()])


def _beside_media(fingerprint: Fingerprint, depth: int, known_bytes: int, tokens: float) -> array[int]:
    """Interpolate counts by the bytes of the text alone; those of media are estimated.

    `tokens` is the count for the boundaries from `depth` on, which lie beyond `known_bytes`.
    """
    ends = fingerprint.ends[depth:].tolist()
    before = _media_before(fingerprint.media, (known_bytes, *ends))
    skipped_bytes, skipped_tokens = before[0]
    media_bytes, media_tokens = before[-1][0] - skipped_bytes, before[-1][1] - skipped_tokens
    text_bytes = max(ends[-1] - known_bytes - media_bytes, 1.0)
    text_tokens = tokens - media_tokens
    if text_tokens <= 0:  # the estimates are too high, or the text's own count is
        text_tokens = text_bytes * TOKENS_PER_BYTE
    scale = max(tokens, 0.0) / (text_tokens + media_tokens)
    rate = text_tokens / text_bytes
    counts = [
        int(scale * ((end - known_bytes - size + skipped_bytes) * rate + count - skipped_tokens) + 0.5)
        for end, (size, count) in zip(ends, before[1:], strict=True)
    ]
    return array("I", counts)


def _media_before(media: Sequence[MediaPart], offsets: Sequence[int]) -> list[tuple[float, float]]:
    """Return the bytes and the tokens of media before each offset; one that reaches beyond it counts in part.

    Both sequences are ascending, so one pass is enough: a prompt may have 20,000 of each.
    """
    found: list[tuple[float, float]] = []
    size = tokens = 0.0  # of the media that end before the offset
    at = 0
    for offset in offsets:
        while at < len(media) and media[at][1] <= offset:
            start, stop, count = media[at]
            size += stop - start
            tokens += count
            at += 1
        part_size = part_tokens = 0.0
        if at < len(media) and media[at][0] < offset:
            start, stop, count = media[at]
            part_size = float(offset - start)
            part_tokens = count * part_size / (stop - start)
        found.append((size + part_size, tokens + part_tokens))
    return found


def learn_tokens(steps: list[Step], prompt_tokens: int, media: Sequence[MediaPart] = ()) -> None:
    """Make the path's counts add up to the count that was reported for its end, and pin it there.

    The parts that lie on no other reported chain absorb the difference: first `media`, whose tokens are guessed, then
    all in proportion. If there are none, the part after the last pin of the last node does. If the prompt is shorter
    than its earlier parts were reported to be, it is rendered differently now, and the end of its unshared part
    shrinks.
    """
    last = steps[-1]
    change = min(prompt_tokens, MAX_PROMPT_TOKENS) - last.tokens
    unknown = [step for step in steps if step.node.known < step.blocks]
    if media and unknown and change:
        change -= _recount_media(steps, media, change)
    if unknown:
        _share(unknown, change)
    else:
        _absorb(last.node, last_pin(last.node, last.blocks), last.blocks, change)
    for step in unknown:
        step.node.known = step.blocks
    if change < 0:
        _shorten(steps, min(prompt_tokens, MAX_PROMPT_TOKENS))
    pin(last.node, last.blocks)


def _shorten(steps: list[Step], prompt_tokens: int) -> None:
    """Remove the tokens in excess of `prompt_tokens` from the end of the path, as far as it is not shared."""
    over = sum([step.node.tokens[step.blocks - 1] for step in steps]) - prompt_tokens
    below: Node | None = None
    for step in reversed(steps):
        node = step.node
        others = [child for child in (node.children or {}).values() if child is not below]
        if over <= 0 or others or step.blocks < len(node.hashes):
            return
        stops = [0, *[pinned for pinned in node.pins if pinned < step.blocks], step.blocks]
        for start, stop in zip(reversed(stops[:-1]), reversed(stops[1:]), strict=True):
            done = reshape(node, start, stop, -over)
            over += done
            if done and stop < step.blocks:
                node.pins = tuple([pinned for pinned in node.pins if pinned < stop])
        below = node


def _share(unknown: list[Step], change: int) -> None:
    """Distribute `change` over the parts of the nodes that are on no reported chain."""
    parts = [_tokens_between(step.node, step.node.known, step.blocks) for step in unknown]
    left = sum(parts)
    for step, part in zip(unknown, parts, strict=True):
        share = change if part == left else change * part // left
        change -= _absorb(step.node, step.node.known, step.blocks, share)
        left -= part


def _recount_media(steps: list[Step], media: Sequence[MediaPart], change: int) -> int:
    """Change the counts of media that lie in runs on no reported chain, at most to zero. Return the change made."""
    runs: list[tuple[Node, list[MediaPart]]] = []
    at = begin = 0
    for step in steps:
        node, end = step.node, step.node.ends[step.blocks - 1]
        inside: list[MediaPart] = []
        while at < len(media) and media[at][1] <= end:  # both are ascending: each part is looked at once
            if begin <= media[at][0]:
                inside.append(media[at])
            at += 1
        if inside and not node.known:
            runs.append((node, inside))
        begin = end
    estimated = 0
    for run in runs:
        estimated += sum([part[2] for part in run[1]])
    if not estimated:
        return 0
    made, share = 0, max(change, -estimated) / estimated
    for node, inside in runs:
        before, least = node.tokens[-1], 0
        for i, (_, counted) in enumerate(_media_before(inside, node.ends.tolist())):
            least = max(least, node.tokens[i] + round(share * counted))
            node.tokens[i] = least
        for entries in node.held:
            entries.tokens += node.tokens[-1] - before
        made += node.tokens[-1] - before
    return made


def _absorb(node: Node, start: int, stop: int, change: int) -> int:
    """Reshape the run's boundaries [start, stop) and keep the reported counts after them. Return the change made."""
    done = reshape(node, start, stop, change) if change else 0
    if done and node.known > stop:
        reshape(node, stop, _next_pin(node, stop), -done)
    return done


def recount(steps: list[Step], held_blocks: int, change: int) -> None:
    """Correct the interpolated count of a fork by `change`, and its children by the opposite."""
    for step in steps:
        node = step.node
        if step.depth == held_blocks and step.blocks == len(node.hashes):
            done = reshape(node, last_pin(node, step.blocks), step.blocks, change)
            pin(node, step.blocks)
            for child in islice((node.children or {}).values(), MAX_FORKS_RECOUNTED):
                reshape(child, 0, child.pins[0] if child.pins else len(child.hashes), -done)
            return


def _tokens_between(node: Node, start: int, stop: int) -> int:
    return node.tokens[stop - 1] - (node.tokens[start - 1] if start else 0)


def _next_pin(node: Node, blocks: int) -> int:
    """Return the first pinned number of boundaries above `blocks`, or all."""
    return next((pinned for pinned in node.pins if pinned > blocks), len(node.hashes))


def reshape(node: Node, start: int, stop: int, change: int) -> int:
    """Change the tokens of the run's boundaries [start, stop) by `change`, in proportion. Return the change made.

    A count cannot fall below zero, so a negative change may be made in part. Later boundaries of the run move along.
    Every holder's total follows.
    """
    tokens = node.tokens
    base = tokens[start - 1] if start else 0
    before = tokens[stop - 1] - base
    after = max(0, before + change)
    if before:
        counts = tokens[start:stop].tolist()
        tokens[start:stop] = array("I", [base + (count - base) * after // before for count in counts])
    else:
        tokens[stop - 1] = base + after
    done = after - before
    if done:
        for i in range(stop, len(tokens)):
            tokens[i] += done
        for entries in node.held:
            entries.tokens += done
    return done


def last_pin(node: Node, blocks: int) -> int:
    """Return the deepest pinned number of boundaries below `blocks`, or 0."""
    at = bisect_left(node.pins, blocks)
    return node.pins[at - 1] if at else 0


def pin(node: Node, blocks: int) -> None:
    """Mark the count at this number of boundaries as reported."""
    at = bisect_left(node.pins, blocks)
    if at == len(node.pins) or node.pins[at] != blocks:
        node.pins = (*node.pins[:at], blocks, *node.pins[at:])

"""Results of replayed traces: a budget must follow the true capacity and not drift in either direction."""

from __future__ import annotations

from array import array

from cache.index.fingerprint import Fingerprint
from cache.index.hashing import chain_root
from cache.index.prefix_index import FeedbackKind, PrefixIndex

BLOCK_BYTES = 2_048
BLOCK_TOKENS = 512


def chain(*blocks: int) -> Fingerprint:
    hashes, last = [], 0
    for block in blocks:
        last = chain_root([b"%d" % last, b"%d" % block])
        hashes.append(last)
    return Fingerprint(array("Q", hashes), array("I", [BLOCK_BYTES * (n + 1) for n in range(len(blocks))]))


def serve(index: PrefixIndex, prompt: Fingerprint, now: float, cached: int | None = None) -> FeedbackKind:
    """One request to replica 0; the engine reports what was predicted, or `cached`."""
    tokens = BLOCK_TOKENS * len(prompt)
    placement = index.place(0, prompt, tokens, now)
    reported = placement.predicted_tokens if cached is None else cached
    return index.answered(placement, tokens, reported, 0, now).learnt


def budget(index: PrefixIndex) -> int:
    return index.replicas()[0].budget_tokens


def test_right_answers_do_not_let_the_budget_run_away():
    """Only a prompt that is among the oldest proves that all of the budget is there."""
    index = PrefixIndex()
    index.set_budget(0, 40 * BLOCK_TOKENS)
    now = 0.0
    for conversation in range(60):
        now += 1.0
        serve(index, chain(0, conversation, *range(1_000, 1_008)), now)
    for _ in range(500):
        now += 1.0
        assert serve(index, chain(0, 59, *range(1_000, 1_008)), now) is FeedbackKind.RIGHT
    assert budget(index) == 40 * BLOCK_TOKENS


def test_a_common_prompt_counted_a_few_tokens_too_long_takes_nothing_with_it():
    """The engine reports whole blocks: what hangs on the common part stays, though that counts as slightly longer."""
    index = PrefixIndex()
    index.set_budget(0, 10**6)
    for conversation in range(20):
        serve(index, chain(0, 1, conversation, 5, 6), float(conversation))
    serve(index, chain(0, 1, 19, 5, 6), 30.0, cached=2 * BLOCK_TOKENS - 16)
    held = index.match(chain(0, 1, 3, 5, 6)).held
    assert held[0].blocks == 5

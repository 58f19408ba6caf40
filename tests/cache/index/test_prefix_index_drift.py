"""What replaying traces showed: a budget must follow the truth and not run away from it in either direction."""

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


def test_right_answers_between_two_wrong_ones_do_not_put_off_the_shrink():
    """A full index grows a little with each right answer; that is no turnover, so the next shortfall still counts."""
    index = PrefixIndex()
    index.set_budget(0, 40 * BLOCK_TOKENS)
    now = 0.0
    for conversation in range(60):
        now += 1.0
        serve(index, chain(0, conversation, *range(1_000, 1_008)), now)
    for _ in range(50):
        now += 1.0
        assert serve(index, chain(0, 59, *range(1_000, 1_008)), now) is FeedbackKind.RIGHT
    before = budget(index)
    assert serve(index, chain(0, 59, *range(1_000, 1_008)), now + 1, cached=2 * BLOCK_TOKENS) is FeedbackKind.LESS
    assert 0.8 * before < budget(index) < 0.96 * before


def test_a_common_prompt_counted_a_few_tokens_too_long_takes_nothing_with_it():
    """The engine reports whole blocks: what hangs on the common part stays, though that counts as slightly longer."""
    index = PrefixIndex()
    index.set_budget(0, 10**6)
    for conversation in range(20):
        serve(index, chain(0, 1, conversation, 5, 6), float(conversation))
    learnt = serve(index, chain(0, 1, 19, 5, 6), 30.0, cached=2 * BLOCK_TOKENS - 16)
    assert learnt is FeedbackKind.LESS
    held = index.match(chain(0, 1, 3, 5, 6)).held
    assert held[0].blocks == 5


def test_the_budget_shrinks_from_what_was_there_before_the_loss():
    """An answer that drops most of the index cuts the budget by a twentieth, and not to what is left of it."""
    index = PrefixIndex()
    index.set_budget(0, 110 * BLOCK_TOKENS)
    for conversation in range(50):
        serve(index, chain(0, 1, 2, conversation, 5), float(conversation))
    learnt = serve(index, chain(0, 1, 2, 49, 5), 60.0, cached=BLOCK_TOKENS // 4)
    assert learnt is FeedbackKind.LESS
    assert budget(index) > 95 * BLOCK_TOKENS

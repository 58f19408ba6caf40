"""Tokens predicted from bytes."""

from __future__ import annotations

import pytest

from proxy.records import Media
from proxy.routing.token_estimate import MOST_MODELS, TokenCounts


def test_the_first_guess_yields_to_the_first_answers():
    """A model of Chinese prose or code is right within a few requests; others are not touched."""
    counts = TokenCounts()
    assert counts.predict("prose", 40_000) == 10_000.0
    for _ in range(3):
        counts.observe("dense", 40_000, 30_000)
    assert counts.predict("dense", 40_000) == pytest.approx(30_000, rel=0.05)
    assert counts.predict("prose", 40_000) == 10_000.0


def test_what_was_answered_before_counts_as_it_was_counted():
    """Only what follows is predicted from bytes."""
    assert TokenCounts().predict("m", 50_000, known_bytes=40_000, known_tokens=31_000.0) == 31_000 + 2_500


def test_a_picture_is_counted_by_its_kind_and_not_by_its_bytes():
    """A megabyte of base64 is no 300,000 tokens; what a kind costs is learned per model."""
    counts, picture = TokenCounts(), Media("image", 1_000_000)
    assert counts.predict("m", 1_004_000, [picture]) == 2_000.0
    for _ in range(40):
        counts.observe("m", 1_004_000, 1_300, [picture])
    assert counts.predict("m", 1_004_000, [picture]) == pytest.approx(1_300, rel=0.02)
    assert counts.predict("m", 2_004_000, [picture, picture]) == pytest.approx(1_600, rel=0.02)
    assert counts.tokens_per_byte("m") == 0.25  # pictures teach nothing about text


def test_the_first_picture_that_is_counted_replaces_the_guess():
    """Of its kind and model only."""
    counts, picture = TokenCounts(), Media("image", 1_000_000)
    assert counts.media_tokens("m", "image") == 1_000
    counts.observe("m", 1_004_000, 1_256, [picture])
    assert counts.media_tokens("m", "image") == 256
    assert (counts.media_tokens("m", "audio"), counts.media_tokens("other", "image")) == (1_000, 1_000)


def test_each_of_several_pictures_is_counted_with_its_part_of_their_tokens():
    """Divide the tokens that are not the text's by the number of pictures."""
    counts, picture = TokenCounts(), Media("image", 1_000_000)
    counts.observe("m", 4_004_000, 1_000 + 4 * 256, [picture] * 4)
    assert counts.media_tokens("m", "image") == 256


def test_media_in_the_known_part_are_not_counted_again():
    """They are in what was answered."""
    counts, picture = TokenCounts(), Media("image", 1_000_000)
    assert counts.predict("m", 1_008_000, [picture], known_bytes=1_004_000, known_tokens=1_900.0) == 2_900.0


def test_mixed_media_and_nonsense_teach_nothing():
    """Two kinds in one prompt cannot be told apart."""
    counts = TokenCounts()
    counts.observe("m", 2_000_000, 9_000, [Media("image", 900_000), Media("audio", 900_000)])
    counts.observe("m", 0, 10)
    counts.observe("m", 10, 0)
    assert counts.predict("m", 4_000) == 1_000.0
    assert counts.predict("m", 901_000, [Media("hologram", 901_000)]) == 3_000.0


def test_model_names_do_not_fill_the_memory():
    """They come from clients; the longest unused is forgotten."""
    counts = TokenCounts()
    counts.observe("first", 4_000, 4_000)
    for number in range(MOST_MODELS):
        counts.observe(f"m{number}", 4_000, 4_000)
    assert counts.tokens_per_byte("first") == 0.25
    assert counts.tokens_per_byte("m1") > 0.5

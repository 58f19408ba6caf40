"""Predict the tokens of a prompt before an engine has counted them, per model, from what engines reported.

No tokenizer: bytes per token differ threefold between Chinese, code and prose, and every answer reports the true
count of its prompt. A picture, sound or file is hashed as bytes but counted by its kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from proxy.records import Media

FIRST_TOKENS_PER_BYTE: Final = 0.25
"""English prose and JSON, before anything is learned."""

FIRST_WEIGHT_BYTES: Final = 4_096.0
"""Weight of the first guess, in bytes of prompt: the first long answer outweighs it."""

MEMORY: Final = 0.98
"""Factor by which the weight of past answers shrinks with each new one: about fifty count."""

FIRST_MEDIA_TOKENS: Mapping[str, float] = {"image": 1_000.0, "audio": 1_000.0, "file": 3_000.0}
"""First guess by kind: a one-megapixel picture, a minute of speech, a file of a few pages."""

MEDIA_STEP: Final = 0.2
"""Weight of the newest answer in the mean of a kind."""

MOST_MODELS: Final = 256
"""Models remembered; the least recently used is dropped, since model names come from clients."""


class _Model:
    __slots__ = ("media_tokens", "text_bytes", "text_tokens")

    def __init__(self) -> None:
        self.text_bytes = FIRST_WEIGHT_BYTES
        self.text_tokens = FIRST_WEIGHT_BYTES * FIRST_TOKENS_PER_BYTE
        self.media_tokens: dict[str, float] = {}  # mean by kind, of kinds that were counted


class TokenCounts:
    """Predicts tokens from bytes, per model."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    def tokens_per_byte(self, model: str) -> float:
        """Return the ratio for text; the first guess for a model that never answered."""
        known = self._models.get(model)
        return FIRST_TOKENS_PER_BYTE if known is None else known.text_tokens / known.text_bytes

    def media_tokens(self, model: str, kind: str) -> float:
        """Return the mean tokens of one image, sound or file; the first guess if none was counted."""
        known = self._models.get(model)
        counted = None if known is None else known.media_tokens.get(kind)
        return FIRST_MEDIA_TOKENS.get(kind, FIRST_MEDIA_TOKENS["file"]) if counted is None else counted

    def predict(
        self,
        model: str,
        size_bytes: int,
        media: Sequence[Media] = (),
        known_bytes: int = 0,
        known_tokens: float = 0.0,
    ) -> float:
        """Predict the tokens of a prompt of `size_bytes`, `media` included.

        If its first `known_bytes` were answered before and are `known_tokens`, only the rest is predicted; media then
        count as part of the known bytes as long as they fit there.
        """
        ratio = self.tokens_per_byte(model)
        if not media:
            return known_tokens + (size_bytes - known_bytes) * ratio
        text_bytes, tokens, room = size_bytes - known_bytes, known_tokens, known_bytes
        for item in media:
            if item.size_bytes <= room:
                room -= item.size_bytes
            else:
                text_bytes -= item.size_bytes
                tokens += self.media_tokens(model, item.kind)
        return tokens + max(text_bytes, 0) * ratio

    def observe(self, model: str, size_bytes: int, prompt_tokens: int, media: Sequence[Media] = ()) -> None:
        """Learn an engine's count for a prompt; about media only if all are of one kind."""
        if size_bytes <= 0 or prompt_tokens <= 0:
            return
        if not media and prompt_tokens > size_bytes:
            return  # a byte has at most one token: the upstream read more than this text
        known = self._models.pop(model, None) or _Model()
        self._models[model] = known  # moved to the end: the least recently used stays in front
        if len(self._models) > MOST_MODELS:
            del self._models[next(iter(self._models))]
        if not media:
            known.text_bytes = known.text_bytes * MEMORY + size_bytes
            known.text_tokens = known.text_tokens * MEMORY + prompt_tokens
        elif len({item.kind for item in media}) == 1:
            kind = media[0].kind
            text_bytes = max(size_bytes - sum(item.size_bytes for item in media), 0)
            each = max(prompt_tokens - text_bytes * known.text_tokens / known.text_bytes, 0.0) / len(media)
            before = known.media_tokens.get(kind, each)
            known.media_tokens[kind] = before + MEDIA_STEP * (each - before)

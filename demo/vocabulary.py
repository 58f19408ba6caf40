"""Train a byte-level BPE vocabulary on Python's own source, which is on every machine that runs Cairn."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_vocabulary(size: int, special_tokens: Sequence[str], training_bytes: int) -> Tokenizer:
    """Return a vocabulary of `size` entries, `special_tokens` first, trained on `training_bytes` of source."""
    vocabulary = Tokenizer(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    vocabulary.train_from_iterator(_source_texts(training_bytes), trainer)
    return vocabulary


def _source_texts(most_bytes: int) -> Iterator[str]:
    """Yield the standard library's modules in a fixed order, up to `most_bytes`."""
    left = most_bytes
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")[:left]
        left -= len(text)
        yield text
        if left <= 0:
            return

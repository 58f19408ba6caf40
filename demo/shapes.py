"""The local model's name, size and file: all that is needed to start an engine on it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

MODEL_NAME = "cairn-demo"
RECIPE = 1  # raise it when a change of `demo.local_model` makes files written before unusable
VOCABULARY_SIZE = 8_192  # entries; trains in one second, and English prose is about 3 bytes a token
SLOTS = 3  # prompts that a replica keeps: the demo's two documents and one that the user tries
SLOT_TOKENS = 4_096  # enough for a document, a question and an answer; about 10 KB of memory per token


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a Llama network. `context_tokens` is the context length that its file declares."""

    blocks: int
    width: int
    feed_forward: int
    heads: int
    context_tokens: int = 16_384


DEMO = Shape(blocks=6, width=512, feed_forward=1_536, heads=4)  # 30 M parameters: a cold document takes seconds
SMALL = Shape(blocks=6, width=256, feed_forward=768, heads=4)  # for tests: 12.7 MB, 2,000 tokens a second


def model_path(folder: Path, shape: Shape) -> Path:
    """Return the path in `folder` of the model of this shape; the name changes with all that the file depends on."""
    recipe = json.dumps([RECIPE, VOCABULARY_SIZE, asdict(shape)])
    return folder / f"{MODEL_NAME}-{blake2b(recipe.encode(), digest_size=5).hexdigest()}.gguf"


def vocabulary_path(folder: Path) -> Path:
    """Return the path in `folder` of the vocabulary, a `tokenizers` file that all shapes share."""
    return folder / f"vocabulary-{RECIPE}-{VOCABULARY_SIZE}.json"

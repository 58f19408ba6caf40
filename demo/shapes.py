"""What the local model is called, how large it is and where its file lies: all that a starter must know of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

MODEL_NAME = "cairn-demo"
RECIPE = 1  # counts the changes of `demo.local_model` that make older files unfit
VOCABULARY_SIZE = 8_192  # entries: trained in two seconds, and English prose comes out at some 3 bytes a token
SLOTS = 3  # prompts that a replica holds: the demo's two documents, and what a person tries afterwards
SLOT_TOKENS = 4_096  # a document fits in with its question and answer; some 18 KB of memory per token


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a llama-type network. `context_tokens` is how much it claims to be able to read."""

    blocks: int
    width: int
    feed_forward: int
    heads: int
    context_tokens: int = 16_384


DEMO = Shape(blocks=18, width=640, feed_forward=2_048, heads=4)  # 110 M parameters: a prefill that one can see
SMALL = Shape(blocks=6, width=256, feed_forward=768, heads=4)  # 12.7 MB: 2,000 tokens in a second, for tests


def model_path(folder: Path, shape: Shape) -> Path:
    """The model file of this shape in `folder`; its name changes with everything that it is made of."""
    made_of = json.dumps([RECIPE, VOCABULARY_SIZE, asdict(shape)])
    return folder / f"{MODEL_NAME}-{blake2b(made_of.encode(), digest_size=5).hexdigest()}.gguf"


def vocabulary_path(folder: Path) -> Path:
    """The vocabulary in the format of `tokenizers`; all shapes share it."""
    return folder / f"vocabulary-{RECIPE}-{VOCABULARY_SIZE}.json"

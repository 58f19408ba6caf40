"""Make the small local model for the demo and the tests: a GGUF file and its vocabulary.

The weights are random, so its text makes no sense; its speed and its caching are those of trained weights. As a
program (`python -m demo.local_model FOLDER`) it makes the demo's model and prints a line before each step.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from demo.shapes import DEMO, MODEL_NAME, VOCABULARY_SIZE, Shape, model_path, vocabulary_path
from demo.vocabulary import train_vocabulary

TRAINING_BYTES = 6_000_000  # of the standard library's source; more takes longer and changes the vocabulary little
SEED = 20_251  # arbitrary, but fixed: every machine makes the same weights
HEAD_WIDTH = 256
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_model(folder: Path, shape: Shape, progress: Callable[[str], None] = lambda _: None) -> Path:
    """Return the path of the model file and make it if it is missing. Calls `progress` before each step."""
    path = model_path(folder, shape)
    if path.exists():
        return path
    if not vocabulary_path(folder).exists():
        progress("Training the local model's vocabulary on Python's own source")
    vocabulary = load_vocabulary(folder)
    progress(f"Making {_parameters(shape) / 1e6:.0f} million random weights")
    _replace(path, lambda unfinished: _write_model(unfinished, vocabulary, shape))
    return path


def load_vocabulary(folder: Path) -> Tokenizer:
    """Return the byte-level BPE vocabulary; train it if `folder` has none."""
    path = vocabulary_path(folder)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        trained = train_vocabulary(VOCABULARY_SIZE, CONTROL_TOKENS, TRAINING_BYTES)
        _replace(path, lambda unfinished: trained.save(str(unfinished)))
    return Tokenizer.from_file(str(path))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file and move it to `path`, so that an interrupted run leaves no partial file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    unfinished = Path(name)
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_model(path: Path, vocabulary: Tokenizer, shape: Shape) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, shape)
    _add_vocabulary(writer, vocabulary)
    _add_tensors(writer, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name(MODEL_NAME)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.blocks)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_WIDTH)
    writer.add_value_length(HEAD_WIDTH)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Tokenizer) -> None:
    numbered = sorted(vocabulary.get_vocab().items(), key=lambda entry: entry[1])
    tokens = [token for token, _ in numbered]
    tokens += [f"<|unused{number}|>" for number in range(len(tokens), VOCABULARY_SIZE)]
    kinds = [
        gguf.TokenType.CONTROL if token in CONTROL_TOKENS or token.startswith("<|unused") else gguf.TokenType.NORMAL
        for token in tokens
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = json.loads(vocabulary.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_tensors(writer: gguf.GGUFWriter, shape: Shape) -> None:
    random = np.random.default_rng(SEED)
    attention = shape.heads * HEAD_WIDTH
    matrices = {
        "attn_q": (attention, shape.width),
        "attn_k": (HEAD_WIDTH, shape.width),
        "attn_v": (HEAD_WIDTH, shape.width),
        "attn_output": (shape.width, attention),
        "ffn_gate": (shape.feed_forward, shape.width),
        "ffn_up": (shape.feed_forward, shape.width),
        "ffn_down": (shape.width, shape.feed_forward),
    }

    def add(name: str, rows: int, columns: int) -> None:
        scale = shape.width**-0.5
        writer.add_tensor(name, _q8_0(random, rows, columns, scale), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    ones = np.ones(shape.width, dtype=np.float32)
    add("token_embd.weight", VOCABULARY_SIZE, shape.width)
    for block, (name, (rows, columns)) in itertools.product(range(shape.blocks), matrices.items()):
        add(f"blk.{block}.{name}.weight", rows, columns)
    for block, name in itertools.product(range(shape.blocks), ("attn_norm", "ffn_norm")):
        writer.add_tensor(f"blk.{block}.{name}.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    add("output.weight", VOCABULARY_SIZE, shape.width)


def _parameters(shape: Shape) -> int:
    attention = shape.width * HEAD_WIDTH * (2 * shape.heads + 2)
    return shape.blocks * (attention + 3 * shape.width * shape.feed_forward) + 2 * VOCABULARY_SIZE * shape.width


def _q8_0(random: np.random.Generator, rows: int, columns: int, scale: float) -> npt.NDArray[np.uint8]:
    """Return a matrix of normal numbers times `scale` as llama.cpp's Q8_0 blocks of 32 weights and a factor."""
    weights = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)
    return gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)


if __name__ == "__main__":
    make_model(Path(sys.argv[1]), DEMO, lambda step: print(step, flush=True))

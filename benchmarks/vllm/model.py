"""Make a tiny model of random weights that vLLM can load: a configuration and a vocabulary; vLLM draws the weights.

Caching and usage behave as with trained weights; only the text makes no sense.
"""

from __future__ import annotations

import json
from pathlib import Path

from demo.vocabulary import train_vocabulary

NAME = "tiny"
VOCABULARY_SIZE = 4_096
CONTEXT_TOKENS = 32_768
TRAINING_BYTES = 1_500_000
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CONFIGURATION = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 1_024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "vocab_size": VOCABULARY_SIZE,
    "max_position_embeddings": CONTEXT_TOKENS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 2,
}

CHAT_TEMPLATE = """\
{%- set first = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if first or tools -%}
<|im_start|>system
{{ first }}{% if tools %}

# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}<|im_end|>
{% endif -%}
{%- set last_user = namespace(place=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' %}{% set last_user.place = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if not (loop.first and message.role == 'system') -%}
<|im_start|>{{ message.role }}
{% set thought = message.reasoning or message.reasoning_content -%}
{%- if thought and loop.index0 > last_user.place %}<think>
{{ thought }}
</think>
{% endif -%}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
"""ChatML: the tools follow the system message, and reasoning before the last user message is left out."""


def make_model(folder: Path) -> Path:
    """Write the model's files to `folder`, unless they are there, and return it: about two seconds."""
    last = folder / "config.json"
    if not last.exists():
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = train_vocabulary(VOCABULARY_SIZE, SPECIAL_TOKENS, TRAINING_BYTES)
        vocabulary.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "eos_token": "<|im_end|>",
                    "pad_token": "<|endoftext|>",
                    "model_max_length": CONTEXT_TOKENS,
                    "chat_template": CHAT_TEMPLATE,
                }
            )
        )
        last.write_text(json.dumps(CONFIGURATION))
    return folder

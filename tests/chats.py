"""Chats, chat templates and a tokenizer of bytes that knows ChatML's marks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ALPHABET = ["<|end|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{%- if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{%- if m.role == 'assistant' -%}{% generation %}{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}<tool>{{ call.function | tojson }}</tool>{% endfor -%}"
    "<|im_end|>{% endgeneration %}{%- else -%}{{ m.content }}<|im_end|>{%- endif -%}{{ '\n' }}{%- endfor -%}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with generation marks, tools, and calls of them."""
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that writes the last answer in another way than earlier ones, as some that think do."""


def byte_tokenizer(
    folder: Path, template: str | None, alphabet: Sequence[str] = ALPHABET
) -> PreTrainedTokenizerFast:
    """Write a tokenizer of bytes with a chat template into a folder; ids are places in `alphabet`."""
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|end|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of a user and the assistant by turns."""
    told = [] if system is None else [{"role": "system", "content": system}]
    return told + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def write(path: Path, rows: Sequence[Any]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

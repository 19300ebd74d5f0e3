"""A tokenizer of few words with every special token that a task asks for, and sentences of its words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>", *[f"<extra_id_{i}>" for i in range(20)]]
WORDS = "the a cat dog bird sees likes fears red blue old new and".split()


def make_tokenizer(folder: Path, *, ends: bool = False) -> int:
    """Save the tokenizer; with `ends`, it ends every text with </s>, as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS, "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = ("$A </s>", "$A </s> $B </s>") if ends else ("$A", "$A [SEP]:0 $B:1")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("[SEP]", 3), ("</s>", 5)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", eos_token="</s>", additional_special_tokens=SPECIAL[6:],
    ).save_pretrained(folder)  # fmt: skip
    return len(vocabulary)


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, 12)) + " ."

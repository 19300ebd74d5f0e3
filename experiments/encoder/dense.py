"""The dense T5 for the experiments on an encoder, trained for long.

It has 236 thousand parameters, and is trained by span corruption at a constant rate on the corpus of
`experiments/code`. FOLDER/corpus is that corpus; it is made if it is not there.

    python experiments/encoder/dense.py FOLDER --until 160
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import corpus  # noqa: E402
from continuation import Start  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SENTINELS = 16  # <extra_id_0> to <extra_id_15>; a row has 7 spans
CONFIG = {
    "vocab_size": 1056, "d_model": 48, "d_ff": 128, "d_kv": 16, "num_heads": 3, "num_layers": 4,
    "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0,
    "pad_token_id": 1024, "eos_token_id": 0, "decoder_start_token_id": 1024,
}  # fmt: skip
BATCH = 4096  # tokens that the encoder reads per step
RATE = 2e-3
UNIT = 576  # steps for 10 tokens per parameter
STARTS = {10: UNIT, 40: 4 * UNIT, 80: 8 * UNIT, 160: 16 * UNIT, 320: 32 * UNIT}  # tokens per parameter: steps


def data(folder: Path) -> dict[str, Any]:
    """Return the [data] table; the tokenizer is that of the corpus, with padding and sentinels."""
    tokenizer = folder / "tokenizer"
    held_out = corpus.write(folder / "corpus")["held_out"]
    if not tokenizer.exists():
        write_tokenizer(folder / "corpus" / "tokenizer", tokenizer)
    return {
        "sources": [{"path": str(folder / "corpus" / "code.jsonl")}],
        "held_out": held_out,
        "tokenizer": str(tokenizer),
        "cache": str(folder / "tokens"),
    }


def write_tokenizer(base: Path, out: Path) -> None:
    """Write the tokenizer `base` with padding and sentinels."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    sentinels = [f"<extra_id_{number}>" for number in range(SENTINELS)]
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": sentinels})
    tokenizer.save_pretrained(out)


def table(folder: Path) -> dict[str, Any]:
    """Return the run file."""
    return {
        "source": str(folder / "shape"),
        "out": str(folder / "dense-run"),
        "from_scratch": True,
        "seed": 0,
        "task": {"name": "span_corruption"},
        "data": data(folder),
        "train": {
            "steps": max(STARTS.values()), "batch_tokens": BATCH, "sequence_length": 128,
            "precision": "float32", "eval_every": UNIT // 2, "eval_examples": 1024,
        },
        "schedule": {"name": "constant", "peak": RATE, "warmup": 200},
        "checkpoint": {"every": UNIT, "keep": 32},
    }  # fmt: skip


def model() -> PreTrainedModel:
    """Return a T5 1.1 with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(**CONFIG))


START = Start(table=table, model=model, steps=STARTS)


def main() -> None:
    """Train the model, or resume its training, export every start, and record the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the corpus, the run and the models go")
    parser.add_argument("--until", type=int, choices=[*STARTS], required=True, help="tokens per parameter")
    given = parser.parse_args()
    START.train(given.folder, given.until)
    START.record(given.folder, HERE / "dense.json")


if __name__ == "__main__":
    main()

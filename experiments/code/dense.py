"""The dense model for the experiments on code, trained for long.

It is a Llama of 312 thousand parameters, trained at a constant rate on the corpus of `corpus.py` to 320
tokens per parameter. All other runs start from its checkpoints after 10, 40, 80, 160 and 320 tokens per
parameter.

    python experiments/code/dense.py FOLDER
    python experiments/code/dense.py FOLDER --publish 320     # the model of `upcycle demo`
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import corpus  # noqa: E402
from continuation import Start  # noqa: E402
from upcycle.demo.story import MODEL  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 1024, "max_position_embeddings": 512, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0,
    "initializer_range": 0.02, "attention_bias": False, "mlp_bias": False, "dtype": "float32",
}  # fmt: skip
BATCH = 4096  # tokens per step
RATE = 2e-3
UNIT = 762  # steps for 10 tokens per parameter
STARTS = {10: UNIT, 40: 4 * UNIT, 80: 8 * UNIT, 160: 16 * UNIT, 320: 32 * UNIT}  # tokens per parameter: steps


def data(folder: Path) -> dict[str, Any]:
    """Return the [data] table of every run on the corpus in `folder`."""
    return {
        "sources": [{"path": str(folder / "corpus" / "code.jsonl")}],
        "held_out": corpus.write(folder / "corpus")["held_out"],
        "tokenizer": str(folder / "corpus" / "tokenizer"),
        "cache": str(folder / "tokens"),
    }


def table(folder: Path) -> dict[str, Any]:
    """Return the run file."""
    return {
        "source": str(folder / "shape"),
        "out": str(folder / "dense-run"),
        "from_scratch": True,
        "seed": 0,
        "data": data(folder),
        "train": {
            "steps": STARTS[320], "batch_tokens": BATCH, "sequence_length": corpus.SEQUENCE_LENGTH,
            "precision": "float32", "eval_every": UNIT // 2, "eval_tokens": 131_072,
        },
        "schedule": {"name": "constant", "peak": RATE, "warmup": 200},
        "checkpoint": {"every": UNIT, "keep": 32},
    }  # fmt: skip


def model() -> PreTrainedModel:
    """Return the model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**CONFIG))


START = Start(table=table, model=model, steps=STARTS, exported=("--dtype", "float32", "--optimizer"))


def publish(folder: Path, tokens: int) -> None:
    """Write a start in bfloat16, with its tokenizer, to the folder of the demo; no path of this machine."""
    shutil.rmtree(MODEL, ignore_errors=True)
    START.write(folder, tokens, MODEL, "--dtype", "bfloat16")
    shutil.copyfile(folder / "corpus" / "about.json", HERE / "corpus.json")
    for file in (folder / "corpus" / "tokenizer").iterdir():
        shutil.copyfile(file, MODEL / file.name)
    card, provenance = MODEL / "README.md", MODEL / "upcycle.json"
    card.write_text(card.read_text().replace(f"{folder}/", ""))
    record = json.loads(provenance.read_text().replace(f"{folder}/", ""))
    record["source"]["path"] = record["source"]["name"]
    provenance.write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Train the model, or resume its training, and export every start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="where the corpus, the run and the models go; not committed"
    )
    parser.add_argument("--publish", type=int, choices=[*STARTS], help="tokens per parameter of a start")
    given = parser.parse_args()
    if given.publish:
        publish(given.folder, given.publish)
        return
    START.train(given.folder, max(STARTS))


if __name__ == "__main__":
    main()

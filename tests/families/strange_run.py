"""In a process of its own: a stranger's family beside those that are there, from a checkpoint to a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from upcycle import families

home, files = map(Path, sys.argv[1:])
families.__path__.append(str(files))

import torch  # noqa: E402 - after the family is where families are
from transformers import AutoModelForCausalLM, PersimmonConfig  # noqa: E402

import upcycle  # noqa: E402
from tiny import make_bytes_tokenizer  # noqa: E402
from upcycle.blueprints.cost import plan  # noqa: E402
from upcycle.training.loop import train  # noqa: E402
from upcycle.training.run import Run  # noqa: E402

torch.manual_seed(0)
config = PersimmonConfig(
    vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
dense = AutoModelForCausalLM.from_config(config).eval()
with torch.no_grad():
    for parameter in dense.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
dense.save_pretrained(home / "dense")
make_bytes_tokenizer(home / "dense")

# It converts, the folder is verified, and the function is the dense one's.
recipe = upcycle.Recipe.of({"moe": {"target": "upcycled", "num_experts": 4, "layers": "every_other"}})
upcycle.convert(home / "dense", home / "moe", recipe)
proof = upcycle.verify(home / "dense", home / "moe")
assert proof.holds, proof.checks
assert proof.preserves_function
assert proof.logits
rows = torch.randint(0, 272, (2, 16))
with torch.no_grad():
    wanted, found = dense(rows).logits, upcycle.open(home / "moe").eval()(rows).logits
assert (wanted - found).abs().max() < 1e-4, (wanted - found).abs().max()

# FLOPs: every matrix, the head, and no table.
h, i = 32, 48
block, moe = 4 * h * h + 2 * h * i, 4 * h * h + 4 * h + 2 * 2 * h * i
assert plan(home / "dense", recipe).dense_flops_per_token == 2 * (3 * block + 272 * h)
assert plan(home / "dense", recipe).flops_per_token == 2 * (2 * block + moe + 272 * h)

# It trains from nothing, with rates by depth.
text = home / "text.txt"
text.write_text("".join(f"The {n * n % 97}th word of {n} is {chr(97 + n % 26)}. " for n in range(400)))
table = {
    "source": str(home / "dense"), "out": str(home / "run"), "from_scratch": True, "seed": 1,
    "moe": {"target": "upcycled", "num_experts": 4, "layers": "every_other"},
    "data": {"sources": [{"path": str(text)}], "held_out": 0.1, "append_eos": False},
    "train": {"steps": 6, "batch_tokens": 128, "sequence_length": 16, "precision": "float32",
              "layer_decay": 0.9},
    "schedule": {"name": "constant", "peak": 1e-2},
}  # fmt: skip
train(Run.of(table))
losses = [json.loads(line)["loss"] for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
assert abs(losses[0] - 5.6) < 0.2, losses  # ln 272
assert losses[-1] < losses[0] - 0.3, losses
print("trained")

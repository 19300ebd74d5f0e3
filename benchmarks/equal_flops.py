"""The seconds of a training step with experts, relative to the dense step of equal active FLOPs, on a CPU.

The experts are those of `recipes/equal_flops.toml`: 16 of half the width, top-2. The seconds are those of the
processor in one thread, so that other processes disturb little; dense and MoE take turns, and a ratio is of a
round. `--profile` names the operations that cost the MoE more than the dense model.

    python benchmarks/equal_flops.py [--hidden 64 128 256 512] [--rounds 8] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import machine
import steps
from upcycle.training.run import Run

RECIPE = Path(__file__).parent.parent / "recipes" / "equal_flops.toml"
ROWS, LENGTH, LAYERS, VOCABULARY = 16, 256, 4, 1024


def contenders(hidden: int, work: Path) -> dict[str, Callable[[], Any]]:
    """Return the step of the dense model and the step of the MoE."""
    torch.manual_seed(0)
    heads = max(2, hidden // 32)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=LAYERS,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=LENGTH,
    )  # fmt: skip
    source = work / str(hidden)
    LlamaForCausalLM(config).save_pretrained(source)
    rows = steps.random_rows(ROWS, LENGTH, VOCABULARY)
    table: dict[str, Any] = {
        "source": str(source), "out": "unused", "data": {"sources": [{"path": "unused"}]},
        "schedule": {"peak": 1.0},
        "train": {"steps": 1, "batch_tokens": ROWS * LENGTH, "sequence_length": LENGTH},
    }  # fmt: skip
    return {
        "dense": steps.ours(Run.of(table), rows),
        "moe": steps.ours(Run.of(table | tomllib.loads(RECIPE.read_text())), rows),
    }


def seconds(step: Callable[[], Any]) -> float:
    """Return the seconds of this thread's processor time that a step takes."""
    began = time.thread_time()
    step()
    return time.thread_time() - began


def measure(hidden: int, rounds: int, work: Path) -> dict[str, Any]:
    """Return the seconds of both steps, and their ratio within rounds."""
    steps_of = contenders(hidden, work)
    for step in steps_of.values():
        step()
    taken = {name: [] for name in steps_of}  # type: dict[str, list[float]]
    for number in range(rounds):
        for name in sorted(steps_of, reverse=bool(number % 2)):
            taken[name].append(seconds(steps_of[name]))
    return {
        "hidden": hidden,
        "seconds": {name: round(statistics.median(each), 4) for name, each in taken.items()},
        "moe_over_dense": machine.ratio(taken["moe"], taken["dense"]),
    }


def dearer(hidden: int, work: Path, count: int = 12) -> dict[str, float]:
    """Return the operations that cost the MoE more seconds a step, relative to the whole dense step."""
    spent: dict[str, Counter[str]] = {}
    for name, step in contenders(hidden, work).items():
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        spent[name] = Counter({event.key: event.self_cpu_time_total for event in profile.key_averages()})
    whole = spent["dense"].total()
    more = Counter({key: spent["moe"][key] - spent["dense"][key] for key in spent["moe"]})
    return {key: round(value / whole, 4) for key, value in more.most_common(count)}


def main() -> None:
    """Measure every width, and write one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, help="where to write the result (default: standard output)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="upcycle-bench-") as work:
        result: dict[str, Any] = {
            "device": machine.name(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "tokens": ROWS * LENGTH,
            "layers": LAYERS,
            "steps": [measure(hidden, options.rounds, Path(work)) for hidden in options.hidden],
        }
        if options.profile:
            result["dearer"] = {hidden: dearer(hidden, Path(work)) for hidden in options.hidden}
    text = json.dumps(result, indent=2) + "\n"
    options.out.write_text(text) if options.out else sys.stdout.write(text)


if __name__ == "__main__":
    main()

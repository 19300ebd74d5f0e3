"""The seconds of a training step with experts, relative to the dense step of equal active FLOPs, on a CPU.

The experts are those of `recipes/equal_flops.toml`: 16 of half the width, top-2. The seconds are those of the
processor in one thread, so that other processes disturb little; the contenders take turns, and a ratio is
of a round (`of_fastest`: of each contender's fastest step). `grouped_mm` is the MoE with grouped products,
which ran by default before. `products` is the ratio of the matrix products of the feed-forward networks
alone. `--profile` names the operations that cost the MoE more than the dense model.

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
from upcycle.nn import kernels
from upcycle.training.run import Run

RECIPE = Path(__file__).parent.parent / "recipes" / "equal_flops.toml"
ROWS, LENGTH, LAYERS, VOCABULARY = 16, 256, 4, 1024


def contenders(hidden: int, work: Path) -> dict[str, Callable[[], Any]]:
    """Return the step of the dense model, and that of the MoE as a run has it and with grouped products."""
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
    recipe = tomllib.loads(RECIPE.read_text())
    grouped = {"train": {**table["train"], "experts_implementation": kernels.GROUPED}}
    return {
        "dense": steps.ours(Run.of(table), rows),
        "moe": steps.ours(Run.of(table | recipe), rows),
        "grouped_mm": steps.ours(Run.of(table | recipe | grouped), rows),
    }


def seconds(step: Callable[[], Any]) -> float:
    """Return the seconds of this thread's processor time that a step takes."""
    began = time.thread_time()
    step()
    return time.thread_time() - began


def measure(hidden: int, rounds: int, work: Path) -> dict[str, Any]:
    """Return the seconds of all steps, their ratios to the dense one, and the ratio of products alone."""
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
        "moe_over_dense": _ratio(taken["moe"], taken["dense"]),
        "grouped_mm_over_dense": _ratio(taken["grouped_mm"], taken["dense"]),
        "products": products(hidden),
    }


def _ratio(of: list[float], to: list[float]) -> dict[str, float]:
    return {**machine.ratio(of, to), "of_fastest": round(min(of) / min(to), 3)}


def products(hidden: int, rounds: int = 5) -> float:
    """Return the time of the experts' matrix products over that of the dense network's, the fastest of each.

    They are those of a forward and a backward pass of one layer, with as many tokens for each expert.
    """
    width, experts, tokens = 4 * hidden, 16, ROWS * LENGTH

    def layer(rows: int, *shapes: tuple[int, int]) -> list[tuple[torch.Tensor, ...]]:
        return [tuple(map(torch.randn, ((rows, i), (o, i), (rows, o)))) for i, o in shapes]

    dense = layer(tokens, (hidden, width), (hidden, width), (width, hidden))
    each = [layer(2 * tokens // experts, (hidden, width), (width // 2, hidden)) for _ in range(experts)]

    def run(parts: list[tuple[torch.Tensor, ...]]) -> None:
        for given, weight, gradient in parts:
            torch.mm(given, weight.T)
            torch.mm(gradient, weight)
            torch.mm(gradient.T, given)

    taken: dict[str, list[float]] = {"dense": [], "expert": []}
    for _ in range(rounds + 1):
        taken["dense"].append(seconds(lambda: run(dense)))
        taken["expert"].append(seconds(lambda: run([part for parts in each for part in parts])))
    return round(min(taken["expert"]) / min(taken["dense"]), 3)


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

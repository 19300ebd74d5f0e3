"""Tokens/s of a training step: MoE, dense of the same active FLOPs, and the step of transformers.

    python benchmarks/train_step.py [--size small|1b] [--rounds 8] [--out results.json]

`upcycle compiled` is a run with `train.compile`; the time of compiling is not counted.

All contenders are in one process and take turns, one step each, in rotating order; ratios are of medians.
`dense` has a feed-forward network that is top-k times as wide. `transformers` is the loss of the model class
(with its own balance loss), clip_grad_norm_ and torch.optim.AdamW, with the default implementation of
experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import machine
import steps
from upcycle.conversion.write import convert
from upcycle.system import gpus
from upcycle.training import start
from upcycle.training.run import Run

EXPERTS, TOP_K = 8, 2
SIZES: dict[str, dict[str, int]] = {
    # As an 8-expert top-2 MoE it has about 1.0 B active parameters, and with Adam it fills one GPU of 140 GB.
    "1b": {
        "hidden": 2048, "width": 4096, "layers": 16, "heads": 16, "kv": 8, "vocabulary": 32000,
        "rows": 8, "length": 4096,
    },
    "small": {
        "hidden": 256, "width": 1024, "layers": 4, "heads": 4, "kv": 2, "vocabulary": 1024,
        "rows": 4, "length": 512,
    },
}  # fmt: skip


def make_dense(folder: Path, size: dict[str, int], width: int) -> Path:
    """Save a random Llama as an ordinary checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocabulary"], hidden_size=size["hidden"], intermediate_size=width,
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["kv"],
        max_position_embeddings=size["length"],
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def ours(source: Path, size: dict[str, int], moe: bool, **train: str | bool) -> tuple[Callable[[], Any], int]:
    """Return a step of `upcycle train` with these settings of `train`, and its active FLOPs per token."""
    table: dict[str, Any] = {
        "source": str(source),
        "out": "unused",
        "data": {"sources": [{"path": "unused.txt"}]},
        "train": {
            "steps": 1,
            "batch_tokens": size["rows"] * size["length"],
            "sequence_length": size["length"],
            **train,
        },
        "schedule": {"peak": 1e-4},
        **({"moe": {"num_experts": EXPERTS, "top_k": TOP_K}} if moe else {}),
    }
    run = Run.of(table)
    begun = start.start_of(run)
    begun.dense.checkpoint.close()
    return steps.ours(run, rows_of(size)), begun.training_flops(size["length"], all_scores=True)


def rows_of(size: dict[str, int]) -> torch.Tensor:
    """Return the rows of a step."""
    return steps.random_rows(size["rows"], size["length"], size["vocabulary"])


def measure(size: dict[str, int], rounds: int, work: Path) -> dict[str, Any]:
    """Measure every contender in turn; return medians of tokens/s and medians of the ratios within rounds."""
    source = make_dense(work / "dense", size, size["width"])
    wide = make_dense(work / "wide", size, TOP_K * size["width"])
    convert(source, work / "moe", Run.of({**_MINIMAL, "source": str(source)}).recipe)
    contenders: dict[str, Callable[[], Any]] = {}
    contenders["dense"], dense_flops = ours(wide, size, moe=False)
    contenders["upcycle"], flops = ours(source, size, moe=True)
    contenders["upcycle compiled"], _ = ours(source, size, moe=True, compile=True)
    for name in ("grouped_mm", "eager"):
        contenders[f"upcycle {name}"], _ = ours(source, size, moe=True, experts_implementation=name)
    contenders["transformers"] = steps.theirs(work / "moe", rows_of(size))
    for contender in contenders.values():  # compiled blocks are ready after the second step
        machine.timed(contender)
        machine.timed(contender)
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, int] = {}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if machine.device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            seconds[name].append(machine.timed(contenders[name]))
            if machine.device().type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() - held
    tokens = size["rows"] * size["length"]
    speed = {name: tokens / statistics.median(s) for name, s in seconds.items()}

    def ratio(a: str, b: str) -> dict[str, float]:
        return machine.ratio(seconds[b], seconds[a])

    flops_of = {name: dense_flops if name == "dense" else flops for name in names}
    peak = None
    if machine.device().type == "cuda":
        gpu = gpus.of_device(torch.cuda.get_device_name())
        peak = gpu.peak_flops if gpu else None
    return {
        "size": size,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "rounds": rounds,
        "device": machine.name(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tokens_per_s": {name: round(s, 1) for name, s in speed.items()},
        "active_training_flops_per_token": {"dense": dense_flops, "upcycle": flops},
        "mfu": None if peak is None else {n: round(s * flops_of[n] / peak, 4) for n, s in speed.items()},
        "activation_bytes": memory or None,
        "upcycle_over_transformers": ratio("upcycle", "transformers"),
        "compiled_over_transformers": ratio("upcycle compiled", "transformers"),
        "upcycle_over_dense": ratio("upcycle", "dense"),
        "grouped_mm_over_eager": ratio("upcycle grouped_mm", "upcycle eager"),
    }  # fmt: skip


_MINIMAL = {
    "out": "unused", "moe": {"num_experts": EXPERTS, "top_k": TOP_K}, "schedule": {"peak": 1.0},
    "data": {"sources": [{"path": "x"}]}, "train": {"steps": 1},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--profile", action="store_true", help="where the time of a step goes, on standard error"
    )
    parser.add_argument("--out", type=Path, help="where to write the result (default: standard output)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upcycle-bench-") as work:
        if options.profile:
            source = make_dense(Path(work) / "dense", SIZES[options.size], SIZES[options.size]["width"])
            contender, _ = ours(source, SIZES[options.size], moe=True)
            contender()
            with torch.profiler.profile() as profile:
                contender()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15), file=sys.stderr)
            return
        result = measure(SIZES[options.size], options.rounds, Path(work))
    text = json.dumps(result, indent=2) + "\n"
    options.out.write_text(text) if options.out else sys.stdout.write(text)


if __name__ == "__main__":
    main()

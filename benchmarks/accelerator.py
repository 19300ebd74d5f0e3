"""Tokens/s and MFU of a training step on one GPU, one contender after another, in four minutes.

    python benchmarks/accelerator.py [--size full|toy] [--seconds 240] [--out results.json]

First it checks that experts run in groups and one by one give the same loss and gradients, and that the GPU
gives those of the CPU. Then it times the steps of these models, in bf16 arithmetic with float32 weights and
AdamW:

- `coarse`: eight experts, top-2, of the dense width: 1.0 B active parameters at full size
- `fine`: 64 experts of an eighth of the width, top-8: the active FLOPs of the dense model
- `dense`: the dense model of the FLOPs of `coarse`, with a network that is top-2 times as wide

Each MoE runs as `upcycle train` runs it, with each implementation of experts that works here, with blocks
compiled, and as transformers runs it. MFU counts active FLOPs. The models do not fit beside each other, so
they come in sequence; `dense` comes first and last, and the two figures show how steady the device is. What
the time does not allow is left out, and the result names it.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import machine
import steps
from upcycle.conversion.write import convert
from upcycle.hf.parts import ALL_EXPERTS_FUNCTIONS
from upcycle.system import gpus
from upcycle.training import start
from upcycle.training.run import Run

WARM_UP, STEPS = 3, 6
LARGEST = 5  # costs that the profile names
COARSE: dict[str, Any] = {"moe": {"num_experts": 8, "top_k": 2}}
FINE: dict[str, Any] = {
    "moe": {"num_experts": 64, "top_k": 8, "granularity": 8}, "init": {"name": "virtual_group"},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Size:
    """The shape of the dense models, and the tokens of a step."""

    hidden: int
    width: int
    layers: int
    heads: int
    kv: int
    vocabulary: int
    rows: int
    length: int


SIZES = {
    "full": Size(hidden=2048, width=4096, layers=16, heads=16, kv=8, vocabulary=32000, rows=8, length=4096),
    "toy": Size(hidden=64, width=128, layers=2, heads=4, kv=2, vocabulary=256, rows=2, length=64),
}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model and a way to run its step."""

    name: str
    recipe: dict[str, Any]  # empty: the dense model
    width: int = 1  # of the dense network, as a multiple of the size's
    experts: str | None = None  # the implementation; None: the default
    compiled: bool = False
    theirs: bool = False  # whether transformers runs the step


def contenders() -> list[Contender]:
    """Return all contenders, the ones that matter most first."""
    dense = Contender(name="dense", recipe={}, width=2)
    coarse, fine = Contender(name="coarse", recipe=COARSE), Contender(name="fine", recipe=FINE)
    others = [name for name in ("eager", *sorted(ALL_EXPERTS_FUNCTIONS)) if name != "grouped_mm"]
    return [
        dense,
        coarse,
        replace(coarse, name="coarse, compiled", compiled=True),
        fine,
        replace(coarse, name="coarse, transformers", theirs=True),
        replace(dense, name="dense, compiled", compiled=True),
        replace(fine, name="fine, compiled", compiled=True),
        replace(fine, name="fine, transformers", theirs=True),
        *(replace(coarse, name=f"coarse, {name}", experts=name) for name in others),
        *(replace(fine, name=f"fine, {name}", experts=name) for name in others),
    ]


def source(folder: Path, size: Size, width: int) -> Path:
    """Return a random Llama as an ordinary checkpoint, written once."""
    made = folder / f"dense-{width}"
    if not made.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=width * size.width,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv,
            max_position_embeddings=size.length,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made)
    return made


def run_file(folder: Path, size: Size, contender: Contender) -> Run:
    """Return the run of a contender."""
    train: dict[str, Any] = {
        "steps": 1, "batch_tokens": size.rows * size.length, "sequence_length": size.length,
        "micro_batch": size.rows, "compile": contender.compiled,
    }  # fmt: skip
    if contender.experts:
        train["experts_implementation"] = contender.experts
    return Run.of(
        {
            "source": str(source(folder, size, contender.width)), "out": "unused",
            "data": {"sources": [{"path": "unused.txt"}]}, "train": train, "schedule": {"peak": 1e-4},
            **contender.recipe,
        }
    )  # fmt: skip


def converted(folder: Path, run: Run) -> Path:
    """Return the MoE of a run, written to a new folder."""
    assert run.recipe is not None
    made = Path(tempfile.mkdtemp(dir=folder)) / "converted"
    convert(run.source, made, run.recipe)
    return made


def rows_of(size: Size) -> torch.Tensor:
    """Return the rows of a step."""
    return steps.random_rows(size.rows, size.length, size.vocabulary)


def correctness(folder: Path) -> dict[str, float]:
    """Return the largest differences of losses and gradients, relative to the largest gradient.

    They are those of grouped experts and experts one by one, and of the device and the CPU, in float32.
    """
    size = SIZES["toy"]
    rows = rows_of(size)
    found: dict[str, float] = {}
    for name, recipe in (("coarse", COARSE), ("fine", FINE)):
        asked = (Contender(name=name, recipe=recipe, experts=how) for how in ("grouped_mm", "eager"))
        grouped, looped = (
            steps.trainee_of(run_file(folder / "toy", size, each), "float32").model for each in asked
        )
        there = _gradients(grouped, rows)
        found[f"{name}: grouped against one by one"] = _apart(there, _gradients(looped, rows))
        if machine.device().type != "cpu":
            here = _gradients(grouped.to("cpu"), rows.cpu())
            found[f"{name}: {machine.device().type} against cpu"] = _apart(there, here)
    return found


def _gradients(model: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=rows[:, :-1], labels=rows[:, :-1], use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {"loss": loss.detach().cpu()}


def _apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp(min=1e-8)) for n in ours)


def built(folder: Path, size: Size, contender: Contender) -> tuple[Callable[[], Any], int]:
    """Return the step of a contender, and its active FLOPs per token."""
    run = run_file(folder, size, contender)
    begun = start.start_of(run)
    begun.dense.checkpoint.close()
    rows = rows_of(size)
    one_step = steps.theirs(converted(folder, run), rows) if contender.theirs else steps.ours(run, rows)
    return one_step, begun.training_flops(size.length, all_scores=True)


def free() -> None:
    """Give back the memory of the last contender, which nothing holds any more."""
    gc.collect()
    torch._dynamo.reset()
    if machine.device().type == "cuda":
        torch.cuda.empty_cache()


def measured(folder: Path, size: Size, contender: Contender) -> dict[str, Any]:
    """Return a contender's tokens/s, MFU, memory, and for those of ours that are not compiled a profile."""
    cuda = machine.device().type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    one_step, flops = built(folder, size, contender)
    for _ in range(WARM_UP):
        machine.timed(one_step)
    seconds = statistics.median(machine.timed(one_step) for _ in range(STEPS))
    tokens = size.rows * size.length / seconds
    gpu = gpus.of_device(torch.cuda.get_device_name()) if cuda else None
    found: dict[str, Any] = {
        "seconds": round(seconds, 4),
        "tokens_per_s": round(tokens, 1),
        "active_training_flops_per_token": flops,
        "mfu": round(tokens * flops / gpu.peak_flops, 4) if gpu else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }
    if not contender.compiled and not contender.theirs and contender.experts is None:
        found["largest_costs"] = profile(one_step)
    return found


def profile(one_step: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return the operators that take most of a step: their names and shares of the step's time."""
    with torch.profiler.profile() as watched:
        machine.timed(one_step)
    kind = "self_device_time_total" if machine.device().type == "cuda" else "self_cpu_time_total"
    events = sorted(watched.key_averages(), key=lambda e: -getattr(e, kind))
    total = sum(getattr(e, kind) for e in events) or 1
    return [
        {"operator": e.key[:80], "calls": e.count, "share": round(getattr(e, kind) / total, 3)}
        for e in events[:LARGEST]
    ]


class TimeIsUp(BaseException):
    """A contender takes longer than there is time; no `except Exception` on the way may keep it."""


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in the block when the seconds are over: compiling may take longer than the rest."""

    def stop(*_: Any) -> None:
        raise TimeIsUp

    if seconds <= 0:
        raise TimeIsUp
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(folder: Path, size: Size, seconds: float) -> dict[str, Any]:
    """Check, then time contenders until the time is over; the dense model comes first and last.

    The time begins when it is called. Checks and the last contender are not cut short.
    """
    ends = time.monotonic() + seconds
    found: dict[str, Any] = {"correctness": correctness(folder), "contenders": {}, "left_out": {}}
    again = 0.0  # seconds that the dense model takes, which comes once more at the end
    for contender in contenders():
        began = time.monotonic()
        try:
            with no_longer_than(ends - began - again):
                found["contenders"][contender.name] = measured(folder, size, contender)
        except TimeIsUp:
            found["left_out"][contender.name] = "no time left"
        except Exception as error:  # a kernel that is not installed, or memory that does not reach
            found["left_out"][contender.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        free()
        again = again or time.monotonic() - began
    if "dense" not in found["contenders"]:
        return found
    found["contenders"]["dense, again"] = measured(folder, size, contenders()[0])
    speed = {name: each["tokens_per_s"] for name, each in found["contenders"].items()}
    found["over_dense"] = {name: round(speed[name] / speed["dense"], 3) for name in speed}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--out", type=Path, help="where to write the result (default: standard output)")
    options = parser.parse_args()
    size = SIZES[options.size]
    with tempfile.TemporaryDirectory(prefix="upcycle-bench-") as work:
        result = {
            "device": machine.name(),
            "size": vars(size),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            **measure(Path(work), size, options.seconds),
        }
    text = json.dumps(result, indent=2) + "\n"
    options.out.write_text(text) if options.out else sys.stdout.write(text)


if __name__ == "__main__":
    main()

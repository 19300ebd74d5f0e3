"""The demo: it trains a small dense Llama, upcycles it three ways, trains all at equal FLOPs, and reports."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from upcycle.api.calibration import calibrate
from upcycle.api.evaluation import Evaluation, evaluate
from upcycle.api.inspection import inspect
from upcycle.api.reporting import report
from upcycle.blueprints.cost import Plan, plan_of
from upcycle.conversion.write import convert
from upcycle.demo.corpus import HELD_OUT, Corpus, tokenizer_of
from upcycle.errors import UpcycleError
from upcycle.hf.quiet import quiet
from upcycle.recipe import Recipe
from upcycle.reporting import drawing
from upcycle.system.wording import count, size
from upcycle.verification import Proof, verify

if TYPE_CHECKING:
    from upcycle.training.run import Run

CONTINUED = 0.55  # FLOPs of the continued training of each model, relative to the dense training
LENGTH, BATCH = 128, 8
PEAK = 2e-3
PROBE = 24  # steps to measure how many fit into the time


@dataclass(frozen=True, kw_only=True)
class Made:
    """A Mixture of Experts before its training."""

    plan: Plan
    proof: Proof


@dataclass(frozen=True, kw_only=True)
class Continued:
    """A model after continued training."""

    name: str
    tokens: int
    flops: float
    before: float  # held-out loss, nats per token
    after: float


class Audience(Protocol):
    """The interface that shows the demo."""

    def say(self, sentence: str) -> None:
        """Show a sentence about the next step or a result."""

    def made(self, mixtures: Mapping[str, Made]) -> None:
        """Show the Mixtures of Experts before their training, by name."""

    def evaluated(self, found: Evaluation) -> None:
        """Show the scores of the trained models."""

    def continued(self, rows: Sequence[Continued], page: Path) -> None:
        """Show the results of continued training, and where the report is."""


def run(folder: Path, audience: Audience, *, seconds: float, seed: int) -> list[Continued]:
    """Run the demo in `folder`, which must not exist; `seconds` is the time to train the dense model."""
    if folder.exists():
        raise UpcycleError(f"{folder} exists already; delete it, or choose another with --out")
    if not 0 < seconds < math.inf:
        raise UpcycleError(f"--seconds {seconds:g}; it must be a number above zero")
    drawing.need_matplotlib()
    try:
        corpus = Corpus.write(folder)
        what = f"the last {HELD_OUT:.0%} held out"
        audience.say(f"corpus: {size(corpus.sources.stat().st_size)} of Python's standard library, {what}")
        dense, budget = _train_dense(folder, corpus, audience, seconds=seconds, seed=seed)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    ways = _ways(folder, corpus)
    made = {name: _upcycle(dense, folder / name, {"seed": seed, **way}) for name, way in ways.items()}
    audience.made(made)
    continued = [
        _go_on(folder, corpus, audience, name, way, CONTINUED * budget, seed)
        for name, way in {"dense": {}, **ways}.items()
    ]
    _evaluate(folder, corpus, audience, [row.name for row in continued])
    folders = [folder / kind / row.name for row in continued for kind in ("runs", "trained")]
    page = folder / "report.html"
    written = report(
        [folder / "runs" / "dense-training", *folders],
        page,
        markdown=folder / "report.md",
        title="upcycle demo",
    )
    for trouble in written.troubles:
        audience.say(trouble)
    audience.continued(continued, page)
    return continued


def _train_dense(
    folder: Path, corpus: Corpus, audience: Audience, *, seconds: float, seed: int
) -> tuple[Path, float]:
    """Train the dense model; return its folder and its training FLOPs."""
    from upcycle.training import metrics
    from upcycle.training.export import export
    from upcycle.training.loop import train

    shape = folder / "shape"
    _write_shape(shape, corpus)
    table = {"source": str(shape), "from_scratch": True}
    probe = _run(folder, corpus, "probe", table, PROBE, seed)
    train(probe)
    times = sorted(line.seconds or 0.0 for line in metrics.read(Path(probe.out)))
    shutil.rmtree(probe.out)
    steps = max(2, round(seconds / times[len(times) // 2]))
    dense_run = _run(folder, corpus, "dense-training", table, steps, seed)
    audience.say(f"training a dense model for {steps} steps")
    train(dense_run)
    made = export(dense_run.out, folder / "dense")
    audience.say(f"dense model: {count(made.parameters)} parameters, {count(steps * BATCH * LENGTH)} tokens")
    return folder / "dense", steps * BATCH * LENGTH * _flops_per_token(dense_run)


def _write_shape(folder: Path, corpus: Corpus) -> None:
    """Write a Llama with random weights as an ordinary checkpoint with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_of(corpus.seen.read_text())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _ways(folder: Path, corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Return the recipes of three ways to make experts, with equal active FLOPs."""
    statistics = folder / "statistics.safetensors"
    calibrate(
        folder / "dense", statistics, text=corpus.seen, collect=("l2",), positions=("neurons",), limit=256,
        length=LENGTH,
    )  # fmt: skip
    eight = {"moe": {"num_experts": 8, "top_k": 2}}
    recycled = {"name": "importance", "statistics": str(statistics), "output": "expected"}
    return {
        "copy": {**eight, "init": {"name": "copy"}},
        "drop": {**eight, "init": {"name": "drop", "ratio": 0.5}},
        "recycle": {"moe": {"num_experts": 16, "top_k": 4, "expert_width": 176}, "init": recycled},
    }


def _upcycle(dense: Path, folder: Path, way: Mapping[str, Any]) -> Made:
    return Made(plan=plan_of(convert(dense, folder, Recipe.of(way))), proof=verify(dense, folder))


def _run(folder: Path, corpus: Corpus, name: str, table: Mapping[str, Any], steps: int, seed: int) -> Run:
    """Make the run of `steps` steps."""
    from upcycle.training.run import Run

    scratch = table.get("from_scratch", False)
    return Run.of(
        {
            "source": str(folder / "dense"), "out": str(folder / "runs" / name), "seed": seed,
            "data": {
                "sources": [{"path": str(corpus.sources)}], "held_out": HELD_OUT, "append_eos": False,
                "cache": str(folder / "runs" / "tokens"),
            },
            "train": {
                "steps": steps, "batch_tokens": BATCH * LENGTH, "sequence_length": LENGTH,
                "eval_every": max(1, steps // 6), "eval_tokens": 128 * LENGTH,
            },
            "schedule": {
                "name": "cosine", "peak": PEAK if scratch else PEAK / 2, "floor": PEAK / 20,
                "warmup": max(1, steps // 20),
            },
            "checkpoint": {"every": 0}, "log": {"every": 100}, **table,
        }
    )  # fmt: skip


def _go_on(
    folder: Path,
    corpus: Corpus,
    audience: Audience,
    name: str,
    way: Mapping[str, Any],
    flops: float,
    seed: int,
) -> Continued:
    """Continue the training of a model for `flops` FLOPs, and export it."""
    from upcycle.training import metrics
    from upcycle.training.export import export
    from upcycle.training.loop import train

    per_step = _flops_per_token(_run(folder, corpus, name, way, 2, seed)) * BATCH * LENGTH
    wanted = _run(folder, corpus, name, way, max(2, round(flops / per_step)), seed)
    audience.say(f"training on: {name}")
    result = train(wanted)
    export(wanted.out, folder / "trained" / name)
    records = metrics.read(result.out)
    assert result.held_out_loss is not None
    return Continued(
        name=name,
        tokens=records[-1].tokens,
        flops=len(records) * per_step,
        before=records[0].held_out_start or 0.0,
        after=result.held_out_loss,
    )


def _flops_per_token(wanted: Run) -> int:
    """Return the active FLOPs of training on one token."""
    from upcycle.training.start import start_of

    begun = start_of(wanted)
    begun.dense.checkpoint.close()
    return begun.training_flops(LENGTH)


def _evaluate(folder: Path, corpus: Corpus, audience: Audience, names: list[str]) -> None:
    """Score all models on held-out text in bits per byte, and record the routing of those with experts."""
    found = evaluate([folder / "trained" / name for name in names], text=corpus.held_out, length=LENGTH)
    audience.evaluated(found)
    if lost := found.record().lost:
        raise lost[0]
    domains = {"code": corpus.held_out, "documentation": corpus.documentation}
    for name in names[1:]:
        inspect(folder / "trained" / name, text=domains, limit=64, length=LENGTH).save()

"""`upcycle demo`: the whole job on one machine, with nothing but what Python and this package bring.

Trains a small dense Llama on the standard library's own sources, saves it as an ordinary checkpoint, converts
and verifies it, and trains dense and MoE on at equal FLOPs.
"""

from __future__ import annotations

import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from upcycle.console import count, err, grid, out, size
from upcycle.cost import plan_of
from upcycle.errors import UpcycleError
from upcycle.proof import Proof, quiet, verify
from upcycle.recipe import Recipe
from upcycle.write import convert

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from upcycle.training.run import Run

CORPUS_BYTES = 4_000_000
HELD_OUT = 0.09  # of the continued training: all of it lies in the tenth that the dense training left out
CONTINUED = 0.6  # steps of the MoE's continued training, of those of the dense training
VOCABULARY, LENGTH, BATCH = 1024, 128, 8
PEAK_LR, WARM_UP = 2e-3, 0.05  # of the time
RECIPES: dict[str, dict[str, Any]] = {
    "copy": {"init": {"name": "copy"}},
    "drop": {"init": {"name": "drop", "ratio": 0.5}},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of the result."""

    name: str
    parameters: int
    active: int
    loss: float
    proof: Proof | None


@dataclass(frozen=True, kw_only=True)
class Continued:
    """One model trained on."""

    name: str
    tokens: int
    flops: float
    before: float  # held-out loss, nats per token
    after: float


def run(folder: Path, *, seconds: float, seed: int) -> list[Row]:
    """Train, upcycle and compare below `folder`, which must not exist yet."""
    if folder.exists():
        raise UpcycleError(f"{folder} exists already; delete it, or choose another with --out")
    if seconds <= 0:
        raise UpcycleError(f"--seconds {seconds:g}; it must be above zero")
    corpus = standard_library()
    out.print(f"corpus: {size(len(corpus))} of Python's standard library, the last tenth held out")
    dense = folder / "dense"
    try:
        held_out, steps = train(corpus, dense, seconds=seconds, seed=seed)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    rows: list[Row] = []
    for name, table in RECIPES.items():
        recipe = Recipe.of({"seed": seed, **table})
        built = convert(dense, folder / name, recipe)
        plan = plan_of(built)
        if not rows:
            loss = evaluate(dense, held_out)
            rows.append(
                Row(
                    name="dense",
                    parameters=plan.dense_parameters,
                    active=plan.dense_parameters,
                    loss=loss,
                    proof=None,
                )
            )
        rows.append(
            Row(
                name=f"8 experts, {name}",
                parameters=plan.total_parameters,
                active=plan.active_parameters,
                loss=evaluate(folder / name, held_out),
                proof=verify(dense, folder / name),
            )
        )
    show(rows, folder)
    (folder / "corpus.txt").write_text(corpus)
    moe_steps = max(2, round(CONTINUED * steps))
    moe = continued_run(folder, "copy", RECIPES["copy"], moe_steps, seed)
    ratio = flops_per_token(moe) / flops_per_token(continued_run(folder, "dense", None, 1, seed))
    runs = {"dense": continued_run(folder, "dense", None, round(ratio * moe_steps), seed)}
    runs |= {name: continued_run(folder, name, recipe, moe_steps, seed) for name, recipe in RECIPES.items()}
    show_continued([continue_training(name, run_) for name, run_ in runs.items()], folder)
    return rows


def continued_run(folder: Path, name: str, recipe: dict[str, Any] | None, steps: int, seed: int) -> Run:
    """`steps` more steps of the dense model, or of the MoE that `recipe` makes of it."""
    from upcycle.training.run import Run

    return Run.of(
        {
            "source": str(folder / "dense"),
            "out": str(folder / "runs" / name),
            "seed": seed,
            **({"moe": {"num_experts": 8, "top_k": 2}, **recipe} if recipe else {}),
            "data": {
                "sources": [{"path": str(folder / "corpus.txt")}],
                "held_out": HELD_OUT,
                "append_eos": False,
                "cache": str(folder / "runs" / "tokens"),
            },
            "train": {
                "steps": steps,
                "batch_tokens": BATCH * LENGTH,
                "sequence_length": LENGTH,
                "eval_every": steps,
                "eval_tokens": 128 * LENGTH,
            },
            "schedule": {"peak": PEAK_LR / 2, "floor": PEAK_LR / 20, "warmup": max(1, steps // 20)},
            "checkpoint": {"every": 0},
            "log": {"every": 100},
        }
    )


def flops_per_token(run_: Run) -> int:
    """Active FLOPs of training on one token."""
    from upcycle.training.start import start_of

    begun = start_of(run_)
    begun.dense.checkpoint.close()
    return begun.training_flops(LENGTH)


def continue_training(name: str, run_: Run) -> Continued:
    """Train as `run_` says."""
    from upcycle.training import metrics
    from upcycle.training.loop import train as go

    out.print(f"training on: {name}")
    result = go(run_)
    records = metrics.read(result.out)
    assert result.held_out_loss is not None
    return Continued(
        name=f"8 experts, {name}" if run_.recipe else name,
        tokens=records[-1]["tokens"],
        flops=records[-1]["tokens"] * flops_per_token(run_),
        before=records[0]["held_out_start"],
        after=result.held_out_loss,
    )


def standard_library() -> str:
    """Sources of the standard library, as far as `CORPUS_BYTES`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = ("test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__", "encodings")
    texts, total = [], 0
    for path in sorted(root.rglob("*.py")):
        if any(part in skip for part in path.relative_to(root).parts):
            continue
        text = path.read_text(errors="ignore")
        texts.append(text)
        total += len(text)
        if total >= CORPUS_BYTES:
            break
    if total < 100_000:
        raise UpcycleError(f"the sources of Python's standard library are not at {root}")
    return "\n".join(texts)[:CORPUS_BYTES]


def train(corpus: str, folder: Path, *, seconds: float, seed: int) -> tuple[torch.Tensor, int]:
    """Train a dense Llama for about `seconds` and save it; the held-out tokens, [N, L + 1], and the steps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(corpus)
    with quiet():
        ids = torch.tensor(tokenizer(corpus).input_ids)
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    seen, held_out = rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :][:128]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    start, losses = time.monotonic(), []
    columns = (
        TextColumn("training the dense model"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=1.0, note="")
        while (done := (time.monotonic() - start) / seconds) < 1:
            lr = PEAK_LR * (done / WARM_UP if done < WARM_UP else 1 - 0.9 * (done - WARM_UP) / (1 - WARM_UP))
            optimizer.param_groups[0]["lr"] = lr
            batch = seen[torch.randint(len(seen), (BATCH,), generator=generator)]
            loss = model(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            recent = sum(losses[-20:]) / len(losses[-20:])
            progress.update(task, completed=done, note=f"step {len(losses)}, loss {recent:.2f}")
    out.print(
        f"dense model: {count(model.num_parameters())} parameters, {len(losses)} steps, "
        f"{count(len(losses) * BATCH * LENGTH)} tokens"
    )
    save(model, tokenizer, folder)
    return held_out, len(losses)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """An ordinary Hugging Face checkpoint."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def make_tokenizer(corpus: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def evaluate(folder: Path, rows: torch.Tensor) -> float:
    """Mean loss in nats per token on rows of tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        losses = [float(model(batch, labels=batch).loss) for batch in rows.split(BATCH)]
    return sum(losses) / len(losses)


def show(rows: list[Row], folder: Path) -> None:
    """The result as a table and a sentence."""
    table = grid("", "model", "parameters", "active", "held-out loss", "largest logit difference", "verified")
    for row in rows:
        proof = row.proof
        table.add_row(
            row.name,
            count(row.parameters),
            count(row.active),
            f"{row.loss:.5f}",
            f"{proof.logits['random'].relative:.1e} of scale" if proof else "",
            ("yes" if proof.holds else "NO") if proof else "",
        )
    out.print(table)
    dense, copy, drop = rows
    out.print(
        f"copy computes what the dense model computes (loss {copy.loss - dense.loss:+.1e}); drop starts "
        f"{drop.loss - dense.loss:.2f} nats behind and has to be trained on."
    )


def show_continued(rows: list[Continued], folder: Path) -> None:
    """What continued training gave, as a table and one sentence."""
    table = grid("\ntrained on", "model", "tokens", "training FLOPs", "held-out before", "held-out after")
    for row in rows:
        table.add_row(
            row.name, count(row.tokens), f"{row.flops:.3g}", f"{row.before:.4f}", f"{row.after:.4f}"
        )
    out.print(table)
    dense, *moes = rows
    best = min(moes, key=lambda row: row.after)
    gained = dense.after - best.after
    out.print(
        f"At equal FLOPs the best MoE ({best.name}) ends at {best.after:.3f} nats per token and the dense "
        f"model at {dense.after:.3f}: upcycling {'gained' if gained > 0 else 'lost'} {abs(gained):.3f} "
        f"(one seed)."
    )
    out.print(f"checkpoints: {folder}/dense, /copy, /drop; try: upcycle export {folder}/runs/copy trained")

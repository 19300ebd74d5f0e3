"""Sparse Upcycling of a small T5 on TinyStories with the paper's recipe: is it worth its FLOPs?

The script trains a tokenizer and the dense model, then every variant with every seed, and gathers
`results.json`; runs that are already there are not repeated.

    python experiments/sparse_upcycling_t5/run.py --text tinystories.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from upcycle.recipe import read_toml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402

PRESET = HERE.parent.parent / "recipes" / "sparse_upcycling_t5.toml"
VOCABULARY, SENTINELS = 512, 16


def preset() -> dict[str, Any]:
    """Return the recipe of the paper with 8 experts."""
    table = {k: v for k, v in read_toml(PRESET).items() if k in ("moe", "init", "router", "decoder")}
    table["moe"] |= {"num_experts": 8}
    return table


VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "preset": preset(),
}


def make_source(folder: Path, text: Path) -> None:
    """Write a T5 1.1 with random weights, and a tokenizer of the words of the text with sentinels."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    special = ["<pad>", "</s>", "<unk>", *[f"<extra_id_{i}>" for i in range(SENTINELS)]]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train([str(text)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=special[3:],
    ).save_pretrained(folder)  # fmt: skip
    config = T5Config(
        vocab_size=VOCABULARY, d_model=128, d_ff=256, d_kv=32, num_layers=4, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)


def table(variant: str | None, seed: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the run file of a variant, or of the dense model for None, as a table."""
    out = read_toml(HERE / "base.toml")
    out["data"]["sources"][0]["path"] = str(options.text)
    out["data"]["cache"] = str(options.runs / "tokens")
    if variant is None:
        return out | {"source": str(options.runs / "t5"), "out": str(options.runs / "base")}
    begun = out["train"]["steps"]
    del out["from_scratch"]
    out |= {"seed": seed, **VARIANTS[variant]}
    out |= {"source": str(options.runs / "dense-base"), "out": str(options.runs / f"{variant}-{seed}")}
    out["train"] |= {"steps": steps, "eval_every": max(1, steps // 4)}
    out["schedule"]["decay"] = steps // 4
    out["schedule"]["start_step"] = begun
    return out


def base(options: argparse.Namespace) -> None:
    """Train the dense model."""
    source, out = options.runs / "t5", options.runs / "dense-base"
    if not source.exists():
        make_source(source, options.text)
    if not out.exists():
        common.train(table(None, 0, 0, options), options.threads)
        common.upcycle("export", str(options.runs / "base"), str(out))


def go(variant: str, seed: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one run and return its result."""
    run = table(variant, seed, steps, options)
    common.train(run, options.threads)
    out = Path(run["out"])
    record = json.loads((out / "run.json").read_text())
    lines = common.lines_of(out)
    for private in ("source", "out"):
        run[private] = Path(run[private]).name
    run["data"]["sources"][0]["path"] = options.text.name
    run["data"].pop("cache")
    flops = record["training_flops_per_row"]
    return {
        "variant": variant,
        "seed": seed,
        "run": run,
        "parameters": record["parameters"],
        "active_parameters": record["active_parameters"],
        "training_flops_per_row": flops,
        "seconds": round(sum(x["seconds"] for x in lines)),
        "curve": common.curve(out, run["train"]["batch_size"], flops),
        "layers": [
            {k: layer[k] for k in ("stack", "layer", "left_behind", "entropy", "dead")}
            for layer in lines[-1].get("layers", ())
        ],
    }


def main() -> None:
    """Run the missing jobs, gather the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--steps", type=int, default=400, help="of the MoE; the dense model gets its FLOPs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    base(options)
    cost = {v: common.flops_per_row(table(v, 0, 4, options)) for v in VARIANTS}
    steps = {v: round(options.steps * cost["preset"] / cost[v]) for v in VARIANTS}
    trained = [
        {k: x[k] for k in ("step", "held_out_loss", "held_out_accuracy")}
        for x in common.lines_of(options.runs / "base")
        if "held_out_loss" in x
    ]
    runs = common.gather(
        HERE / "results.json",
        [(v, seed) for v in VARIANTS for seed in range(options.seeds)],
        lambda variant, seed: go(variant, seed, steps[variant], options),
        list(VARIANTS),
        options.jobs,
        {"base": trained},
    )
    print(f"{'variant':16} {'start':>8} {'accuracy':>9} {'error':>7} {'loss':>8} {'error':>7}")
    for variant in VARIANTS:
        mine = [r["curve"] for r in runs if r["variant"] == variant]
        start, _ = common.mean_and_error([c[0]["accuracy"] for c in mine])
        end, error = common.mean_and_error([c[-1]["accuracy"] for c in mine])
        loss, loss_error = common.mean_and_error([c[-1]["loss"] for c in mine])
        errors = [f"{common.error_text(e, '{:.4f}'):>7}" for e in (error, loss_error)]
        print(f"{variant:16} {start:8.4f} {end:9.4f} {errors[0]} {loss:8.4f} {errors[1]}")


if __name__ == "__main__":
    main()

"""The layout of "Llama 3 Meets MoE" and ours, by the same forecast.

    python benchmarks/paper_layout.py [--gpus 128] [--gpu H100] [--json]

The paper trains Llama 3 8B with 8 experts top-2 with TP 2, EP 8 folded over it, PP 4 in 8 virtual stages,
and ZeRO-1 over what is left (arXiv 2412.09952, section 4). What it measured on 128 GPUs cuts rows in two as
well (CP 2), which is left out here. upcycle has no pipeline. Here the paper's step is worked out by hand with
the constants and the collectives of `upcycle.forecast`: one row of 8192 tokens a GPU, no recomputation, even
routing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import forecast as true_size
import tiny  # type: ignore[import-not-found]
from upcycle.api.forecasting import foretell
from upcycle.blueprints.blueprint import Blueprint
from upcycle.forecast import time
from upcycle.forecast.outlook import Outlook
from upcycle.forecast.traffic import Collective
from upcycle.system import gpus
from upcycle.system.gpus import Gpu

TP, EP, PP, VP = 2, 8, 4, 8
LENGTH, BF16, F32 = 8192, 2, 4


def papers(built: Blueprint, ours: Outlook, world: int, gpu: Gpu) -> dict[str, float]:
    """Return the seconds of a step in the paper's layout, on as many tokens as `ours`."""
    config = built.dense.config
    hidden, layers = config["hidden_size"], config["num_hidden_layers"] // PP
    copies = world // (TP * PP)  # groups that see different rows
    micro_batches = world // copies  # one row a GPU
    total = sum(entry.lazy.size for entry in built.entries.values())
    experts = 8 * 3 * hidden * config["intermediate_size"] * config["num_hidden_layers"]
    of_experts, others = experts / (EP * PP), (total - experts) / (TP * PP)
    whole = LENGTH * hidden * BF16

    def seconds(kind: str, ranks: int, apart: int, size: float) -> float:
        call = Collective(kind=kind, what="", ranks=ranks, apart=apart, times=1, bytes=round(size))  # type: ignore[arg-type]
        return time.seconds(call, gpu) if ranks > 1 else 0.0

    arithmetic = time.flops(ours.setting, recomputed=False) / (gpu.peak_flops * time.ARITHMETIC)
    # Sequence parallelism gathers and scatters around attention, forward and backward.
    tensor = 2 * seconds("all_reduce", TP, 1, whole)
    routed = 4 * seconds("all_to_all", EP, 1, whole / TP * 2)
    handed = whole / TP / (time.LINK * gpu.network)  # from stage to stage, forward and backward
    gradients = sum(
        seconds("reduce_scatter", ranks, TP * PP, size * F32)
        + seconds("all_gather", ranks, TP * PP, size * BF16)
        for ranks, size in ((world // (EP * PP), of_experts), (copies, others))
    )
    return {
        "arithmetic": arithmetic,
        "bubble": arithmetic * (PP - 1) / (VP * micro_batches),
        "activations": micro_batches * layers * (tensor + routed),
        "stages": micro_batches * 2 * VP * handed,
        "parameters": gradients,
    }


def main() -> None:
    """Print both."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--gpus", type=int, default=128)
    ask.add_argument("--gpu", default="H100")
    ask.add_argument("--json", action="store_true")
    asked = ask.parse_args()
    gpu = gpus.find(asked.gpu)
    config = {**true_size.LLAMA, **true_size.SIZES["8B"]}
    moe = {"moe": {"num_experts": 8, "top_k": 2}}
    with tempfile.TemporaryDirectory() as folder:
        source = tiny.make_headers(Path(folder) / "dense", config)
        found = {
            f"ours, {'recomputed' if again else 'kept'}, {rows} row(s)": foretell(
                source,
                moe,
                world=asked.gpus,
                gpu=asked.gpu,
                ep=EP,
                context=LENGTH,
                rows=rows,
                recompute=again,
            )
            for again, rows in ((True, 1), (True, 2), (True, 4), (False, 1))
        }
        ours = found["ours, kept, 1 row(s)"]
        parts = papers(ours.setting.built, ours, asked.gpus, gpu)
    hidden = parts["arithmetic"] + parts["bubble"] + parts["activations"]
    out = {
        name: {
            "peak_gb": round(each.peak.total / 1e9, 1), "fits": each.fits,
            "mfu_overlapped": round(each.mfu(each.time.overlapped), 3),
            "mfu_in_turn": round(each.mfu(each.time.in_turn), 3),
        }
        for name, each in found.items()
    }  # fmt: skip
    out["the paper's"] = {
        **{name: round(seconds, 3) for name, seconds in parts.items()},
        "mfu_overlapped": round(ours.mfu(hidden), 3),
        "mfu_in_turn": round(ours.mfu(sum(parts.values())), 3),
    }
    print(json.dumps(out) if asked.json else "\n".join(f"{name}: {each}" for name, each in out.items()))


if __name__ == "__main__":
    main()

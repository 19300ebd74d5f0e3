"""The forecast of a training step against torch's own counts in a world of fake ranks, at true size.

    python benchmarks/forecast.py [--only 8B-64] [--out results.json]

The models are headers alone. Every layer of them is there, and every rank of the world but one is fake. torch
computes shapes and no values, counts what is alive with `MemTracker`, and dispatches every collective.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import simulated  # type: ignore[import-not-found]
import tiny  # type: ignore[import-not-found]
from upcycle.blueprints.making import blueprint
from upcycle.forecast import memory, traffic
from upcycle.forecast.setting import Recompute, Setting
from upcycle.recipe import Recipe
from upcycle.sharding.layout import Layout

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "num_key_value_heads": 8, "torch_dtype": "bfloat16", "rope_theta": 500000.0,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
SIZES = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step: a size of Llama 3, made into 8 experts top-2, on a layout."""

    size: str
    layout: Layout
    length: int
    recompute: Recompute = True


CASES = {
    "8B-64": Case(size="8B", layout=Layout(fsdp=64, ep=8), length=8192),
    "8B-128": Case(size="8B", layout=Layout(fsdp=128, ep=8), length=2048),
    "8B-512": Case(size="8B", layout=Layout(replicate=8, fsdp=64, ep=8), length=8192),
    "70B-1024": Case(size="70B", layout=Layout(replicate=4, fsdp=256, ep=8), length=8192),
    "8B-512-one-copy": Case(size="8B", layout=Layout(fsdp=512, ep=8), length=8192),
    "8B-64-kept": Case(size="8B", layout=Layout(fsdp=64, ep=8), length=2048, recompute=False),
    "8B-64-selective": Case(size="8B", layout=Layout(fsdp=64, ep=8), length=8192, recompute="selective"),
    "8B-64-no-ep": Case(size="8B", layout=Layout(fsdp=64), length=4096),
}


def main() -> None:
    """Run the cases and write what was foretold and what was counted."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--only", nargs="*", default=list(CASES), choices=CASES)
    ask.add_argument("--layers", type=int, help="layers, if not all")
    ask.add_argument("--out", type=Path)
    asked = ask.parse_args()
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cases": {},
    }
    for name in asked.only:
        found["cases"][name] = result = run(CASES[name], asked.layers)
        print(name, json.dumps({k: v for k, v in result.items() if k != "traffic"}), flush=True)
        if asked.out:
            asked.out.write_text(json.dumps(found, indent=1) + "\n")


def run(case: Case, layers: int | None) -> dict[str, Any]:
    """Return what was foretold and counted of one case. Bytes are those of the first rank."""
    config = {**LLAMA, **SIZES[case.size]}
    if layers:
        config["num_hidden_layers"] = layers
    with tempfile.TemporaryDirectory() as folder:
        built = blueprint(
            tiny.make_headers(Path(folder) / "dense", config), Recipe.of(moe={"num_experts": 8, "top_k": 2})
        )
        began = time.process_time()
        step = simulated.step(built, case.layout, rows=1, length=case.length, recompute=case.recompute)
        took = time.process_time() - began
        setting = Setting(
            built=built, layout=case.layout, lengths={"layers": case.length}, recompute=case.recompute
        )
        peak = memory.peak(setting)
        foretold = traffic.by_kind(traffic.collectives(setting))
    return {
        "parameters": sum(entry.lazy.size for entry in built.entries.values()),
        "layers": config["num_hidden_layers"],
        "layout": asdict(case.layout),
        "tokens_of_a_rank": case.length,
        "recompute": case.recompute,
        "peak_foretold": round(peak.total),
        "peak_counted": step.peak,
        "ratio": round(peak.total / step.peak, 4),
        "moment": peak.moment,
        "traffic_is_exact": foretold == step.traffic,
        "traffic": [
            {
                "kind": kind, "ranks": ranks, "calls": calls, "bytes": size,
                "calls_foretold": foretold.get((kind, ranks), (0, 0))[0],
                "bytes_foretold": foretold.get((kind, ranks), (0, 0))[1],
            }
            for (kind, ranks), (calls, size) in step.traffic.items()
        ],
        "cpu_seconds": round(took, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()

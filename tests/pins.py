"""What must stay as it is: blueprint hashes, bytes of conversions and losses of seeded runs.

The models are made up, with numbers of numpy's Philox, so nothing here depends on how torch or transformers
draw. `pins.json` has the values. `python tests/pins.py` writes it anew; only a change that is meant to change
them may do so.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tiny import DECODERS, OTHERS, RECENT, SPECIAL, config_of, make_statistics
from upcycle import families
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.conversion.write import convert
from upcycle.recipe import Recipe

FILE = Path(__file__).parent / "pins.json"
Table = dict[str, Any]

_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
_ARCHITECTURES: dict[str, tuple[str, Table]] = {
    "vit": ("ViTForImageClassification", {**_VISION, "image_size": 12, "patch_size": 4}),
    "deit": ("DeiTForImageClassification", {**_VISION, "image_size": 12, "patch_size": 4}),
    "dinov2": (
        "Dinov2ForImageClassification",
        {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2,
         "image_size": 12, "patch_size": 4},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 12, 16, 24], "depths": [2, 1, 2, 1], "image_size": 12, "patch_size": 1},
    ),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [8, 12, 16, 24], "depths": [2, 1, 2, 1], "image_size": 12, "patch_size": 1},
    ),
    "bert": ("BertForMaskedLM", {**_VISION, "vocab_size": 60, "max_position_embeddings": 40}),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_ff": 24, "num_layers": 4, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 8,
         "vocab_size": 60, "decoder_start_token_id": 0},
    ),
    "mt5": (
        "MT5ForConditionalGeneration",
        {"d_model": 16, "d_ff": 24, "num_layers": 4, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 8,
         "vocab_size": 60, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
    ),
}  # fmt: skip

_MOE = {"num_experts": 4, "top_k": 2}
_UP = {**_MOE, "target": "upcycled"}
_CHOICE = {"name": "expert_choice"}
_SPHERE = {"name": "spherical"}

# Name: the source, and the recipe.
CONVERSIONS: dict[str, tuple[str, Table]] = {
    **{f"{name}: copy": (name, {"moe": _MOE}) for name in DECODERS},
    **{f"{name}: upcycled": (name, {"moe": _UP}) for name in [*DECODERS, *OTHERS] if name not in RECENT},
    **{
        f"{name}: every other": (name, {"moe": {**_UP, "layers": "every_other"}, "router": _CHOICE})
        for name in ("vit", "deit", "dinov2", "bert")
    },
    **{
        f"{name}: last half": (name, {"moe": {**_UP, "layers": "last_half"}, "init": {"name": "noise"}})
        for name in ("convnext", "vit", "bert")
    },
    "convnextv2: stages": ("convnextv2", {"moe": {**_UP, "layers": "last_half"},
                                          "stage_4": {"moe": {"num_experts": 2}}}),
    "t5: both stacks": ("t5", {"moe": _UP, "router": _CHOICE, "decoder": {"router": {"name": "top_k"}}}),
    "mt5: both stacks": ("mt5", {"moe": _UP, "router": _CHOICE, "decoder": {"router": {"name": "top_k"}}}),
    "vit: spherical": ("vit", {"moe": {**_UP, "layers": "last_half", "universal_experts": 4,
                                       "universal_width": 6}, "router": _SPHERE, "init": {"name": "random"}}),
    "vit: soft": ("vit", {"moe": _UP, "router": {"name": "soft"}}),
    "vit: mean": ("vit", {"moe": {**_UP, "pooling": "mean"}, "router": _CHOICE}),
    "llama: sigmoid": ("llama", {"moe": _UP, "router": {"name": "sigmoid"}}),
    "llama: bfloat16": ("llama", {"moe": _MOE, "dtype": "bfloat16"}),
    "llama: seed": ("llama", {"moe": _MOE, "seed": 7, "init": {"name": "noise"}}),
    "llama: drop": ("llama", {"moe": _MOE, "init": {"name": "drop", "ratio": 0.5}}),
    "llama: drop, independent": ("llama", {"moe": _MOE, "init": {"name": "drop", "indices": "independent"}}),
    "llama: noise": ("llama", {"moe": _MOE, "init": {"name": "noise"}}),
    "llama: virtual_group": ("llama", {"moe": {"num_experts": 8, "granularity": 2, "target": "granitemoe"},
                                       "init": {"name": "virtual_group"}}),
    "qwen3: virtual_group": ("qwen3", {"moe": {**_MOE, "num_experts": 8, "granularity": 2, "top_k": 2},
                                       "init": {"name": "virtual_group"}}),
    "qwen2: shuffle_slice": ("qwen2", {"moe": {**_MOE, "num_experts": 8, "granularity": 2},
                                       "init": {"name": "shuffle_slice"}}),
    "llama: split": ("llama", {"moe": {**_MOE, "granularity": 4}, "init": {"name": "split"}}),
    "llama: random": ("llama", {"moe": {**_UP, "expert_width": 16}, "init": {"name": "random"}}),
    "llama: uniform": ("llama", {"moe": {**_UP, "expert_width": 16}, "init": {"name": "uniform"}}),
    "llama: importance": ("llama", {"moe": {**_UP, "expert_width": 16}, "init": {"name": "importance",
                                                                               "statistics": "STATISTICS"}}),
    "llama: co_activation": ("llama", {"moe": {**_UP, "expert_width": 24}, "init": {
        "name": "co_activation", "statistics": "STATISTICS", "partition": "spectral"}}),
    "vit: successor": ("vit", {"moe": {**_UP, "expert_width": 8}, "init": {"name": "random"},
                               "router": _SPHERE, "successor": {"hidden_size": 8}}),
    "vit: narrower": ("vit", {"moe": {"target": "dense"}, "init": {"name": "uniform"},
                              "successor": {"hidden_size": 8}}),
    "vit: deeper": ("vit", {"moe": {"target": "depth_tiled", "depth": 2}}),
    "t5: deeper": ("t5", {"moe": {"target": "depth_tiled", "depth": 3}}),
    "qwen2: shared expert": ("qwen2", {"moe": {**_MOE, "shared_experts": 1}}),
    "llama: branch-train-mix": ("llama", {"moe": _MOE, "init": {"name": "branch_train_mix",
                                                               "sources": ["DONOR"]}}),
}  # fmt: skip


def source(folder: Path, model_type: str, salt: str = "") -> Path:
    """A dense checkpoint whose numbers depend on the names of its tensors alone."""
    if folder.exists():
        return folder
    if model_type in _ARCHITECTURES:
        architecture, config = _ARCHITECTURES[model_type]
    else:
        made = config_of(model_type).to_dict()
        known = families.find(model_type).defaults
        config = {
            k: v for k, v in made.items() if k in known or k in _SIZED or k in SPECIAL.get(model_type, {})
        }
        architecture = _CAUSAL.get(model_type, "")
    config = {
        **config,
        "model_type": model_type,
        **({"architectures": [architecture]} if architecture else {}),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    family = families.find(model_type)
    tensors = {
        name: _numbers(name + salt, shape) for name, shape in family.shapes(family.config(config)).items()
    }
    from safetensors.numpy import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


_SIZED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_parameters", "hidden_act", "hidden_activation",
)  # fmt: skip
_CAUSAL = {"gemma3_text": "Gemma3ForCausalLM", "qwen3_5_text": "Qwen3_5ForCausalLM"}


def _numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    raw = np.random.Generator(np.random.Philox(key=key)).integers(-1000, 1001, shape)
    scale = (math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3) / 577.0
    middle = float("norm" in name.lower() and name.endswith("weight"))
    return (middle + raw * scale).astype(np.float32)


def converted(name: str, home: Path) -> dict[str, str]:
    """The blueprint hash of a conversion, and a hash of its tensors and config."""
    model_type, table = CONVERSIONS[name]
    dense = source(home / model_type, model_type)
    text = json.dumps(table)
    if "STATISTICS" in text:
        file = home / f"{model_type}.statistics"
        if not file.exists():
            make_statistics(file, dense)
        text = text.replace("STATISTICS", str(file))
    if "DONOR" in text:
        text = text.replace("DONOR", str(source(home / f"{model_type}-donor", model_type, "donor")))
    out = home / "out" / name.replace(" ", "_").replace(":", "")
    built = convert(dense, out, Recipe.of(json.loads(text)))
    with Checkpoint.open(out) as folder:
        digest = hashlib.sha256()
        for tensor in sorted(folder.tensors):
            info = folder.tensors[tensor]
            digest.update(json.dumps([tensor, info.dtype, list(info.shape)]).encode())
            digest.update(folder.pread(info, 0, info.nbytes).tobytes())
        config = hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode()).hexdigest()
    return {"blueprint": built.hash, "tensors": digest.hexdigest(), "config": config}


def _runs() -> Iterator[tuple[str, str, Table]]:
    text = {"train": {"steps": 4, "batch_tokens": 64, "sequence_length": 16, "precision": "float32",
                      "eval_every": 2, "eval_tokens": 64},
            "schedule": {"name": "constant", "peak": 1e-2, "warmup": 2}, "seed": 3}  # fmt: skip
    yield "llama: dense", "llama", text
    yield "llama: native", "llama", {**text, "moe": _MOE, "router": {"jitter": 0.1, "z_loss_coef": 0.01}}
    yield (
        "llama: pooled, noise",
        "llama",
        {**text, "moe": _MOE, "router": {"balance_loss": "pooled"}, "init": {"name": "noise"}},
    )
    yield "llama: from scratch", "llama", {**text, "moe": _MOE, "from_scratch": True}
    yield (
        "llama: upcycled",
        "llama",
        {**text, "moe": _UP, "router": {"name": "top_k", "capacity_factor": 1.0}},
    )
    yield (
        "llama: sigmoid",
        "llama",
        {**text, "moe": _UP, "router": {"name": "sigmoid", "bias_update_rate": 0.01}},
    )
    yield (
        "llama: accumulated",
        "llama",
        {
            **text,
            "moe": _MOE,
            "train": {**text["train"], "micro_batch": 1},
            "router": {"balance_counts": "exact"},
        },
    )
    yield (
        "qwen3: drop",
        "qwen3",
        {**text, "moe": _MOE, "init": {"name": "drop"}, "schedule": {"name": "cosine", "peak": 1e-2}},
    )
    # An expert that wants two tokens equally takes either one by rounding: a run in which none does.
    calm = {"schedule": {**text["schedule"], "peak": 1e-3}, "seed": 5}
    yield "bert: expert choice", "bert", {**text, **calm, "moe": _UP, "router": _CHOICE}
    yield (
        "t5: expert choice",
        "t5",
        {**text, "moe": _UP, "router": _CHOICE, "decoder": {"router": {"name": "top_k"}}},
    )


RUNS = {name: (model_type, table) for name, model_type, table in _runs()}


def trained(name: str, home: Path) -> list[float]:
    """The losses of a seeded run, held-out ones before the first step first."""
    from tiny import make_bytes_tokenizer
    from upcycle.training.loop import train
    from upcycle.training.run import Run

    model_type, table = RUNS[name]
    folder = home / f"{model_type}-trained"
    if not folder.exists():
        _with_vocabulary(folder, model_type)
        marks = {"bert": ("[MASK]",), "t5": tuple(f"<extra_id_{i}>" for i in range(8))}.get(model_type, ())
        make_bytes_tokenizer(folder, *marks)
        if model_type == "bert":
            config = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps(config | {"mask_token": "[MASK]"}))
    text = home / "text.txt"
    text.write_text(
        "".join(f"The {i * i % 97}th word of {i} is {chr(97 + i % 26) * (i % 5 + 1)}. " for i in range(400))
    )
    out = home / "runs" / name.replace(" ", "_").replace(":", "")
    data = {"sources": [{"path": str(text)}], "held_out": 0.1, "append_eos": False}
    train(Run.of({"source": str(folder), "out": str(out), "data": data, **table}))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [lines[0]["held_out_start"], *(x["loss"] for x in lines), lines[-1]["held_out_loss"]]


def _with_vocabulary(folder: Path, model_type: str) -> None:
    """The made-up model with an embedding for bytes."""
    if model_type in _ARCHITECTURES:
        architecture, config = _ARCHITECTURES[model_type]
        _ARCHITECTURES[model_type] = (architecture, {**config, "vocab_size": 272})
        source(folder, model_type)
        _ARCHITECTURES[model_type] = (architecture, config)
        return
    from tiny import SMALL

    small = SMALL["vocab_size"]
    SMALL["vocab_size"] = 272
    source(folder, model_type)
    SMALL["vocab_size"] = small


def main() -> None:
    """Write `pins.json` anew."""
    import tempfile

    with tempfile.TemporaryDirectory() as home:
        pins = {
            "conversions": {name: converted(name, Path(home)) for name in CONVERSIONS},
            "runs": {name: trained(name, Path(home)) for name in RUNS},
        }
    FILE.write_text(json.dumps(pins, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Folders and names that are mistaken for a checkpoint: what they really are, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from upcycle.errors import listed

_DCP = "is a distributed checkpoint of torch; write it as a model first (upcycle export, if upcycle made it)"
_KINDS = {
    "run.json": "is the folder of a training run; write its checkpoint as a model first: upcycle export RUN "
    "OUT",
    "adapter_config.json": "is an adapter (LoRA) without the model it belongs to; merge the two first, with "
    "merge_and_unload of peft, and save the result, or name it as `adapter` of an [[init.expert]]",
    ".metadata": _DCP,
    "*.distcp": _DCP,
    "*.gguf": "holds a GGUF file, which is for llama.cpp; give the safetensors checkpoint that it came from",
    "consolidated*.safetensors": "holds consolidated.safetensors, the names of its maker's code; give the "
    "same model in Hugging Face form",
    "*.safetensors": "holds files of weights and no model.safetensors or model.safetensors.index.json; "
    "download the index, too, or give the one file that name",
}

# The prefixes that training programs put before every name, and how to get the model without them.
_WRAPPERS = {
    "module.": "save model.module",
    "_orig_mod.": "save model._orig_mod",
    "module._orig_mod.": "save model.module._orig_mod",
    "_orig_mod.module.": "save model._orig_mod.module",
    "_fsdp_wrapped_module.": "save the full state dict of the model inside",
    "base_model.model.": "merge the adapter first, with merge_and_unload of peft",
}


def folder(path: Path) -> str | None:
    """Say what a folder without a model is, if that can be told."""
    return next((said for pattern, said in _KINDS.items() if any(path.glob(pattern))), None)


def names(stored: Iterable[str]) -> str | None:
    """Say which prefix a program put before all tensor names, and what to do about it."""
    all_ = list(stored)
    for prefix in sorted(_WRAPPERS, key=len, reverse=True):
        if all_ and all(name.startswith(prefix) for name in all_):
            return (
                f"its tensors are called {prefix}..., as {listed(sorted(all_), 1)}: a training program "
                f"wrapped the model; {_WRAPPERS[prefix]}, and not what is around it"
            )
    return None


def empty(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Say what a checkpoint is whose tensors have no elements, as ZeRO-3 leaves them."""
    hollow = [name for name, shape in shapes.items() if 0 in shape]
    if not hollow:
        return None
    return (
        f"{listed(hollow)} hold nothing (shape [0]): the model was saved under DeepSpeed ZeRO-3 without its "
        f"shards; run zero_to_fp32.py on that training's checkpoint, and save what it gives"
    )


_HEADS = {
    "v_head.": "a value head, which trl puts beside a model; save its pretrained_model without it",
    "score.": "the head of a reward model or classifier; save the model of the language without it",
    "lora_": "matrices of an adapter (LoRA); merge it first, with merge_and_unload of peft",
    "vision_tower.": "a vision tower; the language model alone is taken by the type of this config",
}


def beside(around: Iterable[str]) -> str | None:
    """Say what a training program put beside a multimodal model, none of which has a value head."""
    return heads(name for name in around if name.startswith("v_head."))


def heads(surplus: Iterable[str]) -> str | None:
    """Say what tensors are that a model of this type does not have, if their names tell."""
    names_ = sorted(surplus)
    for part, said in _HEADS.items():
        if found := [name for name in names_ if name.startswith(part) or f".{part}" in name]:
            return f"{listed(found)} belong to {said}"
    return None

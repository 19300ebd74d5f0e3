"""A model out of a folder, with every tensor in its place. Whatever opens one for a person opens it here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from upcycle import families, targets
from upcycle.checkpoints.checkpoint import CONFIG, Checkpoint, read_json
from upcycle.errors import UpcycleError, listed, shown
from upcycle.families._checked import MOST_BLOCKS
from upcycle.hf.parts import ALL_EXPERTS_FUNCTIONS
from upcycle.nn import kernels

_MATRICES = ("gate_up_proj", "up_proj", "down_proj")  # of all experts of a layer, as transformers holds them
_EXPERT = re.compile(r"(.*\.experts\.)(\d{1,6})(\..*)")


def read_config(folder: str | Path) -> PreTrainedConfig:
    """The config of the model in `folder`. Raises `UpcycleError` where transformers cannot read it."""
    refuse_depth(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UpcycleError:
        raise
    except Exception as error:  # whatever transformers dislikes about a file, it is what there is to say
        raise UpcycleError(f"{folder}: its config.json cannot be used ({_first_line(error)})") from error


def refuse_depth(folder: str | Path) -> None:
    """Refuse a config.json of more blocks than any model has: transformers would make each of them, and a
    list of them before."""
    if not (Path(folder) / CONFIG).is_file():
        return
    config = read_json(Path(folder) / CONFIG, f"{folder} has no {CONFIG}")
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer"):
        if type(config.get(key)) in (int, float) and config[key] > MOST_BLOCKS:
            raise UpcycleError(
                f"{folder}: {key} = {shown(config[key])} in its {CONFIG}; a model has {MOST_BLOCKS:,} blocks "
                f"at most"
            )


def fill(cls: type[PreTrainedModel], folder: str | Path, **options: Any) -> PreTrainedModel:
    """The model of class `cls` in `folder` (or a hub id), every parameter of it read from there.

    Raises `UpcycleError`, with names, where a tensor is missing, misshapen, or has no place in the model,
    but for those that transformers ignores by its own rules and those that the family knows to be needless.
    `options` go to `from_pretrained`. Experts run as their rows allow, unless `experts_implementation` says.
    """
    wanted = options.get("experts_implementation")
    refuse_unknown(wanted)
    refuse_depth(folder)
    ours = {"trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = cls.from_pretrained(folder, **options, **ours)
    except (UpcycleError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a damaged folder anything can be raised
        if said := _uneven(folder):
            raise UpcycleError(f"{folder}: {said}") from error
        raise UpcycleError(f"{folder} cannot be opened as a {cls.__name__}: {_first_line(error)}") from error
    if faults := _faults(model, report):
        uneven = _uneven(folder)
        raise UpcycleError(
            f"{folder} is no whole {cls.__name__}: {'; '.join([*([uneven] if uneven else []), *faults])}. "
            f"Nothing is made up or dropped in silence: give the checkpoint with the tensors that its config "
            f"calls for"
        )
    choose_experts(model, wanted)
    opened: PreTrainedModel = model
    return opened


def refuse_unknown(implementation: str | None) -> None:
    """Refuse a name of an experts implementation that transformers does not have."""
    known = [kernels.ONE_BY_ONE, *sorted(ALL_EXPERTS_FUNCTIONS.keys())]
    if implementation is not None and implementation not in known:
        raise UpcycleError(f"experts_implementation = {implementation!r}; allowed: {', '.join(known)}")


def choose_experts(model: PreTrainedModel, wanted: str | None) -> None:
    """Let the experts of `model` run one after another where grouped products do not take their rows."""
    if wanted not in (None, kernels.GROUPED) or model.config._experts_implementation != kernels.GROUPED:
        return
    odd = [t for t in expert_matrices(model) if not kernels.take_groups(t.shape[-1:], t.element_size())]
    if not odd:
        return
    if wanted is not None:
        raise UpcycleError(
            f"experts_implementation = {wanted!r} wants rows of a multiple of {kernels.ROW} bytes, and "
            f"experts have rows of {odd[0].shape[-1]} numbers of {odd[0].element_size()} bytes; take "
            f"{kernels.ONE_BY_ONE!r}"
        )
    model.set_experts_implementation(kernels.ONE_BY_ONE)


def expert_matrices(model: nn.Module) -> list[torch.Tensor]:
    """The matrices of all experts, [E, rows, columns] each; of a model shared out, this rank's part."""
    return [
        parameter.to_local() if hasattr(parameter, "to_local") else parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.rpartition(".")[2] in _MATRICES
    ]


# --- what is wrong with what was found


def _faults(model: PreTrainedModel, report: Mapping[str, Any]) -> list[str]:
    """What the loading report has against a folder, a part of a sentence each."""
    family, config = _family(model)
    spared = set() if family is None else set(family.optional(config))
    missing = sorted(name for name in report["missing_keys"] if name not in spared)
    extra = sorted(
        name for name in report["unexpected_keys"] if family is None or family.ignored(name) is None
    )
    shapes = sorted(
        f"{name} ({_shape(found)} in place of {_shape(due)})"
        for name, found, due in report["mismatched_keys"]
    )
    out = []
    if missing:
        head = [name for name in missing if not name.startswith(model.base_model_prefix + ".")]
        alone = head == missing and model.base_model is not model
        what = " (the head of the model: what is there is a model without one)" if alone else ""
        out.append(f"it lacks {listed(missing)}{what}")
    if shapes:
        out.append(f"it has other shapes of {listed(shapes)}")
    if extra:
        out.append(f"it holds {listed(extra)}, which such a model does not have")
    return out + [str(said) for said in report.get("error_msgs") or ()]


def _family(model: PreTrainedModel) -> tuple[families.Family | None, dict[str, Any]]:
    """The dense family of a model, where it has one, with its config in full."""
    raw = model.config.to_dict()
    target = targets.opened(raw)
    dense = (target.dense_config(raw) if target else None) or raw
    if (dense_type := str(dense.get("model_type"))) not in families.names():
        return None, {}
    family = families.find(dense_type)
    try:
        return family, dict(family.config(dense))
    except UpcycleError:  # a model that transformers opens and no conversion takes
        return None, {}


def _shape(sizes: Iterable[int]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _uneven(folder: str | Path) -> str:
    """Which experts of a layer lack a tensor that others have, or have it in another shape; empty: none.

    transformers stacks the experts of a layer, and names the stack where one does not fit.
    """
    try:
        with Checkpoint.open(Path(folder), allow_nonfinite=True) as opened:
            shapes = {name: info.shape for name, info in opened.tensors.items()}
    except (UpcycleError, OSError):
        return ""
    layers: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}  # by place, then expert, then tensor
    for name, shape in shapes.items():
        if found := _EXPERT.fullmatch(name):
            layers.setdefault(found[1], {}).setdefault(found[2], {})[found[3]] = shape
    lacking: list[str] = []
    odd: list[str] = []
    for place, experts in layers.items():
        numbers = range(max(map(int, experts)) + 1)
        for tensor in sorted({name for expert in experts.values() for name in expert}):
            there = [expert[tensor] for expert in experts.values() if tensor in expert]
            usual = max(there, key=there.count)
            for number in numbers:
                found_shape = experts.get(str(number), {}).get(tensor)
                if found_shape is None:
                    lacking.append(f"{place}{number}{tensor}")
                elif found_shape != usual:
                    odd.append(f"{place}{number}{tensor} ({_shape(found_shape)} in place of {_shape(usual)})")
    parts = [f"it lacks {listed(lacking)}"] if lacking else []
    return "; ".join(parts + ([f"it has other shapes of {listed(odd)}"] if odd else []))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)

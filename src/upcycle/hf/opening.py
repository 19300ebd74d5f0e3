"""Opens a model from a folder and checks every tensor. All models opened for a user are opened here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from upcycle import families, targets
from upcycle.checkpoints.checkpoint import CONFIG, Checkpoint, read_json
from upcycle.dense.leaving_out import dropped_twins, drops_head
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, listed, shown
from upcycle.families._checked import MOST_BLOCKS
from upcycle.hf import implementations
from upcycle.hf.parts import ALL_EXPERTS_FUNCTIONS
from upcycle.nn import expert_by_expert, grouped, kernels
from upcycle.nn.upcycled_config import CLASS_PREFIX

ALL_EXPERTS_FUNCTIONS.register(kernels.EXPERT_BY_EXPERT, expert_by_expert.run)
ALL_EXPERTS_FUNCTIONS.register(kernels.FOLLOWING, grouped.run)
_MATRICES = ("gate_up_proj", "up_proj", "down_proj")  # stacked over all experts of a layer
_EXPERT = re.compile(r"(.*\.experts\.)(\d{1,6})(\..*)")


def read_config(folder: str | Path) -> PreTrainedConfig:
    """Read the config of the model in `folder`. Raises `UpcycleError` if transformers cannot read it."""
    refuse_depth(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UpcycleError:
        raise
    except Exception as error:  # transformers can raise anything here; its message is passed on
        raise UpcycleError(f"{folder}: its config.json cannot be used ({_first_line(error)})") from error


def refuse_depth(folder: str | Path) -> None:
    """Refuse a config.json with more blocks than any model has; transformers would build all of them."""
    if not (Path(folder) / CONFIG).is_file():
        return
    config = read_json(Path(folder) / CONFIG, f"{folder} has no {CONFIG}")
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer"):
        if type(config.get(key)) in (int, float) and config[key] > MOST_BLOCKS:
            raise UpcycleError(
                f"{folder}: {key} = {shown(config[key])} in its {CONFIG}; a model has {MOST_BLOCKS:,} blocks "
                f"at most"
            )


def fill(
    cls: type[PreTrainedModel], folder: str | Path, *, left_out: Collection[str] = (), **options: Any
) -> PreTrainedModel:
    """Open the model of class `cls` in `folder` (or a hub id) and read every parameter from there.

    Raises `UpcycleError`, with names, if a tensor is missing, has the wrong shape or has no place in the
    model. Tensors that transformers ignores by its own rules, that the family knows to be optional, and those
    in `left_out` are exempt. `options` go to `from_pretrained`. Unless `experts_implementation` is given, the
    row lengths decide it.
    """
    wanted = options.get("experts_implementation")
    refuse_unknown(wanted)
    refuse_depth(folder)
    ours = {"trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if "config" not in options:
        options |= _other_config(cls, folder)
    try:
        model, report = cls.from_pretrained(folder, **options, **ours)
    except (UpcycleError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged folder can raise anything
        if said := _uneven(folder):
            raise UpcycleError(f"{folder}: {said}") from error
        raise UpcycleError(f"{folder} cannot be opened as a {cls.__name__}: {_first_line(error)}") from error
    if faults := _faults(model, report, left_out):
        uneven = _uneven(folder)
        raise UpcycleError(
            f"{folder} is no whole {cls.__name__}: {'; '.join([*([uneven] if uneven else []), *faults])}. "
            f"Nothing is made up or dropped in silence: give the checkpoint with the tensors that its config "
            f"calls for"
        )
    choose_experts(model, wanted)
    opened: PreTrainedModel = model
    return opened


def _other_config(cls: type[PreTrainedModel], folder: str | Path) -> dict[str, Any]:
    """Return the config to open a folder with, as an option, if that of the folder asks for foreign code."""
    path = Path(folder) / CONFIG
    if not path.is_file() or not any(
        key in path.read_text("utf-8", "replace") for key in implementations.OWN
    ):
        return {}
    config = read_config(folder)
    kind = getattr(cls, "config_class", None)  # none: an Auto class
    if kind is not None and kind is not type(config):
        config = kind.from_pretrained(folder)
    return {"config": config} if implementations.refrain(config, str(path)) else {}


def tie_dropped(model: PreTrainedModel, dense: Dense) -> None:
    """Put in the place of dropped tensors, which transformers has read, what the class ties them to."""
    if drops_head(dense) and (head := model.get_output_embeddings()) is not None:
        head.weight = model.get_input_embeddings().weight
    for twin, other in dropped_twins(dense).items():
        module, _, leaf = twin.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(other))


def refuse_unknown(implementation: str | None) -> None:
    """Raise `UpcycleError` for an experts implementation that transformers does not have."""
    known = [kernels.ONE_BY_ONE, *sorted(ALL_EXPERTS_FUNCTIONS.keys())]
    if implementation is not None and implementation not in known:
        raise UpcycleError(f"experts_implementation = {implementation!r}; allowed: {', '.join(known)}")


def choose_experts(model: PreTrainedModel, wanted: str | None) -> None:
    """Run the experts of `model` one after another if grouped products do not accept their rows.

    Raises `UpcycleError` if grouped products were asked for.
    """
    if wanted not in (None, *kernels.IN_GROUPS):
        return
    if model.config._experts_implementation not in kernels.IN_GROUPS:
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
    """Return the matrices of all experts, [E, rows, columns] each; of a sharded model, this rank's part."""
    return [
        parameter.to_local() if hasattr(parameter, "to_local") else parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.rpartition(".")[2] in _MATRICES
    ]


# --- faults of a loaded folder


def _faults(model: PreTrainedModel, report: Mapping[str, Any], left_out: Collection[str]) -> list[str]:
    """Return the faults in the loading report, each as part of a sentence."""
    family, config = _family(model)
    spared = set() if family is None else {*family.optional(config), *family.may_lack(config)}
    missing = sorted(name for name in report["missing_keys"] if name not in spared)
    extra = sorted(
        name
        for name in report["unexpected_keys"]
        if name not in left_out and (family is None or family.ignored(name) is None)
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
    """Return the dense family of a model and its full config; None and {} if there is no family.

    The class that is open counts, where config.json names another one that has the same body.
    """
    raw = model.config.to_dict()
    target = targets.opened(raw)
    dense = (target.dense_config(raw) if target else None) or raw
    if (dense_type := str(dense.get("model_type"))) not in families.names():
        return None, {}
    family = families.find(dense_type)
    open_now = type(model).__name__.removeprefix(CLASS_PREFIX)
    if open_now in family.architectures:
        dense = {**dense, "architectures": [open_now]}
    try:
        return family, dict(family.config(dense))
    except UpcycleError:  # transformers can open this model, but upcycle cannot convert it
        return None, {}


def _shape(sizes: Iterable[int]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _uneven(folder: str | Path) -> str:
    """Describe the experts of a layer that lack a tensor or have one of another shape; empty if none do.

    transformers stacks the experts of a layer, and its own error names only the stack.
    """
    try:
        with Checkpoint.open(Path(folder), allow_nonfinite=True) as opened:
            shapes = {name: info.shape for name, info in opened.tensors.items()}
    except (UpcycleError, OSError):
        return ""
    layers: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}  # by layer, then expert, then tensor
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

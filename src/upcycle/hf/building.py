"""Builds a model of transformers without memory, and finishes it when its parameters have been filled."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.monkey_patching import patch_output_recorders
from transformers.utils.loading_report import LoadStateDictInfo

from upcycle.errors import UpcycleError, cut, listed
from upcycle.hf import implementations
from upcycle.hf.body import Body
from upcycle.hf.quiet import quiet
from upcycle.tensors.entries import Entry
from upcycle.tensors.moved import Concat, Slice


def on_meta(
    cls: type[PreTrainedModel],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    experts_implementation: str | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Return a model of class `cls` on the meta device, with the dtypes that `from_pretrained` gives it.

    Parameters that the class ties are still two (`tie`), because transformers' plans name both. Raises
    `UpcycleError` if attention cannot run in the way that is asked for.
    """
    made: PreTrainedConfig = cls.config_class.from_dict(
        cls.config_class._decode_special_floats({k: v for k, v in config.items() if k != "torch_dtype"})
    )
    for each in (made, *(getattr(made, name) for name in made.sub_configs)):
        if each is not None:
            each.dtype = dtype
    if experts_implementation is not None:
        # A multimodal class knows no such setting, and the text model within it does.
        of_experts = made if cls._can_set_experts_implementation() else made.get_text_config()
        of_experts._experts_implementation = experts_implementation
    implementations.refrain(made, "config.json")
    if attn_implementation is not None:
        made._attn_implementation = attn_implementation
    with ExitStack() as contexts:
        contexts.enter_context(quiet())
        for context in cls.get_init_context(dtype, False, False, None):
            contexts.enter_context(context)
        model = _made(cls, made, attn_implementation)
        patch_output_recorders(model)
    _widen(model, dtype)
    model.name_or_path = model.config.name_or_path = ""
    model._weight_conversions = None  # else save_pretrained would write the in-memory names
    return model


def _made(
    cls: type[PreTrainedModel], config: PreTrainedConfig, attn_implementation: str | None
) -> PreTrainedModel:
    try:
        return cls(config)
    except (ImportError, ValueError) as error:
        if attn_implementation is None:
            raise
        reason = cut(str(error).splitlines()[0], 200)
        raise UpcycleError(
            f"train.attn_implementation = {attn_implementation} cannot be used with {cls.__name__} here "
            f"({reason}); take it out, or take another one"
        ) from None


def _widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters that a class keeps in a wider dtype that dtype."""
    tensors = model.state_dict(keep_vars=True)
    for name, wider in kept_wide(model, dtype).items():
        tensor = tensors[name]
        wide = tensor.to(wider)
        place(
            model,
            name,
            nn.Parameter(wide, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide,
        )


def kept_wide(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the tensors of the state dict that the class keeps in a wider dtype in a model of `dtype`."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return {}
    pattern, by_group, _ = build_glob_alternation(list(plan))
    found = ((name, pattern.search(name)) for name in model.state_dict())
    return {name: plan[by_group[match.lastgroup]] for name, match in found if match is not None}


def place(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a parameter or a buffer into the module that `name` names."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    kind = module._parameters if leaf in module._parameters else module._buffers
    kind[leaf] = tensor  # type: ignore[assignment]


def renamed(model: PreTrainedModel, names: Mapping[str, Any]) -> dict[str, str]:
    """Return the names in a model on the meta device by which it knows tensors, with their names on disk.

    Both are those of transformers' own loader. Its conversions of values are not needed, because a target
    gives its tensors as they are in memory. A tensor that has no place, or a parameter without a tensor, is a
    bug in upcycle and raises `AssertionError`, unless the class declares it to be optional. Around a text
    model, the source has the tensors, and what it lacks raises `UpcycleError`.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    known = model.state_dict()
    found: dict[str, str] = {}
    extra: set[str] = set()
    for name in sorted(names, key=dot_natural_key):
        for rename in (renamings, []):  # a name may be the model's own already
            new, _ = rename_source_key(name, rename, [], model.base_model_prefix, known)
            if new in known:
                found[new] = name
                break
        else:
            extra.add(name)
    sources = {name: model.all_tied_weights_keys.get(name, name) for name in known}
    there = {sources[name] for name in found}
    missing = {name for name in known if sources[name] not in there}
    report = LoadStateDictInfo(
        missing_keys=missing,
        unexpected_keys=extra,
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(report)
    lacking, left = sorted(report.missing_keys), sorted(report.unexpected_keys)
    if lacking and all(map(Body.of(model).is_around, lacking)):
        raise UpcycleError(
            f"the source is no whole {type(model).__name__}: around its text model it lacks "
            f"{listed(lacking)}, which its config.json calls for; give the checkpoint with them, or take the "
            f"text model out of it (moe.part_only = text)"
        )
    if lacking or left:
        raise AssertionError(
            f"{type(model).__name__} and its tensors do not agree: missing {lacking}, without a place {left}"
        )
    return found


def split(model: PreTrainedModel, tensors: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return `tensors` with those that the class splits when it opens a folder (Nomic BERT) in their parts.

    The rules are transformers' own.
    """
    out = dict(tensors)
    for name, parts, dim in _parted(model, tensors):
        entry = out.pop(name)
        size = entry.shape[dim] // len(parts)
        for i, part in enumerate(parts):
            out[part] = Entry(Slice(entry.lazy, dim, i * size, (i + 1) * size), entry.dtype)
    return out


def joined(model: PreTrainedModel, tensors: Mapping[str, Entry], names: Collection[str]) -> dict[str, Entry]:
    """Return `tensors` with their parts joined to those that have these `names`; the inverse of `split`."""
    out = dict(tensors)
    for name, parts, dim in _parted(model, names):
        entries = [out.pop(part) for part in parts]
        out[name] = Entry(Concat(tuple(entry.lazy for entry in entries), dim), entries[0].dtype)
    return out


def _parted(model: PreTrainedModel, names: Collection[str]) -> Iterator[tuple[str, list[str], int]]:
    """Yield each name of a tensor that the class splits, with the names of the parts and their axis."""
    for rule in get_model_conversion_mapping(model):
        if not isinstance(rule, WeightConverter):
            continue
        if len(rule.source_patterns) != 1 or [type(done) for done in rule.operations] != [Chunk]:
            continue  # what a target writes in memory's form is not affected by the others
        whole = rule.source_patterns[0]
        for name in names:
            if re.search(whole, name):
                parts = [re.sub(whole, part, name) for part in rule.target_patterns]
                yield name, parts, rule.operations[0].dim


def untie(model: PreTrainedModel, found: Collection[str]) -> None:
    """Keep apart from its source every parameter of `found` that the class ties although both are stored.

    `from_pretrained` does so too if their values differ: T5 1.1 has a head of its own in a class that ties.
    """
    ties = model.all_tied_weights_keys
    for target in [name for name, source in ties.items() if name in found and source in found]:
        del ties[target]


def tie(model: PreTrainedModel) -> None:
    """Make one parameter of those that the class ties, after every plan has been applied to each."""
    model.tie_weights(recompute_mapping=False)


def tied(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of every parameter that has several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    yield from (group for group in groups.values() if len(group) > 1)


def finish(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint has on `device`, and set the model to evaluation.

    Every other tensor must be filled and marked (`mark`).
    """
    for name, buffer in model.named_non_persistent_buffers():
        place(model, name, torch.empty_like(buffer, device=device))
    with quiet():
        model.initialize_weights()
    model.eval()
    model.set_use_kernels(False)


def mark(tensor: torch.Tensor) -> None:
    """Say that a tensor has its values, so that transformers does not draw others."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]

"""Configs of upcycled models: the config of a dense class of transformers, plus `moe`.

`moe` is a list with one entry per stack of blocks. This module does not import torch, so that `import
upcycle` and reading a config stay fast.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, AutoConfig

from upcycle import families
from upcycle.families._wrappers import WRAPPERS
from upcycle.nn import upcycled_config
from upcycle.nn.shape import Shape
from upcycle.nn.upcycled_config import CLASS_PREFIX, PREFIX

_first_read: list[Callable[[str], None]] = []


def when_first_read(do: Callable[[str], None]) -> None:
    """Register `do` to be called with the dense model_type whenever an upcycled config is made."""
    _first_read.append(do)


class UpcycledConfig:
    """The fields that every config of an upcycled model adds to its dense class."""

    moe: list[dict[str, Any]]
    model_type: str

    @property
    def shapes(self) -> list[Shape]:
        """The MoE layers of each stack."""
        return [Shape.of(entry) for entry in self.moe]

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """The plan by which transformers shards the experts under expert parallelism."""
        plan = {}
        for shape in self.shapes:
            up = "gate_up_proj" if shape.gated else "up_proj"
            names = [up, "down_proj", *([f"{up}_bias", "down_proj_bias"] if shape.bias else [])]
            for kind in ("experts", *(["universal"] if shape.universal_experts else [])):
                experts = f"{_any_number(shape.module.format(i=0))}.{kind}"
                plan[experts] = "ep_dispatch_experts"
                plan |= {f"{experts}.{name}": "grouped_gemm" for name in names}
        return plan

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """The plan by which FSDP gathers one block at a time."""
        raw = upcycled_config.dense_config(self.to_dict())  # type: ignore[attr-defined]
        family = families.find(self.model_type.removeprefix(PREFIX))
        known = [name for name in raw["architectures"] if name in family.architectures]  # for any head
        stacks = family.stacks(family.config({**raw, "architectures": known or None}))
        return {f"{_any_number(stack.blocks)}.*": "free_full_weight" for stack in stacks}


def _any_number(path: str) -> str:
    """Return the path of a module as transformers' plans have it, with a star for each number of a block."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


@functools.cache
def wrapper_class(model_type: str) -> type[PreTrainedConfig]:
    """Return the config class of a wrapper that otherwise builds one text model only, for an upcycled one.

    `model_type` is the wrapper's in transformers.
    """
    dense, text = CONFIG_MAPPING[model_type], PREFIX + WRAPPERS[model_type].text

    def init(self: Any, **kwargs: Any) -> None:
        dense.__init__(self, **kwargs)
        for do in _first_read:
            do(model_type)

    members = {
        "model_type": PREFIX + model_type,
        "sub_configs_defaults": {
            **dense.sub_configs_defaults,
            "text_config": SubConfigSpec(config_class=AutoConfig, model_type=text),
        },
        "__init__": init,
        "__module__": __name__,
    }
    made: type[PreTrainedConfig] = type(CLASS_PREFIX + dense.__name__, (dense,), members)
    return made


@functools.cache
def config_class(model_type: str) -> type[PreTrainedConfig]:
    """Return the config class of the upcycled `model_type` (a dense model type of transformers)."""
    if model_type in WRAPPERS:
        return wrapper_class(model_type)
    dense = CONFIG_MAPPING[model_type]

    def init(self: Any, moe: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        dense.__init__(self, **kwargs)
        self.moe = [] if moe is None else moe
        for do in _first_read:
            do(model_type)

    members = {
        "model_type": PREFIX + model_type,
        "__init__": init,
        "__module__": __name__,
    }
    made: type[PreTrainedConfig] = type(CLASS_PREFIX + dense.__name__, (UpcycledConfig, dense), members)
    return made


def upcycled_types() -> list[str]:
    """Return the dense model types of which there are upcycled ones, wrappers that need one included."""
    return [*families.names(), *(name for name, wrapper in WRAPPERS.items() if not wrapper.free)]


def __getattr__(name: str) -> Any:
    # Make classes on demand; pickling looks them up by name.
    for model_type in upcycled_types():
        if CLASS_PREFIX + CONFIG_MAPPING_NAMES.get(model_type, "?") == name:
            return config_class(model_type)
    raise AttributeError(name)

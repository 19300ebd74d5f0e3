"""Configs of upcycled models: those of the dense classes of transformers, and `moe`.

`moe` is a list with one entry a stack of blocks. No torch here: whoever imports `upcycle` and reads a config
must not wait for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from upcycle import families
from upcycle.nn import upcycled_config
from upcycle.nn.shape import Shape
from upcycle.nn.upcycled_config import CLASS_PREFIX, PREFIX

_first_read: list[Callable[[str], None]] = []


def when_first_read(do: Callable[[str], None]) -> None:
    """Call `do` with the dense model_type whenever a config of ours is made."""
    _first_read.append(do)


class UpcycledConfig:
    """What every config of an upcycled model has beside the fields of its dense class."""

    moe: list[dict[str, Any]]
    model_type: str

    @property
    def shapes(self) -> list[Shape]:
        """The MoE layers, stack by stack."""
        return [Shape.of(entry) for entry in self.moe]

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """How transformers shares experts out under expert parallelism."""
        plan = {}
        for shape in self.shapes:
            up = "gate_up_proj" if shape.gated else "up_proj"
            names = [up, "down_proj", *([f"{up}_bias", "down_proj_bias"] if shape.bias else [])]
            for kind in ("experts", *(["universal"] if shape.universal_experts else [])):
                experts = f"{shape.module.replace('{i}', '*')}.{kind}"
                plan[experts] = "ep_dispatch_experts"
                plan |= {f"{experts}.{name}": "grouped_gemm" for name in names}
        return plan

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """Blocks are gathered one at a time."""
        raw = upcycled_config.dense_config(self.to_dict())  # type: ignore[attr-defined]
        family = families.find(self.model_type.removeprefix(PREFIX))
        known = [name for name in raw["architectures"] if name in family.architectures]  # of any head
        stacks = family.stacks(family.config({**raw, "architectures": known or None}))
        return {f"{stack.blocks}.*": "free_full_weight" for stack in stacks}


@functools.cache
def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The config class of the upcycled `model_type` (a dense one of transformers)."""
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


def __getattr__(name: str) -> Any:
    # Classes are made when asked for; pickling asks by name.
    for model_type in families.names():
        if CLASS_PREFIX + CONFIG_MAPPING_NAMES.get(model_type, "?") == name:
            return config_class(model_type)
    raise AttributeError(name)

"""The dense classes of transformers with MoE layers added, registered with its Auto classes.

`config.json` of such a model has `model_type = "upcycled_X"` and a list `moe` with one entry per stack of
blocks (`nn.shape.Shape`). After `import upcycle`, `AutoModel*.from_pretrained` opens one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.initialization import guard_torch_init_functions

from upcycle.checkpoints import hub
from upcycle.errors import UpcycleError, cut
from upcycle.families._wrappers import WRAPPERS
from upcycle.hf import opening, passes
from upcycle.hf.autos import autos
from upcycle.hf.configs import config_class
from upcycle.nn.moe import MoE
from upcycle.nn.upcycled_config import CLASS_PREFIX, PREFIX

_DOWN_KEPT_WIDE = {"wo"}  # the names of last matrices of networks among what classes keep in float32 (T5)
_MATRICES = {"gate_proj", "up_proj", "down_proj"}  # of a network, and in a name of stacked experts


class UpcycledModel:
    """The methods that every upcycled model adds to its dense class."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def initialize_weights(self) -> None:
        """Draw what a checkpoint lacks, also of MoE layers, which the dense class does not know."""
        layers = [m for m in self.modules() if isinstance(m, MoE)]  # type: ignore[attr-defined]
        lacking = [layer for layer in layers if not getattr(layer, "_is_hf_initialized", False)]
        super().initialize_weights()  # type: ignore[misc]
        with guard_torch_init_functions():  # which leaves alone what was loaded
            for layer in lacking:
                layer.reset_parameters(getattr(self.config, "initializer_range", 0.02))  # type: ignore[attr-defined]

    def _prepare_decoder_input_ids_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Take a prompt as the dense class takes it, which transformers knows by its model_type (Whisper)."""
        config: Any = self.config  # type: ignore[attr-defined]
        config.model_type = config.model_type.removeprefix(PREFIX)
        try:
            prepare = super()._prepare_decoder_input_ids_for_generation  # type: ignore[misc]
            return prepare(*args, **kwargs)
        finally:
            del config.model_type  # that of the class is seen again

    def replace(self) -> None:
        """Replace modules with MoE layers as `config.moe` says."""
        base: nn.Module = self.base_model  # type: ignore[attr-defined]
        config: Any = self.config  # type: ignore[attr-defined]
        for shape in config.shapes:
            if shape.stack == "decoder" and not hasattr(base, "decoder"):
                continue  # only the encoder of an encoder-decoder model is here
            layers = []
            for i in shape.layers:
                parent, _, name = shape.module.format(i=i).rpartition(".")
                layer = MoE(config, shape)
                if not layer.experts.down_proj.is_meta:
                    layer.reset_parameters(getattr(config, "initializer_range", 0.02))
                setattr(base.get_submodule(parent), name, layer)
                layers.append(layer)
                for path in shape.replaced:
                    owner, _, name = path.format(i=i).rpartition(".")
                    setattr(base.get_submodule(owner), name, nn.Identity())
            # On the stack, not on the whole model: generation runs an encoder alone, and images have no mask.
            owner = base.get_submodule(shape.module.partition(".")[0])
            alone = shape.stack == "layers" and "input_ids" not in inspect.signature(owner.forward).parameters
            stack = base if alone or isinstance(owner, nn.ModuleList) else owner
            passes.install(stack, layers)
        if after := getattr(config, "mean_pooling_after", 0):
            base.register_forward_hook(functools.partial(_pool, after))


def _pool(after: int, base: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Replace the class token's state by the mean of the patches (global average pooling).

    Sparse Upcycling's vision models have no class token.
    """
    states = output[0]
    pooled = torch.cat([states[:, after:].mean(1, keepdim=True), states[:, 1:]], dim=1)
    if isinstance(output, tuple):  # return_dict = False
        return (pooled, *output[1:])
    output.last_hidden_state = pooled
    return output


@functools.cache
def model_class(dense: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class `dense` of transformers with MoE layers, or with an upcycled text model, in it."""
    config_of = config_class(dense.config_class.model_type)
    if dense.config_class.model_type in WRAPPERS:
        around = {"config_class": config_of, "__module__": __name__}
        return _renamed_as(dense, type(CLASS_PREFIX + dense.__name__, (dense,), around))

    def init(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        # The submodules of a dense class have no experts and would reject a choice of implementation.
        wanted, config._experts_implementation = config._experts_implementation, "eager"
        dense.__init__(self, config, *args, **{**getattr(config, "class_options", {}), **kwargs})
        self.config._experts_implementation = self.get_correct_experts_implementation(wanted)
        self.replace()

    members = {
        "__init__": init,
        "__module__": __name__,
        "config_class": config_of,
        "base_model_prefix": dense.base_model_prefix,
        "_keep_in_fp32_modules": _kept_wide(dense._keep_in_fp32_modules),
    }
    return _renamed_as(dense, type(CLASS_PREFIX + dense.__name__, (UpcycledModel, dense), members))


def _kept_wide(kept: Collection[str] | None) -> list[str] | None:
    """Return the parts that a dense class keeps in float32 beside float16, and what experts have of them."""
    if kept is None or not _DOWN_KEPT_WIDE & {*kept}:
        return None if kept is None else [*kept]
    return [*kept, *(f"{experts}.down_proj" for experts in ("experts", "universal", "shared.one"))]


def _renamed_as(dense: type[PreTrainedModel], made: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return `made` after telling transformers that its names on disk are those of `dense`."""
    model_type = dense.config_class.model_type
    for ours, theirs in ((made.__name__, dense.__name__), (PREFIX + model_type, model_type)):
        # The names on disk are those of the dense model, and so is their renaming on loading.
        if (renaming := get_checkpoint_conversion_mapping(theirs)) is not None:
            kept = [own for rule in renaming if (own := _beside_experts(rule)) is not None]
            register_checkpoint_conversion_mapping(ours, kept, overwrite=True)
    return made


def _beside_experts(rule: Any) -> Any:
    """Return a rule of transformers without its effect on our experts; None if none is left.

    Some dense classes can have experts (Nemotron-H), and some rename every matrix of that name (Nomic BERT).
    """
    if any(".experts." in pattern for pattern in rule.source_patterns):
        return None
    if isinstance(rule, WeightRenaming) and {*rule.target_patterns} <= _MATRICES:
        ((stored, own),) = zip(rule.source_patterns, rule.target_patterns, strict=True)
        return WeightRenaming(f"mlp.{stored}", f"mlp.{own}")
    return rule


def architecture(name: str) -> type[PreTrainedModel]:
    """Return the class called `name`: one of transformers, or the upcycled version of one.

    Raises `UpcycleError` if transformers has no such model class.
    """
    dense = name.removeprefix(CLASS_PREFIX)
    found: Any = getattr(transformers, dense, None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model:
        raise UpcycleError(f"transformers {transformers.__version__} has no class of models {cut(dense)}")
    made: type[PreTrainedModel] = found if dense == name else model_class(found)
    return made


@functools.cache
def register_models(model_type: str) -> None:
    """Register the classes of one model_type with every Auto class that knows the dense one.

    This happens when the first config is read: importing the code of every architecture would take seconds.
    """
    dense, made = CONFIG_MAPPING[model_type], config_class(model_type)
    for auto in autos():
        if dense not in auto._model_mapping:
            continue
        found = auto._model_mapping[dense]
        several = found if isinstance(found, (list, tuple)) else (found,)
        # Skip classes that only share a config: AutoModelForDecision has one class for many model types.
        own = tuple(model_class(cls) for cls in several if cls.config_class is dense)
        if own:
            auto.register(made, own if len(own) > 1 else own[0], exist_ok=True)
            # Trainer and pipelines know a model's task by the names of its classes.
            names = tuple(cls.__name__ for cls in own)
            auto._model_mapping._model_mapping[made.model_type] = names if len(names) > 1 else names[0]
            # Whoever lists the mapping looks the classes up in a module of the model_type; ours have none.
            module = SimpleNamespace(**{cls.__name__: cls for cls in (made, *own)})
            auto._model_mapping._modules[made.model_type.replace("-", "_")] = module


def open(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Open the model in `folder` with the class that its config names; `options` go to `from_pretrained`.

    Raises `UpcycleError` if there is no such folder, or if it does not hold exactly the tensors of the
    class.
    """
    hub.refuse_missing(folder)
    names = opening.read_config(folder).architectures
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UpcycleError(f"{folder}/config.json names no architecture; open it with an AutoModel class")
    return opening.fill(architecture(names[0]), folder, **options)


def __getattr__(name: str) -> Any:
    # Make classes on demand; pickling looks them up by name.
    if name.startswith(CLASS_PREFIX) and hasattr(transformers, name.removeprefix(CLASS_PREFIX)):
        return architecture(name)
    raise AttributeError(name)

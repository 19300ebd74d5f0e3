"""The part of a model that has its blocks: the base model, or the text model of a multimodal one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from upcycle import families
from upcycle.nn.upcycled_config import PREFIX


@dataclass(frozen=True, kw_only=True)
class Body:
    """The part of a model that has the blocks of its family, without the head and without a vision tower.

    The paths of a family in memory (`Stack.module`, `Trained.before`) lie below `module`.
    """

    module: nn.Module
    prefix: str  # of the names of its parameters in the model
    base: str  # that of the base model, which is the body itself or the multimodal model around it

    @classmethod
    def of(cls, model: PreTrainedModel) -> Body:
        """Return the body of a model of transformers, dense or with experts."""
        base: nn.Module = model.base_model
        module: nn.Module = model.get_decoder() if _is_wrapper(model) else base
        return cls(module=module, prefix=_prefix(model, module), base=_prefix(model, base))

    def blocks(self, path: str) -> list[nn.Module]:
        """Return the blocks of the list at `path` (`Stack.blocks`)."""
        return list(self.module.get_submodule(path).children())

    def follows(self, name: str) -> bool:
        """Return whether a parameter belongs to the head, which follows the base model."""
        return not name.startswith(self.base)

    def is_around(self, name: str) -> bool:
        """Return whether a parameter is of the multimodal model around the body; texts never reach it."""
        return name.startswith(self.base) and not name.startswith(self.prefix)


def _is_wrapper(model: PreTrainedModel) -> bool:
    """Return whether a text model lies within the model, which is no family's own (CLIP has two towers)."""
    own = str(model.config.model_type).removeprefix(PREFIX)
    return hasattr(model.config, "text_config") and own not in families.names()


def _prefix(model: nn.Module, wanted: nn.Module) -> str:
    path = next(name for name, module in model.named_modules() if module is wanted)
    return f"{path}." if path else ""

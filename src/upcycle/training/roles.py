"""Says what each parameter of a model is to an optimizer: how many matrices it holds, and of which kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from upcycle.hf import recorded
from upcycle.hf.body import Body
from upcycle.hf.parts import Conv1D
from upcycle.training import moe_layers

Kind = Literal["router", "experts", "rest"]

# Parameters whose first axis counts experts: those of `nn.experts.Experts` and of transformers' MoE classes.
_STACKED = {"gate_up_proj", "up_proj", "down_proj", "grn_weight", "grn_bias"}
# Matrices that are two, the gate above the other: of experts, Phi-3, GLM, Granite and ModernBERT.
_GATE_ABOVE = {"gate_up_proj", "input_linear", "Wi"}


@dataclass(frozen=True, kw_only=True)
class Role:
    """The form and the kind of a parameter, for an optimizer."""

    kind: Kind = "rest"
    stacked: bool = False  # whether the first axis counts experts, so that each entry is a tensor of its own
    transposed: bool = False  # whether a matrix is stored [in, out], and not [out, in]
    matrices: int = 1  # matrices above each other in the last two axes: 2 for a gate above its other half
    hidden: bool = False  # whether it is matrices between the embeddings and the head


def roles(model: PreTrainedModel) -> dict[str, Role]:
    """Return the role of every parameter, by name. Shared experts, which all tokens see, are of the rest."""
    names = [name for name, _ in recorded.routers(model)]
    routers = tuple(f"{name}." for name in names)
    experts = tuple(stack.prefix for stack in moe_layers.stacks(model, names))
    body = Body.of(model)
    out = {}
    for name, parameter in model.named_parameters():
        if name.startswith(routers):
            out[name] = Role(kind="router")
            continue
        kind: Kind = "experts" if name.startswith(experts) else "rest"
        owner = model.get_submodule(name.rpartition(".")[0])
        out[name] = _role(kind, name, parameter, owner, inside=not body.follows(name))
    return out


def _role(kind: Kind, name: str, parameter: nn.Parameter, owner: nn.Module, *, inside: bool) -> Role:
    """Return the role of a parameter that is no router's; `inside` if it is below the head."""
    path = name.split(".")
    own = path[-1].removesuffix("_bias")
    stacked = own in _STACKED
    leaf = own if stacked else path[-2] if len(path) > 1 else ""
    linear = isinstance(owner, (nn.Linear, Conv1D)) and parameter.ndim == 2
    matrix = parameter.ndim == 3 if stacked else linear and min(parameter.shape) > 1
    return Role(
        kind=kind,
        stacked=stacked,
        transposed=matrix and isinstance(owner, Conv1D),
        matrices=2 if matrix and leaf in _GATE_ABOVE else 1,
        hidden=matrix and inside,
    )

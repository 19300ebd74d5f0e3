"""The head of a causal language model: a linear map of hidden states to logits, and what follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from upcycle.errors import UpcycleError

_PROBES = (-3.0, 0.5, 40.0)  # products that tell a factor, a divisor and a bound from each other
_KNOWN: WeakSet[PreTrainedModel] = WeakSet()  # models whose class does what `Head.finished` does


@dataclass(frozen=True, kw_only=True)
class Head:
    """The head of a model of transformers: logits of [T, V] from hidden states [T, H].

    Cohere multiplies them by `factor`, Granite divides them by `divisor`, and Gemma 2 and 3 bound them by
    `cap` x tanh(logits / cap). Under tensor parallelism the ranks of `group` share the words, and this one
    has V' of them, from number `first` on.
    """

    weight: Tensor  # [V', H]
    bias: Tensor | None  # [V']
    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None
    group: Any = None  # None: this rank has all words
    first: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head | None:
        """Return the head of `model`; None if it is no linear map, or if FSDP shards its weight now."""
        linear = _linear(model)
        if linear is None:
            return None
        weight: Tensor = linear.weight
        bias: Tensor | None = linear.bias
        group, first = None, 0
        if isinstance(weight, DTensor):
            if weight.device_mesh.mesh_dim_names != ("tp",) or weight.placements != (Shard(0),):
                return None
            group = weight.device_mesh.get_group()
            first = weight.device_mesh.get_local_rank() * -(-len(weight) // weight.device_mesh.size())
            weight = weight.to_local()
            bias = bias.to_local() if isinstance(bias, DTensor) else bias
        # Not the text model's config: the head of a wrapper is its own, and a linear map alone.
        config: Any = model.config
        return cls(
            weight=weight,
            bias=bias,
            factor=getattr(config, "logit_scale", None),
            divisor=getattr(config, "logits_scaling", None),
            cap=getattr(config, "final_logit_softcapping", None),
            group=group,
            first=first,
        )

    def finished(self, products: Tensor) -> Tensor:
        """Return the logits [..., V] for the products [..., V] of hidden states and the weight."""
        if self.factor is not None:
            products = products * self.factor
        if self.divisor is not None:
            products = products / self.divisor
        if self.cap is not None:
            products = torch.tanh(products / self.cap) * self.cap
        return products


def words(model: PreTrainedModel) -> int | None:
    """Return the number of words of the head of `model`, on all ranks; None if it is no linear map."""
    linear = _linear(model)
    return None if linear is None else len(linear.weight)


def without_logits(
    model: PreTrainedModel, inputs: Mapping[str, Any], compute: Callable[[Tensor, Head], Tensor]
) -> Tensor:
    """Run `model` and return what `compute` makes, [], of the head's hidden states [..., H], and of the head.

    It runs in place of the head's own module, where FSDP has gathered the weight, and what it returns goes
    through the hooks by which FSDP learns of the backward pass. Raises `UpcycleError` if the class does more
    to its logits than `Head.finished` does; the first call with a model compares the two.
    """
    linear, made = _linear(model), []
    heads: list[Head] = []
    probes: list[Tensor] = []
    assert linear is not None

    def instead(hidden: Tensor) -> Tensor:
        head = Head.of(model)
        assert head is not None
        heads.append(head)
        # As logits are, for what the class does with them; FSDP warns of views.
        return compute(hidden, head).view(1, 1, 1).clone()

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        made.append(output)
        if model in _KNOWN or isinstance(output, FakeTensor):  # the second has no numbers to compare
            return None
        probes.append(torch.tensor(_PROBES, device=output.device).view(1, -1, 1))
        return probes[0]

    before = linear.__dict__.get("forward")  # tensor parallelism has put one there
    linear.forward = instead  # type: ignore[method-assign, assignment]
    hook = linear.register_forward_hook(keep)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
        if before is None:
            del linear.forward
        else:
            linear.forward = before  # type: ignore[method-assign]
    if probes:
        _refuse_other(model, logits, heads[0].finished(probes[0]))
        _KNOWN.add(model)
    (only,) = made
    found: Tensor = only.view(())
    return found


def _refuse_other(model: PreTrainedModel, logits: Tensor, wanted: Tensor) -> None:
    """Raise `UpcycleError` if the class made other `logits` of some products than are wanted."""
    if logits.shape != wanted.shape or not torch.allclose(logits.to(wanted), wanted, rtol=1e-2):
        raise UpcycleError(
            f"{type(model).__name__} does something to its logits that upcycle does not know, so they cannot "
            f"be computed in chunks; set a smaller train.micro_batch, with which they are few enough to be "
            f"computed at once"
        )


def _linear(model: PreTrainedModel) -> nn.Linear | None:
    """Return the head's module if it is a plain linear one; FSDP gives it a class of its own."""
    linear = model.get_output_embeddings()
    plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    return linear if plain else None

"""Experts: E feed-forward networks of one shape, stacked in three-dimensional parameters.

Takes rows [M, H], the experts of each row [M, K] and their weights [M, K]; returns [M, H]. The experts run
through the implementations of transformers (grouped matrix products by default) or in a plain loop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedConfig

from upcycle.hf.parts import ACT2CLS, ACT2FN, ALL_EXPERTS_FUNCTIONS
from upcycle.nn import autocast, kernels
from upcycle.nn.grouped import View
from upcycle.nn.response_norm import normalise


def learned(activation: str) -> nn.Module | None:
    """Return an activation that learns numbers, as transformers makes it; None for one that does not."""
    if activation != "xielu":
        return None
    made: nn.Module = ACT2CLS[activation](dtype=torch.get_default_dtype())  # bfloat16 if nothing is said
    return made


class _Borrowed(nn.Module):
    """A module that somebody else has; its parameters are not among those of the module that calls it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._owned_elsewhere = (module,)  # a tuple, so that it is no submodule

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self._owned_elsewhere[0](hidden)
        return out


class Experts(nn.Module):
    """E experts that each compute down(act(gate x) * (up x)), or down(act(up x)) if `gated` is false.

    The parameters are `gate_up_proj` [E, 2I, H] (gate above up) or `up_proj` [E, I, H], and `down_proj`
    [E, H, I]. `bias` adds `gate_up_proj_bias` [E, 2I] or `up_proj_bias` [E, I], and `down_proj_bias` [E, H].
    `dropout` acts between act and down.

    `response_norm` adds a norm between act and down (`response_norm.py`) with `grn_weight` and `grn_bias`
    [E, I]. Such experts run in the plain loop and need to know the group of each row.

    `set_dropout` changes the dropout for a training run and adds one on the output. That one acts on each
    expert's output if a row has one expert (slots, expert choice, top_k with a capacity), and otherwise on
    the weighted sum.

    `act_fn` is an activation with numbers of its own, which its owner shares with others (`learned`).

    `config._experts_implementation` chooses the implementation. `eager` is the loop, which also takes over
    for rows that grouped products do not accept (`kernels.py`), and for a `down_proj` that is wider than the
    matrix before it. T5 keeps it in float32, because its product overflows in float16. Then the result is as
    wide, as that of the dense network is.
    """

    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    _is_expert_parallel = False  # set on the instance when transformers shards the experts

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        gated: bool,
        bias: bool,
        dropout: float = 0.0,
        response_norm: bool = False,
        act_fn: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.has_response_norm = response_norm
        self.has_gate, self.has_bias = gated, bias
        rows = 2 * intermediate_size if gated else intermediate_size
        self.up_name = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(num_experts, rows, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        if bias:
            self.register_parameter(f"{self.up_name}_bias", nn.Parameter(torch.zeros(num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.zeros(num_experts, hidden_size))
        if response_norm:
            self.grn_weight = nn.Parameter(torch.zeros(num_experts, intermediate_size))
            self.grn_bias = nn.Parameter(torch.zeros(num_experts, intermediate_size))
        activated = ACT2FN[activation] if act_fn is None else _Borrowed(act_fn)
        self.act_fn = nn.Sequential(activated, nn.Dropout(dropout)) if dropout and not gated else activated
        self.dropout = nn.Dropout(dropout if gated else 0.0)
        self.output_dropout = nn.Dropout(0.0)

    def set_dropout(self, inner: float | None, output: float) -> None:
        """Set the dropout between act and down (`inner`; None: unchanged) and on the outputs."""
        if inner is not None and self.has_gate:
            self.dropout.p = inner
        elif inner is not None:
            activated = self.act_fn[0] if isinstance(self.act_fn, nn.Sequential) else self.act_fn
            self.act_fn = nn.Sequential(activated, nn.Dropout(inner))
        self.output_dropout.p = output

    def reset_parameters(self, std: float) -> None:
        """Draw matrices from N(0, std^2) and set biases to zero; a response norm starts as the identity."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith(("bias", "grn_weight")):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def _apply_gate(self, both: Tensor) -> Tensor:
        """Apply the gate between the two products of a gated expert: [M, 2I] to [M, I]."""
        gate, up = both.chunk(2, dim=-1)
        made: Tensor = self.dropout(self.act_fn(gate) * up)
        return made

    def forward(
        self,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        groups: Tensor | None = None,
        *,
        some_left: bool = False,
    ) -> Tensor:
        """Run rows [M, H] through their experts `index` [M, K] and sum with `weights` [M, K]: [M, H].

        `groups` [M] is the group of each row; only experts with a response norm need it. With `some_left`, an
        index of E is no expert, and adds nothing.
        """
        if self.has_response_norm:
            made: Tensor = self.output_dropout(self.loop(hidden, index, weights, groups))
            return made
        chosen = self._implementation
        if chosen == kernels.ONE_BY_ONE:
            return self.output_dropout(self.loop(hidden, index, weights))
        run = ALL_EXPERTS_FUNCTIONS.get_interface(chosen, Experts.loop)
        dtype = autocast.dtype(hidden.device.type)
        seen = self if dtype is None and not some_left else View(self, dtype, some_left)
        out: Tensor = self.output_dropout(run(seen, hidden, index, weights))
        return out

    @property
    def _implementation(self) -> str:
        """The implementation from the config, or the loop if grouped products do not accept these rows."""
        chosen = getattr(self.config, "_experts_implementation", None) or kernels.ONE_BY_ONE
        if self._widens:
            return kernels.ONE_BY_ONE
        matrices = (getattr(self, self.up_name), self.down_proj)
        fits = all(kernels.take_groups(m.shape[-1:], m.element_size()) for m in matrices)
        return chosen if fits or chosen not in kernels.IN_GROUPS else kernels.ONE_BY_ONE

    @property
    def _widens(self) -> bool:
        """Whether `down_proj` and its product are in a wider type than the matrix before it."""
        return self.down_proj.dtype.itemsize > getattr(self, self.up_name).dtype.itemsize

    def loop(self, hidden: Tensor, index: Tensor, weights: Tensor, groups: Tensor | None = None) -> Tensor:
        """Run one expert after another (the reference) on rows [M, H] with indices and weights [M, K].

        An index of E or more is an expert of another rank. Returns [M, H].
        """
        wide = self.down_proj.dtype if self._widens else hidden.dtype
        chosen = index.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts].tolist()
        out = torch.zeros(hidden.shape, dtype=torch.promote_types(weights.dtype, wide), device=hidden.device)
        for e, places in enumerate(order[: sum(counts)].split(counts)):
            rows = places // index.shape[1]
            own = None if groups is None else groups[rows]
            made = self._one(e, hidden[rows], own) * weights.flatten()[places, None]
            out = out.index_add(0, rows, made.to(out.dtype))
        return out.to(wide)

    def _one(self, e: int, rows: Tensor, groups: Tensor | None = None) -> Tensor:
        up, down = getattr(self, self.up_name), self.down_proj
        up_bias = getattr(self, f"{self.up_name}_bias")[e] if self.has_bias else None
        inner = F.linear(rows, up[e], up_bias)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        if self.has_response_norm:
            assert groups is not None
            inner = normalise(inner, groups, self.grn_weight[e], self.grn_bias[e])
        if self._widens:
            inner = inner.to(down.dtype)
        return F.linear(inner, down[e], self.down_proj_bias[e] if self.has_bias else None)

    def extra_repr(self) -> str:
        kind = "gated" if self.has_gate else "plain"
        return f"{self.num_experts} experts, {kind}, {tuple(self.down_proj.shape[1:])}"

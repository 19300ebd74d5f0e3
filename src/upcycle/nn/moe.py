"""The MoE layer: a router, stacked experts and, in some models, a shared expert.

It replaces a feed-forward network: hidden states [B, ..., H] in, [B, ..., H] out. The dimensions in between
are flattened to one row of tokens: a text, or the positions of an image.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedConfig

from upcycle.errors import UpcycleError
from upcycle.nn import autocast, routers
from upcycle.nn.dispatch import Choices, Dispatch, Groups
from upcycle.nn.experts import Experts, learned
from upcycle.nn.routing import Routing, Tokens
from upcycle.nn.shape import Shape


class RouterLayer(nn.Module):
    """The tensors of a router and its decision about hidden states, computed in float32.

    Tensors that are not trained have float32 or wider in every model, because 16 bits would round the small
    steps of a correction bias away. `from_pretrained` leaves a parameter in the type that it is made in.
    """

    def __init__(self, settings: routers.Router, shape: Shape) -> None:
        super().__init__()
        self.settings, self.shape = settings, shape
        self.weight = nn.Parameter(torch.empty(settings.rows(shape.all_experts), shape.hidden_size))
        for name, extra in settings.extra(shape.all_experts, shape.hidden_size).items():
            trained, usual = name not in settings.untrained, torch.get_default_dtype()
            dtype = usual if trained else torch.promote_types(usual, torch.float32)
            made = torch.full(extra.shape, extra.value, dtype=dtype)
            self.register_parameter(name, nn.Parameter(made, requires_grad=trained))

    def forward(self, hidden: Tensor, padding: Tensor | None) -> Routing:
        """Route groups of tokens [G, N, H]; `padding` [G, N] is True at positions without a token."""
        with autocast.off(hidden.device.type):
            wide = torch.promote_types(hidden.dtype, torch.float32)
            return self.settings.route(
                Tokens(
                    hidden=hidden.to(wide),
                    padding=padding,
                    tensors={name: p.to(wide) for name, p in self.named_parameters()},
                    num_experts=self.shape.all_experts,
                    top_k=self.shape.top_k,
                    training=self.training,
                    causal=self.shape.causal,
                )
            )


class SharedExpert(nn.Module):
    """The shared expert: a feed-forward network that sees every token of a row."""

    def __init__(self, config: PreTrainedConfig, shape: Shape, act_fn: nn.Module | None = None) -> None:
        super().__init__()
        self.one = _experts(config, shape, 1, shape.shared_size, act_fn)

    def forward(self, rows: Tensor) -> Tensor:
        """Apply the shared expert to rows of tokens [B, L, H]; returns [B, L, H]."""
        number = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
        out: Tensor = self.one.output_dropout(self.one._one(0, rows.flatten(0, 1), number))
        return out.view(rows.shape)


def _experts(
    config: PreTrainedConfig, shape: Shape, count: int, width: int, act_fn: nn.Module | None
) -> Experts:
    return Experts(
        config,
        num_experts=count,
        hidden_size=shape.hidden_size,
        intermediate_size=width,
        activation=shape.activation,
        gated=shape.gated,
        bias=shape.bias,
        response_norm=shape.response_norm,
        dropout=shape.dropout,
        act_fn=act_fn,
    )


class MoE(nn.Module):
    """A sparse layer in place of a dense one.

    `shape` describes it; `config` is the config of the whole model.

    `padding` [B, L] is True at positions without a token, and `batch` is the shape (B, L) of the tokens that
    the stack was given. The code that calls the model sets them (see `hf/passes.py`), and sets those of its
    own pass again for a layer that is recomputed in the backward pass.

    With `router.group`, tokens compete with those that stand beside them in the batch, of other rows too. So
    what a row gives depends on these, unless each row is whole groups, or tokens do not compete at all
    (`Router.competes`). In training, all groups must be whole. Outside, the last one may be shorter. It is
    filled up with padding, which changes nothing for its tokens: padding takes no place, and experts have
    places for the tokens that are there. Where tokens do not compete, nothing is filled up, and only a
    response norm sees groups.
    """

    def __init__(self, config: PreTrainedConfig, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        settings = routers.read(shape.router)
        if shape.causal and not settings.causal:
            raise UpcycleError(f"router {settings.name} in a causal stack: {settings.not_in_a_decoder}")
        self.router = RouterLayer(settings, shape)
        act_fn = learned(shape.activation)
        if act_fn is not None:
            self.act_fn = act_fn  # as the dense network has it; all experts share it
        self.experts = _experts(config, shape, shape.num_experts, shape.intermediate_size, act_fn)
        self.universal = (
            _experts(config, shape, shape.universal_experts, shape.universal_size, act_fn)
            if shape.universal_experts
            else None
        )
        self.shared = SharedExpert(config, shape, act_fn) if shape.shared_size else None
        self.padding: Tensor | None = None
        self.batch: torch.Size | None = None

    def reset_parameters(self, std: float) -> None:
        """Initialise matrices as transformers does, and the router as its settings say."""
        self.experts.reset_parameters(std)
        if self.universal is not None:
            self.universal.reset_parameters(std)
        nn.init.normal_(self.router.weight, std=self.router.settings.std)
        for name, extra in self.router.settings.extra(self.shape.all_experts, self.shape.hidden_size).items():
            parameter = getattr(self.router, name)
            if extra.std:
                nn.init.normal_(parameter, std=extra.std)
            else:
                nn.init.constant_(parameter, extra.value)
        if self.shared is not None:
            self.shared.one.reset_parameters(std)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = self._rows(hidden)
        groups, padding = self._groups(rows)
        dispatch = self._seen_by_norms(self.router(groups, padding).dispatch)
        run = self._run_some if dispatch.some_left else self._run
        out: Tensor = dispatch.run(groups.flatten(0, 1), run)
        if len(out) > (count := rows.shape[:2].numel()):
            out = out[:count]  # without what the last group was filled up with
        out = out.view(hidden.shape)
        return out if self.shared is None else out + self.shared(rows).view(hidden.shape)

    def _rows(self, hidden: Tensor) -> Tensor:
        """Reshape hidden states to rows [B, L, H]; some classes join the rows of a batch before a layer."""
        if hidden.ndim > 2:
            return hidden.flatten(1, -2)
        joined = self.batch is not None and self.batch.numel() == len(hidden)
        return hidden.unflatten(0, self.batch) if joined else hidden[None]

    def _run(self, hidden: Tensor, index: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        """Run rows [M, H] through their experts, as `Experts.forward` does.

        With universal experts, each row must have one expert and the rows must be in the order of the
        experts, as slots are.
        """
        own = (groups(),) if self.shape.response_norm else ()  # expert parallelism's forward takes three
        if self.universal is None:
            out: Tensor = self.experts(hidden, index, weights, *own)
            return out
        core = self.shape.num_experts * (len(hidden) // self.shape.all_experts)
        return torch.cat(
            [
                self.experts(hidden[:core], index[:core], weights[:core], *(g[:core] for g in own)),
                self.universal(
                    hidden[core:],
                    index[core:] - self.shape.num_experts,
                    weights[core:],
                    *(g[core:] for g in own),
                ),
            ]
        )

    def _run_some(self, hidden: Tensor, index: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        """Run rows [M, H] of which those with an expert number of E have none; their output is zero."""
        if not self.experts._is_expert_parallel:
            own = groups() if self.shape.response_norm else None
            out: Tensor = self.experts(hidden, index, weights, own, some_left=True)
            return out
        # The exchange between ranks knows no such number. It waits for the device in any case.
        kept = (index[:, 0] < self.shape.all_experts).nonzero()[:, 0]
        made = self._run(hidden[kept], index[kept], weights[kept], lambda: groups()[kept])
        return torch.zeros_like(hidden, dtype=made.dtype).index_copy(0, kept, made)

    def _groups(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Reshape rows [B, L, H] and their padding to groups [G, N, H] and [G, N].

        Outside training, rows stay rows if tokens do not compete, and else the last group is filled up.
        """
        batch, length, size = rows.shape
        padding = self.padding
        if padding is not None:
            # With a cache of earlier tokens the mask is longer than the current input. Otherwise a mask of
            # another length is one of what the positions were made from: of samples of sound, for example.
            longer = self.shape.causal and padding.shape[1] > length
            fits = padding.shape[0] == batch and (longer or padding.shape[1] == length)
            padding = padding[:, padding.shape[1] - length :] if fits else None
        group = self.router.settings.group
        if not group or not (self.training or self._competes):
            return rows, padding
        lacking = -(batch * length) % group
        if lacking and self.training:
            raise UpcycleError(
                f"router.group = {group} does not divide the {batch} x {length} tokens of a forward pass in "
                f"training; choose a divisor, or 0 to route each row by itself"
            )
        if lacking:
            there = rows.new_zeros((batch, length), dtype=torch.bool) if padding is None else padding
            padding = F.pad(there.flatten(), (0, lacking), value=True)
            rows = F.pad(rows.flatten(0, 1), (0, 0, 0, lacking))
        return rows.reshape(-1, group, size), None if padding is None else padding.reshape(-1, group)

    @property
    def _competes(self) -> bool:
        return self.router.settings.competes(self.shape.all_experts, self.shape.top_k)

    def _seen_by_norms(self, dispatch: Dispatch) -> Dispatch:
        """Give a response norm the groups that it has in training, where tokens were not routed in groups."""
        group = self.router.settings.group
        if group and self.shape.response_norm and isinstance(dispatch, Choices):
            return dataclasses.replace(dispatch, length=group)
        return dispatch

"""Marks of the neurons that are most active for a token (CMoE, arXiv 2502.04416: ATopK)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError
from upcycle.hf.parts import ACT2FN
from upcycle.tensors.lazy import Lazy


@dataclass(frozen=True, kw_only=True, eq=False)
class Markers:
    """The marks of one network, whose rows of gate and up [I, H] have length one."""

    gate: Tensor
    up: Tensor
    activation: str
    marked: int  # neurons of a token that are marked, K_a

    @property
    def width(self) -> int:
        """The number of neurons, I."""
        return len(self.up)

    def of(self, tokens: Tensor) -> Tensor:
        """Return the marks of inputs of the network [T, H], 1 for the K_a largest |h| of a token: [T, I].

        h = act(g x) (u x) with token and rows of length one.
        """
        x = F.normalize(tokens.float(), dim=-1)
        h = (ACT2FN[self.activation](F.linear(x, self.gate)) * F.linear(x, self.up)).abs()
        return torch.zeros_like(h).scatter(-1, h.topk(self.marked, dim=-1).indices, 1.0)


def refuse(dense: Dense, marked: int) -> None:
    """Refuse networks without a gate or with biases, for which CMoE has no formula, and narrow ones."""
    for stack in dense.stacks:
        for i in stack.numbers:
            network = dense.feed_forward(i, stack.name)
            if network.gate is None or network.biases():
                raise UpcycleError(
                    f"--collect co_marker is for gated networks without biases, and those of "
                    f"{dense.family.model_type} are not; use co_activation"
                )
            if marked > network.width:
                raise UpcycleError(f"--marked {marked} is more than the {network.width} neurons of a network")


def markers(dense: Dense, marked: int, device: torch.device) -> dict[tuple[str, int], Markers]:
    """Return the markers of every block, by stack and number."""
    home = torch.device("cpu") if device.type == "mps" else device

    def unit(matrix: Lazy) -> Tensor:
        return F.normalize(torch.from_numpy(matrix.all("F32")), dim=-1).to(home)

    out = {}
    for stack in dense.stacks:
        for i in stack.numbers:
            network = dense.feed_forward(i, stack.name)
            assert network.gate is not None
            out[stack.name, i] = Markers(
                gate=unit(network.gate), up=unit(network.up), activation=stack.activation, marked=marked
            )
    return out

"""The stacks of a dense model: runs of blocks of one kind, each block with a feed-forward network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The grid of patches that are the positions of a stack: how many, and their size in pixels."""

    rows: int
    columns: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A run of blocks of one kind, each with a feed-forward network. `{i}` stands for a block's number."""

    name: str = "layers"
    count: int
    having: tuple[int, ...] = ()  # the blocks that have a network, if some of them have none of this stack
    first: int = 0  # number of its first network, if moe.layers counts on from stack to stack
    total: int = 0  # networks that moe.layers counts over; 0 means its own
    hidden: int  # channels of its blocks
    width: int  # neurons of its networks
    attention: int = 0  # channels of all heads of a usual block (`Family.scored`); 0 means no attention
    across: str = ""  # another stack whose tokens its blocks attend to as well
    path: str  # path of the network on disk, and of the MoE layer that takes its place
    owned: tuple[str, ...]  # the prefixes of the names of its tensors on disk
    module: str  # path of the network in memory, below the base model
    replaced: tuple[str, ...] = ()  # modules in memory that belong to the network as well
    down: str  # path of the network's last matrix in memory, below the base model
    # paths in memory of the matrix that ends self-attention; a block has one of them
    heads: tuple[str, ...] = ()
    causal: bool
    joined: bool = False  # whether a row can have several inputs, which only a mask keeps apart
    activation: str
    dropout: float = 0.0  # between the activation and the last matrix
    norm_path: str = ""  # path on disk of the norm that only the network reads; empty if there is none

    @property
    def numbers(self) -> Sequence[int]:
        """The numbers of its blocks that have a network."""
        return self.having or range(self.count)

    @property
    def blocks(self) -> str:
        """The path of the list of its blocks in memory, below the base model."""
        return self.module.partition(".{i}")[0]

    def owns(self, name: str, i: int) -> bool:
        """Return whether the tensor called `name` on disk is part of the network of block `i`."""
        return name.startswith(tuple(start.format(i=i) for start in self.owned))


def lists_of(stacks: Sequence[Stack]) -> list[str]:
    """Return the path of each list of blocks in memory, which several stacks may share (Gemma 4), once."""
    return list(dict.fromkeys(stack.blocks for stack in stacks))


def at(stacks: Sequence[Stack], blocks: str, i: int) -> Stack:
    """Return the stack of block `i` in the list at `blocks`; without a network, it is of the first one."""
    there = [stack for stack in stacks if stack.blocks == blocks]
    return next((stack for stack in there if i in stack.numbers), there[0])


def only_stack(
    config: Mapping[str, Any],
    *,
    base: str,
    block: str,
    network: str,
    down: str,
    attention: str,
    causal: bool,
    norm: str = "",
    owned: Sequence[str] = (),
    replaced: Sequence[str] = (),
) -> tuple[Stack, ...]:
    """Return the one stack of a model whose blocks are all alike.

    `base` is the prefix of the base model on disk, and `block` that of a block below it, with `{i}`. The
    other names are those in a block: the network, its last matrix, the matrix that ends attention, the norm
    that only the network reads, the prefixes of the network's tensors (by default, all below it), and other
    modules that belong to it.
    """
    return (
        Stack(
            count=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            width=config["intermediate_size"],
            attention=config["hidden_size"],
            path=f"{base}{block}{network}",
            owned=tuple(f"{base}{block}{name}" for name in owned or (f"{network}.",)),
            module=block + network,
            replaced=tuple(block + name for name in replaced),
            down=block + down,
            heads=(block + attention,),
            causal=causal,
            activation=config["hidden_act"],
            norm_path=f"{base}{block}{norm}" if norm else "",
        ),
    )

"""Decoders with plain networks, under names of their own: GPT-2, GPT-NeoX, OPT."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

from upcycle.errors import UpcycleError
from upcycle.families import Config, Stack, Weights
from upcycle.families._checked import check
from upcycle.families._decoder import REQUIRED
from upcycle.families._stacks import only_stack
from upcycle.families._training import Trained
from upcycle.families._weights import Matrix, below
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Transposed


class PlainDecoder(Trained):
    """A decoder whose networks are two matrices, up and down."""

    no_native = "no native MoE has its plain, biased networks"
    blocks: ClassVar[str]  # the list of blocks, below the base model
    up: ClassVar[str]  # the first matrix of a network, by its name in a block
    down_name: ClassVar[str]  # the second one
    module: ClassVar[str] = "mlp"  # the network in memory, by its name in a block
    replaced: ClassVar[tuple[str, ...]] = ()  # other modules of a block that belong to the network
    owned: ClassVar[tuple[str, ...]] = ("mlp.",)
    attention: ClassVar[str]  # the matrix that ends attention, by its name in a block
    across: ClassVar[bool] = False  # matrices are stored [inputs, outputs]
    keys: ClassVar[Mapping[str, str]] = {}  # how config.json spells what the rest of the project reads
    residual: ClassVar[tuple[str, ...]] = ()

    def config(self, raw: Mapping[str, Any]) -> Config:
        check(self.model_type, raw)
        config: Config = {**self.defaults, **raw}
        config |= {name: config[key] for name, key in self.keys.items() if config.get(key) is not None}
        if "hidden_size" in config and config.get("intermediate_size") is None:
            config["intermediate_size"] = 4 * config["hidden_size"]
        if missing := [self.keys.get(key, key) for key in REQUIRED if config.get(key) is None]:
            raise UpcycleError(f"config.json of a {self.model_type} model lacks {', '.join(missing)}")
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        config["architectures"] = None
        return config

    @abc.abstractmethod
    def outside(self, config: Config) -> Weights:
        """Return the tensors of the base model outside its blocks, by their names in it."""

    @abc.abstractmethod
    def block(self, config: Config) -> Weights:
        """Return the tensors of a block, by their names in it."""

    def weights(self, config: Config) -> Weights:
        out = self.outside(config)
        for i in range(config["num_hidden_layers"]):
            out |= below(f"{self.blocks}.{i}.", self.block(config))
        out = below(self.root, out)
        assert self.tied is not None
        head, table = self.tied
        return out if config["tie_word_embeddings"] else out | {head: Matrix(out[table].shape)}

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return only_stack(
            config,
            base=self.root,
            block=f"{self.blocks}.{{i}}.",
            network=self.module,
            down=self.down_name,
            attention=self.attention,
            owned=self.owned,
            replaced=self.replaced,
            causal=True,
        )

    def branches(self, config: Config, stack: Stack) -> tuple[str, ...]:
        return tuple(f"{stack.blocks}.{{i}}.{name}" for name in self.residual)

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        up, down = (f"{self.root}{self.blocks}.{layer}.{name}." for name in (self.up, self.down_name))
        turned = Transposed if self.across else _as_it_is
        biases = {"up_bias": up + "bias", "down_bias": down + "bias"}
        return FeedForward(
            up=turned(tensors[up + "weight"]),
            down=turned(tensors[down + "weight"]),
            **{part: tensors[name] for part, name in biases.items() if name in tensors},
        )


def _as_it_is(tensor: Lazy) -> Lazy:
    return tensor

"""Native MoE architectures of transformers. One file here is one `model_type`: its names and its config.

A file `MODEL_TYPE.py` binds a `Native` to the module name `native`. Names are those of the hub's own
checkpoints of that architecture, per expert, so that every client loads the output as it loads those.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from upcycle import registry
from upcycle.feed_forward import FeedForward
from upcycle.lazy import Concat, Lazy, Pick, Slice, Stack

Config = dict[str, Any]

COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "tie_word_embeddings",
    "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache",
)  # fmt: skip


class Layout(Protocol):
    """Where the experts of a layer go."""

    def write(self, experts: list[FeedForward]) -> dict[str, Lazy]:
        """The experts by their names on disk, below the layer's prefix."""

    def read(self, tensors: Mapping[str, Lazy]) -> list[FeedForward]:
        """The experts among the tensors of a layer, by their names below its prefix."""

    def fuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """The tensors of a layer with its experts as transformers holds them in memory."""


@dataclass(frozen=True, kw_only=True)
class PerExpert:
    """One tensor a matrix and expert, below the layer's prefix."""

    path: str  # with {e}
    gate: str
    up: str
    down: str

    def write(self, experts: list[FeedForward]) -> dict[str, Lazy]:
        """The experts by their names on disk."""
        return {
            f"{self.path.format(e=e)}.{getattr(self, name)}.weight": matrix
            for e, expert in enumerate(experts)
            for name, matrix in expert.matrices().items()
        }

    def read(self, tensors: Mapping[str, Lazy]) -> list[FeedForward]:
        """The experts among the tensors of a layer, by their names below its prefix."""
        out: list[FeedForward] = []
        while f"{self.path.format(e=len(out))}.{self.gate}.weight" in tensors:
            path = self.path.format(e=len(out))
            out.append(
                FeedForward(
                    gate=tensors[f"{path}.{self.gate}.weight"],
                    up=tensors[f"{path}.{self.up}.weight"],
                    down=tensors[f"{path}.{self.down}.weight"],
                )
            )
        return out

    def fuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """The tensors of a layer with its experts as transformers holds them: [E, 2I, H] and [E, H, I]."""
        experts = self.read(tensors)
        if not experts:
            return dict(tensors)
        head = self.path.partition("{e}")[0]
        rest = {name: t for name, t in tensors.items() if not name.startswith(head)}
        fused = Fused(gate_up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj")
        return rest | fused.write(experts)


@dataclass(frozen=True, kw_only=True)
class Fused:
    """All experts in two tensors: gate over up [E, 2I, H], and down [E, H, I]."""

    gate_up: str
    down: str

    def write(self, experts: list[FeedForward]) -> dict[str, Lazy]:
        """The experts by their names on disk."""
        return {
            self.gate_up: Stack(tuple(Concat(_gated(x), 0) for x in experts)),
            self.down: Stack(tuple(x.down for x in experts)),
        }

    def read(self, tensors: Mapping[str, Lazy]) -> list[FeedForward]:
        """The experts among the tensors of a layer, by their names below its prefix."""
        if self.gate_up not in tensors:
            return []
        both, down = tensors[self.gate_up], tensors[self.down]
        count, rows, _ = both.shape
        return [
            FeedForward(
                gate=Slice(Pick(both, e), 0, 0, rows // 2),
                up=Slice(Pick(both, e), 0, rows // 2, rows),
                down=Pick(down, e),
            )
            for e in range(count)
        ]

    def fuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """The tensors of a layer as they are: they are stored as transformers holds them."""
        return dict(tensors)


def _gated(network: FeedForward) -> tuple[Lazy, Lazy]:
    """Gate and up of a network, which every native MoE has."""
    assert network.gate is not None
    return network.gate, network.up


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The shared expert of an architecture that has one."""

    path: str  # below the layer's prefix
    combine: Literal["gated", "sum", "average"]  # with the routed output
    config: Callable[[int, int], Config]  # (width, number of shared experts) -> its config fields
    gate: str | None = None  # the sigmoid gate [1, H] of `gated`
    mandatory: Literal["narrow", "full"] | None = None  # built whether or not one is asked for

    def write(self, network: FeedForward) -> dict[str, Lazy]:
        """The shared expert by its names on disk."""
        return {f"{self.path}.{name}_proj.weight": m for name, m in network.matrices().items()}


@dataclass(frozen=True, kw_only=True)
class Native:
    """An MoE architecture: where its tensors and its settings go."""

    model_type: str
    architecture: str  # the transformers class
    summary: str
    layout: Layout
    router: str  # name of the router weight [E, H] below the layer's prefix
    fields: tuple[str, ...]  # config fields beyond COMMON that the dense config gives
    num_experts_field: str = "num_experts"
    top_k_field: str = "num_experts_per_tok"
    width_field: str = "intermediate_size"
    renormalizes: Literal["always", "optional"]  # optional: `norm_topk_prob`
    shared: Shared | None = None
    dense_layers: Callable[[Config, frozenset[int]], Config | str] | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    extra: Callable[[int, str], dict[str, Lazy]] | None = None  # (E, dtype) -> more tensors of a MoE layer
    finish: Callable[[Config], Config] = lambda config: config  # what the hub's configs spell otherwise
    clients: Callable[[Config], Mapping[str, str]] = lambda _: {}  # who will not compute the same, and why
    upcycled: bool = False  # no MoE class of transformers, but the dense class with `nn.MoE` in it
    dense: Literal["", "deeper", "narrower"] = ""  # what the dense class became, where it has no experts

    def config(
        self,
        dense: Config,
        *,
        num_experts: int,
        top_k: int,
        width: int,
        normalize: bool,
        shared_experts: int,
        shared_width: int,
    ) -> Config:
        """config.json of the MoE, in this architecture's spelling, without what depends on layers."""
        out: Config = {"architectures": [self.architecture], "model_type": self.model_type}
        out |= {name: dense[name] for name in (*COMMON, *self.fields) if name in dense}
        out |= {
            self.num_experts_field: num_experts,
            self.top_k_field: top_k,
            self.width_field: width,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": False,
        }
        if self.renormalizes == "optional":
            out["norm_topk_prob"] = normalize
        if self.shared:
            out |= self.shared.config(shared_width, shared_experts)
        return self.finish(out | _rope(dense["rope_parameters"]) | dict(self.constants))


def client_limits(
    config: Config, *, mlx_scales_rope: bool = False, mlx_head_dim: bool = True
) -> dict[str, str]:
    """What llama.cpp and mlx-lm are known to ignore in the config of an architecture they load."""
    name, out = config["model_type"], {}
    if not mlx_head_dim and config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        out["mlx-lm"] = f"ignores head_dim in {name}"
    if not mlx_scales_rope and config["rope_parameters"]["rope_type"] != "default":
        out["mlx-lm"] = f"ignores the scaling of rotary positions in {name}"
    if config["hidden_act"] != "silu":
        out |= dict.fromkeys(("llama.cpp", "mlx-lm"), f"hard-codes SiLU in {name}")
    return out


def _rope(rope: Mapping[str, Any]) -> Config:
    """Rotary settings in both spellings: transformers 5 reads the first, everything older the others."""
    out: Config = {"rope_parameters": dict(rope), "rope_theta": rope["rope_theta"]}
    if (share := rope.get("partial_rotary_factor")) is not None:
        out["partial_rotary_factor"] = share
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    return out if rope["rope_type"] == "default" else {**out, "rope_scaling": scaling}


def find(model_type: str) -> Native:
    """The native architecture called `model_type`."""
    return registry.find(sys.modules[__name__], model_type, "native", "target")


def names() -> list[str]:
    """The native architectures that have a file here."""
    return registry.names(sys.modules[__name__])

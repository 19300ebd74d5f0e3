"""The upcycled target: a dense class of transformers with `nn.MoE` in some of its blocks.

Takes the place of a `Native` where no MoE class of transformers fits the model or the router. Names on disk
are the dense model's, but for the networks that become MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from upcycle.computed import Drawn, Fill
from upcycle.errors import UpcycleError
from upcycle.families import Config, Stack
from upcycle.feed_forward import FeedForward
from upcycle.init import Site
from upcycle.lazy import Concat, Lazy, Pick
from upcycle.lazy import Stack as Stacked
from upcycle.natives import Fused, Native, Shared
from upcycle.recipe import Recipe

TARGET = "upcycled"
PREFIX = "upcycled_"  # of model_type
CLASS_PREFIX = "Upcycled"


_GATED = Fused(gate_up="experts.gate_up_proj", down="experts.down_proj")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Experts in three-dimensional tensors, as `nn.Experts` holds them: disk and memory are the same."""

    def write(self, experts: list[FeedForward]) -> dict[str, Lazy]:
        """The experts by their names below the layer: [E, 2I, H] or [E, I, H], [E, H, I], and vectors."""
        first = experts[0]
        up = "gate_up_proj" if first.gate is not None else "up_proj"
        out: dict[str, Lazy] = {
            f"experts.{up}": Stacked(tuple(_over(x.gate, x.up) for x in experts)),
            "experts.down_proj": Stacked(tuple(x.down for x in experts)),
        }
        biases = [(x.gate_bias, x.up_bias, x.down_bias) for x in experts]
        if first.up_bias is not None:
            out[f"experts.{up}_bias"] = Stacked(
                tuple(_over(gate, b) for gate, b, _ in biases if b is not None)
            )
            out["experts.down_proj_bias"] = Stacked(tuple(b for _, _, b in biases if b is not None))
        for name in first.response():
            out[f"experts.{name}"] = Stacked(tuple(x.response()[name] for x in experts))
        return out

    def read(self, tensors: Mapping[str, Lazy]) -> list[FeedForward]:
        """The experts among the tensors of a layer, by their names below it; biases are left aside."""
        if (up := tensors.get("experts.up_proj")) is None:
            return _GATED.read(tensors)
        down = tensors["experts.down_proj"]
        return [FeedForward(up=Pick(up, e), down=Pick(down, e)) for e in range(down.shape[0])]

    def fuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """The tensors of a layer as they are: they are stored as they are held."""
        return dict(tensors)


def _over(gate: Lazy | None, up: Lazy) -> Lazy:
    """Gate over up, or up alone in a network without a gate."""
    return up if gate is None else Concat((gate, up), 0)


@dataclass(frozen=True, kw_only=True)
class SharedExpert(Shared):
    """The dense network beside the experts, kept like a single expert."""

    def write(self, network: FeedForward) -> dict[str, Lazy]:
        """The shared expert by its names below the layer."""
        names = Layout().write([network])
        return {f"{self.path}.one.{name.removeprefix('experts.')}": t for name, t in names.items()}


def target(model_type: str, architecture: str, recipe: Recipe) -> Native:
    """The upcycled target of a dense class, for the recipe of one stack."""

    return Native(
        model_type=PREFIX + model_type,
        architecture=CLASS_PREFIX + architecture,
        summary="the dense class with MoE layers in it",
        layout=Layout(),
        router="router.weight",
        fields=(),
        renormalizes="optional",
        shared=SharedExpert(path="shared", combine="sum", config=lambda width, count: {}),
        upcycled=True,
    )


def dense_class(model_type: str, architecture: str, became: Literal["deeper", "narrower"]) -> Native:
    """The dense class itself, without experts: a baseline."""
    return Native(
        model_type=model_type,
        architecture=architecture,
        summary=f"the dense class, {became}",
        layout=Layout(),
        router="",
        fields=(),
        renormalizes="optional",
        upcycled=True,
        dense=became,
    )


def refuse_experts(recipe: Recipe, sections: tuple[str, ...]) -> None:
    """Refuse a recipe for a dense target that asks for experts: nothing would heed it."""
    given, default, target = recipe.as_table(), Recipe.of().as_table(), recipe.moe.target
    if recipe.parts:
        raise UpcycleError(
            f"moe.target = {target} makes no experts, and [{next(iter(recipe.parts))}] is about them; take "
            f"it out"
        )
    for section in sections:
        for key, value in given[section].items():
            if value != default[section].get(key) and key not in ("target", "depth"):
                raise UpcycleError(
                    f"moe.target = {target} makes no experts, and {section}.{key} = {value} is about them; "
                    f"take it out"
                )


def router_tensors(recipe: Recipe, site: Site, norm: Mapping[str, Lazy], dtype: str) -> dict[str, Lazy]:
    """The tensors of a router beside its weight, by their names below the layer. `norm` has weight and bias
    of the norm before the network, where there is one."""
    out: dict[str, Lazy] = {}
    for name, extra in recipe.router.extra(site.all_experts, site.hidden).items():
        if extra.inherited is not None:
            if extra.inherited not in norm:
                raise UpcycleError(
                    "router.query_norm = inherited needs a LayerNorm with weight and bias before the "
                    "network, and this model has none; set router.query_norm = fresh"
                )
            out[f"router.{name}"] = norm[extra.inherited]
        elif extra.std:
            rows, columns = extra.shape
            out[f"router.{name}"] = Drawn(
                (rows, columns), dtype, "normal", extra.std, site.key("router", name)
            )
        else:
            out[f"router.{name}"] = Fill(extra.shape, dtype, extra.value)
    return out


def entry(
    stack: Stack, sites: list[Site], recipe: Recipe, network: FeedForward, shared_width: int
) -> dict[str, Any]:
    """What config.json says of the MoE layers of a stack: `nn.configs.Shape`."""
    return {
        "stack": stack.name,
        "layers": [site.layer for site in sites],
        "module": stack.module,
        "replaced": list(stack.replaced),
        "num_experts": recipe.moe.num_experts,
        "top_k": recipe.moe.top_k,
        "hidden_size": network.hidden,
        "intermediate_size": sites[0].width,
        "universal_experts": sites[0].universal_experts,
        "universal_size": sites[0].universal_width,
        "shared_size": shared_width,
        "activation": stack.activation,
        "gated": network.gate is not None,
        "bias": network.up_bias is not None,
        "dropout": stack.dropout,
        "causal": stack.causal,
        "router": recipe.router.as_table(),
        **({"response_norm": True} if network.response() else {}),
    }


def config(
    raw: Mapping[str, Any], model_type: str, architecture: str, entries: list[dict[str, Any]], pooled: int
) -> Config:
    """config.json of the upcycled model: the dense one's and what its MoE layers are.

    `pooled` is the number of tokens before the patches where their mean takes the place of the class token.
    """
    pooling = {"mean_pooling_after": pooled} if pooled else {}
    return {
        **raw,
        "architectures": [CLASS_PREFIX + architecture],
        "model_type": PREFIX + model_type,
        "moe": entries,
        **pooling,
    }


def dense_type(config: Mapping[str, Any]) -> str | None:
    """The dense model_type that an upcycled config was made from; None where it is no such config."""
    model_type = config.get("model_type")
    upcycled = isinstance(model_type, str) and model_type.startswith(PREFIX) and "moe" in config
    return model_type.removeprefix(PREFIX) if upcycled and isinstance(model_type, str) else None


def dense_config(config: Mapping[str, Any]) -> Config:
    """The config of the dense model in that of the upcycled one."""
    out = {k: v for k, v in config.items() if k not in ("moe", "mean_pooling_after")}
    named = [str(name).removeprefix(CLASS_PREFIX) for name in out.get("architectures") or ()]
    return {**out, "model_type": dense_type(config), "architectures": named}


def refuse_look_ahead(stack: Stack, recipe: Recipe) -> None:
    """Refuse a router that reads later tokens in a stack that must not."""
    if stack.causal and not recipe.router.causal:
        where = "a decoder" if stack.name == "layers" else "the decoder"
        why = recipe.router.not_in_a_decoder
        raise UpcycleError(
            f"router {recipe.router.name} cannot stand in {where}: {why} (in a T5, under [decoder.router])"
        )

"""config.json of an upcycled model: the dense config, plus a description of its MoE layers.

Read without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upcycle.families import Config, Stack
    from upcycle.init import Site
    from upcycle.recipe import Recipe
    from upcycle.tensors.feed_forward import FeedForward

PREFIX = "upcycled_"  # prefix of model_type
CLASS_PREFIX = "Upcycled"


def entry(stack: Stack, sites: list[Site], recipe: Recipe, network: FeedForward) -> dict[str, Any]:
    """Return the entry of config.json for the MoE layers of a stack; `nn.shape.Shape` reads it."""
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
        "shared_size": sites[0].shared_width,
        "activation": stack.activation,
        "gated": network.gate is not None,
        "bias": network.up_bias is not None,
        "dropout": stack.dropout,
        "causal": stack.causal,
        "router": recipe.router.as_built(),
        **({"response_norm": True} if network.response() else {}),
    }


def config(
    raw: Mapping[str, Any],
    model_type: str,
    architecture: str,
    entries: list[dict[str, Any]],
    pooled: int,
    options: Mapping[str, Any],
) -> Config:
    """Return config.json of the upcycled model: the dense config plus its MoE layers.

    `options` are arguments of the dense class besides its config. If the mean of the patches replaces the
    class token, `pooled` is the number of tokens before the patches.
    """
    pooling = {"mean_pooling_after": pooled} if pooled else {}
    kept = {k: v for k, v in raw.items() if (k, v) != ("quantization_config", None)}
    return {
        **kept,
        "architectures": [CLASS_PREFIX + architecture],
        "model_type": PREFIX + model_type,
        "moe": entries,
        **pooling,
        **({"class_options": dict(options)} if options else {}),
    }


def dense_type(config: Mapping[str, Any]) -> str | None:
    """Return the dense model_type that an upcycled config was made from, or None if it is another config."""
    model_type = config.get("model_type")
    upcycled = isinstance(model_type, str) and model_type.startswith(PREFIX) and "moe" in config
    return model_type.removeprefix(PREFIX) if upcycled and isinstance(model_type, str) else None


def dense_config(config: Mapping[str, Any]) -> Config:
    """Return the config of the dense model that an upcycled config contains."""
    out = {k: v for k, v in config.items() if k not in ("moe", "mean_pooling_after", "class_options")}
    named = [str(name).removeprefix(CLASS_PREFIX) for name in out.get("architectures") or ()]
    return {**out, "model_type": dense_type(config), "architectures": named}

"""Blocks that predict further tokens: left out, kept, or with experts like the layers (`moe.mtp`).

transformers never reads them; vLLM and SGLang draft with them (multi-token prediction, DeepSeek-V3, arXiv
2412.19437, section 2.2). Both build them as they build the layers of the model, so those of a native Mixture
of Experts have experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from upcycle.dense.due import refuse_other_shapes, refuse_surplus
from upcycle.dense.leaving_out import dropped
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, listed
from upcycle.families import Config, Stack
from upcycle.families._further import Further
from upcycle.init import Site
from upcycle.recipe import Recipe
from upcycle.targets import Target, _moe_layer
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy, Stored

STACK = "mtp"  # the name of these blocks in streams of random numbers
_ROOT = "model."


@dataclass(frozen=True, kw_only=True)
class Predictor(Dense):
    """The blocks that predict further tokens, under the names of the layers of a model of their own."""

    further: Further

    @cached_property
    def tensors(self) -> dict[str, Lazy]:
        return {_ROOT + name.removeprefix(self.further.prefix): t for name, t in self.stored.items()}

    @property
    def stored(self) -> dict[str, Lazy]:
        """The tensors by their names on disk."""
        found = self.checkpoint.tensors.items()
        return {name: Stored(self.checkpoint, info) for name, info in found if self.further.owns(name)}

    def stack(self, name: str) -> Stack:
        return self.stacks[0]

    def feed_forward(self, layer: int, stack: str = "layers") -> FeedForward:
        return super().feed_forward(layer)


def admitted(dense: Dense, recipe: Recipe) -> Dense:
    """Return the dense model, whose config counts the blocks if the recipe keeps them as they are.

    Raises `UpcycleError` if it has none, or if they are not what its config says.
    """
    if recipe.moe.mtp == "drop":
        return dense
    _predictor(dense, recipe)
    return replace(dense, keeps_further=True) if recipe.moe.mtp == "keep" else dense


def _predictor(dense: Dense, recipe: Recipe) -> Predictor:
    """Return the blocks. Raises `UpcycleError` if they are missing, misshapen, or not of the config."""
    further, opened = dense.family.further, dense.checkpoint
    if further is None:
        raise UpcycleError(
            f"moe.mtp = {recipe.moe.mtp}: upcycle knows of no blocks that predict further tokens in a "
            f"{dense.family.model_type}; take it out"
        )
    count = dense.place.config(opened.config).get(further.counted) or 0
    expected = dense.family.further_weights(dense.config, count)
    stored = {name: info for name, info in opened.tensors.items() if further.owns(name)}
    if gone := sorted(stored.keys() & dropped(opened, recipe.drop).keys()):
        raise UpcycleError(
            f"drop leaves out {listed(gone)}, and moe.mtp = {recipe.moe.mtp} wants such blocks; take one of "
            f"them out"
        )
    if not stored or not count:
        raise UpcycleError(
            f"moe.mtp = {recipe.moe.mtp}: {opened.folder} holds {len(stored)} tensors of blocks that predict "
            f"further tokens, and its config.json says {further.counted} = {count}; set moe.mtp = drop"
        )
    refuse_other_shapes(
        opened.folder,
        {name: weight.shape for name, weight in expected.items()},
        {name: (info.name, info.shape) for name, info in stored.items()},
    )
    refuse_surplus(opened, sorted(stored.keys() - expected.keys()), dense.family.model_type)
    return Predictor(
        checkpoint=opened,
        family=dense.family,
        config={**dense.config, "num_hidden_layers": count},
        left_out={},
        place=dense.place,
        further=further,
    )


def added(
    dense: Dense,
    recipe: Recipe,
    target: Target,
    sites: tuple[Site, ...],
    config: Config,
    tensors: Mapping[str, Lazy],
) -> tuple[Config, Mapping[str, Lazy]]:
    """Return config and tensors with the blocks that the recipe asks for.

    They are those of the source itself, whatever else experts and backbone are made of. With
    `moe.mtp = upcycle` they have experts as the last layer has.

    Raises `UpcycleError` if the target cannot have the blocks that the recipe asks for.
    """
    if recipe.moe.mtp == "drop":
        return config, tensors
    names = target.layer_names()
    if recipe.moe.mtp == "keep":
        if names is not None:
            raise UpcycleError(
                f"moe.mtp = keep: whoever reads the blocks of a {target.model_type} that predict further "
                f"tokens expects experts in them; set it to upcycle or drop"
            )
        return config, {**tensors, **_predictor(dense, recipe).stored}
    if names is None:
        raise UpcycleError(
            "moe.mtp = upcycle is for a native target: no program reads experts in such blocks of an "
            "upcycled model; set it to keep or drop"
        )
    _refuse_measured(recipe)
    model = _predictor(dense, recipe)
    prefix = model.further.prefix
    out = {
        name: tensor
        for name, tensor in model.stored.items()
        if not any(
            model.stacks[0].owns(_ROOT + name.removeprefix(prefix), i) for i in range(model.stacks[0].count)
        )
    }
    count = model.config["num_hidden_layers"]
    own = [replace(sites[-1], stack=STACK, layer=layer, blocks=count) for layer in range(count)]
    others = [replace(sites[-1], layer=layer) for layer in dense.stacks[0].numbers]
    recipe.init.check_together([*others, *own])
    for layer, site in enumerate(own):
        made = _moe_layer.tensors([model], site, recipe, names, model.tensors)
        _moe_layer.add(out, f"{prefix}layers.{layer}", made)
    raw = dense.place.config(dense.checkpoint.config)
    about = {key: value for key, value in raw.items() if key.startswith(model.further.keys)}
    return target.with_own(config, about), {**tensors, **out}


def _refuse_measured(recipe: Recipe) -> None:
    """Refuse experts and routers that are made of what these blocks do not have."""
    if recipe.init.donors or recipe.init.selects or recipe.router.start.from_data:
        raise UpcycleError(
            f"moe.mtp = upcycle: init {recipe.init.name} with router.init = {recipe.router.start.name} takes "
            f"other checkpoints or statistics, which there are none of for blocks that predict further "
            f"tokens; set it to drop"
        )

"""The numbers of experts that a section [grow] gives a recipe, or the reason why the two do not fit."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from upcycle.dense.mixtures import Mixture
from upcycle.errors import UpcycleError
from upcycle.nn.routers.top_k import TopK

if TYPE_CHECKING:
    from upcycle.recipe import Grow, Recipe


def resolved(recipe: Recipe, source: Mixture) -> Recipe:
    """Return the recipe with the numbers of experts that `[grow]` makes of this source.

    Raises `UpcycleError` if the two do not fit, or if the recipe asks for what growth would ignore.
    """
    grow = recipe.grow
    assert grow is not None
    if recipe.successor is not None:
        raise UpcycleError(
            "[successor] makes a narrower model of a dense source, and [grow] does not; take one out"
        )
    if recipe.parts:
        raise UpcycleError(
            f"[{next(iter(recipe.parts))}]: a source that grows has one stack of blocks; take it out"
        )
    if not isinstance(recipe.router, TopK):
        raise UpcycleError(
            f"router.name = {recipe.router.name}: a source that grows keeps its router; take it out"
        )
    count, found = _count(grow, source), dataclasses.replace
    moe = found(
        recipe.moe,
        num_experts=count,
        top_k=_top_k(grow, source, count),
        granularity=_granularity(source) if grow.dense_layers else 1,
    )
    router = found(recipe.router, normalize=source.renormalizes)
    out = found(recipe, moe=moe, router=router)
    _refuse_ignored(recipe, out, source)
    return out


def _count(grow: Grow, source: Mixture) -> int:
    """Return the number of experts of a layer."""
    old = source.num_experts
    count = grow.experts or grow.factor * old
    if count < old:
        raise UpcycleError(
            f"grow.experts = {count}, and {source.checkpoint.folder} has {old} experts; give more"
        )
    if count == old and not grow.dense_layers and grow.shared_width <= source.shared_width:
        raise UpcycleError(
            f"[grow] makes {count} experts of {old}, which are the same; raise grow.factor or grow.experts, "
            f"or set grow.dense_layers = true"
        )
    if grow.dense_layers and len(source.moe_layers) == source.config["num_hidden_layers"]:
        raise UpcycleError(
            f"grow.dense_layers: all layers of {source.checkpoint.folder} have experts; take it out"
        )
    _refuse_shared_width(grow, source)
    if grow.choose == "all" and count % old:
        raise UpcycleError(
            f"grow.choose = all copies all {old} experts equally often, and grow.experts = {count} is no "
            f"multiple of {old}; take a multiple, or choose = utility"
        )
    if grow.choose == "utility" and count > grow.most_copies * old:
        raise UpcycleError(
            f"{count} experts need more than grow.most_copies = {grow.most_copies} copies of some of the "
            f"{old} experts; take fewer experts, or raise it"
        )
    return count


def _refuse_shared_width(grow: Grow, source: Mixture) -> None:
    """Refuse a shared expert if the class has none, or one narrower than the source's."""
    if grow.shared_width and not source.shared_width:
        raise UpcycleError(
            f"grow.shared_width = {grow.shared_width}: a {source.family.model_type} has no shared expert; "
            f"take it out"
        )
    if 0 < grow.shared_width < source.shared_width:
        raise UpcycleError(
            f"grow.shared_width = {grow.shared_width}, and the shared expert of {source.checkpoint.folder} "
            f"has {source.shared_width} neurons; give more, or 0 to keep these"
        )


def _top_k(grow: Grow, source: Mixture, count: int) -> int:
    """Return the number of experts per token."""
    if grow.top_k > count:
        raise UpcycleError(f"grow.top_k = {grow.top_k} is more than the {count} experts that there are")
    if not grow.top_k and source.top_k * count % source.num_experts:
        raise UpcycleError(
            f"{count} experts are {count / source.num_experts:.4g} times those of the source, and a token "
            f"cannot take {source.top_k} times as many; set grow.top_k"
        )
    return grow.top_k or source.top_k * count // source.num_experts


def _granularity(source: Mixture) -> int:
    """Return the number of experts that the network of a dense layer is cut into."""
    whole, part = source.config["intermediate_size"], source.config[source.native.width_field]
    if whole % part:
        raise UpcycleError(
            f"grow.dense_layers: the {whole} neurons of a dense layer cannot be cut into experts of {part} "
            f"neurons, which all experts of a {source.family.model_type} have; leave these layers dense"
        )
    return int(whole // part)


def _refuse_ignored(given: Recipe, out: Recipe, source: Mixture) -> None:
    """Refuse keys of other sections that growth would ignore."""
    table, settled, usual = given.as_table(), out.as_table(), type(given).of().as_table()
    new_layers = out.grow is not None and out.grow.dense_layers  # they are made by [init] and [router]
    for section in ("moe", "router") if new_layers else ("moe", "init", "router"):
        for key, value in table[section].items():
            if key in ("untie", "target") or (new_layers and section == "router" and key != "normalize"):
                continue
            known = [usual[section].get(key)]
            if key in ("num_experts", "top_k", "granularity", "normalize"):  # a recorded recipe has them
                known.append(settled[section][key])
            if value not in known:
                raise UpcycleError(
                    f"{section}.{key} = {value} is about experts that are made of dense networks, and [grow] "
                    f"copies those that are there; take it out, or set a key of [grow]"
                )
    allowed = ("native", "grown", source.family.model_type)
    if given.moe.target not in allowed:
        raise UpcycleError(
            f"moe.target = {given.moe.target}: a {source.family.model_type} that grows stays one; take it out"
        )

"""One MoE layer: which blocks become one, its scaled experts, its router, and its shared expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from upcycle.errors import UpcycleError, listed
from upcycle.families import Stack
from upcycle.init import Site
from upcycle.recipe import Recipe
from upcycle.system import memory
from upcycle.targets._layouts import MoeNames
from upcycle.tensors.computed import Drawn, Fill
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.dense.source import Dense

T = TypeVar("T")
NARROW = 128  # neurons of a shared expert that the architecture requires and the recipe does not ask for
MOST_EXPERTS = 1 << 16  # in all layers together; twice as many took over 30 s to plan
EXPERT_BYTES = 8 << 10  # measured memory for the names and the definition of one expert
SHARED_GATE_STD = 1e-7  # sigmoid(gate x) = 1/2 to 1e-6, and gate x is not exactly 0 (NaN in llama.cpp)


def sites(recipe: Recipe, dense: Dense, names: MoeNames) -> tuple[Site, ...]:
    """Return the blocks that become MoE layers, stack by stack.

    They are checked for what the initialisation and the router need.
    """
    parts = {stack.name: recipe.at(stack.name) for stack in dense.stacks}
    chosen = {stack.name: chosen_layers(parts[stack.name], stack) for stack in dense.stacks}
    refuse_too_many_experts(recipe, {name: (parts[name], len(layers)) for name, layers in chosen.items()})
    out = []
    for stack in dense.stacks:
        part = parts[stack.name]
        moe, router = part.moe, names.routing(part.router)
        router.start.check(moe.num_experts, moe.granularity)
        width = moe.expert_width or stack.width // moe.granularity
        shared = _shared_width(part, names, stack.width, width) if chosen[stack.name] else 0
        for layer in chosen[stack.name]:
            origin = dense.origin(layer, stack.name)
            site = Site(
                stack=stack.name,
                layer=layer,
                blocks=stack.count,
                num_experts=moe.num_experts,
                top_k=moe.top_k,
                granularity=moe.granularity,
                dense_width=origin.width,
                hidden=stack.hidden,
                dense_hidden=origin.hidden,
                expert_width=width,
                universal_experts=moe.universal_experts,
                universal_width=(moe.universal_width or width // 4) if moe.universal_experts else 0,
                shared_width=shared,
                seed=recipe.seed,
                grouped_router=router.start.groups and router.linear,
                uniform_router=router.start.uniform(router.std),
                gate_sum=router.gate_sum(moe.num_experts, moe.top_k) if router.rescale else 1.0,
                even_weights=router.even and router.rescale,
            )
            recipe.init.check(site)
            if stack.width % moe.granularity:
                raise UpcycleError(
                    f"moe.granularity = {moe.granularity} does not divide the successor's width {stack.width}"
                )
            out.append(site)
    if not out:
        raise UpcycleError("moe.layers chooses no layer; the result would be the dense model")
    recipe.init.check_together(out)
    return tuple(out)


def refuse_too_many_experts(recipe: Recipe, stacks: Mapping[str, tuple[Recipe, int]]) -> None:
    """Refuse so many experts that they would fill the memory, before the first one is made.

    `stacks` has the recipe of each stack and the number of its blocks that become MoE layers.
    """
    each = ((part.moe.num_experts + part.moe.universal_experts, count) for part, count in stacks.values())
    total = sum(experts * count for experts, count in each)
    room = memory.available()
    most = MOST_EXPERTS if room is None else min(MOST_EXPERTS, room // EXPERT_BYTES)
    if total > most:
        raise UpcycleError(
            f"moe.num_experts = {recipe.moe.num_experts} makes {total:,} experts in all layers together; "
            f"{most:,} are taken at most here, so take fewer experts or fewer layers"
        )


def chosen_layers(recipe: Recipe, stack: Stack) -> list[int]:
    """Return the blocks that `moe.layers` selects, by their numbers in the stack.

    `every_other` is 1, 3, 5, ...; `last_half` is those from count // 2 on. Both count networks, because some
    blocks may have none. In a model of stages the numbers continue from stage to stage.
    """
    layers, count = recipe.moe.layers, stack.total or len(stack.numbers)
    places = {stack.first + place: number for place, number in enumerate(stack.numbers)}
    if layers == "all":
        return list(places.values())
    if layers == "every_other":
        return [number for place, number in places.items() if place % 2]
    if layers == "last_half":
        return [number for place, number in places.items() if place >= count // 2]
    if stack.having:  # the numbers are those of blocks
        if wrong := sorted({*layers} - {*(range(stack.count) if stack.total else stack.numbers)}):
            having = listed([*map(str, stack.numbers)], 12)
            raise UpcycleError(f"moe.layers has {wrong}; the layers that have a network are {having}")
        return sorted({*layers} & {*stack.numbers})
    if wrong := [i for i in sorted(set(layers)) if not 0 <= i < count]:
        where = "model" if stack.name == "layers" or stack.total else stack.name
        raise UpcycleError(f"moe.layers has {wrong}; the {where} has layers 0 to {count - 1}")
    return [number for place, number in places.items() if place in layers]


def refuse_look_ahead(dense: Dense, recipe: Recipe) -> None:
    """Raise `UpcycleError` for a router that reads later tokens, in a causal stack that gets experts."""
    for stack in dense.stacks:
        part = recipe.at(stack.name)
        if stack.causal and not part.router.causal and chosen_layers(part, stack):
            where = {"layers": "a decoder", "decoder": "the decoder"}.get(stack.name, "a causal stack")
            under = f", under [{stack.name}.router]" if stack.name == "decoder" else ""
            raise UpcycleError(
                f"router {part.router.name} cannot stand in {where}: {part.router.not_in_a_decoder}{under}"
            )


def _shared_width(recipe: Recipe, names: MoeNames, full: int, width: int) -> int:
    """Return the neurons of the shared expert, or 0 if there is none.

    The dense network has `full` neurons, and an expert has `width`.
    """
    asked, shared, granularity = recipe.moe.shared_experts, names.shared, recipe.moe.granularity
    if shared is None:
        if asked:
            raise UpcycleError(f"{names.model_type} has no shared expert; set moe.shared_experts = 0")
        return 0
    if not asked:
        return {"narrow": min(NARROW, full), "full": width, None: 0}[shared.mandatory]
    if recipe.init.chooses_shared and shared.combine != "sum":
        raise UpcycleError(
            f"init {recipe.init.name} adds the shared expert as it is, and {names.model_type} weighs it; "
            f"set moe.target = upcycled"
        )
    if not recipe.init.chooses_shared and asked != granularity:
        raise UpcycleError(
            f"moe.shared_experts = {asked} of 1/{granularity} of the dense width; the shared expert is the "
            f"dense network itself, so it must be 0 or moe.granularity ({granularity})"
        )
    wanted = asked * full // granularity
    if shared.experts_wide is not None and (built := shared.experts_wide(asked) * width) != wanted:
        raise UpcycleError(
            f"{names.model_type} builds a shared expert of {built} neurons, as its experts have {width}, "
            f"and this recipe makes one of {wanted}; set moe.shared_experts = 0"
        )
    return wanted


def averaged(models: list[Dense], recipe: Recipe) -> dict[str, Lazy]:
    """Return every tensor of the dense models, combined by the initialisation's `backbone`."""
    mixed = in_backbone(models, recipe)
    return {name: recipe.init.merge([model.tensors[name] for model in mixed]) for name in models[0].tensors}


def in_backbone(models: list[T], recipe: Recipe) -> list[T]:
    """Return those of the dense models that everything outside the experts is made from."""
    return [models[place] for place in recipe.init.in_backbone]


def add(out: dict[str, Lazy], prefix: str, made: Mapping[str, Lazy]) -> None:
    """Add the tensors of a layer to `out`; a name that already exists is a bug of ours."""
    for name, tensor in made.items():
        if (full := f"{prefix}.{name}") in out:
            raise AssertionError(f"{full} is defined twice")
        out[full] = tensor


def tensors(
    models: list[Dense], site: Site, recipe: Recipe, names: MoeNames, every: Mapping[str, Lazy]
) -> dict[str, Lazy]:
    """Return the tensors of one MoE layer by their names below the layer's prefix.

    `models` are the dense models, the source first. `recipe` is that of the layer's stack. `every` has the
    combined tensors of the dense models.
    """
    networks = [model.origin(site.layer, site.stack) for model in models]
    hidden, dtype = site.hidden, networks[0].down.dtype
    asked, shared = recipe.moe.shared_experts > 0, names.shared
    part = recipe.init.shared(networks, site) if asked else None
    halved = asked and part is None and shared is not None and shared.combine in ("gated", "sum")
    half = 0.5 if halved else 1.0
    experts = _experts(networks, range(site.num_experts), site, recipe, half)
    router, rows = recipe.router, recipe.router.rows(site.all_experts)
    weight = router.start.weight(site, rows, dtype, router.std)
    out = {names.router: weight, **names.layout.write(experts)}
    if site.universal_experts:
        others = _experts(networks, range(site.num_experts, site.all_experts), site.universal, recipe, half)
        written = names.layout.write(others).items()
        out |= {f"universal.{name.removeprefix('experts.')}": tensor for name, tensor in written}
    out |= names.beside_router(recipe, site, _norm(models[0], site, every), dtype)
    if (neurons := recipe.init.representatives(site)) is not None:
        activation = models[0].stack(site.stack).activation
        started = router.from_neurons(networks[0].take(neurons), activation)
        beside = names.router.removesuffix("weight")
        out |= {f"{beside}{name}": tensor for name, tensor in started.items()}
    if shared and site.shared_width:
        # A successor's experts are made from the predecessor; its shared expert is its own, narrower network.
        whole = [model.feed_forward(site.layer, site.stack) for model in models]
        network = part or combined(whole, recipe).neurons(0, site.shared_width)
        if not asked:
            idle = Fill((hidden, site.shared_width), dtype, 0.0)
            network = replace(network, down=idle)
        elif part is None and shared.combine == "sum":
            network = network.scaled(down=0.5, down_bias=0.5)
        out |= shared.write(network)
        if shared.gate:
            std = SHARED_GATE_STD if asked else 0.02
            out[shared.gate] = Drawn((1, hidden), dtype, "normal", std, site.key("shared gate"))
    return out


def _norm(dense: Dense, site: Site, every: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Return weight and bias of the norm before the network, if there is one."""
    before = dense.stack(site.stack).norm_path.format(i=site.layer)
    return {part: every[f"{before}.{part}"] for part in ("weight", "bias") if f"{before}.{part}" in every}


def _experts(
    networks: list[FeedForward], numbers: range, site: Site, recipe: Recipe, half: float
) -> list[FeedForward]:
    """Return the experts with the given numbers, scaled."""
    gate, up, down = factors(recipe, site)
    # The outputs of a token's experts sum to the bias once, whatever share of the network each expert has.
    scales = {"gate": gate, "up": up, "down": down * half, "down_bias": half / site.gate_sum}
    return [recipe.init.make(networks, e, site).scaled(**scales) for e in numbers]


def combined(networks: list[FeedForward], recipe: Recipe) -> FeedForward:
    """Combine the networks of the dense checkpoints into one, as everything outside the experts is."""
    return FeedForward.merged(in_backbone(networks, recipe), recipe.init.merge)


def factors(recipe: Recipe, site: Site) -> tuple[float, float, float]:
    """Return the factors for gate, up and down of an expert, given what its router weights sum to."""
    factor = recipe.init.scale(site) / site.gate_sum
    if recipe.init.spread == "down":
        return 1.0, 1.0, factor
    if recipe.init.spread == "sqrt":
        return 1.0, math.sqrt(factor), math.sqrt(factor)
    root = factor ** (1 / 3)
    return root, root, root

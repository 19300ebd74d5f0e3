"""The caveats of a blueprint that a user should know before spending money on it, one sentence each."""

from __future__ import annotations

from upcycle.blueprints import spared
from upcycle.blueprints.blueprint import Blueprint
from upcycle.checkpoints.dtypes import BY_TORCH_NAME, FLOATS
from upcycle.dense import towers
from upcycle.dense.adapted import Adapted
from upcycle.dense.places import Alone, Body, Part, Within
from upcycle.errors import listed, shown
from upcycle.families._wrappers import VISION
from upcycle.init import Site
from upcycle.nn import kernels, router_rows
from upcycle.nn.routers import Router
from upcycle.recipe import Moe, Recipe
from upcycle.system.wording import layers_of, place_of


def _adapters(built: Blueprint) -> list[str]:
    """Warn about adapters beside the weights, which transformers loads on top if peft is installed."""
    return [
        f"{opened.name} has an adapter beside its weights (adapter_config.json), which is not in the result; "
        f"to keep it, merge it into the weights first"
        for opened in dict.fromkeys(model.checkpoint for model in (built.dense, *built.donors))
        if (opened.folder / "adapter_config.json").exists()
    ]


def _lost_changes(built: Blueprint) -> list[str]:
    """Say which changes of an adapter are left out, because they are to what is no expert."""
    out = []
    for place, model in enumerate(built.donors, start=1):
        if isinstance(model, Adapted) and (lost := spared.lost_changes(built, place)):
            kept = len(model.changes) - len(lost)
            modules = sorted({".".join(name.removesuffix(".weight").split(".")[-2:]) for name in lost})
            out.append(
                f"{model.adapter.checkpoint.name}: {kept} of the {len(model.changes)} matrices that it "
                f"changes are merged into experts; {len(lost)} are left out ({listed(modules, 8)}), because "
                f"what is no expert comes from elsewhere (init.backbone)"
            )
    return out


def warnings(built: Blueprint) -> list[str]:
    """Return a warning for each thing that may cost training time or that other programs do differently."""
    out = _of_part(built) + (_of_part(built.tower) if built.tower else []) + _counted(built)
    # Similar stacks give the same warnings.
    return [*dict.fromkeys(out)]


def of_weights(built: Blueprint) -> list[str]:
    """Return those of the warnings that are about weights, which a run from scratch draws anew."""
    out = []
    for part in (built, built.tower):
        if part is not None:
            new = _first_new(part)
            out += [*_of_experts(part), *(_of_zeros(part, new) if new else ()), *_of_rows(part)]
    return out


def _of_experts(built: Blueprint) -> list[str]:
    """Return the warnings about what experts are made of."""
    new = _first_new(built)
    if new is None:
        return _adapters(built)
    return [*built.recipe.init.warnings(new), *_adapters(built), *built.remarks, *_lost_changes(built)]


def _of_zeros(built: Blueprint, site: Site) -> list[str]:
    """Return the warning about a router that tells no expert from another."""
    row = built.dense.lengths[site.stack]
    taken = built.recipe.router.experts_per_token(site.num_experts, site.top_k, row)
    if not site.uniform_router or taken >= site.num_experts:
        return []
    return [
        "an all-zero router gives every expert the same score, and ties send every token to the same "
        "experts; use another router.init, or a small router.std"
    ]


def _of_rows(built: Blueprint) -> list[str]:
    """Return the warnings about the rows of routers."""
    rows = {place_of(site.stack, site.layer): rows for site, rows in built.router_rows.items()}
    return router_rows.warnings(rows)


def _first_new(built: Blueprint) -> Site | None:
    """Return the first layer that gets experts; None if all have some already."""
    return next((site for site in built.sites if site.growth is None), None)


def _counted(built: Blueprint) -> list[str]:
    """Say which part of a multimodal model FLOPs are counted in."""
    if not isinstance(built.dense.place, Part) or isinstance(built.dense.place, Alone):
        return []
    rest = "its vision tower has others" if built.tower else "the rest of it is as it was"
    return [
        f"FLOPs per token are those of the {built.dense.place.called} of a {built.target.model_type}; {rest}"
    ]


def _of_part(built: Blueprint) -> list[str]:
    """Return the warnings about one model, or one part of a multimodal one."""
    if not built.sites:
        return [*built.target.warnings(built), *_adapters(built)]
    new = _first_new(built)
    out = _of_experts(built) + (_of_new_layers(built, new) if new else [])
    if odd := _misaligned(built):
        out.append(
            f"{odd}: transformers' default kernel for experts refuses that, so they run one after another, "
            f'which is slower (experts_implementation="eager")'
        )
    if isinstance(place := built.dense.place, Body):
        named = built.source.config["architectures"][0]
        out.append(
            f"config.json names {named}, and only its body is stored: the result is a {place.named}, without "
            f"a head"
        )
    if built.config.get("use_cache") is False:
        out.append(
            "config.json says use_cache = false, as training scripts write it; the result says true, because "
            "generation would compute every token anew"
        )
    out += _of_rows(built)
    out += _unread(built) + _of_a_tower(built)
    out += _past_a_switch(built)
    out += _odd_widths(built)
    out += built.target.warnings(built)
    return out + built.dense.family.warnings(built.target.computes)


def _of_new_layers(built: Blueprint, site: Site) -> list[str]:
    """Return the warnings about layers that get experts; `site` is the first of them."""
    out = []
    if built.recipe.moe.pooling == "mean":
        out.append(
            "the head sees the mean of the patches and not the class token it was trained on: the function "
            "is not kept, and the head has to learn anew"
        )
    routed = [(part.moe, built.target.routing(part.router)) for part in built.parts.values()]
    if any(moe.top_k == 1 and router.shares_one and router.normalize for moe, router in routed):
        out.append(
            "top-1 with renormalised weights is always exactly 1: the router gets no gradient from the "
            "task; use top_k = 2 or more, or router.normalize = false where the target allows it"
        )
    out += _of_zeros(built, site)
    out += [note for moe, router in routed if (note := _not_renormalised(moe, router)) is not None]
    if any(getattr(part.router, "capacity_factor", None) for part in _causal(built)):
        out.append(
            "capacity in a causal stack: places are counted over the tokens at hand, so that generation with "
            "a cache, which sees one token at a time, drops none and differs from training"
        )
    if _leaves_weights_out(built) and not any(part.router.has_slots for part in built.parts.values()):
        out.append("weights are left out: the function is not kept, and the model has to be trained")
    for part in built.parts.values():
        if part.router.has_slots:
            out.append(f"a slot of {part.router.name} mixes tokens: the function is not kept")
        elif not part.router.reaches_all(part.moe.num_experts, part.moe.top_k):
            out.append(
                f"{part.router.name} with this capacity leaves some tokens without an expert: the layer adds "
                f"nothing to them, and the function is not kept"
            )
    network = built.dense.feed_forward(site.layer, site.stack)
    if network.response() and not built.preserves_function:
        out.append(
            f"{built.dense.family.model_type} normalises responses over all places of an image, an expert "
            f"over those that come to it: the function is kept only where every expert has all of them "
            f"(top_k = num_experts)"
        )
    return out


def _leaves_weights_out(built: Blueprint) -> bool:
    """Return whether the result lacks weights of the dense model that its function takes."""
    init, narrower = built.recipe.init, built.dense.whole is not built.dense
    return init.selects and (narrower or not all(map(init.preserves, built.sites)))


def _causal(built: Blueprint) -> list[Recipe]:
    """Return the recipes of the stacks that predict their own next token."""
    causal = {stack.name for stack in built.dense.stacks if stack.causal}
    return [part for name, part in built.parts.items() if name in causal]


def _not_renormalised(moe: Moe, router: Router) -> str | None:
    """Return a warning if the weights of a token's experts do not sum to one."""
    count, top_k = moe.num_experts, moe.top_k
    if router.sums_to_one(count, top_k) or (router.even and router.rescale):
        return None
    factor = 1 / router.gate_sum(count, top_k)
    if not router.rescale:
        return (
            f"the router's weights are not renormalised and experts are not rescaled: a layer starts "
            f"with a fraction of the dense network's output, 1 / {factor:g} or somewhat more"
        )
    return (
        f"the router's weights are not renormalised: experts are scaled by {factor:g} and the "
        f"function is kept only as far as the router scores all experts alike (router.std = "
        f"{router.std:g}; router.init = zeros does)"
    )


def _unread(built: Blueprint) -> list[str]:
    """Warn about the last layers of a vision tower if what is read is an earlier one's output (LLaVA)."""
    if built.recipe.moe.part != VISION or not built.sites:
        return []
    raw = built.source.config
    last = towers.first_unread(raw, built.sites[0].blocks)
    if not (idle := [str(site.layer) for site in built.sites if site.layer >= last]):
        return []
    return [
        f"the model reads the vision tower before its last layers (vision_feature_layer = "
        f"{shown(raw.get('vision_feature_layer'))}): experts in {layers_of(idle)} do nothing; leave them out "
        f"of moe.layers"
    ]


def _of_a_tower(built: Blueprint) -> list[str]:
    """Warn about what a vision tower that stays as it is lacks, where no image need pass through it."""
    dense = built.dense.whole
    if not isinstance(dense.place, Within) or isinstance(dense.place, Alone):
        return []
    stored = dense.checkpoint.tensors.keys() - dense.left_out.keys()
    around = [name for name in stored if dense.place.own(name) is None]
    _, lacks = towers.missing(dense.checkpoint.config, around)
    if not lacks:
        return []
    return [
        f"the vision tower lacks {listed(lacks)}, which its config calls for, though images need not pass "
        f"through it: transformers draws such tensors at random, and upcycle verify, load and train refuse "
        f"the model"
    ]


def _past_a_switch(built: Blueprint) -> list[str]:
    """Warn if generation with a cache goes on differently where the dense model switches."""
    said = built.dense.family.parts_ways(built.dense.config, built.target.computes)
    return [] if said is None else [said]


_BLOCKS = {128: "block-wise FP8 and the fused kernels of vLLM and SGLang", 256: "K-quants of llama.cpp"}


def _odd_widths(built: Blueprint) -> list[str]:
    """Warn about experts whose width is no whole number of the blocks that quantisation works in.

    A width that the dense network already has is nothing that the recipe could mend, and it is not named.
    """
    widths = {
        site.width
        for site in built.sites
        if site.width != built.dense.stack(site.stack).width and site.width >= min(_BLOCKS)
    }
    return [
        f"experts have {width:,} neurons, no multiple of {block}, which {what} work in; such files fall back "
        f"to other kernels or types, or cannot be made"
        for width in sorted(widths)
        for block, what in _BLOCKS.items()
        if width % block
    ]


def _misaligned(built: Blueprint) -> str | None:
    """Return a warning if expert rows do not start at a multiple of 16 bytes, which grouped_mm needs."""
    item = FLOATS[BY_TORCH_NAME[built.config["dtype"]]].itemsize
    for site in built.sites:
        for name, length in (("neurons", site.width), ("hidden units", site.hidden)):
            if not kernels.take_groups([length], item):
                return f"rows of {length} {name} take {length * item} bytes, no multiple of 16"
    return None

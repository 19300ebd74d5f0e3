"""What a person should know about a blueprint before spending money on it, one sentence each."""

from __future__ import annotations

from upcycle.blueprints import Blueprint
from upcycle.dtypes import BY_TORCH_NAME, FLOATS
from upcycle.errors import listed


def warnings(built: Blueprint) -> list[str]:
    """Everything that may cost training time, or that another program will compute otherwise."""
    moe, router = built.recipe.moe, built.recipe.router
    site = next(iter(built.sites.values()))
    out = list(built.recipe.init.warnings(site))
    if moe.top_k == 1 and router.normalize:
        out.append(
            "top-1 with renormalised weights is always exactly 1: the router gets no gradient from the "
            "task; use top_k = 2 or more, or router.normalize = false where the target allows it"
        )
    if site.uniform_router:
        out.append(
            "an all-zero router gives every expert the same score, and ties send every token to the same "
            "experts; use another init, or a small std"
        )
    if not router.normalize:
        out.append(
            f"the router's weights are not renormalised: experts are scaled by N / K = "
            f"{moe.num_experts / moe.top_k:g} and the function is kept only as far as the router is "
            f"uniform (std {router.std:g})"
        )
    if moe.shared_experts == 0 and built.shared_width:
        out.append(
            f"{built.native.model_type} cannot be without a shared expert: one of {built.shared_width} "
            f"neurons is there with a zero down projection, and training may use it"
        )
    if odd := _misaligned(built):
        out.append(
            f"{odd}: transformers' default kernel for experts refuses that; load with "
            f'experts_implementation="eager"'
        )
    for client, why in built.native.clients(built.config).items():
        out.append(f"{client} {why}: it will not reproduce this model's function")
    if unknown := built.dense.unknown_keys:
        out.append(
            f"config.json has keys that a {built.dense.family.model_type} of transformers does not read; "
            f"left out: {listed(list(unknown), 5)}"
        )
    return out + built.dense.family.warnings(built.native.model_type)


def _misaligned(built: Blueprint) -> str | None:
    """Which rows of the experts do not begin at a multiple of 16 bytes, as torch's grouped_mm wants."""
    item = FLOATS[BY_TORCH_NAME[built.config["dtype"]]].itemsize
    width = next(iter(built.sites.values())).width
    for name, length in (("neurons", width), ("hidden units", built.dense.config["hidden_size"])):
        if length * item % 16:
            return f"rows of {length} {name} take {length * item} bytes, no multiple of 16"
    return None

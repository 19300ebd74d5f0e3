"""Which target a configuration of mergekit-moe means, for its base model."""

from __future__ import annotations

from upcycle.targets import natives
from upcycle.translation import _base


def chosen(source: str, asked: str, *, shared: bool) -> tuple[str, list[str]]:
    """Return `moe.target` for a base model, empty if the family's own is meant, and remarks.

    `asked` is the native target that the configuration names, or empty. `shared` says that a shared expert is
    wanted, which not every native target has.
    """
    if (base := _base.natives(source)) is None:
        return _unchecked(source, asked, shared=shared)
    family, fitting = base
    if not fitting:
        return "upcycled", [f"{family} has no native MoE that computes the same, so moe.target = upcycled"]
    remarks = []
    if asked and asked not in fitting:
        remarks.append(f"architecture: {family} cannot become {asked} exactly, so it is left out")
        asked = ""
    first = asked or fitting[0]
    taken = (
        first if not shared else next((n for n in (first, *fitting) if natives.find(n).shared), "upcycled")
    )
    if taken != first:
        remarks.append(_without(first, taken))
    return ("" if taken == first and not asked else taken), remarks


def _unchecked(source: str, asked: str, *, shared: bool) -> tuple[str, list[str]]:
    """Return what `chosen` does, for a base model whose family cannot be told."""
    if asked and shared and natives.find(asked).shared is None:
        return "upcycled", [_without(asked, "upcycled")]
    if not asked and not shared:
        return "", []
    result = f"{asked or 'a native MoE'}{' with a shared expert' if shared else ''}"
    return asked, [
        f"{source} is no folder here with the config of a known family, so nothing says whether it can "
        f"become {result}: if `upcycle plan` refuses it, set moe.target = upcycled"
    ]


def _without(native: str, taken: str) -> str:
    """Return the remark that another target than `native` is taken."""
    opened = ", which only transformers opens" if taken == "upcycled" else ""
    return f"shared_experts: {native} has no shared expert, so moe.target = {taken}{opened}"

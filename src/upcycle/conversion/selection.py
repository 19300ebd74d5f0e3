"""`selection.npz`: the neurons, channels and heads of a larger network that each expert was made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from upcycle.blueprints.blueprint import Blueprint
from upcycle.dense.successors import Narrowed
from upcycle.init import Site
from upcycle.init._selecting import Selecting
from upcycle.tensors.positions import Positions

FILE = "selection.npz"


def selection(built: Blueprint) -> dict[str, np.ndarray]:
    """Return the chosen positions in the predecessor, ascending, int32, by name.

    The names are `neurons.STACK.LAYER.expert.E` (universal experts after the others, with `channels` beside
    them if each expert has its own), and in a narrower model `channels.STACK`, `heads.STACK.LAYER` and
    `neurons.STACK.LAYER`. The result is empty if nothing was chosen.
    """
    init, found = built.recipe.init, dict[str, Positions]()
    if not isinstance(init, Selecting):
        return {}
    if isinstance(built.dense, Narrowed):
        found |= built.dense.chosen
    for site in built.sites:
        for e in range(site.all_experts):
            of = _site_of(site, e)
            place = f"{site.stack}.{site.layer}.expert.{e}"
            found[f"neurons.{place}"] = init.neurons(e, of)
            if init.channels == "per_expert" and of.hidden < of.dense_hidden:
                found[f"channels.{place}"] = init.channels_of(e, of)
    return {name: positions.values.astype(np.int32) for name, positions in found.items()}


def _site_of(site: Site, e: int) -> Site:
    return site if e < site.num_experts else site.universal


def write(built: Blueprint, folder: Path) -> None:
    """Write the file if the initialisation chose positions."""
    if found := selection(built):
        np.savez_compressed(folder / FILE, **found)  # type: ignore[arg-type]

"""One expert of each layer with everything around it: the dense model that a later merge takes as a donor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from upcycle.blueprints.blueprint import Blueprint, as_written
from upcycle.blueprints.making import blueprint
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError
from upcycle.init.copy import Copy
from upcycle.system import whole_file
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import Lazy
from upcycle.training.exports import Format, Trained
from upcycle.training.exports._about import dense_provenance_of
from upcycle.training.exports._beside import lay
from upcycle.training.exports._on_disk import on_disk
from upcycle.training.exports.huggingface import open_to_others
from upcycle.training.start import Start


class Expert(Format):
    """Class, names and config of the dense model that a run started from, with expert N as its network."""

    summary = "a dense model with one expert of each layer as its network (--expert N)"
    takes_expert = True

    def write(self, trained: Trained, folder: Path, dtype: str) -> None:
        begun, names = trained.start, _names_of(trained)
        stored = on_disk(trained.model, begun, trained.types)
        made = {dense: stored[name] for dense, name in names.items()}
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
        config = as_written(_config(begun) | {"dtype": dtype, "torch_dtype": dtype})
        whole_file.write_json(folder / "config.json", config)
        open_to_others(folder)
        laid = lay(trained, folder, config)
        told = dense_provenance_of(trained, folder, laid, target=str(config["model_type"]))
        whole_file.write_json(folder / told.FILE, told.as_table())

    def parameters(self, trained: Trained) -> int:
        entries = trained.start.entries
        return sum(entries[name].lazy.size for name in _names_of(trained).values())


def _config(begun: Start) -> dict[str, Any]:
    """Return config.json of the dense model: with a head of its own, if the run has untied it."""
    config = dict(begun.dense.outer)
    return config if _untied(begun) is None else config | {"tie_word_embeddings": False}


def _untied(begun: Start) -> str | None:
    """Return the name of a head that the source has tied and this run trains on its own (moe.untie)."""
    built, tied = begun.built, begun.dense.family.tied
    if built is None or not built.recipe.moe.untie or tied is None or tied[0] in begun.dense.tensors:
        return None
    return tied[0]


def _names_of(trained: Trained) -> Mapping[str, str]:
    assert trained.expert is not None
    return _names(trained.start, trained.expert)


def _names(begun: Start, number: int) -> Mapping[str, str]:
    """Return where each tensor of the dense model is in the trained one, by its name on disk there.

    Raises `UpcycleError` if a tensor of the dense model is not there whole, or something would be lost.
    """
    built = begun.built
    if built is None or not built.sites:
        raise UpcycleError(
            "--expert takes one expert out of a Mixture of Experts, and this run has none; leave it out"
        )
    count = min(site.num_experts for site in built.sites)
    if number >= count:
        raise UpcycleError(f"--expert {number}, and the experts of a layer have the numbers 0 to {count - 1}")
    stored, entries = _with_copies(begun.dense, built, begun.entries)
    dense = {id(lazy): name for name, lazy in stored.items()}
    head = _untied(begun)
    places: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if name == head:
            places[name] = [name]
        elif (own := dense.get(id(entry.lazy))) is not None:
            places.setdefault(own, []).append(name)
        elif entry.shape[0] not in built.expert_counts:  # those of routers count experts
            raise UpcycleError(
                f"--expert: {name} of this model is no tensor of the dense one and would be lost; begin "
                f"with init.name = copy or with experts of other models (init.name = experts, "
                f"branch_train_mix), and with a target without shared experts"
            )
    experts = _experts(begun)
    lost = [own for own in begun.dense.stored if len(places.get(own, ())) not in (1, experts.get(own, 1))]
    if lost:
        raise UpcycleError(
            f"--expert: {lost[0]} has no place of its own in this model; start the run with init.name = copy "
            f"and a target that stores experts one by one"
        )
    return {
        own: sorted(found, key=_naturally)[number if len(found) > 1 else 0] for own, found in places.items()
    }


def _with_copies(
    dense: Dense, built: Blueprint, entries: Mapping[str, Entry]
) -> tuple[Mapping[str, Lazy], Mapping[str, Entry]]:
    """Return the dense model's tensors, and the MoE's as if all its experts were copies of one network.

    Experts of donors have the names and shapes that such copies have.
    """
    if not built.donors:
        return dense.stored, entries
    alike = blueprint(dense.checkpoint, replace(built.recipe, init=Copy()))
    return alike.dense.stored, {
        name: alike.entries[name] if entry is built.entries[name] else entry
        for name, entry in entries.items()
    }


def _experts(begun: Start) -> Mapping[str, int]:
    """Return the tensors of the networks that became experts, with the number of experts of their layer."""
    dense = begun.dense
    named = {id(lazy): name for name, lazy in dense.stored.items()}
    out = {}
    for site in begun.built.sites if begun.built else ():
        network = dense.origin(site.layer, site.stack)
        for lazy in (*network.matrices().values(), *network.biases().values(), *network.response().values()):
            if (name := named.get(id(lazy))) is not None:
                out[name] = site.num_experts
    return out


def _naturally(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


format = Expert

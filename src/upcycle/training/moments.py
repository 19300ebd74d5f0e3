"""The moments of a dense run's optimizer, beside its export, and those that an MoE has from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from upcycle import targets
from upcycle.blueprints.making import blueprint
from upcycle.checkpoints.checkpoint import Checkpoint, read_json
from upcycle.dense.admission import admit
from upcycle.errors import UpcycleError, listed
from upcycle.init import Site
from upcycle.recipe import Recipe
from upcycle.targets import _moe_layer
from upcycle.tensors.computed import Fill
from upcycle.tensors.entries import Entry
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run
from upcycle.training.start import Start, build

OPTIMIZER = "optimizer"  # folder of the moments next to an exported model


def carry_state(
    start: Start, run: Run, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Give the optimizer the dense run's moments, tiled to experts, and return the dense run's step.

    The router's moments are zero. The moments have the dense model's names and shapes, so the blueprint that
    makes the weights makes them too (Sparse Upcycling, B.6). Raises `UpcycleError` if they are missing or do
    not fit.
    """
    folder = start.dense.checkpoint.folder / OPTIMIZER
    if not (folder / "state.json").is_file():
        raise UpcycleError(
            f"optimizer.carry_state = true, and {start.dense.checkpoint.folder} has no {OPTIMIZER}/; make it "
            f"with `upcycle export RUN OUT --optimizer`, or set it to false"
        )
    if start.built and not start.built.target.keeps_narrow_bits(start.dense.family):
        raise UpcycleError(
            f"optimizer.carry_state = true: {start.dense.family.model_type} changes weights on their way to "
            f"{start.built.target.model_type}, and moments do not change with them; set it to false"
        )
    if run.recipe and start.built:
        _refuse_scaled(run.recipe, start.built.sites)
    step = read_json(folder / "state.json", f"{folder} has no state.json").get("step")
    if type(step) is not int or step < 0:
        raise UpcycleError(f"{folder / 'state.json'} is damaged: step = {step!r}; export the run again")
    moments: dict[str, dict[str, Tensor]] = {name: {} for name, _ in model.named_parameters()}
    for moment in _stored_moments(folder, run):
        with Checkpoint.open(folder / moment) as stored:
            entries = moments_of(stored, run)
            shaped = build(start, entries, run, ranks, torch.float32).to(ranks.device)
            given = dict(shaped.named_parameters())
            for name, parameter in model.named_parameters():
                moments[name][moment] = given[name].detach().to(parameter.dtype)
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter in trained:
            optimizer.state[parameter] = run.optimizer.carried(optimizer, parameter, step, moments[name])
    return step


def _refuse_scaled(recipe: Recipe, sites: Sequence[Site]) -> None:
    """Raise `UpcycleError` if experts are scaled copies of the network, because their moments are not."""
    for site in sites:
        part = recipe.at(site.stack)
        if site.growth is None and part.moe.shared_experts:
            raise UpcycleError(
                "optimizer.carry_state = true: with moe.shared_experts the experts and the shared one count "
                "half each, and their moments would have to be scaled; set it to false, or take "
                "moe.shared_experts out"
            )
        if _moe_layer.factors(part, site) != (1.0, 1.0, 1.0):
            raise UpcycleError(
                "optimizer.carry_state = true: without router.normalize the experts are scaled, and their "
                "moments would have to be; set one of the two, or router.rescale = false"
            )


def _stored_moments(folder: Path, run: Run) -> tuple[str, ...]:
    """Return the names of the optimizer's moments. Raises `UpcycleError` if `folder` lacks one."""
    wanted = run.optimizer.moments
    if not wanted:
        raise UpcycleError(
            f"optimizer.carry_state = true: optimizer.name = {run.optimizer.name}, as it is set, has no "
            f"moments that could be tiled to experts; set it to false"
        )
    if any(not (folder / moment).is_dir() for moment in wanted):
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UpcycleError(
            f"optimizer.carry_state = true: {folder} has {listed(there)}, and optimizer.name = "
            f"{run.optimizer.name} takes {listed([*wanted])}; take the optimizer of that run, or set it "
            f"to false"
        )
    return wanted


def moments_of(stored: Checkpoint, run: Run) -> Mapping[str, Entry]:
    """Return the moments of every tensor of the model, made from those of the dense model."""
    if run.recipe is None:
        return admit(stored).entries
    kind = targets.recorded({"target": run.recipe.moe.target})
    copied = blueprint(stored, kind.moments(run.recipe))
    # Tensors that come from no source tensor (constants, gates of shared experts) have no moments yet. The
    # same holds for a router, even if it contains a norm of the dense model.
    return {
        n: e
        if not copied.target.draws(n) and any(True for _ in e.lazy.sources())
        else replace(e, lazy=Fill(e.shape, e.lazy.dtype, 0.0))
        for n, e in copied.entries.items()
    }

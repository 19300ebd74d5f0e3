"""`upcycle.foretell`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.blueprints.blueprint import Blueprint, blueprint
from upcycle.checkpoints.hub import peek
from upcycle.errors import UpcycleError
from upcycle.forecast import outlook
from upcycle.forecast.outlook import Outlook
from upcycle.forecast.setting import Recompute, Setting
from upcycle.recipe import Recipe, RecipeLike
from upcycle.sharding.layout import Layout
from upcycle.system import gpus

if TYPE_CHECKING:
    from upcycle.training.run import Run

CONTEXT = 4096  # tokens of a row if none are given and the model has as many positions


def foretell(
    source: str | Path,
    recipe: RecipeLike = None,
    *,
    world: int,
    gpu: str = "H100",
    replicate: int = 1,
    tp: int = 1,
    ep: int = 1,
    rows: int = 1,
    context: int | None = None,
    recompute: Recompute = True,
) -> Outlook:
    """Return what a step of training `recipe`'s model needs on one of `world` GPUs of the kind `gpu`.

    The ranks are laid out as replicate x fsdp x tp, with experts shared out over `ep` of them. A rank
    computes on `rows` rows of `context` tokens. `recompute` is activation checkpointing. Only headers are
    read. Raises `UpcycleError` if source, recipe and layout do not fit.
    """
    for name, value in (("world", world), ("rows", rows), ("context", context)):
        if value is not None and (type(value) is not int or value < 1):
            raise UpcycleError(f"{name} = {value}; it must be a whole number of 1 or more")
    built = blueprint(peek(source), Recipe.of(recipe))
    fsdp = world // max(1, replicate * tp)
    layout = Layout(replicate=replicate, fsdp=fsdp, tp=tp, ep=ep)
    _refuse(layout, built, world)
    setting = Setting(
        built=built, layout=layout, lengths=_lengths(built, context), rows=rows, recompute=recompute
    )
    return outlook.of(setting, gpus.find(gpu))


def foretell_run(run: Run, *, world: int, gpu: str = "H100") -> Outlook:
    """Return what a step of a run needs on one of `world` GPUs of the kind `gpu`.

    Without train.micro_batch a rank has all its rows in one forward pass. Everything is trained. A teacher
    and the masks of data.isolate are not counted; `rehearse` counts a teacher and what is frozen. Raises
    `UpcycleError` if the run does not fit the world, or trains a dense model.
    """
    if run.recipe is None:
        raise UpcycleError("a forecast is for a Mixture of Experts, and the run file has no [moe]; add one")
    built = blueprint(peek(run.source), run.recipe)
    train = run.train
    layout = run.parallel.layout(world)
    _refuse(layout, built, world)
    share = train.rows // layout.dp
    if layout.dp * share != train.rows or not share:
        raise UpcycleError(
            f"the {train.rows} rows of a global batch do not divide among {layout.dp} groups of ranks; "
            f"change train.batch_tokens, train.batch_size or the layout"
        )
    rows = min(train.micro_batch or share, share)
    setting = Setting(
        built=built,
        layout=layout,
        lengths=_lengths(built, train.sequence_length),
        rows=rows,
        passes=-(-share // rows),
        precision="mixed" if train.precision == "auto" else train.precision,
        # The selective form computes no product twice. Its memory is at most that without any.
        recompute=train.activation_checkpointing is True,
        moments=run.optimizer.copies,
    )
    return outlook.of(setting, gpus.find(gpu))


def _refuse(layout: Layout, built: Blueprint, world: int) -> None:
    """Raise `UpcycleError` if a layout does not fit the world or the model."""
    config = built.dense.config
    heads = [config[n] for n in ("num_attention_heads", "num_key_value_heads") if config.get(n)]
    layout.refuse(world, experts=built.expert_counts, heads=heads, prefix="parallel.")


def _lengths(built: Blueprint, context: int | None) -> dict[str, int]:
    """Return the tokens of a row in each stack of blocks."""
    dense = built.dense
    if "image_size" in dense.config:
        return dict(dense.family.lengths(dense.config))
    length = context or min(CONTEXT, dense.family.length(dense.config))
    return {stack.name: length for stack in dense.stacks}

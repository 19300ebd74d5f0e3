"""calibrate, train, export, gguf: the commands that run a model over data, or save what was made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

import upcycle
from upcycle.cli.options import (
    Count,
    Domains,
    Drop,
    Field,
    File,
    Flag,
    Names,
    Number,
    Out,
    Source,
    Text,
    Whole,
    app,
    domains,
    names,
    refuse_both,
)
from upcycle.cli.screen import out as screen
from upcycle.cli.screen import show_json
from upcycle.system.wording import size

if TYPE_CHECKING:
    from upcycle.records.statistics import Statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The statistics, and the data that they are taken on.

    Args:
        images: a parquet file, or a folder with one folder a class
        text: text, JSON lines or parquet, as `upcycle train` reads them
        prompts: a TOML file with a [[domain]] for each expert: name, positive_prompts,
            negative_prompts, or a text
        domain: the text of an expert's domain, and its name
        collect: statistics to collect: l1, l2, count, co_activation, co_marker, gradient; for routers mean,
            second_moment, sample, mergekit_hidden, mergekit_hidden_avg, cheap_embed (l1, l2, count and, with
            domains, mean, if absent)
        positions: activations to collect them of: neurons, channels, heads
        limit: largest number of images or rows, of each domain; 0: all (30000 images, 2048 rows of
            text, if absent)
        length: tokens of a row of text (512, or as many as the model takes, if absent)
        field: the text in JSON lines and parquet
        batch_size: images or rows of a forward pass
        threshold: a number above it counts as active
        sample: tokens in the sample of each layer
        marked: neurons of a token that co_marker counts as active
        seed: seed of the random order of the examples, and of the sample
        in_order: take the first examples instead
        device: device, such as cpu or cuda:1 (an accelerator if there is one, if absent)
        cache: folder for decoded images and token files
        allow_nonfinite: accept NaN and inf in the weights
    """

    images: File = None
    text: File = None
    prompts: File = None
    domain: Domains = ()
    collect: Names = ""
    positions: str = "neurons,channels,heads"
    limit: Whole = None
    length: Whole = None
    field: Field = "text"
    batch_size: Count = 32
    threshold: float = 0.0
    sample: Count = 2_048
    marked: Count = 10
    seed: Count = 0
    in_order: Flag = False
    device: Text = None
    cache: File = None
    allow_nonfinite: Flag = False
    drop: Drop = ()

    def calibrate(self, source: str, out: Path) -> Statistics:
        """Collect these statistics of a model, and write them to `out`."""
        given = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        given |= {"collect": names(self.collect) or None, "positions": names(self.positions)}
        return upcycle.calibrate(source, out, domains=domains(given.pop("domain")), **given)


@app.command
def calibrate(
    source: Source, statistics: OmitArgPrefixes[CalibrationOptions], *, out: Path, json: Flag = False
) -> None:
    """Collect statistics of SOURCE's activations on images or text, for initialisations that need them.

    With --prompts or --domain, one for each expert in their order, they are also those that routers start
    from. The same command resumes a pass that was stopped.

    Args:
        out: the file to make, FILE.safetensors; until it is complete, sums are in FILE.safetensors.partial
        json: print JSON
    """
    from upcycle.cli.views.statistics import show_calibrated

    found = statistics.calibrate(source, out)
    show_json(found.as_dict()) if json else show_calibrated(found)


@app.command
def train(
    run: Annotated[Positional[Path], arg(metavar="RUN.toml")],
    *,
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="KEY=VALUE", help="any key of a run file, such as train.steps=100"),
    ] = (),
    resume: Flag = False,
    dry_run: Flag = False,
    world: Whole = None,
    json: Flag = False,
) -> None:
    """Train as a run file says: upcycle and continue, continue the dense model, or start from scratch.

    The same command works under torchrun: `torchrun --nproc-per-node 8 -m upcycle train RUN.toml`.

    Args:
        run: the run file
        resume: continue from the newest checkpoint of the run, or begin if there is none
        dry_run: only say what the ranks of this run hold and read; nothing is trained or written
        world: processes of the dry run (1, if absent)
        json: print the dry run as JSON
    """
    import os

    from upcycle.cli.views.run import show_trained
    from upcycle.training.run import Run

    refuse_both("--dry-run", "--resume", dry_run and resume, "a dry run begins at the first step")
    if dry_run:
        from upcycle.api.training import rehearse
        from upcycle.cli.views.rehearsal import show_rehearsed

        rehearsed = rehearse(Run.load(run, set), world=1 if world is None else world)
        show_json(rehearsed.as_dict()) if json else show_rehearsed(rehearsed)
        return
    if world is not None or json:
        raise upcycle.UpcycleError(
            "--world and --json belong to --dry-run; torchrun starts processes of a run"
        )
    result = upcycle.train(Run.load(run, set), resume=resume)
    if int(os.environ.get("RANK") or 0) == 0:
        show_trained(result)


@app.command
def export(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    out: Out,
    *,
    step: Whole = None,
    dtype: str = "source",
    optimizer: Flag = False,
    format: str = "huggingface",
    expert: Whole = None,
    average: Whole = None,
    decay: Number = None,
) -> None:
    """Write a checkpoint of a training run as a model folder.

    Args:
        run: the folder of a run (its `out`)
        out: the folder to make
        step: the checkpoint to take (the newest, if absent)
        dtype: source, float32, bfloat16 or float16
        optimizer: add the moments of the optimizer, for optimizer.carry_state of a later run
        format: the layout of the folder; huggingface is that of `upcycle convert`
        expert: write the dense model with expert N of each layer as its network instead
        average: take the mean of so many checkpoints, the newest up to `step`
        decay: take an exponential moving average instead, which keeps this part at every checkpoint
    """
    from upcycle.cli.views.run import show_exported

    made = upcycle.export(
        run,
        out,
        step=step,
        dtype=dtype,
        with_optimizer=optimizer,
        format=format,
        average=average,
        decay=decay,
        expert=expert,
    )
    show_exported(made)


@app.command
def gguf(
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")],
    out: Out,
    *,
    outtype: str = "auto",
    llama_cpp: File = None,
) -> None:
    """Write a model folder as a GGUF file, with llama.cpp's own converter.

    Args:
        folder: a folder that convert or export made, or any model that llama.cpp knows
        out: the file to make, NAME.gguf
        outtype: type of the matrices: auto, f32, f16, bf16 or q8_0
        llama_cpp: folder of llama.cpp's sources ($LLAMA_CPP, or what is installed, if absent)
    """
    made = upcycle.gguf(folder, out, outtype=outtype, llama_cpp=llama_cpp)
    screen.print(f"{made.path}: {size(made.bytes)}, by {made.converter}")

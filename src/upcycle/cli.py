"""The command line: `upcycle plan | advise | convert | verify | calibrate | train | ...`.

Results go to standard output, progress and errors to standard error. Exit code 0: done; 1: verify found
that a promise does not hold; 2: a mistake in what was given; 130: interrupted. Nothing heavy is imported
before a command runs.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, UseAppendAction, arg

from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from upcycle.recipe import Recipe

Source = Annotated[
    Positional[str],
    arg(metavar="SOURCE", help="dense checkpoint: a folder, or a hub id (owner/name, owner/name@revision)"),
]
Out = Annotated[Positional[Path], arg(metavar="OUT")]
Domains = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="[NAME=]PATH")]
Jobs = Annotated[int, arg(metavar="N", help="threads that read, compute and write")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What to build."""

    recipe: Annotated[
        Path | None, arg(metavar="FILE.toml", help="a recipe; the options below go over it")
    ] = None
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="KEY=VALUE", help="any key of a recipe, such as init.ratio=0.25; repeatable"),
    ] = ()
    experts: Annotated[int | None, arg(metavar="N", help="moe.num_experts (8)")] = None
    top_k: Annotated[int | None, arg(metavar="K", help="moe.top_k (2)")] = None
    init: Annotated[str | None, arg(metavar="NAME", help="init.name (copy); see `upcycle list`")] = None
    layers: Annotated[
        str | None, arg(metavar="SPEC", help="moe.layers: all, every_other, last_half or 1,3,5 (all)")
    ] = None
    target: Annotated[str | None, arg(metavar="NAME", help="moe.target (native); see `upcycle list`")] = None
    dtype: Annotated[str | None, arg(metavar="D", help="source, float32, bfloat16 or float16 (source)")] = (
        None
    )
    seed: Annotated[int | None, arg(metavar="N", help="seed of every random number (0)")] = None

    def read(self) -> Recipe:
        """The recipe these options describe."""
        from upcycle.recipe import Recipe, of_run_file, override, read_toml

        shortcuts = {
            "moe.num_experts": self.experts,
            "moe.top_k": self.top_k,
            "init.name": self.init,
            "moe.layers": _layers(self.layers),
            "moe.target": self.target,
            "dtype": self.dtype,
            "seed": self.seed,
        }
        table = of_run_file(read_toml(self.recipe)) if self.recipe else {}
        given = [f"{key}={value}" for key, value in shortcuts.items() if value is not None]
        return Recipe.of(override(table, [*given, *self.set]))


def _layers(spec: str | None) -> str | None:
    """`1,3,5` as TOML has it; names stay names."""
    if spec is None or not spec.replace(",", "").replace(" ", "").strip("[]").isdigit():
        return spec
    return f"[{spec.strip('[]')}]"


app = tyro.extras.SubcommandApp()


@app.command
def plan(
    source: Source, recipe: OmitArgPrefixes[RecipeOptions], *, json: bool = False, jobs: Jobs = 2
) -> None:
    """Show what a recipe makes of SOURCE and what it costs, reading headers only.

    Args:
        json: print JSON
    """
    from upcycle import console, cost

    result = cost.plan(source, recipe.read(), jobs=jobs)
    console.show_json(result.as_dict()) if json else console.show_plan(result)


@app.command
def advise(
    source: Source,
    recipe: OmitArgPrefixes[RecipeOptions],
    *,
    tokens: str,
    dense_tokens: str | None = None,
    gpus: int | None = None,
    gpu: str = "H100",
    context: int | None = None,
    json: bool = False,
) -> None:
    """Say what is known before spending: dense continuation, upcycling or from scratch? Reads headers only.

    Args:
        tokens: what the model would be trained on now, such as 100B
        dense_tokens: what SOURCE was trained on; much cannot be said without it, and nothing is assumed
        gpus: how many there are (the least number is worked out, if absent)
        gpu: of which kind: H100, H200, H800, A100 or A800
        context: tokens of a row of text (4096, or as many as the model takes, if absent)
        json: print JSON
    """
    from upcycle import console
    from upcycle.advise.gather import advise as ask
    from upcycle.advise.situation import Asked, parse_tokens

    asked = Asked(
        tokens=parse_tokens(tokens, "--tokens"),
        dense_tokens=None if dense_tokens is None else parse_tokens(dense_tokens, "--dense-tokens"),
        gpus=gpus, gpu=gpu, context=context,
    )  # fmt: skip
    result = ask(source, recipe.read(), asked)
    console.show_json(result.as_dict()) if json else console.show_advice(result)


@app.command
def convert(
    source: Source,
    out: Out,
    recipe: OmitArgPrefixes[RecipeOptions],
    *,
    resume: bool = False,
    jobs: Jobs = 2,
    shard_size: str = "5GB",
    allow_nonfinite: bool = False,
) -> None:
    """Write the Mixture of Experts that a recipe makes of SOURCE to the new folder OUT.

    Args:
        out: the folder to make; until it is whole it is called OUT.partial
        resume: go on with an OUT.partial that a broken run left
        shard_size: size of a weight file at most, such as 5GB or 500MB
        allow_nonfinite: take NaN and inf in the weights as they are
    """
    from upcycle import console
    from upcycle.cost import plan_of
    from upcycle.shards import parse_size
    from upcycle.write import convert as write

    built_from, size = recipe.read(), parse_size(shard_size)
    with console.bytes_bar("writing") as (progress, set_total):
        built = write(
            source,
            out,
            built_from,
            resume=resume,
            jobs=jobs,
            shard_size=size,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            planned=lambda b: set_total(b.nbytes),
        )
    console.show_converted(plan_of(built), out)


@app.command
def verify(
    source: Source,
    out: Out,
    *,
    json: bool = False,
    text: Path | None = None,
    logits: bool = True,
) -> None:
    """Prove that OUT is what its recipe makes of SOURCE: coverage, bytes, logits. Exit 1 if it is not.

    Args:
        out: a folder made by `upcycle convert`
        json: print JSON
        text: a text file to compare logits on, besides random tokens
        logits: compare the logits of both models in float32, which loads both
    """
    from upcycle import console
    from upcycle.proof import verify as check

    result = check(source, out, text=text, logits=logits)
    console.show_json(result.as_dict()) if json else console.show_proof(result)
    sys.exit(0 if result.holds else 1)


@app.command
def calibrate(
    source: Source,
    *,
    out: Path,
    images: Path | None = None,
    text: Path | None = None,
    collect: str = "l1,l2,count",
    positions: str = "neurons,channels,heads",
    limit: int | None = None,
    length: int | None = None,
    batch_size: int = 32,
    threshold: float = 0.0,
    seed: int = 0,
    in_order: bool = False,
    device: str | None = None,
    cache: Path | None = None,
    allow_nonfinite: bool = False,
    json: bool = False,
) -> None:
    """Collect statistics of SOURCE's activations on images or a text, for initialisations that ask for them.

    Started again as it was, a pass that was stopped goes on.

    Args:
        out: the file to make, FILE.safetensors; until it is whole, sums are kept in FILE.safetensors.partial
        images: a parquet file, or a folder with one folder a class
        text: text, JSON lines or parquet, as `upcycle train` reads them
        collect: what: l1, l2, count, co_activation, gradient
        positions: of what: neurons, channels, heads
        limit: images or rows at most; 0: all (30000 images, 2048 rows of text, if absent)
        length: tokens of a row of text (512, or as many as the model takes, if absent)
        batch_size: images or rows of a forward pass
        threshold: above which a number counts as active
        seed: of the random order that examples are taken in
        in_order: take the first examples instead
        device: such as cpu or cuda:1 (an accelerator where there is one, if absent)
        cache: folder for decoded images and token files
        allow_nonfinite: take NaN and inf in the weights as they are
        json: print JSON
    """
    from upcycle import console
    from upcycle.calibration import Asked
    from upcycle.calibration import calibrate as go

    asked = Asked(
        images=images, text=text, collect=_names(collect), positions=_names(positions), limit=limit,
        length=length, batch_size=batch_size, threshold=threshold, seed=seed, in_order=in_order,
        device=device, cache=cache, allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    with console.examples_bar("calibrating") as (progress, set_total):
        found = go(source, out, asked, progress=progress, planned=set_total)
    console.show_json(found.as_dict()) if json else console.show_calibrated(found)


def _names(listed: str) -> tuple[str, ...]:
    """`a, b` as names."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())


@app.command
def train(
    run: Annotated[Positional[Path], arg(metavar="RUN.toml")],
    *,
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="KEY=VALUE", help="any key of a run file, such as train.steps=100; repeatable"),
    ] = (),
    resume: bool = False,
) -> None:
    """Train as a run file says: upcycle and go on, continue the dense model, or start from scratch.

    The same command works under torchrun: `torchrun --nproc-per-node 8 -m upcycle train RUN.toml`.

    Args:
        run: the run file
        resume: go on from the run's newest checkpoint, or begin where there is none
    """
    import os

    from upcycle import console
    from upcycle.training.loop import train as go
    from upcycle.training.run import Run

    result = go(Run.load(run, set), resume=resume)
    if os.environ.get("RANK", "0") == "0":
        console.show_trained(result)


@app.command
def export(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    out: Out,
    *,
    step: int | None = None,
    dtype: str = "source",
    optimizer: bool = False,
) -> None:
    """Write a checkpoint of a training run as a model folder, in the layout of `upcycle convert`.

    Args:
        run: the folder of a run (its `out`)
        out: the folder to make
        step: the checkpoint to take (the newest, if absent)
        dtype: source, float32, bfloat16 or float16
        optimizer: add the Adam moments, for optimizer.carry_state of a later run
    """
    from upcycle import console
    from upcycle.training.export import export as write

    console.show_exported(write(run, out, step=step, dtype=dtype, with_optimizer=optimizer))


@app.command(name="eval")
def eval_(
    checkpoints: Annotated[Positional[tuple[str, ...]], arg(metavar="CHECKPOINT")],
    *,
    text: Annotated[
        UseAppendAction[tuple[Path, ...]],
        arg(
            metavar="FILE",
            help="score on a text what the model is made for: the next token (loss, perplexity, "
            "bits per byte), spans cut out (T5), masked tokens; repeatable",
        ),
    ] = (),
    images: Path | None = None,
    few_shot: Path | None = None,
    tasks: Annotated[str, arg(metavar="NAMES")] = "",
    task_files: Path | None = None,
    num_fewshot: int | None = None,
    superglue: Path | None = None,
    per_class: int = 10,
    length: int | None = None,
    stride: int | None = None,
    separator: str | None = None,
    batch_size: int = 0,
    limit: int = 0,
    cache: Path | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Score checkpoints, dense or Mixture of Experts, on data they were not trained on.

    Several checkpoints are compared with the first, with a standard error over the same examples.
    Results are put into eval.json in each checkpoint's folder (of a hub id, into --out alone).

    Args:
        checkpoints: folders of models, or hub ids
        images: top-1 accuracy on labelled images: a parquet file, or a folder with one folder a class
        few_shot: fit a linear probe on a few of these images, and test it on those of --images
        tasks: tasks of lm-evaluation-harness, such as arc_easy,piqa,blimp (needs the extra `eval`)
        task_files: folder of their data, NAME.jsonl and blimp/PARADIGM.jsonl; without it, from the hub
        num_fewshot: examples before each question of a task (what the task says, if absent)
        superglue: folder of SuperGLUE's tasks, boolq.jsonl and so on, asked text to text as T5 is
        per_class: images of each class that the probe is fitted on
        length: tokens of a row or window of text (512, or what the model takes)
        stride: tokens of a window that are scored, the others being context (the length)
        separator: what stands between the documents of a text file; without it, a file is one document
        batch_size: rows of a forward pass; 0: found by itself
        limit: images, rows, windows or examples of a task at most; 0: all
        cache: folder for decoded images and token files
        out: write everything, comparison included, to this JSON file
        json: print JSON
    """
    from upcycle import console, hub
    from upcycle.evaluate import results
    from upcycle.evaluate.comparison import compare
    from upcycle.evaluate.scores import Asked, score

    asked = Asked(
        text=text, images=images, shots=few_shot, tasks=_names(tasks), task_files=task_files,
        num_fewshot=num_fewshot, superglue=superglue, per_class=per_class, length=length, stride=stride,
        separator=separator, batch_size=batch_size, limit=limit, cache=cache,
    )  # fmt: skip
    if not checkpoints:
        raise UpcycleError("give at least one CHECKPOINT, a folder of a model")
    scored = [score(checkpoint, asked) for checkpoint in checkpoints]
    compared = compare(scored)
    found = [each.as_json() for each in scored]
    console.show_json({"checkpoints": found, **compared}) if json else console.show_scores(found, compared)
    sys.stdout.flush()
    if out is not None:
        results.write(out, {"format": results.FORMAT, "checkpoints": found, **compared})
        console.show_recorded(out)
    for each in scored:
        if hub.is_id(each.checkpoint):
            continue
        try:
            console.show_recorded(results.record(each.folder, each.results))
        except UpcycleError as error:
            if out is None:
                raise
            print(f"upcycle: {error}", file=sys.stderr)


@app.command
def inspect(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
    *,
    source: str | None = None,
    text: Domains = (),
    images: Domains = (),
    limit: int = 256,
    length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    cache: Path | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Show the experts of a checkpoint: width, similarity to each other and to the dense network, routers.

    With texts or images, one set for each domain, it also shows who goes where: load and confidence of every
    layer, tokens left behind, how differently the domains use the experts, and each expert's favourites. That
    is kept as routing.json in the folder.

    Args:
        checkpoint: an MoE or a dense checkpoint, folder or hub id
        source: the dense checkpoint it was made from (what its provenance names, if absent)
        text: a text to watch the routers on, and the name of its domain; repeatable
        images: likewise a set of images
        limit: rows or images of each domain at most; 0: all
        length: tokens of a row of text (512, or as many as the model takes, if absent)
        batch_size: rows or images of a forward pass
        seed: of the choice of rows
        cache: folder for decoded images and token files
        plot: folder for the figures, as PNG
        json: print JSON
    """
    from upcycle import console
    from upcycle.anatomy import inspect as look

    result, seen = look(checkpoint, source), None
    if text or images:
        from upcycle.evaluate.specialisation import Asked, specialisation

        asked = Asked(
            text=_domains(text), images=_domains(images), limit=limit, length=length,
            batch_size=batch_size, seed=seed, cache=cache,
        )  # fmt: skip
        with console.examples_bar("watching") as (progress, set_total):
            seen = specialisation(result["checkpoint"], asked, progress=progress, planned=set_total)
        seen.save()
        result["routing"] = seen.as_dict()
    if plot is not None:
        from upcycle.report.plots import plot as draw

        draw(result["checkpoint"], seen, plot)
    console.show_json(result) if json else console.show_anatomy(result)


def _domains(given: tuple[str, ...]) -> dict[str, Path]:
    """`NAME=PATH`, or a path whose name is the domain's, as paths by name."""
    out: dict[str, Path] = {}
    for domain in given:
        name, equals, path = domain.partition("=")
        path = path if equals else domain
        name = name if equals else Path(domain).stem
        if name in out:
            raise UpcycleError(f"two sets are called {name}; give them names of their own: NAME=PATH")
        out[name] = Path(path)
    return out


@app.command
def report(
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")],
    *,
    out: Path,
    markdown: Path | None = None,
    title: str | None = None,
    dense_flops: float | None = None,
    dense_tokens: float | None = None,
) -> None:
    """Write one page about runs and checkpoints: did it pay, curves, tasks, routers, similarity, speed.

    Args:
        runs: folders of training runs, and of checkpoints that they were exported to
        out: the page to make, REPORT.html; a report that is there is replaced
        markdown: the same as Markdown, with figures as PNG in a folder beside it
        title: of the page
        dense_flops: training FLOPs that the dense checkpoint had cost, where no provenance says so
        dense_tokens: the same in tokens
    """
    from upcycle import console
    from upcycle.report import TITLE
    from upcycle.report import report as write

    if not runs:
        raise UpcycleError("give at least one RUN, a folder of `upcycle train` or `upcycle export`")
    troubles = write(
        runs, out, markdown=markdown, title=title or TITLE, dense_flops=dense_flops, dense_tokens=dense_tokens
    )
    console.show_reported([p for p in (out, markdown) if p is not None], troubles)


@app.command(name="list")
def list_(*, json: bool = False) -> None:
    """List families, targets, initialisations and router initialisations: name, one line, what it needs.

    Args:
        json: print JSON
    """
    from upcycle import catalogue, console

    table = catalogue.everything()
    console.show_json(table) if json else console.show_catalogue(table)


@app.command
def demo(*, out: Path = Path("demo"), seconds: float = 60, seed: int = 0) -> None:
    """Train a small dense model on Python's own sources, upcycle it three ways, train on, and report.

    Args:
        out: folder for runs, checkpoints and report.html
        seconds: how long to train the dense model; training on takes about three times as long
        seed: of the training and the recipes
    """
    from upcycle.demo.story import run

    run(out, seconds=seconds, seed=seed)


def main(args: list[str] | None = None) -> None:
    """The console script."""
    try:
        app.cli(
            prog="upcycle",
            description="Turn a trained dense checkpoint into a Mixture of Experts, and prove it.",
            args=args,
            config=(FlagCreatePairsOff,),
        )
    except UpcycleError as error:
        print(f"upcycle: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "upcycle: interrupted; convert and train go on with --resume, calibrate as it was started",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        print(
            f"upcycle: error: {error.filename or 'input or output'}: {error.strerror or error}",
            file=sys.stderr,
        )
        sys.exit(2)

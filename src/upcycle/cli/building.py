"""plan, advise, convert, verify, recipe, keys, list: the commands from a dense checkpoint to an MoE."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

import upcycle
from upcycle.cli.options import (
    File,
    Flag,
    Jobs,
    Out,
    RecipeOptions,
    RunOrSource,
    Source,
    Text,
    Whole,
    app,
    refuse_both,
)
from upcycle.cli.screen import show_json
from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from upcycle.forecast.outlook import Outlook
    from upcycle.recipe import Recipe
    from upcycle.training.run import Run

# tyro breaks a line of help where the docstring does, so a long one stands here.
ToTrainOn = Annotated[
    str,
    arg(
        metavar="TEXT",
        help="tokens to train on now, such as 100B, counted as in a run's metrics.jsonl: a row has the "
        "tokens of all its stacks (encoder and decoder), and an image the places of all stages",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForecastOptions:
    """The training that --world foretells.

    Args:
        world: number of GPUs to train on; RUN.toml has the layout itself
        gpu: kind of GPU: H100, H200, H800, A100 or A800 (H100, if absent)
        replicate: copies of the whole model (1, if absent)
        tp: GPUs that split the matrices of a layer (1, if absent)
        ep: GPUs that share out the experts of a layer (1, if absent)
        rows: rows of one forward pass on a GPU (1, if absent)
        context: tokens of a row of text (4096, or as many as the model takes, if absent)
        recompute: keep all activations; without it, blocks are computed again in the backward pass
    """

    world: Whole = None
    gpu: Text = None
    replicate: Whole = None
    tp: Whole = None
    ep: Whole = None
    rows: Whole = None
    context: Whole = None
    recompute: Flag = True

    def of_run(self, run: Run) -> Outlook | None:
        """Return the outlook of a run file; None if none is asked for."""
        from upcycle.api.forecasting import foretell_run

        given = self._given()
        if odd := given.keys() - {"world", "gpu"}:
            raise UpcycleError(
                f"a run file has its layout, rows and context itself, and {_options(odd)} would not be read; "
                f"use --set, such as --set parallel.tp=2 or --set train.micro_batch=1"
            )
        return foretell_run(run, **given) if given else None

    def of_recipe(self, source: str, recipe: Recipe) -> Outlook | None:
        """Return the outlook of what a recipe makes; None if none is asked for."""
        given = self._given()
        return upcycle.foretell(source, recipe, **given) if given else None

    def _given(self) -> dict[str, Any]:
        """Return the options that were given. Raises `UpcycleError` for those that need --world."""
        fields = {each.name: each.default for each in dataclasses.fields(self)}
        given = {name: value for name in fields if (value := getattr(self, name)) != fields[name]}
        if given and self.world is None:
            raise UpcycleError(
                f"without --world N no training is foretold, and {_options(given)} would not be read; add it"
            )
        return given


def _options(given: Iterable[str]) -> str:
    """Return the names of forecast options as they are typed."""
    return ", ".join("--no-recompute" if name == "recompute" else f"--{name}" for name in sorted(given))


@app.command
def plan(
    source: RunOrSource,
    recipe: OmitArgPrefixes[RecipeOptions],
    forecast: OmitArgPrefixes[ForecastOptions],
    *,
    json: Flag = False,
    jobs: Jobs = 2,
) -> None:
    """Show what a recipe makes of SOURCE and what it costs, reading headers only.

    With --world, it foretells a step of training on so many GPUs: memory, traffic, time.

    Args:
        json: print JSON
    """
    from upcycle.cli.views.forecast import show_outlook
    from upcycle.cli.views.plan import show_plan

    if source.endswith(".toml"):
        from upcycle.training.run import Run

        if recipe.recipe is not None:
            raise UpcycleError(
                f"{source} is a run file and has its recipe itself, so --recipe {recipe.recipe} would not be "
                f"read; give one of them, and change single keys with --set"
            )
        run = Run.load(source, recipe.overrides())
        if run.recipe is None:
            raise UpcycleError(f"{source} has no [moe], so there is nothing to plan; add one")
        outlook = forecast.of_run(run)
        source, given = run.source, run.recipe
    else:
        given = recipe.read()
        outlook = forecast.of_recipe(source, given)
    result = upcycle.plan(source, given, jobs=jobs)
    if json:
        show_json(result.as_dict() | ({"forecast": outlook.as_dict()} if outlook else {}))
        return
    show_plan(result)
    if outlook:
        show_outlook(outlook)


@app.command
def advise(
    source: Source,
    recipe: OmitArgPrefixes[RecipeOptions],
    *,
    tokens: ToTrainOn,
    dense_tokens: Text = None,
    gpus: Whole = None,
    gpu: str = "H100",
    context: Whole = None,
    all: Flag = False,
    json: Flag = False,
) -> None:
    """Compare dense continuation, upcycling and training from scratch. It reads headers only.

    Args:
        dense_tokens: tokens that SOURCE was trained on; without it much cannot be said
        gpus: number of GPUs (the smallest possible number, if absent)
        gpu: kind of GPU: H100, H200, H800, A100 or A800
        context: tokens of a row of text (4096, or as many as the model takes, if absent)
        all: show the statements that do not cover this input as well
        json: print JSON
    """
    from upcycle.cli.views.advice import show_advice

    result = upcycle.advise(
        source, recipe.read(), tokens=tokens, dense_tokens=dense_tokens, gpus=gpus, gpu=gpu, context=context
    )
    show_json(result.as_dict()) if json else show_advice(result, all=all)


@app.command
def convert(
    source: Source,
    out: Out,
    recipe: OmitArgPrefixes[RecipeOptions],
    *,
    resume: Flag = False,
    jobs: Jobs = 2,
    shard_size: str = "5GB",
    allow_nonfinite: Flag = False,
) -> None:
    """Write the Mixture of Experts that a recipe makes of SOURCE to the new folder OUT.

    Args:
        out: the folder to make; it is called OUT.partial until it is complete
        resume: continue an OUT.partial that an interrupted run left
        shard_size: largest size of a weight file, such as 5GB or 500MB
        allow_nonfinite: accept NaN and inf in the weights
    """
    from upcycle.blueprints.cost import plan_of
    from upcycle.blueprints.shards import parse_size
    from upcycle.cli.views.conversion import show_converted

    built = upcycle.convert(
        source,
        out,
        recipe.read(),
        resume=resume,
        jobs=jobs,
        shard_size=parse_size(shard_size),
        allow_nonfinite=allow_nonfinite,
    )
    show_converted(plan_of(built), out)


@app.command
def verify(
    source: Source,
    out: Out,
    *,
    json: Flag = False,
    text: File = None,
    images: File = None,
    no_logits: Flag = False,
) -> None:
    """Prove that OUT is what its recipe makes of SOURCE: coverage, bytes, logits. Exit 1 if it is not.

    Args:
        out: a folder made by `upcycle convert`
        json: print JSON
        text: a text file to compare logits on, besides random tokens
        images: a folder of images, or a parquet file, to compare logits on, besides random pixels
        no_logits: leave out the comparison of logits, which loads both models in float32
    """
    from upcycle.cli.views.proof import show_proof

    data = "--text" if text is not None else "--images"
    refuse_both(
        "--no-logits", data, no_logits and (text is not None or images is not None),
        f"{data} is what logits are compared on",
    )  # fmt: skip
    result = upcycle.verify(source, out, text=text, images=images, logits=not no_logits)
    show_json(result.as_dict()) if json else show_proof(result)
    sys.exit(0 if result.holds else 1)


@app.command
def recipe(
    config: Annotated[Positional[Path], arg(metavar="CONFIG.yaml")], *, out: File = None, json: Flag = False
) -> None:
    """Translate a configuration of mergekit-moe to a recipe, and say what cannot be translated.

    Args:
        config: configuration of mergekit-moe, a YAML file
        out: the recipe to write; prompts are written beside it (the recipe is printed if absent)
        json: print JSON
    """
    from upcycle.cli.views.translation import show_translated, write_translated

    made = upcycle.translate(config)
    written = [] if out is None else write_translated(made, out)
    show_json(made.as_dict()) if json else show_translated(made, out, written)


@app.command
def keys(*, markdown: Flag = False, json: Flag = False) -> None:
    """List every key of a recipe and of a run file: its values, its default and one sentence.

    Args:
        markdown: print the page docs/keys.md
        json: print JSON
    """
    from upcycle.cli import keys as known
    from upcycle.cli.views.catalogue import show_keys

    refuse_both("--markdown", "--json", markdown and json, "one page is printed")
    if markdown:
        sys.stdout.write(known.markdown())
        return
    show_json(known.as_dict()) if json else show_keys(known.everything())


@app.command(name="list")
def list_(*, markdown: Flag = False, json: Flag = False) -> None:
    """List families, targets, initialisations and router initialisations: name, one line, requirements.

    Args:
        markdown: print the page docs/models.md, which says what each model becomes
        json: print JSON
    """
    refuse_both("--markdown", "--json", markdown and json, "one page is printed")
    if markdown:
        from upcycle.cli import models

        sys.stdout.write(models.markdown())
        return
    from upcycle.cli import catalogue
    from upcycle.cli.views.catalogue import show_catalogue

    table = catalogue.everything()
    show_json(table) if json else show_catalogue(table)

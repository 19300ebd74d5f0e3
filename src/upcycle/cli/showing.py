"""eval, inspect, report, demo: the commands that show results."""

from __future__ import annotations

import dataclasses
import sys
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
    Text,
    Whole,
    app,
    domains,
    names,
)
from upcycle.cli.screen import show_json
from upcycle.errors import printable

if TYPE_CHECKING:
    from upcycle.api.evaluation import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """The data to score on.

    Args:
        chats: score what the assistant says in the chats of a JSON lines or parquet file
        images: top-1 accuracy on labelled images: a parquet file, or a folder with one folder a class
        few_shot: fit a linear probe on a few of these images, and test it on those of --images
        tasks: tasks of lm-evaluation-harness, such as arc_easy,piqa,blimp (needs the extra `eval`)
        task_files: folder of their data, NAME.jsonl and blimp/PARADIGM.jsonl (the hub, if absent)
        num_fewshot: examples before each question of a task (the number in the task, if absent)
        superglue: folder of SuperGLUE's tasks (boolq.jsonl and so on), asked as text to text as in T5
        per_class: images of each class that the probe is fitted on
        length: tokens of a row or window of text (512, or as many as the model takes, if absent)
        stride: tokens of a window that are scored; the others are context (the length, if absent)
        separator: what stands between the documents of a text file; without it, a file is one document
        field: the text in JSON lines and parquet
        batch_size: rows of a forward pass; 0: automatic
        limit: largest number of images, rows, windows or examples of a task; 0: all
        cache: folder for decoded images and token files
    """

    text: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="[NAME=]PATH",
            help="score on a text what the model is made for: the next token (loss, perplexity, "
            "bits per byte), spans cut out (T5), masked tokens",
        ),
    ] = ()
    chats: File = None
    images: File = None
    few_shot: File = None
    tasks: Names = ""
    task_files: File = None
    num_fewshot: Whole = None
    superglue: File = None
    per_class: Count = 10
    length: Whole = None
    stride: Whole = None
    separator: Text = None
    field: Field = "text"
    batch_size: Count = 0
    limit: Count = 0
    cache: File = None
    drop: Drop = ()

    def evaluate(self, checkpoints: tuple[str, ...]) -> Evaluation:
        """Score the checkpoints on this data."""
        given = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        given |= {"text": domains(self.text, lambda path: path.name), "tasks": names(self.tasks)}
        return upcycle.evaluate(checkpoints, **given)


@app.command(name="eval")
def eval_(
    checkpoints: Annotated[Positional[tuple[str, ...]], arg(metavar="CHECKPOINT...", help_behavior_hint="")],
    data: OmitArgPrefixes[ScoreOptions],
    *,
    out: File = None,
    json: Flag = False,
) -> None:
    """Score checkpoints, dense or Mixture of Experts, on data they were not trained on.

    Several checkpoints are compared with the first, with a standard error over the same examples.
    Results are written to eval.json in each checkpoint's folder, or with --out to that file alone.

    Args:
        checkpoints: folders of models, or hub ids
        out: write everything, comparison included, to this JSON file, and nothing beside the checkpoints
        json: print JSON
    """
    from upcycle.cli.views.scores import show_recorded, show_scores
    from upcycle.evaluation import results

    if out is not None:
        results.refuse_target(out)
    found = data.evaluate(checkpoints)
    show_json(found.as_dict()) if json else show_scores(found.as_dict())
    sys.stdout.flush()
    if out is not None:
        show_recorded(found.write(out))
        return
    recorded = found.record()
    for path in recorded.written:
        show_recorded(path)
    for error in recorded.lost[1:]:
        print(f"upcycle: {printable(str(error))}", file=sys.stderr)
    if recorded.lost:
        raise recorded.lost[0]


@app.command
def inspect(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
    *,
    source: Text = None,
    text: Domains = (),
    images: Domains = (),
    limit: Count = 256,
    length: Whole = None,
    field: Field = "text",
    batch_size: Count = 16,
    seed: Count = 0,
    cache: File = None,
    plot: File = None,
    drop: Drop = (),
    json: Flag = False,
) -> None:
    """Show the experts of a checkpoint: width, similarity to each other and to the dense network, routers.

    With texts or images, one set for each domain, it also shows the routing: load and confidence of every
    layer, tokens left behind, how differently the domains use the experts, and each expert's favourites. It
    is written to routing.json in the folder.

    Args:
        checkpoint: an MoE or a dense checkpoint, folder or hub id
        source: the dense checkpoint it was made from (the one in its provenance, if absent)
        text: a text to watch the routers on, and the name of its domain
        images: a set of images to watch the routers on, and the name of its domain
        limit: largest number of rows or images of each domain; 0: all
        length: tokens of a row of text (512, or as many as the model takes, if absent)
        field: the text in JSON lines and parquet
        batch_size: rows or images of a forward pass
        seed: seed of the choice of rows
        cache: folder for decoded images and token files
        plot: folder for the figures, as PNG
        json: print JSON
    """
    from upcycle.checkpoints import hub
    from upcycle.cli.views.anatomy import show_anatomy

    if plot is not None:
        from upcycle.reporting import plots

        plots.refuse(plot)
    found = upcycle.inspect(
        checkpoint, source, text=domains(text), images=domains(images), limit=limit, length=length,
        field=field, batch_size=batch_size, seed=seed, cache=cache, drop=drop,
    )  # fmt: skip
    show_json(found.as_dict()) if json else show_anatomy(found.as_dict())
    if plot is not None:
        found.plot(plot)
    if not hub.is_id(checkpoint):
        sys.stdout.flush()
        found.save()


@app.command
def report(
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...", help_behavior_hint="")],
    *,
    out: Path,
    markdown: File = None,
    title: Text = None,
    dense_flops: Number = None,
    dense_tokens: Text = None,
) -> None:
    """Write one page about runs and checkpoints: did it pay, curves, tasks, routers, similarity, speed.

    Args:
        runs: folders of training runs, and of checkpoints that they were exported to
        out: the page to write, REPORT.html; an earlier report is replaced
        markdown: a Markdown file with the same content, with figures as PNG in a folder beside it
        title: title of the page
        dense_flops: training FLOPs of the dense checkpoint, if no provenance has them
        dense_tokens: training tokens of the dense checkpoint, such as 100B, if no provenance has them
    """
    from upcycle.cli.views.report import show_reported
    from upcycle.reporting import TITLE

    show_reported(
        upcycle.report(
            runs,
            out,
            markdown=markdown,
            title=title or TITLE,
            dense_flops=dense_flops,
            dense_tokens=dense_tokens,
        )
    )


@app.command
def demo(*, out: Path = Path("demo"), seconds: float = 240, seed: Count = 0) -> None:
    """Continue a small dense model and two Mixtures of Experts made from it at equal FLOPs, and report.

    Args:
        out: folder for runs, checkpoints and report.html
        seconds: time for the three trainings together
        seed: seed of the training and the recipes
    """
    from upcycle.cli.views.demo import Screening
    from upcycle.demo.story import run

    run(out, Screening(), seconds=seconds, seed=seed)

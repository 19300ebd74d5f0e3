"""What a person sees: tables on standard output, progress bars on standard error."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from upcycle import targets
from upcycle.errors import printable
from upcycle.system.wording import count, place_of, size

if TYPE_CHECKING:
    from upcycle.advice.gather import Advice
    from upcycle.blueprints.cost import Plan
    from upcycle.cli.keys import Key
    from upcycle.dense.statistics import Statistics
    from upcycle.training.export import Exported
    from upcycle.training.loop import Result
    from upcycle.verification import Proof

EVERY = 10.0  # seconds between lines about progress, where no bar can be shown


class Screen(Console):
    """A console that shows texts of other people's files and never obeys them."""

    def render_str(self, text: str, **options: Any) -> Text:
        own = len(text) - len(text.lstrip("\n"))  # lines left free before a sentence are ours
        return super().render_str(text[:own] + printable(text[own:]), **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


_SEEN = sys.stdout is not None and sys.stdout.isatty()
# Sentences are left to the terminal to wrap, and whole where the output is a file.
out = Screen(highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if _SEEN else 120)
err = Screen(stderr=True, highlight=False, markup=False, emoji=False)


def quoted(*words: object) -> str:
    """The words of a command as a shell takes them back."""
    return " ".join(map(_quoted, map(str, words)))


def _quoted(word: str) -> str:
    if not word.isprintable():
        text = word.replace("\\", "\\\\").replace("'", "\\'")
        return f"$'{printable(text)}'"
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def show_json(value: object) -> None:
    """JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def grid(title: str, *columns: str) -> Table:
    """A table with a title; every column but the first is right-aligned."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    return table


def show_warnings(warnings: list[str]) -> None:
    """One line each."""
    for warning in warnings:
        out.print(f"[yellow]![/] {escape(warning)}", markup=True)


def show_plan(plan: Plan) -> None:
    """The plan as a table."""
    table = grid(f"{plan.family} -> {plan.target}", "", "dense", plan.kind)
    table.add_row("parameters", count(plan.dense_parameters), count(plan.total_parameters))
    table.add_row("active per token", count(plan.dense_parameters), count(plan.active_parameters))
    table.add_row("FLOPs per token (forward)", count(plan.dense_flops_per_token), count(plan.flops_per_token))
    out.print(table)
    out.print(plan.made)
    out.print(f"writes {size(plan.output_bytes)} with at most {size(plan.peak_memory_bytes)} of memory")
    out.print("computes what the dense model computes: " + ("yes" if plan.preserves_function else "no"))
    out.print(f"blueprint {plan.blueprint_hash}")
    show_warnings(plan.warnings)


def show_advice(advice: Advice) -> None:
    """A row a statement, with its source and whether the input lies where it was found, and the verdict."""
    plan = advice.plan
    shown = Table(title=f"{plan.family} -> {plan.target}: {plan.made}", title_justify="left", box=None,
                  pad_edge=False, header_style="bold", width=out.width)  # fmt: skip
    shown.add_column("what", no_wrap=True)
    for column, share in (("", 5), ("source", 3), ("inside its range", 3)):
        shown.add_column(column, ratio=share, overflow="fold")
    topic = ""
    for statement in advice.statements:
        mark = {True: "yes", False: "no", None: "not known"}[statement.inside]
        new = statement.topic if statement.topic != topic else ""
        cells = (new, statement.said, statement.source, f"{mark}: {statement.why}")
        shown.add_row(*cells)
        topic = statement.topic
    out.print(shown, soft_wrap=False)
    out.print(f"\n{advice.verdict.sentence}")


def show_converted(plan: Plan, folder: Path) -> None:
    """What convert leaves on the screen."""
    out.print(
        f"{folder}: {plan.target}, {plan.made}, "
        f"{count(plan.total_parameters)} parameters, {count(plan.active_parameters)} active, "
        f"{size(plan.output_bytes)}"
    )
    show_warnings(plan.warnings)
    out.print(f"check it: upcycle verify {quoted(plan.source, folder)}")


def show_calibrated(found: Statistics) -> None:
    """What calibrate leaves on the screen: for each layer, the share of neurons that are active, and how many
    never were."""
    table = grid("", "layer", "neurons", "active", "never active")
    for stack, layer in found.blocks("neurons", "count"):
        shares = found.of("neurons", stack, layer, "count")
        table.add_row(
            place_of(stack, layer), str(len(shares)), f"{shares.mean():.1%}", str(int((shares == 0).sum()))
        )
    if table.row_count:
        out.print(table)
    made = found.provenance
    tokens = " + ".join(
        f"{count(n)} {stack}" if stack != "layers" else count(n) for stack, n in made["tokens"].items()
    )
    out.print(
        f"{found.path}: {', '.join(made['collect'])} of {', '.join(made['positions'])} over "
        f"{made['examples']} examples ({tokens} tokens), {size(found.path.stat().st_size)}"
    )
    out.print(f"digest {found.digest}")


def show_trained(result: Result) -> None:
    """What train leaves on the screen."""
    held_out = "" if result.held_out_loss is None else f", held-out loss {result.held_out_loss:.4f}"
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    out.print(f"{result.out}: {result.steps} steps{loss}{held_out}")
    if result.finished:
        out.print(f"use it: upcycle export {quoted(result.out)} OUT")


def show_exported(exported: Exported) -> None:
    """What export leaves on the screen."""
    out.print(
        f"{exported.out}: step {exported.step}, {count(exported.parameters)} parameters in {exported.dtype}"
    )


def show_scores(scores: list[dict[str, Any]], compared: dict[str, Any]) -> None:
    """One row a metric of each checkpoint, then the differences, then what to know about them.

    The parts of a group are left to the JSON.
    """
    table = grid("", "checkpoint", "what", "metric", "value", "+-", "of")
    for score in scores:
        for result in _whole(score["results"]):
            of = f"{result['examples']}" if "examples" in result else ""
            for name, metric in result["metrics"].items():
                shown = (_number(metric["value"]), _number(metric["standard_error"]))
                table.add_row(score["checkpoint"], _what(result), name, *shown, of)
    out.print(table)
    if compared["differences"]:
        table = grid("", "checkpoint", "what", "metric", "difference", "+-", "of")
        for row in _whole(compared["differences"]):
            shown = (_number(row["difference"], sign=True), _number(row["standard_error"]))
            paired = f"{row['count']} {row['units']}"
            table.add_row(row["checkpoint"], _what(row), row["metric"], *shown, paired)
        out.print()
        out.print(table)
        out.print(f"differences are to {compared['differences'][0]['against']}, paired")
    for note in compared["notes"]:
        out.print(note)


def show_recorded(path: Path) -> None:
    """Where results were written."""
    err.print(f"written: {path}", soft_wrap=True)


def _whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "part_of" not in row]


def _what(row: dict[str, Any]) -> str:
    kinds = {"few_shot": "few-shot probe, ", "superglue": "SuperGLUE "}
    return kinds.get(row["kind"], "") + str(row["name"])


def _number(n: float | None, *, sign: bool = False) -> str:
    if n is None:
        return ""
    return (
        f"{n:{'+' if sign else ''}.4f}" if n == 0 or 1e-3 <= abs(n) < 1e5 else f"{n:{'+' if sign else ''}.1e}"
    )


def show_reported(files: list[Path], troubles: list[str]) -> None:
    """What report leaves on the screen."""
    for trouble in troubles:
        err.print(f"! {trouble}", soft_wrap=True)
    for file in files:
        out.print(str(file))


def show_proof(proof: Proof) -> None:
    """One line a check, then the verdict."""
    for check in proof.checks:
        mark = {True: "[green]ok[/]  ", False: "[red]FAIL[/]", None: "[dim]--[/]  "}[check.holds]
        out.print(mark + escape(f" {check.name}: {check.detail}"), markup=True)
    out.print("[green]holds[/]" if proof.holds else "[red]does not hold[/]", markup=True)


def show_anatomy(anatomy: dict[str, Any]) -> None:
    """One row a layer."""
    out.print(f"{anatomy['checkpoint']}: {anatomy['model_type']}, {anatomy['num_layers']} layers")
    columns = ["layer", "experts", "width", "dtype", "cosine between", "cosine to dense", "router norm"]
    table = grid("", *columns)
    for row in anatomy["layers"]:
        if not row["num_experts"]:
            table.add_row(_place(row), "dense", str(row["width"]), row["dtype"], "", "", "")
            continue
        dense = row["cosine_to_dense"]
        groups = [row, *([row["universal"]] if "universal" in row else [])]
        table.add_row(
            _place(row),
            " + ".join(str(group["num_experts"]) for group in groups),
            " + ".join(str(group["width"]) for group in groups),
            row["dtype"],
            " and ".join(_range(group["cosine_between"]) for group in groups if group["cosine_between"])
            + _began(row.get("cosine_between_at_start")),
            f"{sum(dense) / len(dense):.4f}" if dense else "",
            f"{sum(row['router_norms']) / len(row['router_norms']):.4f}",
        )
    out.print(table)
    if "routing" in anatomy:
        show_routing(anatomy["routing"])
    if anatomy["provenance"]:
        made = anatomy["provenance"]
        how = _how(made["recipe"]) if made["recipe"] else ""
        out.print(f"made from {made['source']['name']}{how}")
        for training in made.get("training", ()):
            out.print(f"trained for {training['step']} steps, {count(training['tokens'])} tokens")
        if made["blueprint_hash"]:
            out.print(f"blueprint {made['blueprint_hash']}")
    for note in anatomy["notes"]:
        out.print(f"[dim]{escape(note)}[/]", markup=True)


def show_routing(routing: dict[str, Any]) -> None:
    """Who went where: one row a layer, then each expert's favourite tokens."""
    names = [domain["name"] for domain in routing["domains"]]
    table = grid(
        f"\non {', '.join(names)}", "layer", "busiest", "idlest", "confidence", "left behind", "divergence"
    )
    for row in routing["layers"]:
        load, apart = row["load"], [x for i, line in enumerate(row["divergence"]) for x in line[:i]]
        table.add_row(
            _place(row),
            f"{max(load):.1%}",
            f"{min(load):.1%}",
            f"{row['confidence']:.3f}",
            f"{row['left_behind']:.1%}",
            f"{sum(apart) / len(apart):.4f} bits" if apart else "",
        )
    out.print(table)
    if routing["kind"] == "text":
        for row in routing["layers"]:
            for expert, favourites in enumerate(row["favourites"]):
                liked = " ".join(str(token) for token, _ in favourites)
                out.print(f"layer {_place(row)}, expert {expert}: {liked}")


def _range(found: dict[str, float]) -> str:
    return f"{found['mean']:.4f} ({found['min']:.4f}..{found['max']:.4f})"


def _began(found: dict[str, float] | None) -> str:
    return f", began at {found['mean']:.4f}" if found else ""


def _how(recipe: dict[str, Any]) -> str:
    return targets.recorded(recipe["moe"]).made_by(recipe)


def _place(row: dict[str, Any]) -> str:
    return place_of(row.get("stack", "layers"), row["layer"])


def show_catalogue(table: dict[str, list[dict[str, str]]]) -> None:
    """One table a kind."""
    for kind, rows in table.items():
        shown = Table(title=kind, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in ("name", "what it is", "needs"):
            shown.add_column(column, overflow="fold")
        for row in rows:
            shown.add_row(row["name"], row["summary"], row["needs"])
        out.print(shown)
        out.print()


def show_keys(keys: dict[str, list[Key]]) -> None:
    """One table a section."""
    for section, rows in keys.items():
        shown = Table(title=section, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in ("key", "takes", "default", ""):
            shown.add_column(column, overflow="fold")
        for row in rows:
            shown.add_row(row.name, row.takes, row.default, row.sentence)
        out.print(shown, soft_wrap=False)
        out.print()


_Moves = tuple[Callable[[int], None], Callable[[int], None]]
Bar = AbstractContextManager[_Moves]


def bytes_bar(what: str) -> Bar:
    """A progress bar over bytes: a function that advances it, and one that sets its end."""
    return _bar(what, DownloadColumn(), TransferSpeedColumn(), said=size)


def examples_bar(what: str) -> Bar:
    """A progress bar over examples: a function that advances it, and one that sets its end."""
    return _bar(what, MofNCompleteColumn(), said=lambda n: f"{n:,}")


def _bar(what: str, *counted: ProgressColumn, said: Callable[[float], str]) -> Bar:
    return _drawn(what, *counted) if err.is_terminal else _told(what, said)


@contextmanager
def _told(what: str, said: Callable[[float], str]) -> Iterator[_Moves]:
    """Progress in a file or a pipe: a line now and then, none about what is soon done."""
    done, total, last = 0, 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            of = f" of {said(total)}, {done / total:.0%}" if total else ""
            err.print(f"{what}: {said(done)}{of}", soft_wrap=True)

    def set_total(n: int) -> None:
        nonlocal total
        total = n

    yield advance, set_total


@contextmanager
def _drawn(what: str, *counted: ProgressColumn) -> Iterator[_Moves]:
    columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield (lambda n: progress.advance(task, n)), (lambda n: progress.update(task, total=n))

"""The kind of a run, and its label among others: what it is, and the settings in which it differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from upcycle import targets
from upcycle.recipe import STACKS
from upcycle.reporting.runs import RunHistory

Kind = Literal["dense, continued", "dense, from scratch", "dense, rebuilt", "upcycled", "MoE, from scratch"]
ORDER: tuple[Kind, ...] = (
    "dense, continued", "dense, rebuilt", "dense, from scratch", "upcycled", "MoE, from scratch",
)  # fmt: skip
# The keys of a run file in which runs of one group may differ: the seed, and keys that do not affect numbers.
_FREE = ("seed", "out", "log", "checkpoint", "parallel", "eval")
_FREE_BELOW = {
    "train": ("seed", "micro_batch", "compile", "activation_checkpointing"),
    "data": ("cache", "split_seed", "tokenizer"),  # runs that are compared have one tokenizer, by its bytes
}
_STAGES = "stages"  # not a key of a run file: the names of its stages


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run that are not free to differ between seeds.

    A checkpoint has the path of the first run that began with it, or was taught by it, because paths to one
    folder can be written in several ways.
    """

    table: dict[str, Any]  # the run file
    checkpoints: tuple[int, int]  # the numbers of these first runs, for the source and the teacher

    @property
    def key(self) -> list[Any]:
        """Return what is equal for equal settings, as JSON."""
        return [self.table, *self.checkpoints]


def settings_of(runs: Sequence[RunHistory]) -> list[Settings]:
    """Return the settings of each run."""
    sources, teachers = _firsts(runs, RunHistory.shares_source), _firsts(runs, RunHistory.shares_teacher)
    return [
        _settings(run, runs, source, teacher)
        for run, source, teacher in zip(runs, sources, teachers, strict=True)
    ]


def _firsts(runs: Sequence[RunHistory], share: Callable[[RunHistory, RunHistory], bool]) -> list[int]:
    """Return, for each run, the number of the first one that it shares a checkpoint with, or its own."""
    out: list[int] = []
    for number, run in enumerate(runs):
        first = next(i for i, other in enumerate(runs) if share(run, other))
        out.append(out[first] if first < number else number)
    return out


def _settings(run: RunHistory, runs: Sequence[RunHistory], source: int, teacher: int) -> Settings:
    table = {k: v for k, v in run.table.items() if k not in _FREE}
    for section, free in _FREE_BELOW.items():
        table[section] = {k: v for k, v in table[section].items() if k not in free}
    named = run.table["data"].get("tokenizer")
    if run.table.get("stage"):
        table["stage"] = [_without_tokenizer(stage, named) for stage in run.table["stage"]]
    table["source"] = runs[source].table.get("source")
    if table.get("teacher"):
        table["teacher"] = {**table["teacher"], "source": runs[teacher].table["teacher"].get("source")}
    return Settings(table=table, checkpoints=(source, teacher))


def _without_tokenizer(stage: Mapping[str, Any], named: Any) -> dict[str, Any]:
    """Return the table of a stage without the tokenizer that its run names as well."""
    data = stage.get("data") or {}
    return {**stage, "data": {k: v for k, v in data.items() if (k, v) != ("tokenizer", named)}}


def kind_of(run: RunHistory) -> Kind:
    """Return the kind of model that a run trained, and what it started from."""
    moe = run.table.get("moe")
    if run.about.from_scratch:
        return "dense, from scratch" if moe is None or _is_dense(moe) else "MoE, from scratch"
    if moe is None:
        return "dense, continued"
    return "dense, rebuilt" if _is_dense(moe) else "upcycled"


def _is_dense(moe: Mapping[str, Any]) -> bool:
    return not targets.recorded(moe).has_experts


def labels_of(runs: Sequence[RunHistory]) -> list[str]:
    """Return a label for each run; equal labels are extended by the settings in which the runs differ."""
    plain = [_label(run) for run in runs]
    leaves = [_leaves(settings) for settings in settings_of(runs)]
    out = []
    for label, own in zip(plain, leaves, strict=True):
        alike = [other for other, same in zip(leaves, plain, strict=True) if same == label]
        said = [_said(key, own.get(key)) for key in _telling(alike)]
        out.append(short(", ".join([label, *filter(None, said)]), 70))
    return [
        label if out.count(label) == 1 else f"{label} ({short(run.name, 30)})"
        for label, run in zip(out, runs, strict=True)
    ]


def _leaves(settings: Settings) -> dict[str, Any]:
    """Return every setting by its dotted key; those of a stage or of a stack after its name.

    Settings that a stack shares with the model are left out.
    """
    table = dict(settings.table)
    stages = {str(stage.get("name", number)): stage for number, stage in enumerate(table.pop("stage", ()), 1)}
    stacks = {name: table.pop(name) for name in STACKS if isinstance(table.get(name), Mapping)}
    out = dict(flat(table))
    for name, stage in stages.items():
        out |= {f"{name}: {key}": value for key, value in flat(stage) if key != "name"}
    for name, stack in stacks.items():
        out |= {f"{name}: {key}": value for key, value in flat(stack) if value != out.get(key)}
    return {_STAGES: ", ".join(stages) or None, **out}


def _telling(alike: Sequence[Mapping[str, Any]], most: int = 2) -> list[str]:
    """Return the settings that best distinguish the runs in `alike`: the source first, then the stages."""
    found = {key for leaves in alike for key in leaves}
    keys = sorted(found, key=lambda key: (key != "source", key != _STAGES, len(key), key))
    chosen: list[str] = []

    def kinds(more: str | None) -> int:
        return len({tuple(repr(one.get(k)) for k in (*chosen, *([more] if more else ()))) for one in alike})

    while keys and len(chosen) < most and kinds(None) < len(alike):
        best = max(keys, key=kinds)
        if kinds(best) == kinds(None):
            break
        chosen.append(best)
    return chosen


def _said(key: str, value: Any) -> str:
    """Format a setting for a label: `peak 0.001`, `source small`, `stages warm, all`, `warm: steps 20`.

    A setting without a value is left out, which gives an empty text.
    """
    if key == _STAGES:
        return f"stages {short(value, 24)}" if value else "no stages"
    if value is None:
        return ""
    stage, colon, path = key.rpartition(": ")
    *before, last = [part for part in path.split(".") if part != "name" and not part.isdigit()] or [path]
    if last == "source":
        return f"{before[-1] if before else last} {short(Path(str(value)).name, 24)}"
    return f"{short(stage, 24)}{colon}{last} {short(str(value), 24)}"


def _label(run: RunHistory) -> str:
    kind = kind_of(run)
    short = " (diverged)" if run.diverged else ""
    if run.unfinished:
        short = f" ({run.done} of {run.total_steps} steps)"
    recipe = run.table if run.about.recipe is None else run.about.recipe
    if "moe" not in recipe:
        return kind + short
    target = targets.recorded(recipe["moe"])
    label = target.label(recipe)
    if kind.startswith("dense"):
        return (label if kind == "dense, rebuilt" else kind) + short
    return f"{label}, {target.way(recipe) if kind == 'upcycled' else 'from scratch'}{short}"


def flat(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Yield every leaf of a nested table with its dotted key."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from flat(inner, f"{path}.{place}")
    else:
        yield path, value


def short(text: str, most: int) -> str:
    """Return a text, cut to `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"

"""Tasks of lm-evaluation-harness, run through its Python API on decoders and encoder-decoders.

The tasks (prompts, metrics, few-shot examples) are those of the harness. Their data come from the hub or from
local files. Importing this module needs `lm_eval`.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
import torch
from lm_eval.tasks import TaskManager

from upcycle.errors import UpcycleError, listed
from upcycle.evaluation import task_files
from upcycle.evaluation.differences import Sums
from upcycle.evaluation.harness_model import HarnessModel
from upcycle.evaluation.language_model import LanguageModel
from upcycle.evaluation.results import Metric, Result, data_of
from upcycle.evaluation.task_files import BLIMP, TaskFile
from upcycle.system import progress

FEW_SHOT_SEED = 1234  # the default of the harness
_SPLIT = "file"  # the name of the only split of a local file
_FOLDERS = {  # folders of the harness for these tasks, so that not all have to be searched
    "arc_easy": "arc", "arc_challenge": "arc", "piqa": "piqa", "copa": "super_glue/copa",
    "boolq": "super_glue/boolq", "lambada_openai": "lambada",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Tasks with their data, which can be asked of several models, or of one several times."""

    names: tuple[str, ...]  # what was asked for; none: all files of a folder
    tasks: Mapping[str, Any]
    paths: Mapping[str, Path]  # the local file of each task; none: the data are those of the hub
    shots: int | None
    limit: int


def exam(names: tuple[str, ...], folder: Path | None, *, shots: int | None, limit: int) -> Exam:
    """Return the tasks `names` of the harness with their data.

    The data come from local files in `folder`, or from the hub without a folder. `shots` is the number of
    examples before each question (None: what the task says). `limit` is the largest number of examples of a
    task (0: all). Raises `UpcycleError` for a task or an example that cannot be asked.
    """
    files = task_files.find(folder, names) if folder else []
    tasks = _local(files) if folder else _fetched(names)
    with _quiet():
        for name, task in tasks.items():
            _set_shots(task, shots)
            _refuse_odd(name, task, limit)
    paths = {file.task: file.path for file in files}
    return Exam(names=names, tasks=tasks, paths=paths, shots=shots, limit=limit)


def refuse_unknown(names: Sequence[str]) -> None:
    """Raise `UpcycleError` for a name that is no task of the harness. Nothing is fetched."""
    manager = _manager(names)
    for name in names:
        _refuse_unknown(name, manager)


def score(language: LanguageModel, asked: Exam) -> list[Result]:
    """Score the model on an exam.

    If BLiMP is asked for as a whole, the mean over its paradigms comes last.
    """
    tasks, limit = dict(asked.tasks), asked.limit
    with _quiet():
        for task in tasks.values():  # again, or a second model would see other examples before its questions
            _set_shots(task, asked.shots)
        model = HarnessModel(language)
        with _said(f"the tasks {listed(sorted(tasks))} cannot be scored"):
            found = lm_eval.evaluate(model, {"tasks": tasks}, limit=limit or None, bootstrap_iters=0)
    for name, examples in model.shortened.items():
        progress.say(
            f"{name}: in {len(examples)} of {found['n-samples'][name]['effective']} examples a continuation "
            f"is longer than the {language.length} tokens that the model reads at once; its first tokens are "
            f"left out, as the harness leaves out those of a context"
        )
    settings = {"limit": limit}
    results = [
        _result(
            name,
            found,
            {**(data_of(asked.paths[name]) if asked.paths else {"dataset": _dataset(task)}), **settings},
            len(model.shortened.get(name, ())),
        )
        for name, task in tasks.items()
    ]
    paradigms = [result for result in results if result.name.startswith(f"{BLIMP}_")]
    if not paradigms or (asked.names and BLIMP not in asked.names):
        return results
    shown = [replace(r, more={**r.more, "part_of": BLIMP}) if r in paradigms else r for r in results]
    return [*shown, _mean(BLIMP, paradigms, settings)]


def _manager(names: Sequence[str]) -> TaskManager:
    """Return a manager that knows the tasks `names`.

    It reads all 14,000 task files of the harness only if it must.
    """
    blimp = {name: BLIMP for name in names if name == BLIMP or name.startswith(f"{BLIMP}_")}
    folders = {(blimp | _FOLDERS).get(name) for name in names}
    if None in folders:
        return TaskManager()
    root = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(
        include_defaults=False, include_path=[root / name for name in sorted(map(str, folders))]
    )


def _local(files: Sequence[TaskFile]) -> dict[str, Any]:
    """Return the tasks whose data are local files."""
    manager = _manager([file.task for file in files])
    for file in files:
        _refuse_unknown(file.task, manager)
    tasks: dict[str, Any] = {}
    for file in files:
        member = {
            "task": file.task,
            "custom_dataset": _reader(file),
            "training_split": None,
            "validation_split": None,
            "test_split": _SPLIT,
            "fewshot_split": _SPLIT,
        }
        with _quiet(), _said(f"{file.path} does not hold rows as the task {file.task} has them on the hub"):
            tasks |= manager.load({"group": "local", "task": [member]})["tasks"]
    return tasks


def _reader(file: TaskFile) -> Callable[..., Any]:
    def read(**metadata: Any) -> Any:
        import datasets

        return datasets.DatasetDict(
            {_SPLIT: datasets.Dataset.from_list(task_files.rows(file.path, file.task))}
        )

    return read


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Turn any error of the harness, whose prompts are templates and code, into an `UpcycleError`."""
    try:
        yield
    except (UpcycleError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UpcycleError(f"{what} ({type(error).__name__}: {reason[:200]})") from error


def _refuse_odd(name: str, task: Any, limit: int) -> None:
    """Raise an error for an example that the task cannot ask, with its number, before any is scored."""
    for number, doc in task.doc_iterator(rank=0, limit=limit or None, world_size=1):
        with _said(
            f"task {name}, example {number + 1}: its fields are not those of the hub's data set, each "
            f"with a value"
        ):
            asked = [task.doc_to_text(doc), task.doc_to_target(doc)]
            if task.OUTPUT_TYPE == "multiple_choice":
                choices = task.doc_to_choice(doc)
                asked += choices
                if isinstance(asked[1], int) and not 0 <= asked[1] < len(choices):
                    raise ValueError(f"the right one is number {asked[1]} of {len(choices)}")
            if any(each is None for each in asked):
                raise ValueError("a field is empty")


def _fetched(names: tuple[str, ...]) -> dict[str, Any]:
    """Return the tasks with their data from the hub."""
    manager = _manager(names)
    tasks: dict[str, Any] = {}
    for name in names:
        _refuse_unknown(name, manager)
        try:
            with _quiet():
                tasks |= manager.load(name)["tasks"]
        except Exception as error:  # the hub can raise anything, and the user must see it
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UpcycleError(
                f"the data set of the task {name} cannot be fetched ({reason}); with a network it comes "
                f"by itself, without one put {name}.jsonl into a folder and give it as --task-files FOLDER, "
                f"or in a run file as eval.task_files"
            ) from None
    return tasks


def _refuse_unknown(name: str, manager: TaskManager) -> None:
    if name in manager.all_tasks:
        return
    near = difflib.get_close_matches(name, manager.all_tasks, 3)
    raise UpcycleError(
        f"lm-evaluation-harness {lm_eval.__version__} has no task {name}"
        + (f"; near it are {listed(near)}" if near else "; `lm-eval ls tasks` lists them")
    )


def _set_shots(task: Any, shots: int | None) -> None:
    if shots is not None and task.get_config("num_fewshot") != 0:  # 0 in a task file stays 0
        task.set_config(key="num_fewshot", value=shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEW_SHOT_SEED)


def _dataset(task: Any) -> list[str | None]:
    return [task.get_config("dataset_path"), task.get_config("dataset_name")]


def _result(name: str, found: dict[str, Any], data: dict[str, Any], shortened: int) -> Result:
    """Return the result of one task.

    Metrics that are means over examples can be paired with those of another model.
    """
    samples = found["samples"][name]
    several = len({sample["filter"] for sample in samples}) > 1
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        mine = [
            s for s in sorted(samples, key=lambda s: s["doc_id"]) if s["filter"] == chosen and metric in s
        ]
        better = bool(found["higher_is_better"][name].get(metric, True))
        label = f"{metric},{chosen}" if several else metric
        metrics[label] = _metric(metric, float(value), [sample[metric] for sample in mine], better)
    hashes = tuple(sample["doc_hash"] for sample in samples)
    data = {**data, "num_fewshot": found["n-shot"][name], "task_version": found["versions"][name]}
    return Result(
        kind="tasks", name=name, data=data, metrics=metrics, units=hashes,
        more={
            "examples": found["n-samples"][name]["effective"],
            **({"continuations_shortened": shortened} if shortened else {}),
        },
    )  # fmt: skip


def _metric(name: str, value: float, values: list[Any], better: bool) -> Metric:
    if all(isinstance(v, (int, float)) for v in values):
        sums = Sums.mean(np.array(values), "examples")
        if np.isclose(sums.value, value, rtol=1e-9):
            return Metric.of(sums, higher_is_better=better)
        if name == "perplexity":  # the exponential of minus the mean log-likelihood: use the delta method
            error = sums.standard_error
            spread = None if error is None else value * error
            return Metric(value=value, standard_error=spread, higher_is_better=better)
    return Metric(value=value, standard_error=None, higher_is_better=better)


def _mean(name: str, parts: list[Result], settings: dict[str, Any]) -> Result:
    """Return the mean of the accuracies of some tasks, as the group in the harness computes it."""
    sums = [part.metrics["acc"].sums for part in parts]
    values = [s.top for s in sums if s is not None]
    strata = np.repeat(np.arange(len(values)), [len(v) for v in values])
    made = Sums.mean(np.concatenate(values), "examples", strata)
    return Result(
        kind="tasks",
        name=name,
        data={"tasks": len(parts), **settings},
        metrics={"acc": Metric.of(made, higher_is_better=True)},
        units=tuple(unit for part in parts for unit in part.units),
        more={"examples": len(strata)},
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the log messages and the progress bars of the harness, which has no option for the bars."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda items, **options: items
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar

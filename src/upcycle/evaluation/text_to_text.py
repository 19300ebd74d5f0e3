"""SuperGLUE for encoder-decoders: it asks the tasks, reads the answers and computes the metrics.

Besides the metrics of T5's greedy answers there is `rank_accuracy`, which takes the most likely label of a
task. A model that was not trained on the format seldom generates a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.errors import UpcycleError, listed
from upcycle.evaluation import superglue, task_files
from upcycle.evaluation.differences import Sums
from upcycle.evaluation.language_model import LanguageModel, Pair
from upcycle.evaluation.results import Metric, Result, data_of
from upcycle.evaluation.superglue import TASKS, Example
from upcycle.system import progress

ALL = "superglue"  # the name of the mean over the eight tasks
INPUT, TARGET = 512, 62  # tokens, as in appendix A.2 of Sparse Upcycling


def score(language: LanguageModel, folder: Path, *, limit: int) -> list[Result]:
    """Score the tasks that have a file NAME.jsonl in `folder`, and their mean if all eight are there.

    `limit` is the largest number of rows of a task; 0 means all.
    """
    results = []
    for kind, path in files(folder).items():
        rows = task_files.rows(path, kind)
        examples = superglue.rows_to_examples(kind, rows[: limit or None], path.name)
        data = {**data_of(path), "limit": limit}
        results.append(_result(kind, examples, data, language))
    if len(results) == len(TASKS):
        each = [np.mean([m.value for n, m in r.metrics.items() if n != "rank_accuracy"]) for r in results]
        mean = Metric(value=float(np.mean(each)), standard_error=None, higher_is_better=True)
        data = {"tasks": len(results), "limit": limit}
        results.append(Result(kind="superglue", name=ALL, data=data, metrics={"score": mean}))
    return results


def files(folder: Path) -> dict[str, Path]:
    """Find the files of SuperGLUE in a folder, by task. Raises `UpcycleError` if there are none."""
    if not folder.is_dir():
        raise UpcycleError(f"no folder {folder}; --superglue is a folder of files NAME.jsonl")
    found = {kind: folder / f"{kind}.jsonl" for kind in TASKS if (folder / f"{kind}.jsonl").is_file()}
    if not found:
        names = listed([f"{kind}.jsonl" for kind in TASKS], len(TASKS))
        raise UpcycleError(f"{folder} has no file of SuperGLUE; it should have some of {names}")
    return found


def _result(kind: str, examples: list[Example], data: dict[str, Any], language: LanguageModel) -> Result:
    tokenizer = language.tokenizer
    most = min(INPUT, language.length or INPUT)
    prompts = [tokenizer(e.prompt, truncation=True, max_length=most).input_ids for e in examples]
    with progress.work(f"{kind}: answers", "examples", total=len(examples)) as work:
        said = language.generate(prompts, most=TARGET, advance=work.advance)
    metrics = metrics_of(kind, examples, said)
    if labels := TASKS[kind].labels:
        answers = [tokenizer(text_target=label).input_ids for label in labels]
        pairs = [Pair(prompt, answer) for prompt in prompts for answer in answers]
        with progress.work(f"{kind}: labels", "examples", total=len(pairs)) as work:
            found = [likelihood.nats.sum() for likelihood in language.likelihoods(pairs, work.advance)]
        best = np.reshape(found, (len(prompts), len(labels))).argmin(1)
        metrics["rank_accuracy"] = _share(best == [e.label for e in examples])
    return Result(
        kind="superglue", name=kind, data=data, metrics=metrics, units=tuple(e.prompt for e in examples),
        more={"examples": len(examples)},
    )  # fmt: skip


def metrics_of(kind: str, examples: Sequence[Example], said: Sequence[str]) -> dict[str, Metric]:
    """Compute the metrics of the benchmark for the answers of a model.

    All tasks but ReCoRD and MultiRC have accuracy, CB also the mean F1 of its classes. MultiRC has the F1
    over all answers and the share of questions with every answer right. ReCoRD has exact match and F1, each
    the best over the answers of a query.
    """
    found = [superglue.parse(kind, text, example) for text, example in zip(said, examples, strict=True)]
    if kind == "record":
        return _record(examples, said)
    labels = np.array([example.label for example in examples])
    numbers = np.array(found)
    right = numbers == labels
    if kind == "multirc":
        numbers = np.where(numbers < 0, 1 - labels, numbers)  # an answer that is no label counts as wrong
        whole: dict[Any, bool] = {}
        for example, good in zip(examples, right, strict=True):
            whole[example.question] = whole.get(example.question, True) and bool(good)
        return {
            "f1": Metric(value=_f1(numbers, labels, 1), standard_error=None, higher_is_better=True),
            "exact_match": _share(np.array(list(whole.values())), "questions"),
        }
    metrics = {"accuracy": _share(right)}
    if kind == "cb":
        mean = float(np.mean([_f1(numbers, labels, c) for c in range(len(TASKS[kind].labels))]))
        metrics["mean_f1"] = Metric(value=mean, standard_error=None, higher_is_better=True)
    return metrics


def _record(examples: Sequence[Example], said: Sequence[str]) -> dict[str, Metric]:
    exact: dict[Any, float] = {}
    f1: dict[Any, float] = {}
    for example, text in zip(examples, said, strict=True):
        answers = [superglue.normalised(answer) for answer in example.answers]
        text = superglue.normalised(text)
        exact.setdefault(example.question, float(text in answers))
        f1.setdefault(example.question, max(superglue.squad_f1(text, answer) for answer in answers))
    return {
        "exact_match": _share(np.array(list(exact.values())), "queries"),
        "f1": _share(np.array(list(f1.values())), "queries"),
    }


def _share(values: np.ndarray, units: str = "examples") -> Metric:
    return Metric.of(Sums.mean(values, units), higher_is_better=True)


def _f1(found: np.ndarray, labels: np.ndarray, label: int) -> float:
    """Return the F1 of one class against the others; 0 if it neither occurs nor is answered."""
    both = int(((found == label) & (labels == label)).sum())
    either = int((found == label).sum() + (labels == label).sum())
    return 2 * both / either if either else 0.0

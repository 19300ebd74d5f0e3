"""`upcycle eval`: scores of dense and Mixture-of-Experts checkpoints on data they were not trained on.

For images: top-1 accuracy, or the few-shot probe on frozen features. For texts: bits per byte of a decoder,
or the loss of the model's task (spans, masked tokens). For tasks: those of lm-evaluation-harness, and
SuperGLUE as text to text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from upcycle import tasks
from upcycle.checkpoints import hub
from upcycle.checkpoints.checkpoint import Checkpoint, read_json
from upcycle.data import corpus, splits
from upcycle.dense.admission import admit
from upcycle.dense.leaving_out import that_find
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.evaluation import few_shot, task_files, text_to_text
from upcycle.evaluation.judge import Judge
from upcycle.evaluation.language_model import ENCODER_DECODER, SPEAKING
from upcycle.evaluation.results import Result
from upcycle.evaluation.to_score import ToScore
from upcycle.families import CAUSAL_HEADS
from upcycle.hf import models, opening
from upcycle.hf.quiet import quiet
from upcycle.records.run import RunRecord
from upcycle.system import scratch
from upcycle.system.wording import quoted
from upcycle.tasks import Task
from upcycle.tasks._tokens import refuse_idle, refuse_sound

__all__ = ["Scored", "ToScore", "evaluate", "refuse", "score"]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The results of a checkpoint."""

    checkpoint: str
    folder: Path
    architecture: str
    results: tuple[Result, ...]
    tokenizer: str | None  # a hash that identifies the tokenizer; None: no tokenizer was used

    def as_json(self) -> dict[str, Any]:
        """Return the JSON of `--json`.

        It has every result; a result that is alone of its kind is repeated at the top level.
        """
        found: dict[str, Any] = {"checkpoint": self.checkpoint, "architecture": self.architecture}
        by_kind: dict[str, list[Result]] = {}
        for result in self.results:
            by_kind.setdefault(result.kind, []).append(result)
        for kind, results in by_kind.items():
            if kind in ("text", "images", "few_shot", "chats") and len(results) == 1:
                (result,) = results
                flat = {name: metric.value for name, metric in result.metrics.items()} | dict(result.more)
                error = result.metrics["accuracy"].standard_error
                if kind in ("few_shot", "chats"):
                    found[kind] = {**flat, "standard_error": error}
                else:
                    found |= {**flat, "accuracy_error": error}
        return {**found, "results": [{**r.as_json(), **r.more} for r in self.results]}


def evaluate(source: str | Path, asked: ToScore) -> dict[str, Any]:
    """Score the checkpoint `source` (a folder or a hub id) and return JSON."""
    return score(source, asked).as_json()


def score(source: str | Path, asked: ToScore) -> Scored:
    """Score the checkpoint `source`, a folder or a hub id."""
    folder, subject = _admit(source, asked)
    with quiet():
        model = _model(folder, asked.drop)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    with scratch.folder() as made_here:
        words = corpus.read_tokenizer(folder) if asked.images is None else None
        judge = Judge(
            model=model, subject=subject, tokenizer=words, asked=asked, cache=asked.cache or made_here
        )
        results = _on_texts(judge) if asked.images is None else [_on_images(judge, asked.images)]
    return Scored(
        checkpoint=str(source), folder=folder, architecture=str(subject.config["architectures"][0]),
        results=tuple(results), tokenizer=None if words is None else _fingerprint(words),
    )  # fmt: skip


def refuse(sources: Sequence[str | Path], asked: ToScore) -> None:
    """Raise an error for settings that one of several checkpoints cannot meet, before any is scored."""
    folders = [_admit(source, asked)[0] for source in sources]
    there = {pattern for folder in folders for pattern in _of(folder, asked.drop)}
    if idle := [pattern for pattern in asked.drop if pattern not in there]:
        raise UpcycleError(f"--drop {idle[0]}: no checkpoint holds a tensor of that name")


def _of(folder: Path, drop: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names and patterns of `drop` that a tensor of a folder has."""
    if not drop:
        return ()
    with Checkpoint.open(folder, allow_nonfinite=True) as opened:
        return that_find(opened, drop)


def _model(folder: Path, drop: tuple[str, ...]) -> PreTrainedModel:
    """Open a model without the tensors of `drop`, which only a dense one can lack."""
    if not drop:
        return models.open(folder)
    with Checkpoint.open(folder, allow_nonfinite=True) as opened:
        if not (mine := that_find(opened, drop)):
            return models.open(folder)
        dense = admit(opened, drop=mine)
    model = models.open(folder, left_out=dense.left_out)
    opening.tie_dropped(model, dense)
    return model


def _admit(source: str | Path, asked: ToScore) -> tuple[Path, Subject]:
    folder = hub.local(source)
    if not (folder / "config.json").exists() and (folder / RunRecord.FILE).exists():
        raise UpcycleError(
            f"{folder} is the folder of a training run and no model; write its checkpoint as one first: "
            f"upcycle export {quoted(folder)} OUT"
        )
    config = read_json(folder / "config.json", f"{folder} has no config.json; give a folder of a model")
    subject = Subject(folder=folder, config=config)
    _refuse_unfit(subject, asked)
    _refuse_missing(asked)
    return folder, subject


def _refuse_unfit(subject: Subject, asked: ToScore) -> None:
    """Raise an error for data that a model class cannot be scored on, before weights are read."""
    architecture = subject.architecture
    refuse_sound(subject)
    if asked.shots is None:
        _refuse_other_data(tasks.of(architecture), architecture, asked)
    elif "image_size" not in subject.settings:
        raise UpcycleError(f"{architecture} reads no images; --few-shot is for models that do")
    if asked.chats and not architecture.endswith(CAUSAL_HEADS):
        heads = " or ".join(CAUSAL_HEADS)
        raise UpcycleError(f"{architecture} cannot chat; --chats is for classes that end in {heads}")
    if (asked.by_harness or asked.superglue) and not architecture.endswith(SPEAKING):
        raise UpcycleError(
            f"{architecture} gives no text a likelihood, and tasks ask for one; give --text, or a "
            f"checkpoint of a class that ends in {' or '.join(SPEAKING)}"
        )
    if asked.superglue and not architecture.endswith(ENCODER_DECODER):
        raise UpcycleError(
            f"{architecture} is no encoder-decoder, and --superglue asks text to text, as T5; give "
            f"--tasks boolq,copa,... instead"
        )


def _refuse_other_data(task: Task, architecture: str, asked: ToScore) -> None:
    """Raise an error for data that the task does not read, and for a task that cannot be scored."""
    if asked.images and task.reads != "images":
        raise UpcycleError(f"{architecture} does not classify images; give --text, or --few-shot")
    if (reason := task.unscored(architecture)) is not None:
        raise UpcycleError(reason)
    if not asked.images and task.reads != "text":
        raise UpcycleError(f"{architecture} reads images and no text; give --images")
    if asked.stride is not None and not task.in_windows:
        raise UpcycleError(
            f"--stride {asked.stride} is for decoders, and {architecture} is scored on rows that do not "
            f"overlap; leave it out"
        )


def _refuse_missing(asked: ToScore) -> None:
    """Raise an error if a split, files of a task or lm-evaluation-harness are missing, before scoring.

    Likewise for a separator or a field that none of the texts could have, and for a probe that would be
    tested on what it is fitted on.
    """
    for path in filter(None, (*asked.texts, asked.chats)):
        if (why := splits.mixed(splits.to_score(path))) is not None:
            raise UpcycleError(why)
    for given in ({"separator": asked.separator}, {"field": asked.field}):
        refuse_idle([splits.to_score(path).path for path in asked.texts], **given)
    if asked.by_harness:
        harness()
    if asked.task_files:
        task_files.find(asked.task_files, asked.tasks)
    if asked.superglue:
        text_to_text.files(asked.superglue)
    if asked.shots and asked.images:
        few_shot.refuse_shared(asked.shots, asked.images)


def _on_images(judge: Judge, images: Path) -> Result:
    if judge.asked.shots is not None:
        return few_shot.score(judge.model, judge.subject, judge.asked.shots, images, judge.asked, judge.cache)
    return tasks.of(judge.subject.architecture).score(judge, images)


def _on_texts(judge: Judge) -> list[Result]:
    asked, task = judge.asked, tasks.of(judge.subject.architecture)
    results = [replace(task.score(judge, _part(path)), name=name) for name, path in asked.named.items()]
    if asked.chats:
        scored = tasks.find("sft")().score(judge, _part(asked.chats))
        results.append(replace(scored, name=asked.chats.name))
    if asked.by_harness:
        theirs = harness()
        exam = theirs.exam(asked.tasks, asked.task_files, shots=asked.num_fewshot, limit=asked.limit)
        results += theirs.score(judge.language, exam)
    if asked.superglue:
        results += text_to_text.score(judge.language, asked.superglue, limit=asked.limit)
    return results


def _part(path: Path) -> Path:
    """Return the folder of the split to score on if `path` is a data set that has splits, or `path`."""
    return Path(splits.to_score(path).path)


def harness() -> ModuleType:
    """Return the module that needs lm-evaluation-harness. Raises `UpcycleError` if that is not installed."""
    try:
        from upcycle.evaluation import harness as found
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UpcycleError(
            "tasks are those of lm-evaluation-harness, which is not installed: pip install 'upcycle[eval]'"
        ) from None
    return found


def _fingerprint(tokenizer: Any) -> str:
    fast = tokenizer.is_fast
    said = tokenizer.backend_tokenizer.to_str() if fast else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(said.encode()).hexdigest()

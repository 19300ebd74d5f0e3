"""`upcycle.evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

from upcycle.api._names import names
from upcycle.checkpoints import hub
from upcycle.errors import UpcycleError
from upcycle.evaluation import results
from upcycle.evaluation.to_score import ToScore
from upcycle.records.evaluation import EvaluationRecord
from upcycle.system import whole_file
from upcycle.system.needed import said_if_missing
from upcycle.system.progress import Progress, reporting_to
from upcycle.system.signals import interrupting

if TYPE_CHECKING:
    from upcycle.evaluation.comparison import PairedDifference
    from upcycle.evaluation.scores import Scored


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of checkpoints, and the differences between the first one and the others."""

    scored: tuple[Scored, ...]
    differences: tuple[PairedDifference, ...]  # a metric of another checkpoint minus that of the first
    notes: tuple[str, ...]  # reasons why results were not compared

    def as_dict(self) -> dict[str, Any]:
        """Return the evaluation as JSON."""
        return {
            "checkpoints": [each.as_json() for each in self.scored],
            "differences": [row.as_json() for row in self.differences],
            "notes": list(self.notes),
        }

    def write(self, path: str | Path) -> Path:
        """Write the scores and the comparison to the JSON file `path`."""
        path = Path(path)
        results.refuse_target(path)
        whole_file.write_json(path, {"format": EvaluationRecord.FORMAT, **self.as_dict()})
        return path

    def record(self) -> Recorded:
        """Write the scores to eval.json in the folder of each checkpoint.

        Nothing is written into the cache of the hub.
        """
        written: list[Path] = []
        lost: list[UpcycleError] = []
        for each in self.scored:
            if hub.is_id(each.checkpoint):
                continue
            try:
                written.append(results.record(each.folder, each.results, each.tokenizer))
            except UpcycleError as error:
                lost.append(error)
        return Recorded(written=tuple(written), lost=tuple(lost))


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The files that the scores were written to, and the errors for those that could not be written."""

    written: tuple[Path, ...]
    lost: tuple[UpcycleError, ...]


@said_if_missing()
def evaluate(
    checkpoints: str | Path | Sequence[str | Path],
    *,
    text: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None = None,
    images: str | Path | None = None,
    chats: str | Path | None = None,
    few_shot: str | Path | None = None,
    tasks: Sequence[str] = (),
    task_files: str | Path | None = None,
    num_fewshot: int | None = None,
    superglue: str | Path | None = None,
    per_class: int = 10,
    length: int | None = None,
    stride: int | None = None,
    separator: str | None = None,
    field: str = "text",
    batch_size: int = 0,
    limit: int = 0,
    cache: str | Path | None = None,
    drop: Sequence[str] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Score checkpoints on data they were not trained on, and compare them with the first one.

    `checkpoints` are folders or hub ids. `text` is scored by the task that the model is made for: next token
    (nats per token, bits per byte), spans or masked tokens. `chats` gives the loss on what the assistant
    says. `images` gives the top-1 accuracy or, with `few_shot`, that of a linear probe fitted on `per_class`
    images of each class. `tasks` are tasks of lm-evaluation-harness, with `num_fewshot` examples before each
    question and data from `task_files`; `superglue` is a folder of that benchmark. `length` and `stride` of a
    window are in tokens. `field` is that of the text in JSON lines and parquet. `limit` is the largest number
    of rows (0: all), and `batch_size` 0 chooses one automatically. `drop` has names and patterns of tensors
    to leave out of the dense checkpoints that have them. Nothing is written; see `Evaluation.record`. Raises
    `UpcycleError`, before the first model is loaded, for what cannot be scored.
    """
    asked = ToScore(
        text=text, images=images, chats=chats, shots=few_shot,  # type: ignore[arg-type]
        tasks=names(tasks, "tasks"), task_files=task_files,  # type: ignore[arg-type]
        num_fewshot=num_fewshot, superglue=superglue, per_class=per_class, length=length, stride=stride,  # type: ignore[arg-type]
        separator=separator, field=field, batch_size=batch_size, limit=limit, cache=cache,  # type: ignore[arg-type]
        drop=names(drop, "drop"),
    )  # fmt: skip
    several = [checkpoints] if isinstance(checkpoints, (str, Path)) else [*checkpoints]
    if not several:
        raise UpcycleError("give at least one CHECKPOINT, a folder of a model")
    _refuse_absent(several, asked)  # before torch is imported, which takes seconds
    from upcycle.evaluation.comparison import compare
    from upcycle.evaluation.scores import refuse, score

    with reporting_to(progress), interrupting(SIGTERM):
        refuse(several, asked)
        scored = [score(checkpoint, asked) for checkpoint in several]
    compared = compare(scored)
    return Evaluation(scored=tuple(scored), differences=compared.differences, notes=compared.notes)


def _refuse_absent(checkpoints: Sequence[str | Path], asked: ToScore) -> None:
    """Raise `UpcycleError` if a checkpoint or a data file is missing."""
    for checkpoint in checkpoints:
        hub.refuse_missing(checkpoint)
    for path in (*asked.texts, asked.images, asked.chats, asked.shots, asked.task_files, asked.superglue):
        if path is not None and not path.exists():
            raise UpcycleError(f"no data at {path}")

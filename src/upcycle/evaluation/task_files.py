"""Local files of evaluation tasks: `NAME.jsonl` holds the data of the task NAME of lm-evaluation-harness.

Rows have the fields of the data set that the task reads on the hub. Rows of ARC, PIQA, COPA, BoolQ and
LAMBADA may also have the common form of query, choices and gold (or context and continuation). They are
converted to the fields of the hub, so that prompts and metrics stay those of the harness.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.data.documents import json_row
from upcycle.errors import UpcycleError, listed

BLIMP = "blimp"  # the folder of the paradigms, and the name of their group

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """The file with the data of one task."""

    task: str  # the name in the harness
    path: Path


def find(folder: Path, names: tuple[str, ...]) -> list[TaskFile]:
    """Find the files in `folder` of the tasks `names`, or all files if there are no names.

    `blimp` is a folder with one file for each paradigm. Raises `UpcycleError` for a task without a file.
    """
    if not folder.is_dir():
        raise UpcycleError(
            f"no folder {folder}; --task-files, or eval.task_files in a run file, is a folder of files "
            f"NAME.jsonl"
        )
    there = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    there |= {f"{BLIMP}_{path.stem}": path for path in sorted((folder / BLIMP).glob("*.jsonl"))}
    if not there:
        raise UpcycleError(
            f"{folder} holds no task files; it should have NAME.jsonl, or {BLIMP}/PARADIGM.jsonl"
        )
    wanted: dict[str, Path] = {}
    for name in names or there:
        found = {k: p for k, p in there.items() if k == name or (name == BLIMP and k.startswith(f"{BLIMP}_"))}
        if not found:
            raise UpcycleError(
                f"{folder} has no {name}.jsonl for the task {name}; it has files of "
                f"{listed(sorted(there), 8)}. Put the file there, or leave out --task-files (in a run file, "
                f"eval.task_files) to fetch the task's data set"
            )
        wanted |= found
    return [TaskFile(task=task, path=path) for task, path in wanted.items()]


def rows(path: Path, task: str) -> list[Row]:
    """Read the rows of a file, with the fields of the data set of `task` on the hub."""
    out = []
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        out.append(_as_on_the_hub(_row(line, where), task, where))
    if not out:
        raise UpcycleError(f"{path} holds no rows")
    return out


def _row(line: str, where: str) -> Row:
    try:
        row = json_row(line, where)
        json.dumps(row, ensure_ascii=False).encode()
    except RecursionError:
        raise UpcycleError(f"{where} is nested too deep to be a row") from None
    except UnicodeEncodeError:
        raise UpcycleError(f"{where} holds half of a character (a lone surrogate)") from None
    return row


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except FileNotFoundError:
        raise UpcycleError(f"no data at {path}; give a file of JSON lines") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UpcycleError(f"{path} cannot be read as text: {error}") from None


def _as_on_the_hub(row: Row, task: str, where: str) -> Row:
    turn = _TURNS.get(task)
    if turn is None or not (
        {"query", "choices", "gold"} <= row.keys() or {"context", "continuation"} <= row.keys()
    ):
        return _checked(row, task, where)
    try:
        return _checked(turn(row), task, where)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UpcycleError(
            f"{where} is not a row of {task} in the form of query, choices and gold ({error}); give the "
            "fields of the hub's data set"
        ) from None


def _checked(row: Row, task: str, where: str) -> Row:
    """Return the row if it has the fields and types that a known task needs."""
    kinds = _KINDS.get(BLIMP if task.startswith(f"{BLIMP}_") else task, {})
    for name, kind in kinds.items():
        if name not in row:
            raise UpcycleError(
                f"{where} has no {name!r}; a row of {task} has {', '.join(kinds)}, as the hub's data set"
            )
        if not isinstance(row[name], kind):
            found = type(row[name]).__name__
            raise UpcycleError(f"{where}: {name!r} is {found}; in a row of {task} it is {kind.__name__}")
    classes = _CLASSES.get(task)
    if classes is not None and not 0 <= row["label"] < classes:
        raise UpcycleError(f"{where}: 'label' is {row['label']}; in a row of {task} it is 0 to {classes - 1}")
    return row


def _between(text: str, start: str, end: str = "") -> str:
    if not (text.startswith(start) and text.endswith(end)):
        raise ValueError(f"its query should begin with {start!r}" + (f" and end with {end!r}" if end else ""))
    return text[len(start) : len(text) - len(end)]


def _arc(row: Row) -> Row:
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    return {
        "question": _between(row["query"], "Question: "),
        "choices": {"text": row["choices"], "label": letters},
        "answerKey": letters[row["gold"]],
    }


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {
        "goal": _between(row["query"], "Question: ", "\n"),
        "sol1": first,
        "sol2": second,
        "label": row["gold"],
    }


def _copa(row: Row) -> Row:
    connectors = {", because": "cause", ", therefore": "effect"}
    end = next((end for end in connectors if row["query"].endswith(end)), None)
    if end is None:
        raise ValueError("its query should end with ', because' or ', therefore'")
    first, second = (choice[0].upper() + choice[1:] for choice in row["choices"])
    return {
        "premise": row["query"].removesuffix(end) + ".",
        "question": connectors[end],
        "choice1": first,
        "choice2": second,
        "label": row["gold"],
    }


def _boolq(row: Row) -> Row:
    if row["choices"] != ["no", "yes"]:
        raise ValueError("its choices should be no and yes")
    passage, found, question = row["query"].rpartition("\nQuestion: ")
    if not found:
        raise ValueError("its query should have a line 'Question: '")
    return {
        "passage": _between(passage, "Passage: "),
        "question": question.removesuffix("?"),
        "label": row["gold"],
    }


def _lambada(row: Row) -> Row:
    if " " in row["continuation"]:
        raise ValueError("its continuation should be one word")
    return {"text": f"{row['context']} {row['continuation']}"}


_KINDS: Mapping[str, Mapping[str, type]] = {
    "arc_easy": {"question": str, "choices": dict, "answerKey": str},
    "arc_challenge": {"question": str, "choices": dict, "answerKey": str},
    "piqa": {"goal": str, "sol1": str, "sol2": str, "label": int},
    "copa": {"premise": str, "question": str, "choice1": str, "choice2": str, "label": int},
    "boolq": {"passage": str, "question": str, "label": int},
    "lambada_openai": {"text": str},
    BLIMP: {"sentence_good": str, "sentence_bad": str},
}
_CLASSES = {"piqa": 2, "copa": 2, "boolq": 2}
_TURNS: Mapping[str, Callable[[Row], Row]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "piqa": _piqa,
    "copa": _copa,
    "boolq": _boolq,
    "lambada_openai": _lambada,
}

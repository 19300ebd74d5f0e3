"""SuperGLUE as T5 runs it: every task is text in, text out, and the answer is the greedy text.

Inputs and targets are those of T5's code (Raffel et al. 2020; `preprocessors.py`, `glue_utils.py`): the name
of the task, then each field after its name; WSC asks for what a marked pronoun stands for, ReCoRD for the
entity at the placeholder. A row has the fields of the hub's `aps/super_glue`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.evaluation.task_files import Row

_KINDS: Mapping[str, type] = {
    "label": int, "idx": dict, "entities": list, "answers": list, "span2_index": int,
}  # fmt: skip
"""What a field of a row is; text where it does not stand here."""
_TRUTH = ("False", "True")


@dataclass(frozen=True)
class Example:
    """What a model reads, what it should say (any of them), and which question it is part of."""

    prompt: str
    answers: tuple[str, ...]
    label: int = (
        -1
    )  # the number of the answer among the task's labels; of WSC, whether it is what the pronoun means
    question: Hashable = None


@dataclass(frozen=True, kw_only=True)
class SuperGlueTask:
    """How a row of one task is asked. `labels` are the only answers there are, where there are only some."""

    labels: tuple[str, ...]
    fields: tuple[str, ...]  # that a row must have
    ask: Callable[[Row], Example]

    def example(self, row: Row, where: str) -> Example:
        """The row as an example. Raises `UpcycleError` where it is none."""
        if missing := [name for name in self.fields if name not in row]:
            raise UpcycleError(
                f"{where} has no {', '.join(missing)}; a row has the fields of the hub's aps/super_glue: "
                f"{', '.join(self.fields)}"
            )
        try:
            for name in self.fields:
                kind = _KINDS.get(name, str)
                if not isinstance(row[name], kind):
                    raise TypeError(f"{name!r} is {type(row[name]).__name__} and no {kind.__name__}")
            return self.ask(row)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise UpcycleError(
                f"{where} is not a row as the hub's aps/super_glue has them: {error}"
            ) from None


def _classified(name: str, labels: tuple[str, ...], shown: tuple[str, ...]) -> SuperGlueTask:
    """A task that gives fields one after another and wants the name of a class."""

    def ask(row: Row) -> Example:
        parts = [part for field in shown for part in (f"{field}:", row[field])]
        label = _label(row, len(labels))
        return Example(" ".join([name, *parts]), (labels[label],), label)

    return SuperGlueTask(labels=labels, fields=(*shown, "label"), ask=ask)


def _label(row: Row, classes: int) -> int:
    label = int(row["label"])
    if not 0 <= label < classes:
        raise ValueError(
            f"label = {row['label']!r}; allowed: 0 to {classes - 1} (rows of a test set have none)"
        )
    return label


def _multirc(row: Row) -> Example:
    shown = f"multirc question: {row['question']} answer: {row['answer']} paragraph: {row['paragraph']}"
    label = _label(row, 2)
    question = (row["idx"]["paragraph"], row["idx"]["question"])
    hash(question)  # a TypeError where it names no question
    return Example(re.sub("</?b>", "", shown.replace("<br>", " ")), (_TRUTH[label],), label, question)


def _record(row: Row) -> Example:
    # A highlight is a sentence of its own, and gets a full stop where it has no end.
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", row["passage"])
    passage = passage.replace("\n@highlight\n", ". ")
    shown = f"record query: {row['query']} entities: {', '.join(row['entities'])} passage: {passage}"
    if not row["answers"]:
        raise ValueError("it has no answers (rows of a test set have none)")
    question = (row["idx"]["passage"], row["idx"]["query"])
    hash(question)  # a TypeError where it names no question
    if not all(isinstance(text, str) for text in (*row["answers"], *row["entities"])):
        raise ValueError("its answers and entities should be texts")
    return Example(shown, tuple(row["answers"]), question=question)


def _wsc(row: Row) -> Example:
    words, pronoun = row["text"].split(" "), row["span2_text"]
    place = _pronoun(words, int(row["span2_index"]), pronoun)
    rest = words[place][len(pronoun) :]  # punctuation that was not set apart
    marked = [*words[:place], f"*{pronoun}*", *([rest] if rest else []), *words[place + 1 :]]
    return Example(f"wsc: {' '.join(marked).strip()}", (row["span1_text"],), _label(row, 2))


def _pronoun(words: list[str], index: int, pronoun: str) -> int:
    """Where the pronoun stands: at `index`, or beside it (the data set is off by one in a place)."""
    for place in (index, index + 1, index - 1):
        if 0 <= place < len(words) and re.fullmatch(re.escape(pronoun) + r"\W*", words[place]):
            return place
    raise ValueError(f"word {index} of its text is not {pronoun!r}")


TASKS: Mapping[str, SuperGlueTask] = {
    "boolq": _classified("boolq", _TRUTH, ("passage", "question")),
    "cb": _classified("cb", ("entailment", "contradiction", "neutral"), ("hypothesis", "premise")),
    "copa": _classified("copa", ("choice1", "choice2"), ("choice1", "choice2", "premise", "question")),
    "multirc": SuperGlueTask(
        labels=_TRUTH, fields=("question", "answer", "paragraph", "idx", "label"), ask=_multirc
    ),
    "record": SuperGlueTask(
        labels=(), fields=("query", "entities", "passage", "answers", "idx"), ask=_record
    ),
    "rte": _classified("rte", ("entailment", "not_entailment"), ("hypothesis", "premise")),
    "wic": _classified("wic", _TRUTH, ("sentence1", "sentence2", "word")),
    "wsc": SuperGlueTask(
        labels=(), fields=("text", "span1_text", "span2_text", "span2_index", "label"), ask=_wsc
    ),
}


def parse(kind: str, said: str, example: Example) -> int | str:
    """What an answer counts as: the number of a label, or -1 for none; of WSC, whether it means the referent;
    of ReCoRD, the text."""
    if kind == "record":
        return said
    if kind == "wsc":
        return int(means(said, example.answers[0]))
    labels = TASKS[kind].labels
    return labels.index(said) if said in labels else -1


_DETERMINERS = frozenset(
    (
        "a an few her his each every many much my our some that the their these this those which whose your"
    ).split()
)


def means(said: str, referent: str) -> bool:
    """Whether an answer names the referent: all words of one are among those of the other, determiners and
    case aside, and a possessive ("Bob's hat") is never the bare name."""
    one, other = (
        " ".join(word for word in text.strip().lower().split(" ") if word not in _DETERMINERS)
        for text in (said, referent)
    )
    if ("'" in one) != ("'" in other):
        return False
    here, there = set(one.split(" ")), set(other.split(" "))
    return here <= there or there <= here


def normalised(text: str) -> str:
    """An answer as SQuAD's evaluation compares it: no case, punctuation, articles, or runs of blanks."""
    bare = re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def squad_f1(said: str, answer: str) -> float:
    """The F1 of the words of two normalised texts."""
    here, there = said.split(), answer.split()
    common = sum(min(here.count(word), there.count(word)) for word in set(here))
    return 2 * common / (len(here) + len(there)) if common else 0.0


def rows_to_examples(kind: str, rows: list[Row], name: str) -> list[Example]:
    """The examples of a task's rows."""
    task: Any = TASKS[kind]
    return [task.example(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]

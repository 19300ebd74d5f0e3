"""SuperGLUE as T5 runs it: every task is text to text, and the answer is generated greedily.

Inputs and targets are those of T5's code (Raffel et al. 2020; `preprocessors.py`, `glue_utils.py`): the name
of the task, then the name and the value of each field. WSC asks what a marked pronoun stands for, and ReCoRD
asks for the entity at the placeholder. A row has the fields of the hub's `aps/super_glue`.
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
"""The types of the fields of a row; a field that is not listed is text."""
_TRUTH = ("False", "True")


@dataclass(frozen=True)
class Example:
    """An input, the accepted answers, and the question that the example is part of."""

    prompt: str
    answers: tuple[str, ...]
    label: int = -1  # index of the right label; for WSC, whether the pronoun means the referent
    question: Hashable = None


@dataclass(frozen=True, kw_only=True)
class SuperGlueTask:
    """The way in which rows of a task become examples.

    `labels` are the only possible answers, if the task has a fixed set.
    """

    labels: tuple[str, ...]
    fields: tuple[str, ...]  # the fields that a row must have
    ask: Callable[[Row], Example]

    def example(self, row: Row, where: str) -> Example:
        """Turn a row into an example. Raises `UpcycleError` if it is malformed."""
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
    """Make a classification task: the input is a list of fields, and the answer is the name of a class."""

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
    hash(question)  # raises TypeError if the row names no question
    return Example(re.sub("</?b>", "", shown.replace("<br>", " ")), (_TRUTH[label],), label, question)


def _record(row: Row) -> Example:
    # A highlight is a sentence of its own, and gets a full stop if it has none.
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", row["passage"])
    passage = passage.replace("\n@highlight\n", ". ")
    shown = f"record query: {row['query']} entities: {', '.join(row['entities'])} passage: {passage}"
    if not row["answers"]:
        raise ValueError("it has no answers (rows of a test set have none)")
    question = (row["idx"]["passage"], row["idx"]["query"])
    hash(question)  # raises TypeError if the row names no question
    if not all(isinstance(text, str) for text in (*row["answers"], *row["entities"])):
        raise ValueError("its answers and entities should be texts")
    return Example(shown, tuple(row["answers"]), question=question)


def _wsc(row: Row) -> Example:
    words, pronoun = row["text"].split(" "), row["span2_text"]
    place = _pronoun(words, int(row["span2_index"]), pronoun)
    rest = words[place][len(pronoun) :]  # punctuation that is attached to the word
    marked = [*words[:place], f"*{pronoun}*", *([rest] if rest else []), *words[place + 1 :]]
    return Example(f"wsc: {' '.join(marked).strip()}", (row["span1_text"],), _label(row, 2))


def _pronoun(words: list[str], index: int, pronoun: str) -> int:
    """Find the pronoun at `index` or beside it: in a few rows of the data set the index is off by one."""
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
    """Turn the text of an answer into what is scored.

    That is the index of a label (-1 for none); for WSC, whether the answer means the referent; for ReCoRD,
    the text.
    """
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
    """Return whether an answer names the referent.

    All words of one must be among those of the other, apart from determiners and case. A possessive ("Bob's
    hat") never matches the bare name.
    """
    one, other = (
        " ".join(word for word in text.strip().lower().split(" ") if word not in _DETERMINERS)
        for text in (said, referent)
    )
    if ("'" in one) != ("'" in other):
        return False
    here, there = set(one.split(" ")), set(other.split(" "))
    return here <= there or there <= here


def normalised(text: str) -> str:
    """Normalise an answer as in SQuAD's evaluation: no case, punctuation, articles or repeated blanks."""
    bare = re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def squad_f1(said: str, answer: str) -> float:
    """Return the F1 score of the words of two normalised texts."""
    here, there = said.split(), answer.split()
    common = sum(min(here.count(word), there.count(word)) for word in set(here))
    return 2 * common / (len(here) + len(there)) if common else 0.0


def rows_to_examples(kind: str, rows: list[Row], name: str) -> list[Example]:
    """Turn the rows of a task into examples."""
    task: Any = TASKS[kind]
    return [task.example(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]

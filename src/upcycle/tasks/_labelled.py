"""Checks that tasks with labelled examples make on their data and on the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from upcycle.data.class_labels import NamesOfNumbers
from upcycle.data.corpus import Data
from upcycle.data.documents import Source
from upcycle.data.examples import Examples, Labelled, refuse_other_classes
from upcycle.data.feeding import Feed, Feeding
from upcycle.data.leaks import shared
from upcycle.errors import UpcycleError, listed
from upcycle.system import progress
from upcycle.tasks import Task

if TYPE_CHECKING:
    from upcycle.data.images import ImageSet
    from upcycle.data.texts import TextSet
    from upcycle.dense.subject import Subject

Classes = int | tuple[str, ...]  # task.classes of a run; 0: none are set
Set = TypeVar("Set", "ImageSet", "TextSet")


def only_source(feeding: Feeding, task: Task) -> Source:
    """Return the only data source. Raises `UpcycleError` if there are several."""
    if (said := _several(feeding.data, task)) is not None:
        raise UpcycleError(said)
    return feeding.data.sources[0]


def _several(data: Data, task: Task) -> str | None:
    if len(data.sources) == 1:
        return None
    return f"{task.name.replace('_', ' ')} takes one [[data.sources]]; there are {len(data.sources)}"


def split(train: Labelled, test: Labelled | None, feeding: Feeding) -> Feed:
    """Return the examples to train on and those to score on: the set `test`, or a share of `train`."""
    data = feeding.data
    return Examples(
        train,
        test,
        held_out_share=data.held_out,
        seed=feeding.seed,
        split_seed=data.split_seed or 0,
        reading=next(iter(feeding.readings), None),
    )


def objection_to(data: Data, task: Task, test: Source | None, unread: Sequence[str]) -> str | None:
    """Return a sentence about [data] that `task` would not use as it says; None if it would.

    `test` is the set to score on, if there is one, and `unread` has the keys that the task does not read.
    """
    of_test = None if test is None else _objection_to_test(test, data)
    return _several(data, task) or _set_in_vain(data, task, unread) or of_test


def _set_in_vain(data: Data, task: Task, unread: Sequence[str]) -> str | None:
    for where, table in (("data.", data), *(("data.sources ", source) for source in data.sources)):
        for key in fields(table):
            value = getattr(table, key.name)
            if key.name in unread and value != key.default:
                return (
                    f"{where}{key.name} = {json.dumps(value)} does nothing, because the task "
                    f"{task.name} does not read it; take it out"
                )
    return None


def _objection_to_test(test: Source, data: Data) -> str | None:
    if data.held_out:
        return (
            f"data.held_out = {data.held_out:g} holds nothing out, because the model is scored on task.test; "
            f"take one of them out"
        )
    if any(shared(test, source) is not None for source in data.sources):
        part = f", split {test.split}" if test.path.startswith("hf:") else ""
        return (
            f"task.test = {test.path}{part} is trained on, too, because data.sources names it; give another "
            f"set, or take task.test out and set data.held_out"
        )
    return None


def refuse_unknown_ids(ids: np.ndarray, path: str, subject: Subject) -> None:
    """Raise `UpcycleError` if the embedding has no row for some of the ids."""
    if (largest := int(ids.max())) >= subject.vocab_size:
        raise UpcycleError(
            f"the tokenizer gives id {largest} in {path} and the embedding has {subject.vocab_size} "
            f"rows; put the tokenizer of the model into its folder, or in a run, set data.tokenizer to it"
        )


def as_the_head(found: Set, subject: Subject, classes: Classes) -> Set:
    """Return the examples with labels renumbered to the model's head.

    If both have class names, the names decide; capital letters in them do not count. Otherwise the numbers
    stay. So do numbers whose names are all foreign to the head, if it has as many classes; a warning says
    what they become. `classes` are those of the run, if it gives the model a new head. Raises `UpcycleError`
    for more classes than the head has, or for a class that it does not know.
    """
    if found.num_labels > subject.num_labels:
        raise UpcycleError(_too_many(found, subject, classes))
    names, known = found.class_names, subject.class_names
    if not names or not known or names == known:
        return found
    if (places := _places(names, known)) is not None:
        return _renumbered(found, places, known)
    if _only_numbers(names) or _only_numbers(known):
        return found
    numbered = isinstance(names, NamesOfNumbers)
    if numbered and _foreign(names, known):
        progress.warn(
            f"{found.name} numbers its classes, and the model's head has other names for all of them, so the "
            f"numbers decide: {listed([f'{name} is {own}' for name, own in zip(names, known, strict=True)])}"
        )
        return found
    odd = _odd(names, known)
    without = "store its numbers without names if they are the head's, " if numbered else ""
    raise UpcycleError(
        f"{found.name} has the class {odd!r}, and the model's head {_instead(odd, known)} (id2label in its "
        f"config.json); call the classes what it calls them, {without}or in a new run, set task.classes for "
        f"a new head"
    )


def _too_many(found: Labelled, subject: Subject, classes: Classes) -> str:
    """Return a sentence about examples of more classes than the head has."""
    if not classes:
        return (
            f"{found.name} has {found.num_labels} classes and the model's head {subject.num_labels} "
            f"(id2label in config.json); give data of its classes, or in a run, set task.classes for a "
            f"new head"
        )
    if isinstance(classes, int):
        return (
            f"{found.name} has {found.num_labels} classes and task.classes = {classes}; set it to "
            f"{found.num_labels}, or give data of fewer classes"
        )
    known = {name.casefold() for name in classes}
    lacking = [name for name in found.class_names if name.casefold() not in known]
    which = f", and not {listed(lacking)}" if len(lacking) < len(found.class_names) else ""
    return (
        f"{found.name} has {found.num_labels} classes and task.classes names {len(classes)}{which}; name all "
        f"of them in task.classes, or give data of fewer classes"
    )


def refuse_unnamed(found: Labelled, subject: Subject) -> None:
    """Raise `UpcycleError` if a head without names cannot be scored, because the examples lack a class.

    Their classes are numbered by their names then, and not as the head's are.
    """
    names, known = found.class_names, subject.class_names
    if not names or isinstance(names, NamesOfNumbers) or _only_numbers(names):
        return
    if len(names) < len(known) and _only_numbers(known):
        raise UpcycleError(
            f"{found.name} has {len(names)} classes with names and the model's head {len(known)} without "
            f"(id2label in its config.json), so nobody can tell which is which; give the head its names, or "
            f"data with all of its classes"
        )


def as_fitted(found: Set, fitted: Set) -> Set:
    """Return examples with labels renumbered to those of the set that a classifier was fitted on.

    If both have class names, the names decide. Raises `UpcycleError` for a class that `fitted` does not have.
    """
    names, known = found.class_names, fitted.class_names
    if not names or not known:
        refuse_other_classes(fitted, found)
        return found
    if (places := _places(names, known)) is None:
        odd = _odd(names, known)
        raise UpcycleError(
            f"{found.name} has the class {odd!r}, and {fitted.name}, which the probe is fitted on, "
            f"{_instead(odd, known)}; give two sets with the same names of classes"
        )
    return _renumbered(found, places, known)


def _renumbered(found: Set, places: Sequence[int], known: Sequence[str]) -> Set:
    """Return examples with the class number `i` as `places[i]`, its place in `known`."""
    names = type(found.class_names)(known)
    labels = np.array(places)[found.labels]
    return replace(found, labels=labels, class_names=names, num_labels=len(known))


def _places(names: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Return the number of each class in the head that has its name; None if one is not there once.

    The names are compared to the letter, or else without regard to capital letters.
    """
    for form in (str, str.casefold):
        here, there = [*map(form, names)], [*map(form, known)]
        if len({*here}) == len({*names}) and all(there.count(name) == 1 for name in here):
            return [there.index(name) for name in here]
    return None


def _odd(names: Sequence[str], known: Sequence[str]) -> str:
    """Return the class to blame: one that the head has not once to the letter, best not in any letters."""
    odd = [name for name in names if known.count(name) != 1]
    folded = [name.casefold() for name in known]
    return ([name for name in odd if folded.count(name.casefold()) != 1] or odd or names)[0]


def _foreign(names: Sequence[str], known: Sequence[str]) -> bool:
    """Return whether there are as many names as a head has, none of them like one of the head's."""
    return len(names) == len(known) and not {*map(_letters, names)} & {*map(_letters, known)}


def _only_numbers(names: Sequence[str]) -> bool:
    """Return whether the names only say that the classes are numbered."""
    numbers = all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(names))
    return numbers or names == ("false", "true")


def _instead(odd: str, known: Sequence[str]) -> str:
    """Describe what a head has instead of a class that it does not know."""
    if odd in known:
        return f"has {known.count(odd)} of that name"
    alike = next((name for name in known if _letters(name) == _letters(odd)), None)
    return (
        f"has {listed(list(known))}"
        if alike is None
        else f"has {alike!r}, which is not the same to the letter"
    )


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))

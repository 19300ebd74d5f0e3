"""Replaces the classification head, to fine-tune on other classes than the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError
from upcycle.families import Config, Weights
from upcycle.families._training import Trained, trained
from upcycle.families._weights import Constant, Normal
from upcycle.tasks import Task
from upcycle.tensors import rng
from upcycle.tensors.computed import Drawn, Fill
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import Lazy


def renewed(
    dense: Dense, config: Mapping[str, Any], entries: Mapping[str, Entry], task: Task, seed: int
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Return config.json and tensors with a new head for `task.classes`.

    As in transformers, matrices start as N(0, deviation^2) and biases as 0. Raises `UpcycleError` if the
    model has no classification head, or one that its family does not describe.
    """
    classes = task.classes
    names = classes if isinstance(classes, tuple) else tuple(f"LABEL_{i}" for i in range(classes))
    labels = {str(i): name for i, name in enumerate(names)}
    family = trained(dense.family, "task.classes")
    weights, more = (
        _listed(family, family.config({**dense.raw, "id2label": given}))
        for given in (labels, {**labels, str(len(labels)): "one more"})
    )
    head = [name for name, weight in weights.items() if more[name] != weight]
    if not head and dense.architecture.endswith("Classification"):
        raise UpcycleError(
            f"task.classes: the family {family.model_type} does not say which tensors of a "
            f"{dense.architecture} are of its classes; take it out, and give data of the classes that it has"
        )
    if not head:
        raise UpcycleError(
            f"task.classes replaces a head of classes, and a {dense.architecture} has none; take it out, or "
            f"{task.remedy}"
        )
    out = dict(entries)
    for name in head:
        begins = family.initial(dense.config, name, weights[name])
        shape = weights[name].shape
        if isinstance(begins, Normal):
            key = rng.key(seed, name, "new head")
            made: Lazy = Drawn((shape[0], shape[1]), "F32", "normal", begins.deviation, key)
        elif isinstance(begins, Constant):
            made = Fill(shape, "F32", begins.value)
        else:
            raise UpcycleError(
                f"task.classes: the family {family.model_type} does not say what {name} starts as; say so in "
                f"its `initial`, or take task.classes out"
            )
        out[name] = Entry(made, entries[name].dtype)
    kept = {k: v for k, v in config.items() if k != "num_labels"}
    return {**kept, "id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}, out


def _listed(family: Trained, config: Config) -> Weights:
    return family.weights(config) | family.class_head(config)

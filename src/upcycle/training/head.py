"""A head for other classes than the checkpoint's: what fine-tuning on another data set begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.blueprints.blueprint import Entry
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError
from upcycle.tensors import rng
from upcycle.tensors.computed import Drawn, Fill

Classes = int | tuple[str, ...]


def renewed(
    dense: Dense, config: Mapping[str, Any], entries: Mapping[str, Entry], classes: Classes, seed: int
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """config.json and tensors with a head for `classes` (names, or how many): matrices N(0, deviation^2) and
    biases 0, as transformers starts them. Raises `UpcycleError` where the model has no such head."""
    names = classes if isinstance(classes, tuple) else tuple(f"LABEL_{i}" for i in range(classes))
    labels = {str(i): name for i, name in enumerate(names)}
    shapes, more = (
        dense.family.shapes(dense.family.config({**dense.raw, "id2label": given}))
        for given in (labels, {**labels, str(len(labels)): "one more"})
    )
    head = [name for name, shape in shapes.items() if more[name] != shape]
    if not head:
        raise UpcycleError(f"task.classes is for a head of classes; a {dense.architecture} has none")
    out = dict(entries)
    for name in head:
        shape = shapes[name]
        deviation = dense.family.deviation(dense.config, name)
        if len(shape) == 2:
            drawn = Drawn((shape[0], shape[1]), "F32", "normal", deviation, rng.key(seed, name, "new head"))
            out[name] = Entry(drawn, entries[name].dtype)
        else:
            out[name] = Entry(Fill(shape, "F32", 0.0), entries[name].dtype)
    made = {k: v for k, v in config.items() if k != "num_labels"}
    return {**made, "id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}, out

"""What is said of a trained model beside its weights, in any format: where it comes from, and a card."""

from __future__ import annotations

from typing import Any

from upcycle import tasks
from upcycle.conversion import card, provenance
from upcycle.training.exports import Trained
from upcycle.training.loop import SOURCES


def provenance_of(trained: Trained, carried: list[str], left: list[str]) -> dict[str, Any]:
    """upcycle.json of the conversion, and what happened to it since."""
    begun, record, state = trained.start, trained.record, trained.state
    if begun.built:
        made = provenance.record(begun.built, trained.hashes, carried=carried, left_behind=left)
    else:
        made = provenance.of_dense(begun.dense.checkpoint, trained.hashes, carried=carried, left_behind=left)
    keys = (
        "upcycle_version", "versions", "precision", "task", "training_flops_per_token", "from_scratch", "run",
    )  # fmt: skip
    training: dict[str, Any] = {key: record[key] for key in keys}
    training["source_hashed"] = "at the start" if SOURCES in {**record, **state} else "at the export"
    names = ("step", "loss", "held_out_start", "held_out_loss", "held_out_accuracy")
    done = {key: state[key] for key in names if key in state}
    tokens = state["step"] * trained.run.train.rows * record["tokens_per_row"]
    return made | {"training": [training | done | {"tokens": tokens}]}


def card_of(trained: Trained) -> str:
    """A short model card; upcycle.json has the rest."""
    begun, record, state = trained.start, trained.record, trained.state
    moe = begun.built is not None and bool(begun.built.sites)
    kind = "dense model that continues"
    if begun.built:
        kind = f"{begun.built.target.kind} dense model" if not moe else "Mixture of Experts"
        kind += " made from"
    what = f"random weights of the shape of `{begun.dense.checkpoint.name}`"
    source = what if begun.from_scratch else f"`{begun.dense.checkpoint.name}`"
    losses = "".join(
        f"| {name} | {state[key]:.4f} |\n"
        for name, key in (("last training loss", "loss"), ("held-out loss", "held_out_loss"))
        if state.get(key) is not None
    )
    return f"""---
library_name: transformers
tags: [{"mixture-of-experts, upcycled" if moe else "upcycle"}]
---

# {trained.name}

A `{begun.config["model_type"]}` {kind} {source}, trained with `upcycle train` for {state["step"]} steps of
{trained.run.train.rows:,} rows. It has {begun.parameters:,} parameters, {begun.active_parameters:,} active.

| | nats per {tasks.find(record["task"]).unit} |
|---|---|
{losses}
## Load

{card.how_to_load(begun.built, begun.architecture)}
`upcycle.json` beside this file holds the recipe, the run file and the hashes of the source.
"""

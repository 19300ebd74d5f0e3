"""The documents that accompany exported weights in any format: provenance and model card."""

from __future__ import annotations

from pathlib import Path

from upcycle import targets, tasks
from upcycle.conversion import card, provenance
from upcycle.conversion.plain import plain
from upcycle.records.provenance import Provenance, Training
from upcycle.training.exports import Trained
from upcycle.training.exports._beside import Laid
from upcycle.training.start import Start


def provenance_of(trained: Trained, folder: Path, laid: Laid) -> Provenance:
    """Return the provenance for upcycle.json in `folder`: that of the conversion, plus the training."""
    if trained.start.built is None:
        return dense_provenance_of(trained, folder, laid)
    return provenance.of_blueprint(
        trained.start.built,
        trained.hashes,
        folder,
        carried=laid.carried,
        left_behind=laid.left,
        made_anew=laid.made_anew,
        training=(training_of(trained),),
    )


def dense_provenance_of(
    trained: Trained, folder: Path, laid: Laid, *, target: str | None = None
) -> Provenance:
    """Return the provenance of a dense model in `folder`; `target` is its type, None: that of the source."""
    return provenance.of_dense(
        trained.start.dense.checkpoint,
        trained.hashes,
        folder,
        carried=laid.carried,
        left_behind=laid.left,
        made_anew=laid.made_anew,
        training=(training_of(trained),),
        target=target,
    )


def training_of(trained: Trained) -> Training:
    """Return the run's entry in upcycle.json, up to the exported state."""
    record, state, batch = trained.record, trained.state, trained.run.train.rows
    measured = not trained.averaged  # the losses are those of a checkpoint, and nobody measured the mean
    known = state.source_sha256 or record.source_sha256
    return Training(
        upcycle_version=record.upcycle_version,
        versions=record.versions,
        precision=record.precision,
        task=record.task,
        training_flops_per_token=record.training_flops_per_token,
        training_flops=float(record.training_flops(state.step * batch, batch)),  # JSON's integers end at 2^63
        from_scratch=record.from_scratch,
        run=record.run,
        source_hashed="at the export" if known is None else "at the start",
        step=state.step,
        averaged_steps=trained.averaged or None,
        average_decay=trained.decay,
        expert=trained.expert,
        loss=state.loss if measured else None,
        held_out_start=state.held_out_start,
        held_out_loss=state.held_out_loss if measured else None,
        held_out_accuracy=state.held_out_accuracy if measured else None,
        tokens=state.step * batch * record.tokens_per_row,
    )


def card_of(trained: Trained) -> str:
    """Return a short model card; upcycle.json has the details."""
    begun, state = trained.start, trained.state
    target = begun.built.target if begun.built else targets.opened(begun.config)
    moe = begun.built is not None and bool(begun.built.sites)
    kind = "dense model that continues"
    if begun.built:
        kind = f"{begun.built.target.kind} dense model" if not moe else "Mixture of Experts"
        kind += " made from"
    return f"""---
library_name: transformers
tags: [{"mixture-of-experts, upcycled" if moe else "upcycle"}]
---

# {plain(trained.name)}

A `{begun.config["model_type"]}` {kind} {_source(begun)}, trained with `upcycle train`
for {state.step} steps of {trained.run.train.rows:,} rows. It has {begun.parameters:,} parameters,
{begun.active_parameters:,} active.
{_measured(trained)}
## Load

{card.how_to_load(target, begun.config, begun.architecture)}
`upcycle.json` beside this file holds the recipe, the run file and the hashes of the source.
"""


def _source(begun: Start) -> str:
    """Return what the weights were before the run: random, or those of checkpoints."""
    dense = begun.dense
    if begun.from_scratch:
        return f"random weights of the shape of {card.made_from([dense.checkpoint])}"
    return card.made_from(begun.built.checkpoints if begun.built else [dense.checkpoint, *dense.others])


def _measured(trained: Trained) -> str:
    """Return what the card says of the losses: those of the checkpoint, or that a mean has none yet."""
    if trained.averaged:
        mean = "mean" if trained.decay is None else f"exponential moving average ({trained.decay:g})"
        steps = ", ".join(map(str, trained.averaged))
        return (
            f"\nThe weights are the {mean} of those after steps {steps}. Nobody has measured their loss yet; "
            f"`upcycle eval` does.\n"
        )
    state = trained.state
    losses = "".join(
        f"| {name} | {loss:.4f} |\n"
        for name, loss in (("last training loss", state.loss), ("held-out loss", state.held_out_loss))
        if loss is not None
    )
    unit = tasks.find(trained.record.task).unit
    return f"\n| | nats per {unit} |\n|---|---|\n{losses}" if losses else ""

"""`upcycle export`: a checkpoint of a run as a folder that every client of the Hugging Face layout opens."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from upcycle import kernels, provenance, selection
from upcycle.checkpoint import file_hash
from upcycle.dtypes import BY_TORCH_NAME
from upcycle.errors import UpcycleError
from upcycle.proof import quiet
from upcycle.training import optimizer, saving
from upcycle.training.loop import RECORD
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.start import MOMENTS, OPTIMIZER, Start, plain_model, scales, start_of
from upcycle.write import carry


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote."""

    out: Path
    step: int
    parameters: int
    dtype: str


def export(
    run_folder: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str = "source",
    with_optimizer: bool = False,
) -> Exported:
    """Write the newest checkpoint of a run (or that of `step`) to the new folder `out`.

    Names, config and tokenizer are those of `upcycle convert`; `upcycle.json` tells of the training too.
    `dtype` is `source` for that of the start, or a torch name. `with_optimizer` adds the Adam moments, by the
    same names, which `optimizer.carry_state` of a later run takes. Holds the whole model in memory.
    """
    run_folder, out = Path(run_folder), Path(out)
    if dtype != "source" and dtype not in BY_TORCH_NAME:
        raise UpcycleError(f"dtype = {dtype!r}; allowed: source, {', '.join(BY_TORCH_NAME)}")
    record = _record(run_folder)
    checkpoint = _checkpoint(run_folder, step)
    if out.exists():
        raise UpcycleError(f"{out} exists already; nothing is overwritten. Choose another name or delete it")
    run = Run.of(record["run"])
    begun = start_of(run)
    if (begun.built.hash if begun.built else None) != record["blueprint_hash"]:
        raise UpcycleError(f"the source {run.source} is not the one that {run_folder} was trained from")
    state = saving.read_state(checkpoint)
    stored = begun.config.get("dtype") or begun.config.get("torch_dtype") or "float32"
    wanted = stored if dtype == "source" else dtype
    model = plain_model(begun)
    adam = optimizer.make(model, run.train, scales(begun, run, model, Routers.of(model)))
    saving.load(checkpoint, model, adam if with_optimizer else None)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if with_optimizer:
            _write_moments(model, adam, begun, partial / OPTIMIZER, int(state["step"]))
        _write_model(model, begun, partial, wanted)
        carried, left = carry(begun.dense.checkpoint.folder, partial)
        trained = _provenance(begun, record, state, carried, left, out)
        saving.write_text(partial / provenance.FILE, json.dumps(trained, indent=2) + "\n")
        if begun.built:
            selection.write(begun.built, partial)
        saving.write_text(partial / "README.md", _card(begun, state, run))
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        begun.dense.checkpoint.close()
    return Exported(out=out, step=int(state["step"]), parameters=begun.parameters, dtype=wanted)


def _record(run_folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((run_folder / RECORD).read_text())
    except FileNotFoundError:
        raise UpcycleError(f"{run_folder} has no {RECORD}; give a folder that `upcycle train` made") from None
    except ValueError as error:
        raise UpcycleError(f"{run_folder / RECORD} is damaged: {error}") from None
    return record


def _checkpoint(run_folder: Path, step: int | None) -> Path:
    there = dict(saving.found(run_folder))
    if not there:
        raise UpcycleError(f"{run_folder} has no checkpoint yet; it saves every `checkpoint.every` steps")
    if step is not None and step not in there:
        raise UpcycleError(
            f"{run_folder} has no checkpoint of step {step}; there are {', '.join(map(str, there))}"
        )
    return there[max(there) if step is None else step]


def _write_model(model: PreTrainedModel, begun: Start, folder: Path, dtype: str) -> None:
    """Weights in the hub's layout, and the config that the start had."""
    with torch.no_grad(), quiet():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and not name.endswith(("e_score_correction_bias", "inv_freq")):
                tensor.data = tensor.data.to(getattr(torch, dtype))
        model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # the source's is carried, if it has one
    config = begun.config | {"dtype": dtype, "torch_dtype": dtype}
    if begun.built is not None:
        config |= {k: v for k, v in begun.built.stored_config(dtype).items() if k == kernels.KEY}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_moments(
    model: PreTrainedModel, adam: torch.optim.Optimizer, begun: Start, folder: Path, step: int
) -> None:
    """Each moment as a checkpoint of the model's own names: the weights step aside for it."""
    weights = {name: p.data for name, p in model.named_parameters()}
    for moment in MOMENTS:
        for parameter in model.parameters():
            parameter.data = adam.state[parameter][moment]
        _write_model(model, begun, folder / moment, "float32")
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
    saving.write_text(folder / "state.json", json.dumps({"step": step}))


def _provenance(
    begun: Start,
    record: dict[str, Any],
    state: dict[str, Any],
    carried: list[str],
    left: list[str],
    out: Path,
) -> dict[str, Any]:
    """upcycle.json of the conversion, and what happened to it since."""
    opened = begun.built.checkpoints if begun.built else [begun.dense.checkpoint]
    hashes = {c.label: {file.name: file_hash(file) for file in c.files} for c in opened}
    if begun.built:
        made = provenance.record(begun.built, hashes, carried=carried, left_behind=left, out=out)
    else:
        made = provenance.of_dense(begun.dense.checkpoint, hashes, carried=carried, left_behind=left, out=out)
    keys = (
        "upcycle_version", "versions", "precision", "task", "training_flops_per_token", "from_scratch", "run",
    )  # fmt: skip
    training = {key: record[key] for key in keys}
    names = ("step", "loss", "held_out_start", "held_out_loss", "held_out_accuracy")
    done = {key: state[key] for key in names if key in state}
    tokens = state["step"] * Run.of(record["run"]).train.rows * record["tokens_per_row"]
    return made | {"training": [training | done | {"tokens": tokens}]}


def _card(begun: Start, state: dict[str, Any], run: Run) -> str:
    """A short model card; upcycle.json has the rest."""
    moe = begun.built is not None and bool(begun.built.sites)
    kind = "dense model that continues"
    if begun.built:
        kind = f"{begun.built.native.dense} dense model" if not moe else "Mixture of Experts"
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

# {run.out.rstrip("/").rpartition("/")[2]}

A `{begun.config["model_type"]}` {kind} {source}, trained with `upcycle train` for {state["step"]} steps of
{run.train.rows:,} rows. It has {begun.parameters:,} parameters, {begun.active_parameters:,} active.

| | nats per token |
|---|---|
{losses}
`upcycle.json` beside this file holds the recipe, the run file and the hashes of the source.
"""

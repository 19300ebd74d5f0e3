"""`upcycle export`: a checkpoint of a run as a folder that every client of the Hugging Face layout opens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from upcycle import tasks
from upcycle.checkpoints.dtypes import BY_TORCH_NAME
from upcycle.conversion import card, provenance, selection
from upcycle.conversion.write import carry
from upcycle.errors import UpcycleError, listed
from upcycle.hf.quiet import quiet
from upcycle.nn import kernels
from upcycle.system import claim, lock, whole_file
from upcycle.training import optimizer, saving
from upcycle.training.loop import SOURCES
from upcycle.training.parallel import Ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.run_folder import read_record
from upcycle.training.start import MOMENTS, OPTIMIZER, Start, plain_model, scales, start_of


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote."""

    out: Path
    step: int
    parameters: int
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """The export as JSON has it."""
        return {**asdict(self), "out": str(self.out)}


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
    here = Ranks(device=torch.device("cpu"))
    if dtype != "source" and dtype not in BY_TORCH_NAME:
        raise UpcycleError(f"dtype = {dtype!r}; allowed: source, {', '.join(BY_TORCH_NAME)}")
    record = read_record(run_folder)
    checkpoint = _checkpoint(run_folder, step)
    claim.may_create(out)
    partial = claim.partial_of(out)
    claim.refuse_foreign(partial)
    saving.refuse_changed(checkpoint, here)
    run = Run.of(record["run"])
    begun = start_of(run)
    for opened in begun.checkpoints:
        claim.refuse_near([out, partial], opened.folder)
    if (begun.built.hash if begun.built else None) != record["blueprint_hash"]:
        raise UpcycleError(f"the source {run.source} is not the one that {run_folder} was trained from")
    state = saving.read_state(checkpoint)
    hashes = _hashes_of_sources(begun, {**record, **state}, run_folder)
    stored = begun.config.get("dtype") or begun.config.get("torch_dtype") or "float32"
    wanted = stored if dtype == "source" else dtype
    model = plain_model(begun)
    adam = optimizer.make(model, run.train, scales(begun, run, model, Routers.of(model)))
    saving.load(checkpoint, model, adam if with_optimizer else None)
    busy = f"another export writes {out}; wait for its end, or choose another name"
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with lock.held(partial.with_name(partial.name + ".lock"), busy), _whole_or_nothing(partial):
            claim.begin(partial)
            if with_optimizer:
                _write_moments(model, adam, begun, partial / OPTIMIZER, int(state["step"]))
            _write_model(model, begun, partial, wanted)
            carried, left = carry(begun.dense.checkpoint.folder, partial)
            trained = _provenance(begun, record, state, hashes, carried, left)
            whole_file.write(partial / provenance.FILE, (json.dumps(trained, indent=2) + "\n").encode())
            if begun.built:
                selection.write(begun.built, partial)
            whole_file.write(partial / "README.md", _card(begun, state, record, run).encode())
            claim.finish(partial, out)
    finally:
        begun.dense.checkpoint.close()
    return Exported(out=out, step=int(state["step"]), parameters=begun.parameters, dtype=wanted)


@contextmanager
def _whole_or_nothing(partial: Path) -> Iterator[None]:
    """Take the partial folder away again where it does not come to its end, and say what stopped it."""
    try:
        yield
    except OSError as error:
        claim.discard(partial)
        raise UpcycleError(
            f"{error.filename or partial} could not be written: {error.strerror or error}; nothing is left "
            f"of it. Make room, or choose another folder"
        ) from None
    except BaseException:
        claim.discard(partial)
        raise


def _hashes_of_sources(begun: Start, known: Mapping[str, Any], run_folder: Path) -> dict[str, dict[str, str]]:
    """The hashes of the files that the run began from; of a run of an older version, which recorded none,
    those of the files that are there now. Refuses files that are no longer those."""
    now = {opened.label: opened.hashes() for opened in begun.checkpoints}
    before = known.get(SOURCES, now)
    if not isinstance(before, dict) or before.keys() != now.keys():
        raise UpcycleError(f"{run_folder} was trained from other checkpoints than its run file names")
    for opened in begun.checkpoints:
        then, here = before[opened.label], now[opened.label]
        if changed := sorted(name for name in {*then, *here} if then.get(name) != here.get(name)):
            raise UpcycleError(
                f"{listed(changed)} in {opened.folder} changed since {run_folder} was trained from it; put "
                f"it back as it was, so that upcycle.json says what the model was made from"
            )
    return before


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
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise UpcycleError(
                f"the weights could not be written to {folder}: {error}; make room, or choose another folder"
            ) from None
    (folder / "generation_config.json").unlink(missing_ok=True)  # the source's is carried, if it has one
    config = begun.config | {"dtype": dtype, "torch_dtype": dtype}
    if begun.built is not None:
        config |= {k: v for k, v in begun.built.stored_config(dtype).items() if k == kernels.KEY}
    whole_file.write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    mode = (folder / "config.json").stat().st_mode  # of a new file, by the umask; safetensors' own is 0600
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


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
    whole_file.write(folder / "state.json", json.dumps({"step": step}).encode())


def _provenance(
    begun: Start,
    record: dict[str, Any],
    state: dict[str, Any],
    hashes: dict[str, dict[str, str]],
    carried: list[str],
    left: list[str],
) -> dict[str, Any]:
    """upcycle.json of the conversion, and what happened to it since."""
    if begun.built:
        made = provenance.record(begun.built, hashes, carried=carried, left_behind=left)
    else:
        made = provenance.of_dense(begun.dense.checkpoint, hashes, carried=carried, left_behind=left)
    keys = (
        "upcycle_version", "versions", "precision", "task", "training_flops_per_token", "from_scratch", "run",
    )  # fmt: skip
    training = {key: record[key] for key in keys}
    training["source_hashed"] = "at the start" if SOURCES in {**record, **state} else "at the export"
    names = ("step", "loss", "held_out_start", "held_out_loss", "held_out_accuracy")
    done = {key: state[key] for key in names if key in state}
    tokens = state["step"] * Run.of(record["run"]).train.rows * record["tokens_per_row"]
    return made | {"training": [training | done | {"tokens": tokens}]}


def _card(begun: Start, state: dict[str, Any], record: dict[str, Any], run: Run) -> str:
    """A short model card; upcycle.json has the rest."""
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

# {run.out.rstrip("/").rpartition("/")[2]}

A `{begun.config["model_type"]}` {kind} {source}, trained with `upcycle train` for {state["step"]} steps of
{run.train.rows:,} rows. It has {begun.parameters:,} parameters, {begun.active_parameters:,} active.

| | nats per {tasks.find(record["task"]).unit} |
|---|---|
{losses}
## Load

{card.how_to_load(begun.built, begun.architecture)}
`upcycle.json` beside this file holds the recipe, the run file and the hashes of the source.
"""

"""The Hugging Face layout, which transformers and other clients of the hub open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from upcycle.blueprints.blueprint import Blueprint, as_written
from upcycle.checkpoints.dtypes import COUNTERS
from upcycle.conversion import selection
from upcycle.errors import UpcycleError
from upcycle.hf.quiet import quiet
from upcycle.nn import kernels
from upcycle.system import whole_file
from upcycle.training.course import Course
from upcycle.training.exports import Format, Trained
from upcycle.training.exports._about import card_of, provenance_of
from upcycle.training.exports._beside import lay
from upcycle.training.exports._on_disk import on_disk
from upcycle.training.moments import OPTIMIZER


class HuggingFace(Format):
    """Names, config and tokenizer as `upcycle convert` writes them, with provenance and a model card."""

    summary = "config.json and safetensors, as transformers opens them"
    holds_moments = True

    def write(self, trained: Trained, folder: Path, dtype: str) -> None:
        begun = trained.start
        if trained.optimizer is not None:
            _write_moments(trained, trained.optimizer, folder / OPTIMIZER)
        write_model(trained, folder, dtype)
        config = begun.built.stored_config() if begun.built else begun.config
        laid = lay(trained, folder, config, begun.built)
        told = provenance_of(trained, folder, laid)
        whole_file.write_json(folder / told.FILE, told.as_table())
        if begun.built:
            selection.write(begun.built, folder)
        whole_file.write_text(folder / "README.md", card_of(trained))


def write_model(trained: Trained, folder: Path, dtype: str) -> None:
    """Write the weights in the hub's layout, with a config that says what they were trained with."""
    begun, model = trained.start, trained.model
    tensors = on_disk(model, begun, trained.types)
    with quiet():
        try:
            model.save_pretrained(folder, state_dict=tensors, save_original_format=False)
        except SafetensorError as error:
            raise UpcycleError(
                f"the weights could not be written to {folder}: {error}; make room, or choose another folder"
            ) from None
    (folder / "generation_config.json").unlink(missing_ok=True)  # if the source has one, it is copied
    config = as_written(begun.config | {"dtype": dtype, "torch_dtype": dtype})
    if begun.built is not None:
        target, told = begun.built.target, _of_training(trained, begun.built)
        own = target.own_config(config)
        config = target.with_own(config, {key: value for key, value in told.items() if key in own})
        config |= {k: v for k, v in begun.built.stored_config(dtype).items() if k == kernels.KEY}
    whole_file.write_json(folder / "config.json", config)
    open_to_others(folder)


def open_to_others(folder: Path) -> None:
    """Give files of weights the mode of other new files, from the umask; safetensors uses 0600."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _of_training(trained: Trained, built: Blueprint) -> dict[str, float]:
    """Return the keys of the model's config that say how routers were trained, in the terms of transformers.

    Trainers read them: `router_aux_loss_coef` is the weight of a loss that is top_k at perfect balance, for
    all layers together. `output_router_logits` stays false: it is a switch of the forward pass, and
    `generate` with a cache fails with it (transformers 5.23).
    """
    balance = Course(trained.run).after(trained.step).run.router
    summed = balance.layers == "sum" and balance.balance_loss == "per_layer"
    layers = len(built.sites) if summed else 1
    return {
        "router_aux_loss_coef": balance.balance_loss_coef * layers,
        "router_jitter_noise": balance.jitter,
    }


def _write_moments(trained: Trained, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write each moment as a checkpoint under the model's own names, in place of the weights."""
    model = trained.model
    wide = replace(trained, types={n: t if t in COUNTERS else "F32" for n, t in trained.types.items()})
    weights = {name: p.data for name, p in model.named_parameters()}
    for moment in trained.run.optimizer.moments:
        for name, parameter in model.named_parameters():
            own = optimizer.state.get(parameter, {}).get(moment)
            parameter.data = torch.zeros_like(weights[name]) if own is None else own
        write_model(wide, folder / moment, "float32")
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
    whole_file.write_json(folder / "state.json", {"step": trained.step})


format = HuggingFace

"""The Hugging Face layout, which transformers and other clients of the hub open."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from upcycle.conversion import selection
from upcycle.conversion.write import carry, fit_tokenizer
from upcycle.errors import UpcycleError
from upcycle.hf.quiet import quiet
from upcycle.nn import kernels
from upcycle.system import whole_file
from upcycle.training.exports import Format, Trained
from upcycle.training.exports._about import card_of, provenance_of
from upcycle.training.start import OPTIMIZER, Start


class HuggingFace(Format):
    """Names, config and tokenizer as `upcycle convert` writes them, with provenance and a model card."""

    summary = "config.json and safetensors, as transformers opens them"
    holds_moments = True

    def write(self, trained: Trained, folder: Path, dtype: str) -> None:
        begun = trained.start
        if trained.optimizer is not None:
            _write_moments(trained, trained.optimizer, folder / OPTIMIZER)
        _write_model(trained.model, begun, folder, dtype)
        carried, left = carry(begun.dense.checkpoint.folder, folder)
        if begun.built:
            made_anew = fit_tokenizer(begun.built, folder)
            carried = [name for name in carried if name not in made_anew]
        of_task = {} if trained.run.task is None else trained.run.task.files()
        for name, text in of_task.items():
            whole_file.write_text(folder / name, text)
        carried = [name for name in carried if name not in of_task]
        told = provenance_of(trained, folder, carried, left)
        whole_file.write_json(folder / told.FILE, told.as_table())
        if begun.built:
            selection.write(begun.built, folder)
        whole_file.write_text(folder / "README.md", card_of(trained))


def _write_model(model: PreTrainedModel, begun: Start, folder: Path, dtype: str) -> None:
    """Write the weights in the hub's layout, with the config of the run's start."""
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
    (folder / "generation_config.json").unlink(missing_ok=True)  # if the source has one, it is copied
    config = begun.config | {"dtype": dtype, "torch_dtype": dtype}
    if begun.built is not None:
        config |= {k: v for k, v in begun.built.stored_config(dtype).items() if k == kernels.KEY}
    whole_file.write_json(folder / "config.json", config)
    mode = (folder / "config.json").stat().st_mode  # a new file's mode, from the umask; safetensors uses 0600
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _write_moments(trained: Trained, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write each moment as a checkpoint under the model's own names, in place of the weights."""
    model = trained.model
    weights = {name: p.data for name, p in model.named_parameters()}
    for moment in trained.run.optimizer.moments:
        for name, parameter in model.named_parameters():
            own = optimizer.state.get(parameter, {}).get(moment)
            parameter.data = torch.zeros_like(weights[name]) if own is None else own
        _write_model(model, trained.start, folder / moment, "float32")
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
    whole_file.write_json(folder / "state.json", {"step": trained.step})


format = HuggingFace

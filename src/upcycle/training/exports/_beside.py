"""The files beside exported weights in any format: those of the source, of the run's data and of its task."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.blueprints.blueprint import Blueprint
from upcycle.checkpoints.carried import TEMPLATES, of_tokenizer
from upcycle.conversion import generation_settings, tokenizer
from upcycle.conversion.write import carry, fit_tokenizer
from upcycle.system import whole_file
from upcycle.training.exports import Trained, _endings


@dataclass(frozen=True, kw_only=True)
class Laid:
    """The names of files that lie beside weights now."""

    carried: list[str]  # as the source has them
    left: list[str]  # of the source, and not copied
    made_anew: Mapping[str, str]  # the reason, by name: not as the source has it


def lay(trained: Trained, folder: Path, config: Mapping[str, Any], built: Blueprint | None = None) -> Laid:
    """Write the files that go with the weights in `folder`, whose config.json is `config`.

    The tokenizer is that of the run's data (`data.tokenizer`), or else that of the source. `built` is the
    blueprint of the weights; None: they are those of a model of the source's class.
    """
    beside = trained.beside
    carried, left = carry(trained.start.dense.checkpoint.folder, folder)
    made: dict[str, str] = {}
    if beside.named is not None:
        replaced = of_tokenizer(carried)
        _remove(folder, replaced)
        names = beside.copy_tokenizer(folder)
        made = dict.fromkeys(names, "the run was trained with the tokenizer that data.tokenizer names")
        left = sorted({*left, *(name for name in replaced if name not in names)})
        if beside.tokenizer is not None:
            made = tokenizer.fit(beside.tokenizer, folder, config) | made
    elif built is not None:
        made = fit_tokenizer(built, folder)
    if built is not None:
        made |= generation_settings.write(built, folder)
    for name, text in beside.texts.items():
        whole_file.write_text(folder / name, text)
        made[name] = f"the run was trained with it (task.name = {trained.record.task})"
    made |= _endings.write(trained, folder)
    return Laid(carried=[name for name in carried if name not in made], left=left, made_anew=made)


def _remove(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).unlink()
    with suppress(OSError):  # it is not there, or has other files
        (folder / TEMPLATES).rmdir()

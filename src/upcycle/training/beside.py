"""What goes with the weights of a run and is not its source's: the tokenizer of its data, files of its task.

A run copies them into its folder when it begins, so that an export has what the model was trained with, even
if they have changed or moved since. Runs of earlier versions have no copies; then the files themselves are
read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from upcycle.checkpoints.carried import carried, of_tokenizer
from upcycle.checkpoints.checkpoint import CONFIG
from upcycle.errors import UpcycleError
from upcycle.system import panics, whole_file
from upcycle.tasks import Task
from upcycle.training.course import Course
from upcycle.training.run import Run

FOLDER = "beside"  # in the folder of a run


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The tokenizer and the files of a run at one of its steps."""

    named: str | None  # data.tokenizer; None: the tokenizer is the source's
    tokenizer: Path | None  # the folder of its files; there is none if a hub id was not copied
    texts: Mapping[str, str]  # the files of the task, by name

    def copy_tokenizer(self, to: Path) -> list[str]:
        """Copy the files of the tokenizer into a folder; return their names."""
        return [] if self.named is None else _copy(str(self.tokenizer or self.named), to)


def keep(run: Run, task: Task, out: Path) -> None:
    """Copy what a run trains with into its folder `out`. Raises `UpcycleError` for a file that is missing."""
    whole_file.clear(out / FOLDER / task.name)
    for name, text in task.files().items():
        whole_file.write_text(out / FOLDER / task.name / name, text)
    for named in _tokenizers(run):
        folder = _kept(run, named, out)
        folder.mkdir(parents=True, exist_ok=True)
        _copy(named, folder)
        if (config := Path(named) / CONFIG).is_file():  # it may say which class opens the files
            shutil.copyfile(config, folder / CONFIG)


def kept_tokenizer(out: Path, number: int = 0) -> Path:
    """Return the folder in which the run in `out` has a copy of a tokenizer, the first one that it names."""
    return out / FOLDER / f"tokenizer-{number}"


def of(run: Run, out: Path, step: int) -> Beside:
    """Return what the run in the folder `out` trained with at a step. Raises `UpcycleError` if it is gone."""
    named = Course(run).after(step).run.data.tokenizer
    folder = None
    if named is not None:
        folder = next((each for each in (_kept(run, named, out), Path(named)) if each.is_dir()), None)
    return Beside(named=named, tokenizer=folder, texts={} if run.task is None else _texts(run.task, out))


def _texts(task: Task, out: Path) -> Mapping[str, str]:
    folder = out / FOLDER / task.name
    if not folder.is_dir():
        return task.files()
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}


def _tokenizers(run: Run) -> list[str]:
    """Return the tokenizers that the stages of a run name."""
    named = (leg.run.data.tokenizer for leg in Course(run).legs)
    return list(dict.fromkeys(name for name in named if name is not None))


def _kept(run: Run, named: str, out: Path) -> Path:
    """Return the folder of a copied tokenizer."""
    return kept_tokenizer(out, _tokenizers(run).index(named))


def _copy(tokenizer: str, to: Path) -> list[str]:
    """Copy the files of a tokenizer, in a folder or of a hub id, into a folder; return their names."""
    folder = Path(tokenizer)
    if not folder.is_dir():
        return _save(tokenizer, to)
    names = of_tokenizer(carried(folder))
    for name in names:
        (to / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, to / name)
    return names


def _save(tokenizer: str, to: Path) -> list[str]:
    """Write a tokenizer of the hub into a folder, as transformers does."""
    from transformers import AutoTokenizer

    try:
        with panics.caught():
            files = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(to)
    except Exception as error:  # the hub or a damaged file can raise anything; its message is passed on
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UpcycleError(
            f"data.tokenizer = {tokenizer} cannot be read ({reason}); put it back, so that it goes with the "
            f"model"
        ) from None
    return of_tokenizer(sorted(str(Path(name).relative_to(to)) for name in files if Path(name).is_file()))

"""The settings of an evaluation: the data and the limits that `upcycle eval` is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from upcycle.data.documents import Source
from upcycle.errors import UpcycleError, refuse_fraction, shown
from upcycle.system.paths import as_paths


@dataclass(frozen=True, kw_only=True)
class ToScore:
    """The data to evaluate on, and how much of it.

    `limit` is the largest number of images, rows, windows or examples; 0 means all. Raises `UpcycleError` for
    settings that contradict each other or are out of range.
    """

    text: Path | Sequence[Path] | Mapping[str, Path] | None = None  # a mapping gives names
    images: Path | None = None
    chats: Path | None = None  # what the assistant says in them is scored
    shots: Path | None = None  # the probe is fitted on these images and tested on `images`
    tasks: tuple[str, ...] = ()  # names of tasks of lm-evaluation-harness
    task_files: Path | None = None
    num_fewshot: int | None = None
    superglue: Path | None = None
    per_class: int = 10
    length: int | None = None  # tokens of a window; None: 512, or fewer if the model takes fewer
    stride: int | None = None  # tokens; None: the same as `length`
    separator: str | None = None
    field: str = Source.field  # the text field of JSON lines, parquet and datasets
    batch_size: int = 0  # 0: chosen automatically
    limit: int = 0
    cache: Path | None = None
    drop: tuple[str, ...] = ()  # tensors of dense checkpoints to leave out, as names or patterns

    def __post_init__(self) -> None:
        as_paths(self, "text", "images", "chats", "shots", "task_files", "superglue", "cache")
        by_text = bool(self.texts or self.chats or self.by_harness or self.superglue)
        if by_text == (self.images is not None) and self.shots is None:
            raise UpcycleError(
                "give either --text FILE or --images SET to evaluate on, --chats FILE, or tasks of text: "
                "--tasks NAMES, --task-files FOLDER, --superglue FOLDER"
            )
        if self.shots is not None and (self.images is None or by_text):
            raise UpcycleError(
                "--few-shot SET is fitted on that set and tested on --images SET; give both, and nothing else"
            )
        at_least = {"limit": 0, "batch_size": 0, "num_fewshot": 0, "per_class": 1, "length": 1, "stride": 1}
        for name, least in at_least.items():
            given = getattr(self, name)
            refuse_fraction(f"--{name.replace('_', '-')}", given)
            if given is not None and given < least:
                raise UpcycleError(f"--{name.replace('_', '-')} {given}; it must be {least} or more")
        if not isinstance(self.separator, str | None):
            raise UpcycleError(f"--separator {shown(self.separator)}; it must be text")
        if self.separator == "":
            raise UpcycleError('--separator ""; leave it out if a file is one document')
        self._refuse_idle()
        if len(self.named) < len(self.texts):
            raise UpcycleError(
                "two texts have one file name, and results are called by it; give them names: NAME=PATH"
            )

    def _refuse_idle(self) -> None:
        """Refuse a setting of something that is not scored."""
        of_text, of_rows = (bool(self.texts), "--text"), (bool(self.texts or self.chats), "--text or --chats")
        read_by = {
            "length": of_rows,
            "stride": of_text,
            "separator": of_text,
            "field": of_text,
            "num_fewshot": (self.by_harness, "--tasks or --task-files"),
            "per_class": (self.shots is not None, "--few-shot"),
        }
        for key in fields(self):
            used, owner = read_by.get(key.name, (True, ""))
            if not used and (given := getattr(self, key.name)) != key.default:
                raise UpcycleError(
                    f"--{key.name.replace('_', '-')} {given} is for {owner}, and nothing of that is scored; "
                    f"leave it out"
                )

    @property
    def texts(self) -> tuple[Path, ...]:
        """The paths of the texts."""
        if self.text is None:
            return ()
        if isinstance(self.text, Mapping):
            return tuple(self.text.values())
        return (self.text,) if isinstance(self.text, Path) else tuple(self.text)

    @property
    def named(self) -> dict[str, Path]:
        """The paths of the texts by the names that their results have."""
        return dict(self.text) if isinstance(self.text, Mapping) else {path.name: path for path in self.texts}

    @property
    def by_harness(self) -> bool:
        """Return whether tasks of lm-evaluation-harness are asked for."""
        return bool(self.tasks or self.task_files)

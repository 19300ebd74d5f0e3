"""SOURCE as a user gives it: a local folder, or a hub id with an optional revision (owner/name@rev)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from upcycle.checkpoints import carried
from upcycle.checkpoints.checkpoint import INDEX, WEIGHTS, Checkpoint, read_json
from upcycle.checkpoints.header import TensorInfo
from upcycle.errors import UpcycleError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


class Opener(Protocol):
    """A way to open a checkpoint: whole (`open_checkpoint`), its config and headers alone (`peek`), or these
    with the files beside the weights (`outline`)."""

    def __call__(
        self, source: str | Path, *, allow_nonfinite: bool = False, label: str = "source"
    ) -> Checkpoint:
        """Return the open checkpoint `source`, a folder or a hub id; `label` is its role in a blueprint."""


def open_checkpoint(
    source: str | Path, *, allow_nonfinite: bool = False, label: str = "source"
) -> Checkpoint:
    """Open the checkpoint `source`, downloading it to the hub's cache if it is a hub id."""
    folder = local(source)
    opened = Checkpoint.open(folder, allow_nonfinite=allow_nonfinite, label=label)
    if is_id(source):
        opened.name = str(source)
    return opened


def is_id(source: str | Path) -> bool:
    """Return whether SOURCE is a hub id rather than a folder."""
    return not Path(source).exists() and _ID.fullmatch(str(source)) is not None


def local(source: str | Path, wanted: tuple[str, ...] = ()) -> Path:
    """Return the folder of SOURCE, downloading it to the hub's cache if it is a hub id.

    `wanted` has the files to download; empty means those of a checkpoint.
    """
    if not is_id(source):
        return Path(source)
    return _download_only(str(source), wanted) if wanted else _download(str(source))


def _parts(source: str) -> tuple[str, str | None]:
    """Return repository and revision of a hub id. The hub's client uses the latter as a path in its cache."""
    repo, _, revision = source.partition("@")
    if revision and {"", ".", ".."} & {*revision.split("/")}:
        raise UpcycleError(f"{source}: {revision} is no revision; give a branch, a tag or a commit")
    return repo, revision or None


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    repo, revision = _parts(source)
    wanted = ["config.json", "*.safetensors", INDEX, *carried.CARRIED]
    with _hub_errors(source):
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]
        )
        below = {*carried.folders(Path(folder)), carried.TEMPLATES}
        snapshot_download(repo, revision=revision, allow_patterns=[f"{name}/*" for name in sorted(below)])
    return Path(folder)


def _download_only(source: str, wanted: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    repo, revision = _parts(source)
    with _hub_errors(source):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*wanted]))


def peek(source: str | Path, *, allow_nonfinite: bool = False, label: str = "source") -> Checkpoint:
    """Read config and headers of `source`; from the hub, a few kilobytes are fetched and no weights.

    If all weights of the revision are in the hub's cache, it opens that folder, so it needs no hub.
    """
    if not is_id(source):
        return Checkpoint.open(source, allow_nonfinite=allow_nonfinite, label=label)
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    repo, revision = _parts(str(source))
    with _hub_errors(source):
        file = Path(hf_hub_download(repo, "config.json", revision=revision))
        if _holds_weights(file.parent):
            opened = Checkpoint.open(file.parent, allow_nonfinite=allow_nonfinite, label=label)
            opened.name = str(source)
            return opened
        config = json.loads(file.read_text())
        try:
            files = HfApi().get_safetensors_metadata(repo, revision=revision).files_metadata
        except NotASafetensorsRepoError:
            raise UpcycleError(f"{source} has no safetensors weights; convert it with transformers") from None
    folder = Path(source)  # there is no such folder here, so a file in it is never one of this machine
    tensors = {
        name: TensorInfo(
            name=name,
            dtype=info.dtype,
            shape=tuple(info.shape),
            file=folder / file,
            offset=info.data_offsets[0],
            nbytes=info.data_offsets[1] - info.data_offsets[0],
        )
        for file, header in files.items()
        for name, info in header.tensors.items()
    }
    opened = Checkpoint(folder, config, tensors, allow_nonfinite=allow_nonfinite, label=label)
    opened.name = str(source)
    return opened


def _holds_weights(folder: Path) -> bool:
    """Return whether a snapshot in the hub's cache has all files of weights; it may have some."""
    if not (folder / INDEX).is_file():
        return (folder / WEIGHTS).is_file()
    files = read_json(folder / INDEX, f"{folder / INDEX} is gone").get("weight_map")
    return isinstance(files, dict) and all((folder / str(name)).is_file() for name in files.values())


def outline(source: str | Path, *, allow_nonfinite: bool = False, label: str = "source") -> Checkpoint:
    """Read what `peek` reads of `source`; from the hub, the tokenizer and its like are fetched as well."""
    opened = peek(source, allow_nonfinite=allow_nonfinite, label=label)
    if is_id(source):
        opened.folder = _download_only(str(source), ("config.json", *carried.CARRIED))
    return opened


@contextmanager
def _hub_errors(source: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong on the way to the hub into an error of one sentence."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        SafetensorsParsingError,
    )

    def said(error: Exception) -> str:
        return str(error).splitlines()[0] if str(error) else type(error).__name__

    try:
        yield
    except RepositoryNotFoundError:
        raise UpcycleError(
            f"{source}: no such folder, and no such model on the hub (or it is gated: accept its terms "
            f"and run `hf auth login`)"
        ) from None
    except HFValidationError as error:
        raise UpcycleError(f"{source}: no such folder, and no hub id either ({said(error)})") from None
    except LocalEntryNotFoundError as error:
        raise UpcycleError(
            f"{source}: no such folder, and the hub cannot be reached ({said(error)})"
        ) from None
    except EntryNotFoundError as error:
        raise UpcycleError(f"{source}: the hub has no config.json of it ({said(error)})") from None
    except (SafetensorsParsingError, ValueError) as error:
        raise UpcycleError(f"{source}: what the hub has of it is damaged ({said(error)})") from None
    except (HfHubHTTPError, OSError) as error:
        raise UpcycleError(
            f"{source}: no such folder, and the hub cannot be reached ({said(error)})"
        ) from None

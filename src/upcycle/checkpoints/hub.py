"""SOURCE as a user gives it: a local folder, or a hub id with an optional revision (owner/name@rev)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from upcycle.checkpoints import carried
from upcycle.checkpoints.checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint, read_json, stamp
from upcycle.checkpoints.header import TensorInfo, read_header
from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from huggingface_hub.utils import SafetensorsFileMetadata

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True, kw_only=True)
class Files:
    """The names of the two files of an adapter: its settings, which are its config, and its weights."""

    config: str
    weights: str


class Opener(Protocol):
    """A way to open a checkpoint: whole (`open_checkpoint`), its config and headers alone (`peek`), or these
    with the files beside the weights (`outline`)."""

    def __call__(
        self,
        source: str | Path,
        *,
        allow_nonfinite: bool = False,
        label: str = "source",
        files: Files | None = None,
    ) -> Checkpoint:
        """Return the open checkpoint `source`, a folder or a hub id; `label` is its role in a blueprint.

        `files` are those of an adapter; None means that it is a model.
        """


def open_checkpoint(
    source: str | Path, *, allow_nonfinite: bool = False, label: str = "source", files: Files | None = None
) -> Checkpoint:
    """Open the checkpoint `source`, downloading it to the hub's cache if it is a hub id."""
    folder = local(source, () if files is None else (files.config, files.weights))
    opened = _open(folder, files, allow_nonfinite=allow_nonfinite, label=label)
    if is_id(source):
        opened.name = str(source)
    return opened


def _open(folder: Path, files: Files | None, *, allow_nonfinite: bool, label: str) -> Checkpoint:
    """Open a model or an adapter on this machine."""
    if files is None:
        return Checkpoint.open(folder, allow_nonfinite=allow_nonfinite, label=label)
    config = read_json(folder / files.config, f"{folder} has no {files.config}; it is not an adapter")
    weights = folder / files.weights
    if not weights.is_file():
        raise UpcycleError(f"{folder} has no {files.weights}; save the adapter with peft as safetensors")
    stamps = {weights: stamp(weights)}
    return Checkpoint(
        folder,
        config,
        read_header(weights),
        allow_nonfinite=allow_nonfinite,
        label=label,
        stamps=stamps,
        config_file=files.config,
    )


def refuse_missing(checkpoint: str | Path) -> None:
    """Raise `UpcycleError` if a checkpoint is neither a hub id nor a folder."""
    if is_id(checkpoint) or Path(checkpoint).is_dir():
        return
    what = "is a file, not a folder" if Path(checkpoint).exists() else "does not exist"
    raise UpcycleError(f"{checkpoint} {what}; give a checkpoint folder or a hub id (owner/name)")


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
    wanted = [CONFIG, "*.safetensors", INDEX, *carried.CARRIED]
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


def peek(
    source: str | Path, *, allow_nonfinite: bool = False, label: str = "source", files: Files | None = None
) -> Checkpoint:
    """Read config and headers of `source`; from the hub, a few kilobytes are fetched and no weights.

    If all weights of the revision are in the hub's cache, it opens that folder, so it needs no hub.
    """
    if not is_id(source):
        return _open(Path(source), files, allow_nonfinite=allow_nonfinite, label=label)
    from huggingface_hub import hf_hub_download

    repo, revision = _parts(str(source))
    name = CONFIG if files is None else files.config
    with _hub_errors(source, name):
        file = Path(hf_hub_download(repo, name, revision=revision))
        if _holds_weights(file.parent, files):
            opened = _open(file.parent, files, allow_nonfinite=allow_nonfinite, label=label)
            opened.name = str(source)
            return opened
        config = json.loads(file.read_text())
    headers = _headers(str(source), files)
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
        for file, header in headers.items()
        for name, info in header.tensors.items()
    }
    opened = Checkpoint(
        folder, config, tensors, allow_nonfinite=allow_nonfinite, label=label, config_file=name
    )
    opened.name = str(source)
    return opened


def _headers(source: str, files: Files | None) -> Mapping[str, SafetensorsFileMetadata]:
    """Fetch the headers of a hub id, by the names of their files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    repo, revision = _parts(source)
    with _hub_errors(source, WEIGHTS if files is None else files.weights):
        if files is not None:
            found = HfApi().parse_safetensors_file_metadata(repo, files.weights, revision=revision)
            return {files.weights: found}
        try:
            return HfApi().get_safetensors_metadata(repo, revision=revision).files_metadata
        except NotASafetensorsRepoError:
            raise UpcycleError(f"{source} has no safetensors weights; convert it with transformers") from None


def _holds_weights(folder: Path, files: Files | None) -> bool:
    """Return whether a snapshot in the hub's cache has all files of weights; it may have some."""
    if files is not None:
        return (folder / files.weights).is_file()
    if not (folder / INDEX).is_file():
        return (folder / WEIGHTS).is_file()
    shards = read_json(folder / INDEX, f"{folder / INDEX} is gone").get("weight_map")
    return isinstance(shards, dict) and all((folder / str(name)).is_file() for name in shards.values())


def outline(
    source: str | Path, *, allow_nonfinite: bool = False, label: str = "source", files: Files | None = None
) -> Checkpoint:
    """Read what `peek` reads of `source`; from the hub, the tokenizer and its like are fetched as well."""
    opened = peek(source, allow_nonfinite=allow_nonfinite, label=label, files=files)
    if is_id(source) and files is None:
        opened.folder = _download_only(str(source), (CONFIG, *carried.CARRIED))
    return opened


@contextmanager
def _hub_errors(source: str | Path, wanted: str = CONFIG) -> Iterator[None]:
    """Turn whatever goes wrong on the way to the hub into an error of one sentence.

    `wanted` is the file that is asked for.
    """
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
        raise UpcycleError(f"{source}: the hub has no {wanted} of it ({said(error)})") from None
    except (SafetensorsParsingError, ValueError) as error:
        raise UpcycleError(f"{source}: what the hub has of it is damaged ({said(error)})") from None
    except (HfHubHTTPError, OSError) as error:
        raise UpcycleError(
            f"{source}: no such folder, and the hub cannot be reached ({said(error)})"
        ) from None

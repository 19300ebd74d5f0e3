"""The statistics of a dense model's activations, layer by layer, which `upcycle calibrate` collects.

The file is a safetensors file of float32 tensors called POSITION.STACK.LAYER.NAME, with its provenance in the
metadata. It is read tensor by tensor, and records which checkpoint it belongs to. Letters: n numbers at a
position, I neurons, H channels, D domains, S tokens of a sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.checkpoints import tensor_file
from upcycle.checkpoints.header import TensorInfo, read_header, read_metadata
from upcycle.errors import UpcycleError, listed
from upcycle.system.once import once

FORMAT = 1
KEY = "upcycle_statistics"  # key of the metadata
PARTIAL = ".partial"  # suffix of the file name while statistics are being collected
POSITIONS = {
    "neurons": "what goes into the last matrix of the feed-forward network [I]",
    "channels": "what goes into the feed-forward network [H]",
    "heads": "what goes into the output projection of self-attention [heads x head_dim]",
}
NAMES = {
    "l1": "mean over tokens of |x| [n]",
    "l2": "root mean square over tokens of x [n]",
    "count": "share of tokens with x above the threshold [n]",
    "co_activation": "share of tokens with both above the threshold, neurons only [n, n]",
    "co_marker": "share of tokens with both among the K_a most active (CMoE), neurons only [n, n]",
    "gradient": "mean over tokens of |x dL/dx|, L the loss summed over targets [n]",
    "mean": "mean over the tokens of each domain, channels only, float64 [D, H]",
    "second_moment": "mean over tokens of x x^T, channels only, float64 [H, H]",
    "sample": "tokens drawn with equal probability, channels only [S, H]",
    "mergekit_hidden": "the router rows of mergekit-moe's gate_mode hidden [D, H]",
    "mergekit_hidden_avg": "the router rows of its gate_mode hidden_avg [D, H]",
    "cheap_embed": "the router row of its gate_mode cheap_embed, the same for all layers [D, H]",
}
NEGATIVE = "mean_negative"  # goes with `mean`: that over the negative prompts, zero if a domain has none
# the position of statistics that are taken at one position alone; the last two are no activations
ONLY_AT = {
    "co_activation": "neurons",
    "co_marker": "neurons",
    "mean": "channels",
    NEGATIVE: "channels",
    "second_moment": "channels",
    "sample": "channels",
    "mergekit_hidden": "residual",
    "mergekit_hidden_avg": "residual",
    "cheap_embed": "embedding",
}
OF_DOMAINS = ("mean", "mergekit_hidden", "mergekit_hidden_avg", "cheap_embed")
OF_PROMPTS = ("mergekit_hidden", "mergekit_hidden_avg", "cheap_embed")
WIDE = ("second_moment", "mean", NEGATIVE)  # stored as float64, because equations are solved with them
_CHUNK = 8 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """An open file of statistics."""

    path: Path
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    provenance: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Statistics:
        """Open the file and read its header. Raises `UpcycleError` if it is another file or incomplete."""
        path = Path(path)
        make = f"`upcycle calibrate SOURCE --out {path}` makes it"
        if not path.exists():
            begun = path.with_name(path.name + PARTIAL).exists()
            raise UpcycleError(
                f"{path} is not finished; start `upcycle calibrate` again as it was, and it goes on"
                if begun
                else f"{path} does not exist; {make}"
            )
        if not path.is_file():
            raise UpcycleError(f"{path} is a folder or a pipe, not a file of statistics; {make}")
        tensors, raw = read_header(path), read_metadata(path).get(KEY)
        if raw is None:
            raise UpcycleError(f"{path} holds no statistics of activations; {make}")
        try:
            provenance = json.loads(raw)
            version, about = provenance["format"], provenance["source"]["fingerprint"]
            whole = isinstance(about, dict) and all(_sound(name, t) for name, t in tensors.items())
            whole = whole and _sound_domains(provenance.get("domains", []), tensors)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            version, whole = FORMAT, False
        if version != FORMAT:
            raise UpcycleError(f"{path} has format {version}; this version reads {FORMAT}. Calibrate again")
        if not whole or not tensors:
            raise UpcycleError(f"{path} is damaged: its provenance or its tensors are not as written; {make}")
        return cls(path=path, tensors=tensors, provenance=provenance)

    @classmethod
    def shared(cls, path: str | Path) -> Statistics:
        """Return the statistics in a file that many ask for, opened once as long as it does not change."""
        path = Path(path)
        return _opened(path, path.stat().st_mtime_ns) if path.is_file() else cls.open(path)

    @property
    def domains(self) -> tuple[Domain, ...]:
        """The domains that `mean` and the like have a row for, in order; empty if it has none."""
        return tuple(Domain(**each) for each in self.provenance.get("domains", ()))

    def of(self, position: str, stack: str, layer: int, name: str) -> np.ndarray:
        """Return a statistic of a layer, float32 [n], or a matrix as `NAMES` says.

        Raises `UpcycleError` if it was not collected.
        """
        info = self.info(position, stack, layer, name)
        return tensor_file.read(self.path, info.dtype, info.shape, info.offset)

    def info(self, position: str, stack: str, layer: int, name: str) -> TensorInfo:
        """Return where a statistic of a layer is in the file, by its header alone.

        Raises `UpcycleError` if it was not collected.
        """
        info = self.tensors.get(f"{position}.{stack}.{layer}.{name}")
        if info is not None:
            return info
        if (position not in POSITIONS and position != ONLY_AT.get(name)) or name not in NAMES:
            raise UpcycleError(
                f"there are no statistics {name} of {position}; positions: {', '.join(POSITIONS)}, "
                f"statistics: {', '.join(NAMES)}"
            )
        keys = [key.split(".") for key in self.tensors]
        positions, names = (sorted({key[i] for key in keys}) for i in (0, 3))
        if position not in positions and position in POSITIONS:
            raise UpcycleError(
                f"{self.path} holds nothing of {position}, only of {', '.join(positions)}; calibrate with "
                f"--positions {','.join([*positions, position])}, or without this option for all of "
                f"{', '.join(POSITIONS)}"
            )
        if not any(key[0] == position and key[3] == name for key in keys):
            raise UpcycleError(
                f"{self.path} holds no {name} of {position}; calibrate with --collect "
                f"{','.join(n for n in NAMES if n in {*names, name})}"
                + (" and --domain or --prompts" if name in OF_DOMAINS and not self.domains else "")
            )
        stacks = {key[1]: max(int(k[2]) for k in keys if k[1] == key[1]) + 1 for key in keys}
        raise UpcycleError(
            f"{self.path} holds no {position} of layer {layer} of {stack}; it has "
            f"{', '.join(f'{count} layers of {n}' for n, count in stacks.items())}: calibrate the checkpoint "
            f"that they are wanted for"
        )

    def blocks(self, position: str, name: str) -> list[tuple[str, int]]:
        """Return the blocks, by stack and number, for which a statistic was collected."""
        keys = [key.split(".") for key in self.tensors]
        return [(stack, int(layer)) for p, stack, layer, n in keys if (p, n) == (position, name)]

    def kept(self) -> dict[tuple[str, ...], list[str]]:
        """Return the names of the statistics that were collected, by the positions where they were."""
        where: dict[str, set[str]] = {name: set() for name in self.provenance["collect"]}
        for key in self.tensors:
            position, _, _, name = key.split(".")
            if name in where:
                where[name].add(position)
        found: dict[tuple[str, ...], list[str]] = {}
        for name, positions in where.items():
            found.setdefault(tuple(sorted(positions)), []).append(name)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return a description of the file as JSON has it."""
        return {"path": str(self.path), "digest": self.digest, **self.provenance}

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of names, shapes and values, independent of where the file came from."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            for name, info in sorted(self.tensors.items()):
                digest.update(json.dumps([name, list(info.shape)]).encode())
                file.seek(info.offset)
                for start in range(0, info.nbytes, _CHUNK):
                    digest.update(file.read(min(_CHUNK, info.nbytes - start)))
        return digest.hexdigest()

    def refuse_other(self, here: Mapping[str, str], folder: Path) -> None:
        """Refuse statistics of another checkpoint than that in `folder`, with the fingerprint `here`.

        For a checkpoint on the hub of which only the headers were fetched, config and headers are compared.
        """
        there = self.provenance["source"]["fingerprint"]
        parts = {"tensors": "names, shapes or types of tensors", "config": "config", "content": "weights"}
        if different := [what for key, what in parts.items() if key in here and here[key] != there.get(key)]:
            raise UpcycleError(
                f"{self.path} was calibrated on {self.provenance['source'].get('name')}, which has other "
                f"{different[0]} than {folder}; run `upcycle calibrate` on that"
            )


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A domain that was calibrated on, as the provenance records it."""

    name: str
    tokens: Mapping[str, int]  # tokens of its prompts or its text that were counted, by stack
    negative_tokens: Mapping[str, int]  # the same for its negative prompts; zero if it has none


@once(maxsize=4)
def _opened(path: Path, mtime: int) -> Statistics:
    return Statistics.open(path)


def _sound(name: str, info: TensorInfo) -> bool:
    position, _, layer, kind = name.split(".")
    dimensions = 2 if kind in ONLY_AT else 1
    known = kind in NAMES or kind == NEGATIVE
    placed = position == ONLY_AT[kind] if kind in ONLY_AT else position in POSITIONS
    numbered = layer.isascii() and layer.isdigit()
    dtype = "F64" if kind in WIDE else "F32"
    return known and placed and numbered and info.dtype == dtype and len(info.shape) == dimensions


def _sound_domains(given: Any, tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether the recorded domains are whole, and as many as the tensors have rows for."""
    domains = [Domain(**each) for each in given]
    counts = [n for d in domains for table in (d.tokens, d.negative_tokens) for n in table.values()]
    rows = {t.shape[0] for name, t in tensors.items() if name.rpartition(".")[2] in (*OF_DOMAINS, NEGATIVE)}
    named = all(isinstance(domain.name, str) for domain in domains)
    return named and all(type(n) is int and n >= 0 for n in counts) and rows <= {len(domains)}


def unmeasured(who: str, key: str, collect: str) -> UpcycleError:
    """Return the error for something that is made of statistics, which `key` has to name.

    `who` is the beginning of the sentence; `collect` names the statistics, and further options if need be.
    """
    return UpcycleError(
        f"{who} activations: measure them with `upcycle calibrate SOURCE --collect {collect} --out FILE` "
        f"and set {key} = FILE"
    )


def refuse_unknown(what: str, given: tuple[str, ...], known: Mapping[str, str]) -> None:
    """Refuse a list of names that is empty, repeats one, or has an unknown one."""
    wrong = [name for name in given if name not in known]
    if wrong or not given or len({*given}) < len(given):
        said = f"has {listed([repr(n) for n in wrong])}" if wrong else "names none, or one twice"
        raise UpcycleError(f"{what} {','.join(given)} {said}; allowed: {', '.join(known)}")

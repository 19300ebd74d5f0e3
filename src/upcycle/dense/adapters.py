"""A LoRA adapter as `peft` saves it: its settings, and a pair of matrices for each module that it changes.

Only what can be merged exactly is taken: W + alpha / r x B A, or alpha / sqrt(r) with `use_rslora`
(arXiv 2106.09685; 2312.03732). The meaning of the keys is that of `peft.LoraConfig` 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.dtypes import FLOATS
from upcycle.checkpoints.header import TensorInfo
from upcycle.checkpoints.hub import Files, Opener, is_id
from upcycle.errors import UpcycleError, listed, shown
from upcycle.tensors.lazy import Lazy, Stored
from upcycle.tensors.moved import Transposed

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = Files(config=CONFIG, weights=WEIGHTS)
_BEFORE = "base_model.model."  # what peft puts before the names of a model's modules
_PAIRS = {  # the ends of the names of a pair: what stands on the left of the product, and on the right
    ".lora_B.weight": ".lora_A.weight",
    ".lora_embedding_B": ".lora_embedding_A",
}
_MERGE = "merge it into its model with merge_and_unload of peft, and give that as `source`"
# Keys of the settings that change more than W by B A, and what they do.
_OTHERS = {
    "use_dora": "is a DoRA, which also learns the lengths of columns",
    "use_qalora": "is a QALoRA, which belongs to a quantised model",
    "lora_bias": "learns biases (lora_bias)",
    "modules_to_save": "has whole modules of its own (modules_to_save)",
    "trainable_token_indices": "has new embeddings (trainable_token_indices)",
    "target_parameters": "changes parameters that are no modules (target_parameters)",
    "layer_replication": "repeats layers (layer_replication)",
    "alora_invocation_tokens": "acts behind certain tokens only (alora_invocation_tokens)",
    "arrow_config": "routes between adapters itself (arrow_config)",
    "use_bdlora": "is a block-diagonal LoRA (use_bdlora)",
}
# Starts of A and B that leave W as it is; with others (PiSSA, OLoRA, LoftQ, CorDA, ...) peft changes W too.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The matrix that an adapter adds to another: scale x left right, with left [N, r] and right [r, M]."""

    left: Lazy
    right: Lazy
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [N, M] of the matrix that it is added to."""
        return self.left.shape[0], self.right.shape[1]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An open adapter. `checkpoint` has its settings as its config, and its tensors."""

    checkpoint: Checkpoint

    @property
    def base(self) -> str:
        """The name of the model that it was trained on, as its maker's machine called it; may be empty."""
        named = self.checkpoint.config.get("base_model_name_or_path")
        return named if isinstance(named, str) else ""

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """The matrices that it adds, by the names of the modules in the model's class.

        Raises `UpcycleError` for a tensor that belongs to no pair, and for a pair of another rank than the
        settings have.
        """
        found = dict(self._found())
        paired = {
            info for pair in found.values() for part in (pair.left, pair.right) for info in part.sources()
        }
        if odd := sorted(info.name for info in self.checkpoint.tensors.values() if info not in paired):
            raise UpcycleError(
                f"{self._where} holds {listed(odd)}, which is no pair of LoRA matrices; {_MERGE}"
            )
        if not found:
            raise UpcycleError(f"{self._where} holds no LoRA matrices; give an adapter that was trained")
        return found

    def targets(self, module: str) -> bool:
        """Return whether the settings name a module, as `peft` reads them."""
        config = self.checkpoint.config
        if _named(config.get("exclude_modules"), module):
            return False
        wanted = config.get("target_modules")
        if isinstance(wanted, str) or not _named(wanted, module):
            return _named(wanted, module)
        layers = config.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        number = self._layer(module)
        return number is not None and number in (layers if isinstance(layers, list) else [layers])

    def _layer(self, module: str) -> int | None:
        """Return the number of the block that a module is in."""
        given = self.checkpoint.config.get("layers_pattern") or [r"[^.]*"]
        for pattern in [given] if isinstance(given, str) else given:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\.", module):
                return int(found["number"])
        return None

    @property
    def _where(self) -> Path:
        return self.checkpoint.folder

    def _found(self) -> Iterator[tuple[str, Pair]]:
        stored = self.checkpoint.tensors
        for name, info in stored.items():
            for left, right in _PAIRS.items():
                other = stored.get(name.removesuffix(left) + right)
                if name.startswith(_BEFORE) and name.endswith(left) and other is not None:
                    module = name.removesuffix(left).removeprefix(_BEFORE)
                    yield module, self._pair(module, info, other, embedding="embedding" in left)

    def _pair(self, module: str, b: TensorInfo, a: TensorInfo, *, embedding: bool) -> Pair:
        """Return what a module's two matrices add; those of an embedding are stored turned."""
        rank, alpha = (
            self._size("r", "rank_pattern", module),
            self._size("lora_alpha", "alpha_pattern", module),
        )
        if len(a.shape) != 2 or len(b.shape) != 2 or (b.shape[1], a.shape[0]) != (rank, rank):
            raise UpcycleError(
                f"{self._where}: {a.name} has shape {list(a.shape)} and {b.name} {list(b.shape)}, and the "
                f"settings say a rank of {rank:g}; give the adapter_config.json that belongs to these weights"
            )
        left, right = (Stored(self.checkpoint, info) for info in (b, a))
        root = math.sqrt(rank) if self.checkpoint.config.get("use_rslora") else rank
        if embedding or self.checkpoint.config.get("fan_in_fan_out"):
            return Pair(left=Transposed(right), right=Transposed(left), scale=alpha / root)
        return Pair(left=left, right=right, scale=alpha / root)

    def _size(self, key: str, patterns: str, module: str) -> float:
        """Return rank or alpha of a module: that of the first pattern that fits, or that of all."""
        config = self.checkpoint.config
        own = config.get(patterns) or {}
        fits = (size for name, size in own.items() if re.match(rf"(.*\.)?({name})$", module))
        return float(next(fits, config[key]))


def open_adapter(source: str, opener: Opener, *, label: str, allow_nonfinite: bool = False) -> Adapter:
    """Open the LoRA adapter in a folder or of a hub id. Only headers are read.

    Raises `UpcycleError` for anything that cannot be merged exactly.
    """
    folder = Path(source)
    if not folder.is_dir() and not is_id(source):
        raise UpcycleError(
            f"{folder} does not exist; give the folder of an adapter, or a hub id (owner/name)"
        )
    if not (folder / CONFIG).exists() and (folder / "config.json").exists():
        raise UpcycleError(f"{folder} is a whole model and no adapter; name it as `source`, not as `adapter`")
    opened = opener(source, allow_nonfinite=allow_nonfinite, label=label, files=FILES)
    _refuse_others(opened.folder, opened.config)
    _refuse_tensors(opened.folder, opened.tensors)
    return Adapter(checkpoint=opened)


def _refuse_others(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse settings of another kind of adapter, or of a wrong type."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UpcycleError(f"{folder} is an adapter of type {shown(kind)}, not LORA; {_MERGE}")
    for key, what in _OTHERS.items():
        if config.get(key):
            raise UpcycleError(f"{folder} {what}; {_MERGE}")
    if config.get("bias", "none") != "none":
        raise UpcycleError(f"{folder} learns biases (bias = {shown(config['bias'])}); {_MERGE}")
    start = config.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in _STARTS):
        raise UpcycleError(
            f"{folder} began as {shown(start)}, for which peft changes the model itself as well; {_MERGE}"
        )
    for key in ("r", "lora_alpha"):
        sizes = [config.get(key), *_values(folder, config, f"{'rank' if key == 'r' else 'alpha'}_pattern")]
        for size in sizes:
            if type(size) not in (int, float) or not 0 < size < math.inf:
                raise UpcycleError(f"{folder}/{CONFIG}: {key} = {shown(size)}; it must be a number above 0")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        names = config.get(key)
        if names is not None and not isinstance(names, str) and not _all(names, str):
            raise UpcycleError(f"{folder}/{CONFIG}: {key} = {shown(names)}; it must be a list of names")
    layers = config.get("layers_to_transform")
    if layers is not None and type(layers) is not int and not _all(layers, int):
        raise UpcycleError(
            f"{folder}/{CONFIG}: layers_to_transform = {shown(layers)}; it must be a list of block numbers"
        )
    for pattern in _patterns(config):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UpcycleError(f"{folder}/{CONFIG}: {shown(pattern)} is no pattern ({error})") from None


def _values(folder: Path, config: Mapping[str, Any], key: str) -> list[Any]:
    """Return the sizes in a table of patterns."""
    table = config.get(key) or {}
    if not isinstance(table, Mapping):
        raise UpcycleError(f"{folder}/{CONFIG}: {key} = {shown(table)}; it must be a table")
    return list(table.values())


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the regular expressions in the settings."""
    for key in ("rank_pattern", "alpha_pattern"):
        yield from config.get(key) or {}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(found := config.get(key), str):
            yield found
    found = config.get("layers_pattern") or []
    yield from [found] if isinstance(found, str) else found


def _refuse_tensors(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse tensors that say what the settings do not, and types that are no numbers."""
    if any("lora_magnitude_vector" in name for name in tensors):
        raise UpcycleError(f"{folder} {_OTHERS['use_dora']}; {_MERGE}")
    table = [n for n in tensors if "lora_" not in n and ("embed" in n or "lm_head" in n or "wte" in n)]
    if table:
        raise UpcycleError(f"{folder} has new embeddings ({listed(sorted(table))}); {_MERGE}")
    if odd := sorted(name for name, info in tensors.items() if info.dtype not in FLOATS):
        raise UpcycleError(
            f"{folder} holds {listed(odd)} as {tensors[odd[0]].dtype}; give an adapter in {', '.join(FLOATS)}"
        )


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _named(names: Any, module: str) -> bool:
    """Return whether a module is meant: by a pattern for the whole name, or by the end of its name."""
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)

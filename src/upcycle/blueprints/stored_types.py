"""The types in which the tensors of a result are stored, by their safetensors names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from upcycle.checkpoints.dtypes import BY_TORCH_NAME, COUNTERS, TORCH_NAMES
from upcycle.tensors.lazy import Lazy

_BIASES = ("e_score_correction_bias", "expert_bias")  # names of a correction bias; the second is that of LFM2


def of(tensors: Mapping[str, Lazy], dtype: str) -> dict[str, str]:
    """Return the type of each tensor by its name on disk. `dtype` is a torch name, or `source`.

    With `source`, a tensor keeps its own type, and so do a counter and a correction bias with any `dtype`: a
    correction bias accumulates tiny steps.
    """
    asked = BY_TORCH_NAME.get(dtype)
    return {
        name: tensor.dtype if asked is None or _is_kept(name, tensor) else asked
        for name, tensor in tensors.items()
    }


def usual(types: Iterable[str]) -> str:
    """Return the torch name of the most common type, which config.json names."""
    return TORCH_NAMES[Counter(types).most_common(1)[0][0]]


def is_bias(name: str) -> bool:
    """Return whether a tensor of that name is a correction bias, which changes the choice of experts only."""
    return name.rpartition(".")[2] in _BIASES


def _is_kept(name: str, tensor: Lazy) -> bool:
    return tensor.dtype in COUNTERS or is_bias(name)

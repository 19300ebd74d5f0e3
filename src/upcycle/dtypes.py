"""The floating-point types of a checkpoint, by their safetensors names."""

import ml_dtypes
import numpy as np

from upcycle.errors import UpcycleError

FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
BY_TORCH_NAME = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TORCH_NAMES = {name: torch_name for torch_name, name in BY_TORCH_NAME.items()}

# sign | exponent | mantissa: the exponent field is all ones for inf and NaN alone.
_EXPONENTS: dict[str, tuple[type, int]] = {
    "F64": (np.uint64, 0x7FF << 52),
    "F32": (np.uint32, 0xFF << 23),
    "F16": (np.uint16, 0x1F << 10),
    "BF16": (np.uint16, 0xFF << 7),
}
_SCAN = 1 << 15


def is_finite(raw: np.ndarray, dtype: str) -> bool:
    """Whether no element of `raw` (uint8, the bytes of an array of `dtype`) is NaN or infinite."""
    unsigned, mask = _EXPONENTS[dtype]
    words: np.ndarray = raw.view(unsigned)
    limit = unsigned(mask)
    return all((words[i : i + _SCAN] & limit).max(initial=0) != limit for i in range(0, words.size, _SCAN))


def cast(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """`values` in `dtype`, rounded to nearest even; a float16 overflow is an error that names the tensor."""
    target = FLOATS[dtype]
    if values.dtype == target:
        return values
    with np.errstate(over="ignore"):
        out = values.astype(target)
    if dtype == "F16" and not is_finite(np.ascontiguousarray(out).view(np.uint8).reshape(-1), dtype):
        raise UpcycleError(f"{name} holds values beyond float16's 65504; use dtype bfloat16 or float32")
    return out

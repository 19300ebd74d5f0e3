"""The floating-point types of a checkpoint, by their safetensors names."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np

from upcycle.errors import UpcycleError

FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
COUNTERS: dict[str, np.dtype] = {"I64": np.dtype(np.int64)}  # single numbers beside the weights, only copied
ITEMS = {**FLOATS, **COUNTERS}
BY_TORCH_NAME = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TORCH_NAMES = {name: torch_name for torch_name, name in BY_TORCH_NAME.items()}

# sign | exponent | mantissa: the exponent field is all ones only for inf and NaN.
_EXPONENTS: dict[str, tuple[type, int]] = {
    "F64": (np.uint64, 0x7FF << 52),
    "F32": (np.uint32, 0xFF << 23),
    "F16": (np.uint16, 0x1F << 10),
    "BF16": (np.uint16, 0xFF << 7),
}
_SCAN = 1 << 15


def is_finite(raw: np.ndarray, dtype: str) -> bool:
    """Return whether no element of `raw` (uint8, the bytes of an array of `dtype`) is NaN or infinite."""
    if dtype not in _EXPONENTS:
        return True
    unsigned, mask = _EXPONENTS[dtype]
    words: np.ndarray = raw.view(unsigned)
    limit = unsigned(mask)
    return all((words[i : i + _SCAN] & limit).max(initial=0) != limit for i in range(0, words.size, _SCAN))


class TooLargeError(UpcycleError):
    """A value is too large for the dtype it is stored in."""


_LARGEST = {name: float(ml_dtypes.finfo(dtype).max) for name, dtype in FLOATS.items()}
_MANTISSA = {name: int(ml_dtypes.finfo(dtype).nmant) for name, dtype in FLOATS.items()}
_WIDER = {
    "F16": "use dtype bfloat16 or float32",
    "BF16": "use dtype float32, or leave dtype at source",
    "F32": "leave dtype at source, or look for what made them so large",
    "F64": "look for what made them so large",
}


def _overflow(name: str, dtype: str) -> TooLargeError:
    limit = f"{_LARGEST[dtype]:.6g}"
    return TooLargeError(f"{name} holds values beyond {TORCH_NAMES[dtype]}'s {limit}; {_WIDER[dtype]}")


def holds(wide: str, narrow: str) -> bool:
    """Return whether dtype `wide` can represent every value of dtype `narrow`."""
    return wide == narrow or (_LARGEST[wide] >= _LARGEST[narrow] and _MANTISSA[wide] >= _MANTISSA[narrow])


def common(types: Collection[str]) -> str:
    """Return the narrowest floating-point type that holds all values of these `types`."""
    return next(wide for wide in reversed(FLOATS) if all(holds(wide, each) for each in types))


def cast(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Return `values` in `dtype`, rounded to nearest even; an overflow is an error that names the tensor."""
    target = ITEMS[dtype]
    if values.dtype == target:
        return values
    with np.errstate(over="ignore"):
        out = values.astype(target)
    if _LARGEST[dtype] < float(ml_dtypes.finfo(values.dtype).max):
        refuse_infinite(out, values, dtype, name)
    return out


def refuse_infinite(out: np.ndarray, values: np.ndarray, dtype: str, name: str) -> None:
    """Refuse a cast `out` of `values` that holds NaN or inf although the values are finite."""
    if not is_finite(np.ascontiguousarray(out).view(np.uint8).reshape(-1), dtype) and bool(
        (np.isfinite(values) & ~np.isfinite(out)).any()
    ):
        raise _overflow(name, dtype)


@contextmanager
def computing(name: str) -> Iterator[None]:
    """Turn an overflow in float32 arithmetic into an error that names the tensor."""
    try:
        with np.errstate(over="raise"):
            yield
    except FloatingPointError:
        raise _overflow(name, "F32") from None

"""Random numbers that depend only on (seed, tensor, expert) and the place in the tensor.

A key names a stream of Philox 4x64 (Salmon et al., SC 2011), a counter-based generator. The stream is cut
into blocks, each started at a counter of its own, so that any range of it can be drawn alone, in any order,
on any thread.
"""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]

FLOAT32 = np.dtype(np.float32)

BLOCK = 1 << 15  # numbers per block: 128 KiB of float32, so that a block stays in the L2 cache


def key(seed: int, *names: object) -> Key:
    """Return the key of the stream called `names` under `seed`: 128 bits of BLAKE2b."""
    text = "\0".join(map(str, (seed, *names)))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _philox(key: Key, block: int) -> np.random.Philox:
    # The block number is the third word of the counter, so no block can run into the next one.
    return np.random.Philox(key=np.array(key, np.uint64), counter=np.array([0, 0, block, 0], np.uint64))


def _stream(
    key: Key, start: int, stop: int, *, normal: bool, scale: float, shift: float, dtype: np.dtype
) -> np.ndarray:
    out, buffer = np.empty(stop - start, dtype), np.empty(BLOCK, np.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = block * BLOCK
        a, b = max(start, first), min(stop, first + BLOCK)
        draws = buffer[: b - first]
        generator = np.random.Generator(_philox(key, block))
        # A normal takes a varying number of raw draws, so a block is always drawn from its start.
        (generator.standard_normal if normal else generator.random)(dtype=np.float32, out=draws)
        draws *= np.float32(scale)
        draws += np.float32(shift)
        out[a - start : b - start] = draws[a - first :]
    return out


def normals(
    key: Key, start: int, stop: int, *, mean: float = 0.0, std: float = 1.0, dtype: np.dtype = FLOAT32
) -> np.ndarray:
    """Return numbers `start` to `stop` of the normal stream `key`; [stop - start], cast to `dtype`."""
    return _stream(key, start, stop, normal=True, scale=std, shift=mean, dtype=dtype)


def uniforms(key: Key, start: int, stop: int, *, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Return numbers `start` to `stop` of the uniform stream `key` in [low, high); [stop - start]."""
    return _stream(key, start, stop, normal=False, scale=high - low, shift=low, dtype=FLOAT32)


@lru_cache(maxsize=64)
def permutation(key: Key, n: int) -> NDArray[np.int64]:
    """Return a random order of range(n): the sorting order of n raw 64-bit draws. Read-only, shape [n]."""
    order = np.argsort(_philox(key, 0).random_raw(n), kind="stable")
    order.setflags(write=False)
    return order

"""Random numbers as a function of what they are for: no state to save, and no order in which threads must draw them."""

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15


def key_of(*parts: object) -> int:
    """A 63-bit key of a purpose, such as `key_of(seed, "images", 3)`; the same on every machine."""
    name = "\0".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit values one by one, one-to-one: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(key: int, rows: NDArray[np.int64], passes: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Uniform numbers that belong to (key, row, pass) alone.

    Args:
        key: 63-bit, from `key_of`.
        rows: (B,) row numbers.
        passes: (B,) how often each row was drawn before.
        count: numbers wanted for each row.

    Returns:
        (B, count) float64 in [0, 1), on the grid of 2**-53.
    """
    golden = np.uint64(_GOLDEN)
    state = mix(np.full(len(rows), key, dtype=np.uint64) + golden)
    state = mix((state ^ rows.astype(np.uint64)) + golden)
    state = mix((state ^ passes.astype(np.uint64)) + golden)
    steps = np.arange(1, count + 1, dtype=np.uint64) * golden
    return (mix(state[:, None] + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53

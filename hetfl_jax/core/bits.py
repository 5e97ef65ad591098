"""Exact counts of bits on a device that has no 64-bit integers.

A count is three int32 digits of base 2^15, not carried: digits may be added and multiplied by small numbers (up to
2^15 in all) without overflow. ``total`` puts them together on the host, in int64.
"""

import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Array

_BASE = 15


def digits(count: int | np.ndarray) -> np.ndarray:
    """[..., 3] int32 of numbers below 2^45 that are known on the host.

    >>> digits(3 * 2**30 + 5).tolist(), int(total(digits(3 * 2**30 + 5)))
    ([5, 0, 3], 3221225477)
    """
    count = np.asarray(count, np.int64)
    if (count < 0).any() or (count >> 3 * _BASE).any():
        raise ValueError(f"{count.max()} bits, allowed 0..2^45 - 1 (core.bits)")
    return np.stack([count >> _BASE * i & (1 << _BASE) - 1 for i in range(3)], -1).astype(np.int32)


def traced(count: Array) -> Array:
    """[..., 3] int32 of int32 numbers that are known only on the device.

    >>> traced(jnp.int32(2**30 + 7)).tolist()
    [7, 0, 1]
    """
    count = jnp.asarray(count, jnp.int32)
    return jnp.stack([count >> _BASE * i & (1 << _BASE) - 1 for i in range(3)], -1)


def total(parts: np.ndarray) -> np.ndarray:
    """int64 numbers from [..., 3] digits, on the host. Digits need not be carried: sums of them are fine.

    >>> total(np.array([[5, 0, 3], [32768, 1, 0]])).tolist()
    [3221225477, 65536]
    """
    return (np.asarray(parts).astype(np.int64) << _BASE * np.arange(3)).sum(-1)


def approximate(parts: Array) -> Array:
    """float32 numbers from [..., 3] digits, on the device, to seven decimals.

    Args:
      parts: int32, carried or not.

    >>> float(approximate(jnp.array([5, 0, 3])))
    3221225472.0
    """
    return (parts.astype(jnp.float32) * 2.0 ** (_BASE * jnp.arange(3))).sum(-1)

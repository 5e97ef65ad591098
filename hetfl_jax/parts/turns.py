"""Linear algebra of codecs: entries in front, Hadamard transform, orthonormal columns."""

import math

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Array


def to_front(values: Array, inside: Array | None, length: int) -> Array:
    """[length]: the entries inside, in row-major order, then zeros. ``inside`` None: all entries.

    >>> to_front(jnp.array([5.0, 0.0, 7.0]), jnp.array([True, False, True]), 4).tolist()
    [5.0, 7.0, 0.0, 0.0]
    """
    flat = values.ravel()
    if inside is None:
        return jnp.pad(flat, (0, length - flat.size))
    place = jnp.cumsum(inside.ravel().astype(jnp.int32)) - 1
    return jnp.zeros(length, flat.dtype).at[jnp.where(inside.ravel(), place, length)].set(flat, mode="drop")


def from_front(front: Array, inside: Array | None, shape: tuple[int, ...]) -> Array:
    """The way back from ``to_front``; entries outside get any value.

    >>> from_front(jnp.array([5.0, 7.0, 0.0]), jnp.array([False, True, True]), (3,))[1:].tolist()
    [5.0, 7.0]
    """
    if inside is None:
        return front[: math.prod(shape)].reshape(shape)
    place = jnp.cumsum(inside.ravel().astype(jnp.int32)) - 1
    return front[jnp.maximum(place, 0)].reshape(shape)


def hadamard(values: Array, size: int | Array) -> Array:
    """``H x`` with the Walsh-Hadamard matrix (entries 1 and -1), on every block of ``size`` entries.

    Args:
      values: [n], n a power of two.
      size: a power of two, at most n; may be traced.

    >>> hadamard(jnp.array([1.0, 2.0, 3.0, 4.0]), 4).tolist(), hadamard(jnp.array([1.0, 2.0, 3.0, 4.0]), 2).tolist()
    ([10.0, -2.0, -4.0, 0.0], [3.0, -1.0, 7.0, -1.0])
    """
    bits = values.size.bit_length() - 1

    def stage(number: Array, values: Array) -> Array:
        # The highest bit of the index becomes the lowest; after all stages the order is the old one.
        high, low = values.reshape(2, -1)
        inside = jnp.left_shift(1, bits - 1 - number) < size
        return jnp.stack([jnp.where(inside, high + low, high), jnp.where(inside, high - low, low)], 1).ravel()

    return jax.lax.fori_loop(0, bits, stage, values)


def orthonormal(columns: Array) -> Array:
    """[m, r]: columns of the same span, orthonormal; a column that depends on those before it becomes zero.

    Gram-Schmidt, each column twice.

    >>> orthonormal(jnp.array([[3.0, 6.0, 1.0], [4.0, 8.0, 0.0]])).round(3).tolist()
    [[0.600..., 0.0, 0.800...], [0.800..., 0.0, -0.600...]]
    """
    number = jnp.arange(columns.shape[1])

    def step(k: Array, done: Array) -> Array:
        column = done[:, k]
        before = jnp.linalg.norm(column)
        for _ in range(2):
            shares = jnp.where(number < k, matmul(done.T, column), 0)
            column = column - matmul(done, shares)
        size = jnp.linalg.norm(column)
        kept = size > 1e-5 * before
        return done.at[:, k].set(jnp.where(kept, column / jnp.where(kept, size, 1), 0))

    return jax.lax.fori_loop(0, columns.shape[1], step, columns)


def matmul(a: Array, b: Array) -> Array:
    """``a @ b`` in float32 on every device.

    >>> matmul(jnp.ones((1, 3)), jnp.ones((3, 1))).tolist()
    [[3.0]]
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

"""Keys by purpose and a keyed permutation that is computed per index.

``fold_in(fold_in(fold_in(seed, purpose), round), client)``: randomness never depends on a client's place in the
cohort, on chunking, bucketing, padding or device count, and a resumed run needs no stored key.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import platform
from hetfl_jax.core.types import Array, PyTree

INIT, PLAN, CLIENT, SURVEY, DATA = range(5)  #: purposes

_ROUNDS = 24  # of the shuffle; pairs of places are uniform from 16 on


def purpose_key(key: Array, purpose: int, *folds: Array | int) -> Array:
    """The key of one purpose, folded with each further number (round, client id, ticket ...).

    >>> a = purpose_key(jax.random.key(0), CLIENT, 3, 7)
    >>> bool((a == purpose_key(jax.random.key(0), PLAN, 3, 7)).all())
    False
    """
    for fold in (purpose, *folds):
        key = jax.random.fold_in(key, fold)
    return key


def draw(sampler: Callable[..., Array], key: Array, shape: Sequence[int], *args: PyTree) -> Array:
    """What ``sampler(key, shape)`` draws, the same numbers, compiled as a flat array.

    Where a draw has four axes, a CPU's compiler takes about two seconds for it, and 0.3 where it is flat.

    Args:
      sampler: ``jax.random.normal``, ``uniform``, ``bits``.
      key: one key.
      shape: of the result.
      args: what the sampler takes after the shape.

    >>> key = jax.random.key(0)
    >>> bool((draw(jax.random.normal, key, (2, 3, 1, 2)) == jax.random.normal(key, (2, 3, 1, 2))).all())
    True
    """
    return sampler(key, (math.prod(shape),), *args).reshape(shape)


def permute(key: Array, position: Array, size: Array | int) -> Array:
    """The entry at ``position`` of a random permutation of ``0 .. size - 1``, without building the permutation.

    The swap-or-not shuffle (Hoang, Morris, Rogaway 2012): in each round, ``v`` and its partner ``k - v mod size``
    change places if a keyed bit of the pair says so. It works at every size, so ``size`` may be traced and the order
    depends on no padded length.

    Args:
      key: one key; the same key gives the same permutation.
      position: int32, any shape, each in ``[0, size)``.
      size: int32 scalar >= 1.

    Returns:
      int32 of ``position``'s shape; over all positions each of ``0 .. size - 1`` occurs once.

    >>> sorted(permute(jax.random.key(0), jnp.arange(5), 5).tolist())
    [0, 1, 2, 3, 4]
    """
    if isinstance(size, int) and size == 1:  # XLA's CPU compiler fails on a shuffle that is all constants
        return jnp.zeros(jnp.shape(position), jnp.int32)
    size = jnp.asarray(size, jnp.uint32)
    salt = jax.random.bits(key, (2, _ROUNDS), jnp.uint32)

    def turn(value: Array, keyed: tuple[Array, Array]) -> tuple[Array, None]:
        mirror, salt = keyed
        partner = jnp.where(value <= mirror, mirror - value, mirror + size - value)
        swap = _mix(jnp.maximum(value, partner) + salt) >> 31
        return jnp.where(swap == 1, partner, value), None

    # A CPU compiles and runs a short loop faster; elsewhere every turn of a loop is a launch.
    unroll = 4 if platform.current().name == "cpu" else _ROUNDS
    value = jnp.asarray(position).astype(jnp.uint32)
    value, _ = jax.lax.scan(turn, value, (salt[0] % size, salt[1]), unroll=unroll)
    return value.astype(jnp.int32)


def shuffled(ids: Array | np.ndarray, size: int) -> Array:
    """int32 ranks of ``ids`` in an order of ``0 .. size - 1`` that is random and always the same.

    >>> sorted(shuffled(jnp.arange(4), 4).tolist())
    [0, 1, 2, 3]
    """
    return permute(jax.random.key(0), jnp.asarray(ids, jnp.int32), size)


def words(key: Array, index: Array) -> Array:
    """32 random bits for each index, computed from the key and the index alone: no array of other indices is drawn.

    A few multiplications an entry, an eighth of what ``jax.random.bits`` takes on a CPU; good enough to round by.

    Args:
      key: one key.
      index: uint32, any shape, below 2^32.

    Returns:
      uint32 of ``index``'s shape.

    >>> all_of_them = words(jax.random.key(0), jnp.arange(5, dtype=jnp.uint32))
    >>> bool((words(jax.random.key(0), jnp.uint32(3)) == all_of_them[3]).all())
    True
    """
    salt = jax.random.bits(key, (2,), jnp.uint32)
    return _mix(_mix(index + salt[0]) ^ salt[1])


def _mix(value: Array) -> Array:
    """Every bit of a 32-bit word depends on every other."""
    value = value * jnp.uint32(0x9E3779B1)
    value = (value ^ (value >> 15)) * jnp.uint32(0x85EBCA77)
    value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE3D)
    return value ^ (value >> 16)

"""Keys by purpose and a keyed permutation that is computed per index.

``fold_in(fold_in(fold_in(seed, purpose), round), client)``: randomness never depends on a client's place in the
cohort, on chunking, bucketing, padding or device count, and a resumed run needs no stored key.
"""

import jax
import jax.numpy as jnp

from hetfl_jax.types import Array

INIT, PLAN, CLIENT, SURVEY, DATA = range(5)  #: purposes

_ROUNDS = 8


def purpose_key(key: Array, purpose: int, *folds: Array | int) -> Array:
    """The key of one purpose, folded with each further number (round, client id, ticket ...).

    >>> a = purpose_key(jax.random.key(0), CLIENT, 3, 7)
    >>> bool((a == purpose_key(jax.random.key(0), PLAN, 3, 7)).all())
    False
    """
    for fold in (purpose, *folds):
        key = jax.random.fold_in(key, fold)
    return key


def permute(key: Array, position: Array, size: Array | int) -> Array:
    """The entry at ``position`` of a random permutation of ``0 .. size - 1``, without building the permutation.

    An unbalanced Feistel network on the smallest power of two >= ``size`` (xor one half of the bits with a keyed hash
    of the other, eight times); values outside the range walk the cycle until they are inside, fewer than two tries on
    average. ``size`` may be traced, so the order depends on no padded length.

    Args:
      key: one key; the same key gives the same permutation.
      position: int32, any shape, each in ``[0, size)``.
      size: int32 scalar >= 1.

    Returns:
      int32 of ``position``'s shape; over all positions each of ``0 .. size - 1`` occurs once.

    >>> sorted(permute(jax.random.key(0), jnp.arange(5), 5).tolist())
    [0, 1, 2, 3, 4]
    """
    size = jnp.asarray(size, jnp.uint32)
    bits = 32 - jax.lax.clz(jnp.maximum(size, 1) - 1)  # of the domain, 0 when size is 1
    low_bits = bits // 2
    low_mask = (jnp.uint32(1) << low_bits) - 1
    high_mask = (jnp.uint32(1) << (bits - low_bits)) - 1
    salt = jax.random.bits(key, (_ROUNDS,), jnp.uint32)

    def mix(value: Array, salt: Array) -> Array:
        value = (value + salt) * jnp.uint32(0x9E3779B1)
        value = (value ^ (value >> 15)) * jnp.uint32(0x85EBCA77)
        value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE3D)
        return value ^ (value >> 16)

    def shuffle(value: Array) -> Array:
        low, high = value & low_mask, value >> low_bits
        for i in range(0, _ROUNDS, 2):
            high = high ^ (mix(low, salt[i]) & high_mask)
            low = low ^ (mix(high, salt[i + 1]) & low_mask)
        return (high << low_bits) | low

    def walk(value: Array) -> Array:
        return jnp.where(value >= size, shuffle(value), value)

    start = shuffle(jnp.asarray(position).astype(jnp.uint32))
    inside = jax.lax.while_loop(lambda v: (v >= size).any(), walk, start)
    return inside.astype(jnp.int32)

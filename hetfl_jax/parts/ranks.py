"""The k largest of many numbers without a sort."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.types import Array

_SAMPLE = 4096  #: of a leaf, for a first guess of a threshold


class _Between(NamedTuple):
    """At least ``count`` ranks reach ``low``, fewer reach ``high``."""

    low: Array
    high: Array
    above_low: Array
    above_high: Array
    step: Array


def _reach(rank: Array, least: Array) -> Array:
    """How many ranks are at least this. XLA adds floats several at a time on a CPU, and here they are exact."""
    return (rank >= least).sum(dtype=jnp.float32 if rank.size < 1 << 24 else jnp.int32).astype(jnp.int32)


def _threshold(rank: Array, count: Array) -> _Between:
    """Between which ranks the ``count`` largest begin.

    Two guesses are from a sample, the next ones from how many reach the ends, every third halves what is left.
    """
    some = jnp.sort(rank.ravel()[:: max(rank.size // _SAMPLE, 1)], descending=True)
    place = count.astype(jnp.float32) * (some.size / rank.size)
    spread = 3 * jnp.sqrt(place) + 2
    ends = some[jnp.clip(jnp.stack([place + spread, place - spread]).astype(jnp.int32), 0, some.size - 1)]

    def narrow(b: _Between) -> _Between:
        width = b.high - b.low
        share = (b.above_low - count + 0.5) / jnp.maximum(b.above_low - b.above_high, 1)
        step = jnp.where(b.step % 3 == 2, width // 2, (share * width.astype(jnp.float32)).astype(jnp.int32))
        step = jnp.where(b.step < 2, ends[jnp.minimum(b.step, 1)] - b.low, step)
        middle = b.low + jnp.clip(step, 1, width - 1)
        found = _reach(rank, middle)
        lower, higher = b._replace(high=middle, above_high=found), b._replace(low=middle, above_low=found)
        return tree.select(found >= count, higher, lower)._replace(step=b.step + 1)

    zero = jnp.int32(0)
    start = _Between(zero, jnp.int32(np.iinfo(np.int32).max), jnp.int32(rank.size), zero, zero)
    return jax.lax.while_loop(lambda b: (b.above_low > count) & (b.high - b.low > 1), narrow, start)


def largest(score: Array, count: int | Array) -> Array:
    """Which ``count`` entries have the largest score; of equal ones the first.

    Nothing is sorted: about a dozen times it is counted how many scores reach a threshold.

    Args:
      score: float32, any shape, at least ``count`` entries >= 0 that may be chosen; the others are below 0.
      count: int32 scalar, may be traced.

    Returns:
      bool of ``score``'s shape.

    >>> largest(jnp.array([1.0, 3.0, 3.0, 2.0]), 2).tolist(), largest(jnp.array([3.0, -1.0, 3.0]), 1).tolist()
    ([False, True, True, False], [True, False, False])
    """
    rank = jax.lax.bitcast_convert_type(score, jnp.int32)  # of floats >= 0 in their order; of others below 0
    count = jnp.asarray(count, jnp.int32)
    found = _threshold(rank, count)

    def first_of_equal(_: None) -> Array:
        equal = (rank == found.low).ravel()
        first = jnp.cumsum(equal.astype(jnp.int32)) <= count - found.above_high
        return (rank > found.low) | (equal & first).reshape(rank.shape)

    return jax.lax.cond(found.above_low > count, first_of_equal, lambda _: rank >= found.low, None)

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


def _guesses(rank: Array, count: Array) -> Array:
    """[2] a rank that is most likely below the threshold, and one above it, by a sample."""
    some = jnp.sort(rank.ravel()[:: max(rank.size // _SAMPLE, 1)], descending=True)
    place = count.astype(jnp.float32) * (some.size / rank.size)
    spread = 3 * jnp.sqrt(place) + 2
    return some[jnp.clip(jnp.stack([place + spread, place - spread]).astype(jnp.int32), 0, some.size - 1)]


def _threshold(rank: Array, count: Array, ends: Array) -> _Between:
    """Between which ranks the ``count`` largest begin.

    First it is counted how many reach the ends; further guesses are from these counts, every third halves what is left.
    """

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


def uniform_guesses(count: Array, among: Array, least: int, width: int) -> Array:
    """[2] ranks about the ``count``-th largest of ``among`` ranks that are uniform in [least, least + width).

    >>> [int(rank) for rank in uniform_guesses(jnp.int32(400), jnp.int32(1_600), 0, 1_000)]
    [701, 798]
    """
    share = count / jnp.maximum(among, 1).astype(jnp.float32)
    spread = (4 * jnp.sqrt(count * (1 - share)) + 8) / jnp.maximum(among, 1)
    below = jnp.clip(1 - share + jnp.stack([-spread, spread]), 0, 1)
    return least + (below * width).astype(jnp.int32)


def largest(score: Array, count: int | Array, ends: Array | None = None) -> Array:
    """Which ``count`` entries have the largest score; of equal ones the first.

    Nothing is sorted: about a dozen times it is counted how many scores reach a threshold.

    Args:
      score: float32, any shape, at least ``count`` entries >= 0 that may be chosen; the others are below 0.
      count: int32 scalar, may be traced.
      ends: [2] int32 ranks between which the threshold probably is, the lower one first; None: by a sample. The rank of
        a score is its bits as an int32. Wrong ones cost time alone.

    Returns:
      bool of ``score``'s shape.

    >>> largest(jnp.array([1.0, 3.0, 3.0, 2.0]), 2).tolist(), largest(jnp.array([3.0, -1.0, 3.0]), 1).tolist()
    ([False, True, True, False], [True, False, False])
    """
    rank = jax.lax.bitcast_convert_type(score, jnp.int32)  # of floats >= 0 in their order; of others below 0
    count = jnp.asarray(count, jnp.int32)
    found = _threshold(rank, count, _guesses(rank, count) if ends is None else ends)

    def last_of_equal(_: None) -> Array:
        equal = jnp.cumsum((rank == found.low).ravel().astype(jnp.int32))
        return (equal < count - found.above_high).sum(dtype=jnp.int32)

    # What is chosen is an expression of each entry, not an array that a branch writes.
    last = jax.lax.cond(found.above_low > count, last_of_equal, lambda _: jnp.int32(rank.size), None)
    place = jnp.arange(rank.size, dtype=jnp.int32).reshape(rank.shape)
    return (rank > found.low) | ((rank == found.low) & (place <= last))

"""Reading a population: the rows of some clients, and the examples of one as it sees them."""

import jax.numpy as jnp

from hetfl_jax.core.types import Array, Population, Shard, Views


def shards(pop: Population, ids: Array) -> Shard:
    """The rows of clients ``ids`` with a leading axis; the pool (x, y, index, views) is left out.

    Args:
      pop: the population.
      ids: [K] int32.

    Returns:
      A ``Shard`` whose leaves are [K, ...].

    >>> import numpy as np
    >>> from hetfl_jax.data.population import population
    >>> pop = population(np.zeros((4, 2)), np.array([0, 1, 1, 0]), np.array([3, 1, 2]), np.array([1, 2]))
    >>> found = shards(pop, jnp.array([1]))
    >>> found.offset.tolist(), found.size.tolist(), found.classes.tolist()
    ([1], [2], [[False, True]])
    """
    view = pop.view[ids] if isinstance(pop.views, Views) else ()
    return Shard(None, None, None, pop.offset[ids], pop.size[ids], pop.classes[ids], view, None)


def examples(shard: Shard, rows: Array) -> tuple[Array, Array]:
    """Pool rows as the owner of the shard sees them: (x [B, ...], y [B]).

    Args:
      shard: with the pool.
      rows: [B] int32 pool rows.

    >>> pool = Shard(jnp.arange(6.0).reshape(3, 2), jnp.array([0, 1, 2]), None, 0, 3, None)
    >>> [v.tolist() for v in examples(pool, jnp.array([2, 0]))]
    [[[4.0, 5.0], [0.0, 1.0]], [2, 0]]
    """
    x, y = shard.x[rows], shard.y[rows]
    if not isinstance(shard.views, Views):
        return x, y
    moved = shard.views.pixels[shard.view]
    flat = x.reshape(x.shape[0], moved.shape[0], -1)
    seen = flat[:, moved].reshape(x.shape)
    return seen, y if jnp.issubdtype(y.dtype, jnp.floating) else shard.views.labels[shard.view][y]

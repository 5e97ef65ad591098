"""Reading a population: the rows of some clients, and the examples of one as it sees them."""

import jax.numpy as jnp

from hetfl_jax.core.types import Array, Population, Shard, Views


def shards(pop: Population, ids: Array) -> Shard:
    """The rows of clients ``ids`` with a leading axis; the pool (x, y, index, views) is left out."""
    view = pop.view[ids] if isinstance(pop.views, Views) else ()
    return Shard(None, None, None, pop.offset[ids], pop.size[ids], pop.classes[ids], view, None)


def examples(shard: Shard, rows: Array) -> tuple[Array, Array]:
    """Pool rows as the owner of the shard sees them: (x [B, ...], y [B])."""
    x, y = shard.x[rows], shard.y[rows]
    if not isinstance(shard.views, Views):
        return x, y
    moved = shard.views.pixels[shard.view]
    flat = x.reshape(x.shape[0], moved.shape[0], -1)
    seen = flat[:, moved].reshape(x.shape)
    return seen, y if jnp.issubdtype(y.dtype, jnp.floating) else shard.views.labels[shard.view][y]

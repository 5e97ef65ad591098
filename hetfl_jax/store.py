"""Where the private memory of clients lives.

``Store(init, gather, scatter, commit)``: the engine asks for the rows of a round's clients and gives them back. This
release keeps all rows on the device, where a round is one jitted call.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax import tree
from hetfl_jax.types import Array, PyTree


class Store(NamedTuple):
    """A home for ``[N, ...]`` rows of client memory."""

    init: Callable[[PyTree, int], PyTree]  #: (one client's memory, N) -> memory
    gather: Callable[[PyTree, Array], PyTree]  #: (memory, ids [K]) -> rows [K, ...]
    scatter: Callable[[PyTree, Array, Array, PyTree], PyTree]  #: (memory, ids, valid, rows) -> memory
    commit: Callable[[int], None]  #: the checkpoint of this round is on disk


def device_store() -> Store:
    """All rows as device arrays, part of the state and of its checkpoint.

    >>> store = device_store()
    >>> memory = store.init({"visits": jnp.int32(0)}, 3)
    >>> store.scatter(memory, jnp.array([2, 0]), jnp.array([True, False]), {"visits": jnp.array([5, 9])})["visits"]
    Array([0, 0, 5], dtype=int32)
    """

    def init(one: PyTree, clients: int) -> PyTree:
        return jax.tree.map(lambda v: jnp.tile(jnp.asarray(v)[None], (clients,) + (1,) * jnp.ndim(v)), one)

    def scatter(memory: PyTree, ids: Array, valid: Array, rows: PyTree) -> PyTree:
        def leaf(m: Array, r: Array) -> Array:
            # Padding may repeat a real client's id: its row must not land anywhere.
            return m.at[jnp.where(valid, ids, m.shape[0])].set(r, mode="drop")

        return jax.tree.map(leaf, memory, rows)

    return Store(init, tree.take, scatter, lambda round: None)

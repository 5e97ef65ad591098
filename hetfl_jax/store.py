"""Where the private memory of clients lives: on the device, in host memory, or in sparse files.

A method's memory of ONE client is a tree of arrays; a store keeps N of them and the engine asks for the rows of a
round's clients. On the device they are part of the state and a round is one jitted call. The other two keep them
outside, so that only the cohort's rows ever reach the device, and packed: a client's row is as large as its own level.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax import tree
from hetfl_jax.segments import Segments
from hetfl_jax.types import Array, PyTree

STORES = ("device", "host", "file")


class Store(NamedTuple):
    """A home for ``[N, ...]`` rows of client memory."""

    init: Callable[[PyTree, int], PyTree]  #: (one client's memory, N) -> memory
    gather: Callable[[PyTree, Array], PyTree]  #: (memory, ids [K]) -> rows [K, ...]
    scatter: Callable[[PyTree, Array, Array, PyTree], PyTree]  #: (memory, ids, valid, rows) -> memory
    #: (round, rounds of the checkpoints there are): keep what was scattered, before the checkpoint of this round
    commit: Callable[[int, Sequence[int]], None] = lambda round, kept: None
    restore: Callable[[int], None] = lambda round: None  #: rows as they were at the checkpoint of this round
    on_host: bool = False  #: whether rows are kept outside the state, by functions that are not traced


class Packing(NamedTuple):
    """How large each client's row is."""

    level: np.ndarray  #: [N] int, fixed
    extents: tuple[list[tuple[int, ...]], ...]  #: for each level, the leading extents of every leaf of the memory

    def sizes(self) -> np.ndarray:
        """[L] entries of a row of each level."""
        return np.asarray([sum(int(np.prod(e)) for e in leaves) for leaves in self.extents], np.int64)


def unpacked(one: PyTree, clients: int) -> Packing:
    """Rows of full size for every client, where levels change from round to round."""
    return Packing(np.zeros(clients, int), ([leaf.shape for leaf in jax.tree.leaves(one)],))


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

    return Store(init, tree.take, scatter)


def file_store(folder: Path, packing: Packing) -> Store:
    """Rows in sparse files below ``folder``, see ``segments``; a client that never took part costs nothing."""
    return _outside(folder, packing, in_memory=False)


def host_store(folder: Path, packing: Packing) -> Store:
    """Rows in host memory; what changed since the last checkpoint is written to ``folder`` with the next one."""
    return _outside(folder, packing, in_memory=True)


def _window(extent: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in extent)


def _outside(folder: Path, packing: Packing, in_memory: bool) -> Store:
    kept: dict[str, Any] = {}

    def init(one: PyTree, clients: int) -> PyTree:
        if packing.level.size != clients:
            raise ValueError(f"a store for {packing.level.size} clients, but there are {clients} (store)")
        leaves, kept["structure"] = jax.tree.flatten(jax.device_get(one))
        if any(leaf.dtype != np.float32 for leaf in leaves):
            raise ValueError("client memory outside the device must be float32 (train.store)")
        kept["one"] = leaves
        kept["files"] = Segments(folder, packing.level, packing.sizes())
        kept["rows"] = {}
        kept["changed"] = set()
        return ()

    def read(client: int) -> np.ndarray | None:
        return kept["rows"].get(client) if in_memory else kept["files"].read(client)

    def gather(memory: PyTree, ids: Array) -> PyTree:
        clients = np.asarray(ids)
        out = [np.tile(leaf[None], (clients.size,) + (1,) * leaf.ndim) for leaf in kept["one"]]
        for slot, client in enumerate(clients.tolist()):
            if (flat := read(client)) is None:
                continue
            start = 0
            for leaf, extent in zip(out, packing.extents[packing.level[client]]):
                end = start + int(np.prod(extent))
                leaf[slot, ...][_window(extent)] = flat[start:end].reshape(extent)
                start = end
        return jax.tree.unflatten(kept["structure"], out)

    def scatter(memory: PyTree, ids: Array, valid: Array, rows: PyTree) -> PyTree:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(rows)]
        for slot in np.flatnonzero(np.asarray(valid)).tolist():
            client = int(ids[slot])
            extents = packing.extents[packing.level[client]]
            cuts = [leaf[slot, ...][_window(extent)].ravel() for leaf, extent in zip(leaves, extents)]
            flat = np.concatenate(cuts)
            if in_memory:
                kept["rows"][client] = flat
                kept["changed"].add(client)
            else:
                kept["files"].write(client, flat)
        return ()

    def commit(round: int, checkpoints: Sequence[int]) -> None:
        for client in sorted(kept["changed"]):
            kept["files"].write(client, kept["rows"][client])
        kept["changed"].clear()
        kept["files"].commit(round, checkpoints)

    def restore(round: int) -> None:
        kept["files"].restore(round)
        if in_memory:
            kept["changed"].clear()
            kept["rows"] = {client: np.array(kept["files"].read(client)) for client in kept["files"].clients()}

    return Store(init, gather, scatter, commit, restore, on_host=True)

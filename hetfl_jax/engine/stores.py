"""Where the private memory of clients lives: on the device, in host memory, or in sparse files.

A method's memory of ONE client is a tree of arrays; a store keeps N of them and the engine asks for the rows of a
round's clients. On the device they are part of the state and a round is one jitted call. The other two keep them
outside, so that only the cohort's rows ever reach the device. Where levels are fixed, rows are packed in all three: a
client's row is as large as its own level.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.types import Array, Line, PyTree
from hetfl_jax.engine.segments import Segments

STORES = ("device", "host", "file")


class Store(NamedTuple):
    """A home for ``[N, ...]`` rows of client memory.

    ``block``, which may be left out, is a device's number: ``memory`` is then what this device keeps of rows that are
    split evenly over devices.

    What a method is told is the same whatever the store; only what fits differs, see ``docs/howto/memory.md``.
    """

    init: Callable[[PyTree, int], PyTree]  #: (one client's memory, N) -> memory
    gather: Callable[..., PyTree]  #: (memory, ids [K], block) -> rows [K, ...], zero where another device has them
    scatter: Callable[..., PyTree]  #: (memory, ids, valid, rows, block) -> memory
    #: (round, rounds of the checkpoints there are): keep what was scattered, before the checkpoint of this round
    commit: Callable[[int, Sequence[int]], None] = lambda round, kept: None
    restore: Callable[[int], None] = lambda round: None  #: rows as they were at the checkpoint of this round
    on_host: bool = False  #: whether rows are kept outside the state, by functions that are not traced
    rows: int = 0  #: for how many it was made, 0 where any will do


class Packing(NamedTuple):
    """How large each client's row is.

    >>> Packing(np.array([0, 1, 1]), ([(4, 3), (4,)], [(2, 3), (2,)])).sizes()
    array([16,  8])
    """

    level: np.ndarray  #: [N] int, fixed
    extents: tuple[list[tuple[int, ...]], ...]  #: for each level, the leading extents of every leaf of the memory

    def sizes(self) -> np.ndarray:
        """[L] int64, entries of a row of each level."""
        return np.asarray([sum(int(np.prod(e)) for e in leaves) for leaves in self.extents], np.int64)


def unpacked(one: PyTree, clients: int) -> Packing:
    """Rows of full size for every client, where levels change from round to round.

    Args:
      one: one client's memory, or its shapes.
      clients: N.

    >>> unpacked({"sum": np.zeros((4, 3))}, clients=2).sizes()
    array([12])
    """
    return Packing(np.zeros(clients, int), ([leaf.shape for leaf in jax.tree.leaves(one)],))


def device_store() -> Store:
    """All rows as device arrays, part of the state and of its checkpoint.

    >>> store = device_store()
    >>> memory = store.init({"visits": jnp.int32(0)}, 3)
    >>> store.scatter(memory, jnp.array([2, 0]), jnp.array([True, False]), {"visits": jnp.array([5, 9])})["visits"]
    Array([0, 0, 5], dtype=int32)
    """

    def gather(memory: PyTree, ids: Array, block: Array | None = None) -> PyTree:
        if block is None:
            return tree.take(memory, ids)
        return jax.tree.map(lambda m: _read(m, ids, jnp.bool_(True), block), memory)

    def scatter(memory: PyTree, ids: Array, valid: Array, rows: PyTree, block: Array | int = 0) -> PyTree:
        return jax.tree.map(lambda m, r: _write(m, ids, valid, r, block), memory, rows)

    return Store(lambda one, clients: jax.tree.map(lambda v: _tiled(v, clients), one), gather, scatter)


def packed_device_store(packing: Packing, one: PyTree) -> Store:
    """``device_store`` with rows as large as their client's level: one array for each level and leaf of the memory.

    Outside its level a row reads as zero.

    Args:
      packing: every client's level, which must not change, and the sizes of levels.
      one: one client's memory, or its shapes.

    >>> store = packed_device_store(Packing(np.array([0, 1, 1]), ([(4,)], [(2,)])), {"sum": jnp.zeros(4)})
    >>> memory = store.init({"sum": jnp.zeros(4)}, 3)
    >>> {name: parts["0"].shape for name, parts in memory.items()}
    {'level_0': (1, 4), 'level_1': (2, 2)}
    >>> memory = store.scatter(memory, jnp.array([2]), jnp.array([True]), {"sum": jnp.ones((1, 4))})
    >>> store.gather(memory, jnp.array([2, 0]))["sum"].tolist()
    [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    leaves, structure = jax.tree.flatten(one)
    names = [f"level_{level}" for level in range(len(packing.extents))]
    here = [packing.level == level for level in range(len(names))]
    rank = np.select(here, [np.cumsum(h) - 1 for h in here]).astype(np.int32)
    windows = [
        (level, i, _window(extent))
        for level, extents in enumerate(packing.extents)
        for i, extent in enumerate(extents)
        if here[level].any() and np.prod(extent) > 0
    ]

    def init(one: PyTree, clients: int) -> PyTree:
        rows = jax.tree.leaves(one)
        memory: dict[str, dict[str, Array]] = {}
        for level, i, window in windows:
            memory.setdefault(names[level], {})[str(i)] = _tiled(rows[i][window], int(here[level].sum()))
        return memory

    def gather(memory: PyTree, ids: Array, block: Array | int = 0) -> PyTree:
        level_of, row = jnp.asarray(packing.level)[ids], jnp.asarray(rank)[ids]
        out = [jnp.zeros((*ids.shape, *leaf.shape), leaf.dtype) for leaf in leaves]
        for level, i, window in windows:
            part = _read(memory[names[level]][str(i)], row, level_of == level, block)
            out[i] = out[i].at[(slice(None), *window)].add(part)
        return jax.tree.unflatten(structure, out)

    def scatter(memory: PyTree, ids: Array, valid: Array, rows: PyTree, block: Array | int = 0) -> PyTree:
        level_of, row = jnp.asarray(packing.level)[ids], jnp.asarray(rank)[ids]
        given, after = jax.tree.leaves(rows), {name: dict(parts) for name, parts in memory.items()}
        for level, i, window in windows:
            kept = memory[names[level]][str(i)]
            own = given[i][(slice(None), *window)]
            after[names[level]][str(i)] = _write(kept, row, valid & (level_of == level), own, block)
        return after

    return Store(init, gather, scatter, rows=packing.level.size)


def _tiled(value: Array, rows: int) -> Array:
    """[rows, ...] copies of one client's start value."""
    return jnp.tile(jnp.asarray(value)[None], (rows,) + (1,) * jnp.ndim(value))


def _own(kept: Array, row: Array, wanted: Array, block: Array | int) -> tuple[Array, Array]:
    """Which of ``row`` are wanted and in this block of a split array, and their places in it.

    >>> [v.tolist() for v in _own(jnp.zeros((2, 1)), jnp.array([0, 2, 3]), jnp.array([True, True, False]), 1)]
    [[False, True, False], [-2, 0, 1]]
    """
    local = row - block * kept.shape[0]
    mine = wanted & (local >= 0) & (local < kept.shape[0])
    return mine, local


def _read(kept: Array, row: Array, wanted: Array, block: Array | int) -> Array:
    """[K, ...] rows of an array that may be one device's block; zero where a row is not wanted or lies elsewhere."""
    mine, local = _own(kept, row, wanted, block)
    rows = kept[jnp.where(mine, local, 0)]
    return jnp.where(mine.reshape(-1, *(1 for _ in rows.shape[1:])), rows, 0)


def _write(kept: Array, row: Array, wanted: Array, rows: Array, block: Array | int) -> Array:
    # Padding may repeat a real client's id: what is not wanted must not land anywhere.
    """The array with [K, ...] rows put in; those that are not wanted, or of another device, change nothing."""
    mine, local = _own(kept, row, wanted, block)
    return kept.at[jnp.where(mine, local, kept.shape[0])].set(rows, mode="drop")


def file_store(folder: Path, packing: Packing) -> Store:
    """Rows in sparse files below ``folder``, see ``segments``; a client that never took part costs nothing.

    Args:
      folder: of the files, inside the run's.
      packing: every client's level and the sizes of levels.

    >>> import tempfile
    >>> store = file_store(Path(tempfile.mkdtemp()), Packing(np.zeros(1000, int), ([(2,)],)))
    >>> _ = store.init({"sum": jnp.zeros(2)}, 1000)
    >>> _ = store.scatter((), np.array([7]), np.array([True]), {"sum": np.ones((1, 2), np.float32)})
    >>> store.gather((), np.array([7, 8]))["sum"].tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    return _outside(folder, packing, in_memory=False)


def host_store(folder: Path, packing: Packing) -> Store:
    """Rows in host memory; what changed since the last checkpoint is written to ``folder`` with the next one.

    Only clients that took part take memory. Functions and errors are those of ``file_store``.

    Args:
      folder: of the files, inside the run's.
      packing: every client's level and the sizes of levels.

    >>> import tempfile
    >>> store = host_store(Path(tempfile.mkdtemp()), Packing(np.zeros(1000, int), ([(2,)],)))
    >>> _ = store.init({"sum": jnp.zeros(2)}, 1000)
    >>> _ = store.scatter((), np.array([7]), np.array([True]), {"sum": np.ones((1, 2), np.float32)})
    >>> store.on_host, store.gather((), np.array([7, 8]))["sum"].tolist()
    (True, [[1.0, 1.0], [0.0, 0.0]])
    """
    return _outside(folder, packing, in_memory=True)


def _window(extent: tuple[int, ...]) -> tuple[slice, ...]:
    """Slices that cut the leading corner of these extents.

    >>> _window((2, 3))
    (slice(0, 2, None), slice(0, 3, None))
    """
    return tuple(slice(0, n) for n in extent)


def _outside(folder: Path, packing: Packing, in_memory: bool) -> Store:
    """A store whose functions run on the host, outside of any program.

    Its ``init`` raises a ValueError for another number of clients, or for memory that is not float32.

    Args:
      in_memory: whether newest rows are kept in host memory; else they are read from the files each time.
    """
    kept: Line = {}

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

    return Store(init, gather, scatter, commit, restore, on_host=True, rows=packing.level.size)

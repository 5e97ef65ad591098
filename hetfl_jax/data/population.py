"""Building a ``Population``: everything is checked here, once, because JAX clamps bad gathers silently."""

from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Array, Population, PyTree, Views

_INT32 = np.iinfo(np.int32).max


def population(
    x: np.ndarray | Array,
    y: np.ndarray | Array,
    index: np.ndarray,
    size: np.ndarray,
    *,
    level: np.ndarray | None = None,
    levels: int = 1,
    classes: int | np.ndarray | None = None,
    view: np.ndarray | None = None,
    views: Views | tuple[()] = (),
) -> Population:
    """Put a partition on the device: one pool, a flat index and sizes; no loop over clients.

    Args:
      x: [M, ...] examples as they should be stored (images as uint8); a device array is shared, not copied.
      y: [M] integer labels in ``[0, classes)``, or float targets of a regression; [M, S] labels of sequences, -1 where
        there is none.
      index: [n] pool rows, client after client.
      size: [N] examples per client, each >= 1, summing to n.
      level: [N] capacity level of each client, default 0.
      levels: number of capacity levels.
      classes: number of classes (default: largest label + 1), or the [N, C] table of classes that each client holds
        (default: the labels among its examples).
      view, views: [N] which of the views each client has; see ``rotations`` and ``renamings``.

    Raises:
      ValueError: naming the client or value that is out of range.

    >>> pop = population(np.zeros((4, 2)), np.array([0, 1, 1, 0]), np.array([3, 1, 2]), np.array([1, 2]))
    >>> pop.offset.tolist(), pop.classes.tolist()
    ([0, 1], [[True, False], [False, True]])
    """
    index, size, stored, y = _array(index, "index"), _array(size, "sizes"), y, _array(y, "labels")
    x = x if hasattr(x, "ndim") else _array(x, "x")
    _check(x.ndim > 0 and y.ndim > 0, f"x of shape {x.shape}, labels of shape {y.shape}: need rows")
    _check(len(x) == len(y) >= 1, f"{len(x)} examples with {len(y)} labels: need as many, at least 1")
    _check(size.ndim == 1 and size.size >= 1, f"sizes of shape {size.shape}: need one per client")
    _check(index.ndim == 1, f"index of shape {index.shape}: need one axis, the rows client after client")
    for name, array in (("sizes", size), ("index", index)):
        _check(np.issubdtype(array.dtype, np.integer), f"{name} of dtype {array.dtype}: need whole numbers")
    empty = np.flatnonzero(size < 1)
    _check(not empty.size, lambda: f"{empty.size} clients hold no example (first: client {empty[0]}); need >= 1 each")
    total = int(size.sum(dtype=np.int64))
    _check(total == index.size, f"sizes sum to {total}, but the index has {index.size} entries")
    _check(max(total, len(x)) < _INT32, f"{max(total, len(x))} examples: at most {_INT32 - 1}")
    low, high = int(index.min()), int(index.max())
    _check(low >= 0 and high < len(x), f"index has rows {low}..{high}, allowed 0..{len(x) - 1}")
    numbers = np.issubdtype(y.dtype, np.floating)
    if numbers:
        _check(classes is None, f"labels of dtype {y.dtype}: need integers where there are classes")
        classes = np.ones((size.size, 1), bool)
    _check(numbers or np.issubdtype(y.dtype, np.integer), f"labels of dtype {y.dtype}: need integers or floats")
    _check_counts(levels, classes)
    table = np.asarray(classes) if np.ndim(classes) else None  # type: ignore[arg-type]
    count = table.shape[1] if table is not None else int(y.max()) + 1 if classes is None else int(classes)
    _check(
        numbers or (int(y.min()) >= (0 if y.ndim == 1 else -1) and int(y.max()) < count),
        f"labels {y.min()}..{y.max()}, allowed 0..{count - 1}",
    )
    level = np.zeros(size.size, np.int32) if level is None else _of_clients(level, "levels", size.size)
    bad = np.flatnonzero((level < 0) | (level >= levels))
    hint = f"; with several levels pass levels={level.max() + 1:.0f}" if levels == 1 and bad.size else ""
    _check(not bad.size, lambda: f"client {bad[0]} has level {level[bad[0]]}, allowed 0..{levels - 1}{hint}")
    held = held_classes(y[index], size, count) if table is None else table.astype(bool)
    _check(held.shape == (size.size, count), f"class table of shape {held.shape}, need {(size.size, count)}")
    if isinstance(views, Views):
        view = np.zeros(size.size, np.int32) if view is None else _of_clients(view, "views", size.size)
        most = views.pixels.shape[0] - 1
        _check(view.min() >= 0 and view.max() <= most, f"views {view.min()}..{view.max()}, allowed 0..{most}")
    else:
        _check(view is None, "clients have a view each, but there are no views")
    seen = jnp.asarray(view, jnp.int32) if view is not None else ()
    offset = np.cumsum(size, dtype=np.int64) - size
    rows, start, count_of, level_of = (stored_as(v, np.int32) for v in (index, offset, size, level))
    labels = stored_as(stored, np.float32 if numbers else np.int32)
    whole = Population(stored_as(x), labels, rows, start, count_of, level_of, stored_as(held), seen, views)
    return whole._replace(levels=((),) * int(levels))


def stored_as(array: Any, dtype: Any = None) -> jax.Array:
    """An array on the device, which ``jnp.asarray`` would do too, but by a program that it compiles for each new shape.

    Args:
      array: of the host, or of a device, where it stays if it has the dtype.
      dtype: of the result; by default the array's own, 64 bits become 32.

    >>> stored_as(np.zeros(3)).dtype, stored_as([1, 2], np.int32).tolist()
    (dtype('float32'), [1, 2])
    """
    there = isinstance(array, jax.Array) and (dtype is None or array.dtype == dtype)
    return array if there else jax.device_put(np.asarray(array, dtype))


def held_classes(labels: np.ndarray, size: np.ndarray, count: int) -> np.ndarray:
    """[N, C] bool: which labels occur among each client's consecutive examples, [n] or [n, S].

    Args:
      labels: client after client, -1 for none.
      size: [N] examples of each client.
      count: C.

    >>> held_classes(np.array([0, 2, 2]), np.array([1, 2]), 3).tolist()
    [[True, False, False], [False, False, True]]
    """
    held = np.zeros((size.size, count), bool)
    client = np.repeat(np.arange(size.size), size * (labels.size // max(len(labels), 1)))
    there = labels.ravel() >= 0
    held[client[there], labels.ravel()[there]] = True
    return held


def _array(value: object, name: str) -> np.ndarray:
    """As an array; rows of uneven length are refused with the array's name."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError):
        raise ValueError(f"{name} of uneven rows: need an array (data.population)") from None


def _of_clients(value: object, name: str, clients: int) -> np.ndarray:
    """[N] whole numbers, one a client; refused otherwise, with the array's name."""
    array = _array(value, name)
    _check(array.shape == (clients,), f"{array.size} {name} for {clients} clients")
    _check(array.dtype.kind in "biuf", f"{name} of dtype {array.dtype}: need whole numbers")
    _check(bool((array == np.floor(array)).all()), f"{name} that are not whole numbers")
    return array


def _check_counts(levels: Any, classes: Any) -> None:
    """Refuse a number of levels or classes below 1, and a class table that is not [N, C]."""
    _check(isinstance(levels, Integral) and int(levels) >= 1, f"levels {levels!r}: need a whole number >= 1")
    if np.ndim(classes):
        _check(np.ndim(classes) == 2, f"class table of shape {np.shape(classes)}: need [clients, classes]")
    elif classes is not None:
        _check(isinstance(classes, Integral) and int(classes) >= 1, f"classes {classes!r}: need a whole number >= 1")


def _check(fine: bool, message: object) -> None:
    if not fine:
        raise ValueError(f"{message() if callable(message) else message} (data.population)")


def batches(pop: Population, batch_size: int, order: np.ndarray | None = None) -> Population:
    """The same examples re-cut into consecutive batches, one "client" a batch, for passes over all data.

    With views, a batch has examples of clients that see alike, and as they do.

    Args:
      batch_size: examples; the last batch (of each view) may be shorter.
      order: [n] permutation of the index, default a fixed shuffle (sorted pools would give one-class batches).

    Returns:
      A population over the same pool, its clients all of level 0.

    >>> pop = population(np.zeros((5, 2)), np.arange(5), np.arange(5), np.array([5]))
    >>> batches(pop, 2).size.tolist()
    [2, 2, 1]
    """
    fine = isinstance(batch_size, Integral) and batch_size >= 1
    _check(fine, f"batch size {batch_size!r}: need a whole number >= 1")
    index = np.asarray(pop.rows)
    order = np.random.default_rng(0).permutation(index.size) if order is None else order
    view = np.zeros(index.size, int)
    if isinstance(pop.views, Views):
        view = np.repeat(np.asarray(pop.view), np.asarray(pop.size))[order]
        order = order[np.argsort(view, kind="stable")]
    kinds, counts = np.unique(view, return_counts=True)
    parts = [min(batch_size, count - start) for count in counts for start in range(0, count, batch_size)]
    kind = [k for k, count in zip(kinds, counts) for _ in range(0, count, batch_size)]
    sizes = np.asarray(parts, np.int32)
    return pop._replace(
        rows=stored_as(index[order]),
        offset=stored_as(np.cumsum(sizes) - sizes, np.int32),
        size=stored_as(sizes),
        level=stored_as(np.zeros(sizes.size), np.int32),
        view=jnp.asarray(kind, pop.view.dtype) if isinstance(pop.views, Views) else (),
        classes=stored_as(np.ones((sizes.size, pop.classes.shape[1]), bool)),
        devices=(),
    )


def joined(first: Population, second: Population) -> Population:
    """The clients of two populations over one pool, one after the other.

    >>> pop = population(np.zeros((4, 2)), np.array([0, 1, 1, 0]), np.array([3, 1, 2]), np.array([1, 2]))
    >>> joined(pop, pop).size.tolist(), joined(pop, pop).offset.tolist()
    ([1, 2, 1, 2], [0, 1, 3, 4])
    """
    first_row = np.int32(first.rows.shape[0])
    clients: list[PyTree] = [
        jax.tree.map(np.asarray, (pop.rows, np.asarray(pop.offset) + start, *pop[4:7], pop.view))
        for pop, start in ((first, np.int32(0)), (second, first_row))
    ]
    *rows, view = jax.tree.map(lambda *pair: stored_as(np.concatenate(pair)), *clients)
    return Population(first.x, first.y, *rows, view, first.views)  # type: ignore[call-arg]

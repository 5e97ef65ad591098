"""A family: one net at several capacity levels, the same module with smaller fields.

``family(module, levels, example)`` builds every level's shapes and compares them leaf by leaf with the full model;
``view`` is the model at one level, dense at its true shape or masked inside a larger one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.types import Array, Level, PyTree, Within
from hetfl_jax.models.adapter import Net, adapt
from hetfl_jax.models.windows import Family, Path, Prepare, Window, base_of, flat, index_of, mask, narrow, overlay


class View(NamedTuple):
    """A model at one level, dense or masked; a client written against it serves both."""

    apply: Callable[..., tuple[Array, PyTree]]  #: see ``apply_at``
    variables: PyTree
    active: Array  #: [E] bool, the exits that the level has
    cut: Callable[[PyTree], PyTree]  #: a full tree -> the level's (narrowed, or dead entries set to zero)
    put: Callable[[PyTree, PyTree], PyTree]  #: (full tree, the level's) -> the full tree with the window replaced


def _as_stored(x: Array, key: Array | None) -> Array:
    return x


def family(
    module: Any,
    levels: Sequence[Mapping[str, Any]],
    example: Any,
    prepare: Prepare = _as_stored,
    masked: bool = True,
) -> Family:
    """The capacity table of ``module`` at each of ``levels``.

    Args:
      module: a linen module; ``module.clone(**level)`` is the level's net. See ``models.adapter`` for its call.
      levels: fields of each level, the largest first, e.g. ``[dict(width=1.0), dict(width=0.5)]``.
      example: one stored batch (or its ShapeDtypeStruct), [B, ...].
      prepare: turns stored examples into the net's input; gets a key while training (augmentation), else ``None``.
      masked: ``False`` for a net that runs only at its true shape (it then refuses masked execution), as any does
        whose levels differ in depth but have no exits of their own.

    Raises:
      ValueError: a level that is not contained in level 0, or has another leaf rank.

    >>> from hetfl_jax.models import MLP
    >>> fam = family(MLP(hidden=(8,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 4)))
    >>> fam.windows["params", "dense_0", "kernel"].extents.tolist()
    [[4, 8], [4, 4]]
    """
    example = jax.eval_shape(lambda v: v, jax.tree.map(jnp.asarray, example)) if not _is_struct(example) else example
    modules = [module.clone(**fields) for fields in levels]
    nets = tuple(adapt(m) for m in modules)
    ready = jax.eval_shape(lambda v: prepare(v, None), example)

    def outline(net: Net) -> tuple[Any, PyTree]:
        return jax.eval_shape(net.outline, jax.random.key(0), ready)

    outputs, shapes = zip(*(outline(net) for net in nets))
    leaves = [flat(s) for s in shapes]
    more = {}
    if hasattr(modules[0], "classes"):
        more = flat(outline(adapt(modules[0].clone(classes=modules[0].classes + 1)))[1])
    windows = {path: _window(path, leaf, leaves, more.get(path)) for path, leaf in leaves[0].items()}
    names = dict.fromkeys(name for fields in levels for name in fields)
    table = {name: np.asarray([getattr(m, name) for m in modules]) for name in names}
    exits = np.asarray([logits.shape[0] for logits in outputs])
    one_head = len(set(table.get("depth", (0,)))) > 1 == len(set(exits))
    return Family(nets, table, shapes, windows, example, prepare, exits, masked and not one_head)


def collects_statistics(fam: Family) -> bool:
    """Whether batch statistics must be collected before evaluation (static batch norm): nothing is tracked."""
    ready = jax.eval_shape(lambda v: fam.prepare(v, None), fam.example)
    stats = jax.eval_shape(lambda v, x: fam.nets[0].apply(v, x, collect=True)[1], fam.shapes[0], ready)
    return bool(jax.tree.leaves(stats)) and "batch_stats" not in fam.shapes[0]


def init(fam: Family, key: Array) -> PyTree:
    """Start variables of the full model."""
    return fam.nets[0].init(key, fam.prepare(tree.zeros(fam.example), None))


def _is_struct(example: Any) -> bool:
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(example))


def _window(path: Path, leaf: Any, levels: list[dict[Path, Any]], wider: Any) -> Window:
    extents = []
    for level, leaves in enumerate(levels):
        shape = leaves[path].shape if path in leaves else (0,) * len(leaf.shape)
        if len(shape) != len(leaf.shape) or any(s > f for s, f in zip(shape, leaf.shape)):
            raise ValueError(
                f"level {level} has {'/'.join(path)} of shape {shape}, not inside {leaf.shape} (families.family)"
            )
        if extra := set(leaves) - set(levels[0]):
            raise ValueError(f"level {level} has {'/'.join(min(extra))}, which level 0 lacks (families.family)")
        extents.append(shape)
    grown = [] if wider is None else [i for i, (a, b) in enumerate(zip(leaf.shape, wider.shape)) if a != b]
    return Window(np.asarray(extents, np.int32).reshape(len(levels), len(leaf.shape)), grown[0] if grown else -1)


def view(fam: Family, variables: PyTree, level: Level) -> View:
    """The model at ``level``: dense at its true shape for an int, masked inside a larger shape for a ``Within``.

    Raises:
      ValueError: a masked level of a family that runs dense only.
    """
    base = base_of(level)

    def cut(values: PyTree) -> PyTree:
        small = narrow(fam, values, base)
        if not isinstance(level, Within):
            return small
        return jax.tree.map(lambda v, keep: jnp.where(keep, v, 0), small, mask(fam, level.level, small, base))

    def put(old: PyTree, new: PyTree) -> PyTree:
        if isinstance(level, Within):
            keep = mask(fam, level.level, new, base)
            new = jax.tree.map(jnp.where, keep, new, narrow(fam, old, base))
        return overlay(fam, old, new, base)

    active = jnp.arange(fam.exits[base]) < jnp.asarray(fam.exits)[index_of(level)]
    return View(apply_at(fam, level), cut(variables), active, cut, put)


def apply_at(fam: Family, level: Level) -> Callable[..., tuple[Array, PyTree]]:
    """``apply(variables, x, train=, valid=, key=, collect=)`` of a level's net on examples as stored.

    A masked level runs the net of its base, told the level's own fields.
    """
    net, capacity = fam.nets[base_of(level)], None
    if isinstance(level, Within):
        if not fam.masked:
            raise ValueError("this net runs only at its true shape: use executor bucketed or debugging (families.view)")
        numbers = {name: column for name, column in fam.fields.items() if column.dtype.kind in "biuf"}
        capacity = {name: jnp.asarray(column)[level.level] for name, column in numbers.items()}

    def apply(variables: PyTree, x: Array, *, key: Array | None = None, **options: Any) -> tuple[Array, PyTree]:
        augment, dropout = (None, None) if key is None else tuple(jax.random.split(key))
        return net.apply(variables, fam.prepare(x, augment), key=dropout, capacity=capacity, **options)

    return apply

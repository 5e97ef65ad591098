"""Windows: the parameters of a level are leading slices of the full ones.

The *window* of a leaf is its leading extents at each level, all zero where a level lacks the leaf (a depth cut).
Everything here is derived from that table: ``mask``, ``narrow``, ``widen``, ``overlay``, ``spread``.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Array, Level, PyTree, Within
from hetfl_jax.models.adapter import Net

Path = tuple[str, ...]
Prepare = Callable[[Array, Array | None], Array]


class Window(NamedTuple):
    """The part of one leaf that each level owns."""

    extents: np.ndarray  #: [L, ndim] leading extents, all zero where the level lacks the leaf
    class_axis: int  #: the axis that grows with the number of classes, -1 if none


class Family(NamedTuple):
    """One net at several capacity levels, level 0 the largest."""

    nets: tuple[Net, ...]  #: one a level
    fields: Mapping[str, np.ndarray]  #: [L] value of each module field that levels set
    shapes: tuple[PyTree, ...]  #: variables of each level as ShapeDtypeStruct
    windows: Mapping[Path, Window]
    example: PyTree  #: ShapeDtypeStruct of a batch of one, as stored
    prepare: Prepare  #: (x as stored, key or None) -> input of the net
    exits: np.ndarray  #: [L] number of exits of each level
    reach: Mapping[Path, np.ndarray]  #: [L, E] which exits each leaf takes part in; empty where nets have one exit
    masked: bool  #: whether masked execution gives the same answer as the dense net of a level

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.nets)


def _path(keys: tuple[PyTree, ...]) -> Path:
    return tuple(str(getattr(key, "key", key)) for key in keys)


def flat(values: PyTree) -> dict[Path, PyTree]:
    """Leaves by path.

    >>> flat({"params": {"head": {"bias": 1}}})
    {('params', 'head', 'bias'): 1}
    """
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(values)[0]}


def map_leaves(fn: Callable[[Path, PyTree], PyTree], values: PyTree) -> PyTree:
    """``fn(path, leaf)`` over a tree of variables, the path as strings: a key of ``Family.windows``.

    >>> map_leaves(lambda path, leaf: "/".join(path), {"params": {"head": {"bias": 1}}})
    {'params': {'head': {'bias': 'params/head/bias'}}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(_path(path), leaf), values)


def base_of(level: Level) -> int:
    """The static level whose shapes are used.

    >>> base_of(2), base_of(Within(0, jnp.int32(2)))
    (2, 0)
    """
    return level.base if isinstance(level, Within) else level


def index_of(level: Level) -> int | Array:
    """The level itself, as a number.

    >>> index_of(2), int(index_of(Within(0, jnp.int32(2))))
    (2, 2)
    """
    return level.level if isinstance(level, Within) else level


def mask(fam: Family, level: int | Array, like: PyTree, base: int = 0) -> PyTree:
    """Which entries of ``like`` (variables, or some of their collections) the level owns; bool, traced level allowed.

    ``like`` has the shapes of level ``base``. A leaf that the family does not know is owned whole.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> mask(fam, 1, fam.shapes[0])["params"]["dense_0"]["bias"].tolist()
    [True, True, False, False]
    """

    def leaf(path: Path, value: Array) -> Array:
        return mask_leaf(fam, path, level, base) if path in fam.windows else jnp.ones(jnp.shape(value), bool)

    return map_leaves(leaf, like)


def masked_by(fam: Family, level: Within, values: PyTree) -> PyTree:
    """``values``, of the shapes of the level's base, with zeros outside the level's window.

    Args:
      fam: of the model.
      level: a traced level inside a static one.
      values: variables, or some of their collections.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> ones = jax.tree.map(lambda s: jnp.ones(s.shape), fam.shapes[0])
    >>> masked_by(fam, Within(0, jnp.int32(1)), ones)["params"]["dense_0"]["bias"].tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    return jax.tree.map(lambda v, keep: jnp.where(keep, v, 0), values, mask(fam, level.level, values, level.base))


def mask_leaf(fam: Family, path: Path, level: int | Array, base: int = 0) -> Array:
    """``mask`` of one leaf, of the shape that level ``base`` gives it.

    Args:
      fam: of the model.
      path: of the leaf, a key of ``fam.windows``.
      level: may be traced.
      base: a static level that holds it.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> mask_leaf(fam, ("params", "dense_0", "bias"), 1).tolist()
    [True, True, False, False]
    """
    extents = fam.windows[path].extents
    inside = jnp.ones(tuple(extents[base]), bool)
    for axis in range(extents.shape[1]):
        if (extents[:, axis] < extents[base, axis]).any():
            inside &= jax.lax.broadcasted_iota(jnp.int32, inside.shape, axis) < jnp.asarray(extents[:, axis])[level]
    return inside


def narrow(fam: Family, values: PyTree, level: int) -> PyTree:
    """The level's own tree: the leading slice of each leaf it has; what the family does not know stays whole.

    ``values`` may be of any level that holds this one, and lack some leaves.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> full = families.init(fam, jax.random.key(0))
    >>> small = narrow(fam, {**full, "rounds": jnp.int32(3)}, 1)
    >>> small["params"]["dense_0"]["kernel"].shape, int(small["rounds"])
    ((3, 2), 3)
    """
    if not isinstance(values, Mapping):
        return values
    leaves = flat(values)

    def leaf(path: Path, shape: PyTree) -> Array:
        return leaves[path][tuple(slice(0, int(extent)) for extent in shape.shape)]

    known = map_leaves(leaf, _there(fam.shapes[level], values))
    return {
        name: known.get(name, value) for name, value in values.items() if name in known or name not in fam.shapes[0]
    }


def _there(shapes: PyTree, values: PyTree) -> PyTree:
    """The part of a tree of mappings whose names ``values`` has too."""
    if not isinstance(shapes, Mapping):
        return shapes
    return {name: _there(shape, values[name]) for name, shape in shapes.items() if name in values}


def widen(fam: Family, values: PyTree, level: int) -> PyTree:
    """The inverse of ``narrow``: zero outside the window.

    Args:
      fam: of the model.
      values: a tree of the level's shapes; what the family does not know stays as it is.
      level: whose shapes these are.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> small = jax.tree.map(lambda s: jnp.ones(s.shape), fam.shapes[1])
    >>> widen(fam, small, 1)["params"]["dense_0"]["bias"].tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    leaves = flat(values)

    def leaf(path: Path, shape: PyTree) -> Array:
        if path not in leaves:
            return jnp.zeros(shape.shape, shape.dtype)
        value = leaves[path]
        return jnp.pad(value, [(0, full - own) for full, own in zip(shape.shape, value.shape)])

    known = map_leaves(leaf, {name: fam.shapes[0][name] for name in values if name in fam.shapes[0]})
    return {name: known.get(name, value) for name, value in values.items()}


def overlay(fam: Family, old: PyTree, new: PyTree, level: int) -> PyTree:
    """``old`` with the level's window replaced by ``new``; entries outside it survive.

    Args:
      fam: of the model.
      old: a tree of full shape.
      new: a tree of the level's shapes; leaves that it lacks stay.
      level: whose shapes these are.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), fam.shapes[0])
    >>> ones = jax.tree.map(lambda s: jnp.ones(s.shape), fam.shapes[1])
    >>> overlay(fam, zeros, ones, 1)["params"]["dense_0"]["bias"].tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    leaves = flat(new)

    def leaf(path: Path, value: Array) -> Array:
        if path not in leaves:
            return value
        return value.at[tuple(slice(0, extent) for extent in leaves[path].shape)].set(leaves[path])

    return map_leaves(leaf, old)


def add_inside(fam: Family, total: PyTree, part: PyTree, level: int) -> PyTree:
    """``total + widen(part, level)``, touching only the level's window.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> ones = lambda level: jax.tree.map(lambda s: jnp.ones(s.shape), fam.shapes[level])
    >>> add_inside(fam, ones(0), ones(1), 1)["params"]["dense_0"]["bias"].tolist()
    [2.0, 2.0, 1.0, 1.0]
    """
    leaves = flat(part)

    def leaf(path: Path, value: Array) -> Array:
        if path not in leaves:
            return value
        own = leaves[path]
        window = jax.lax.slice(value, (0,) * own.ndim, own.shape)
        return jax.lax.dynamic_update_slice(value, window + own, (0,) * own.ndim)

    return map_leaves(leaf, total)


def spread(fam: Family, path: Path, weights: Array, along: Array | None = None) -> Array:
    """``sum_l weights[l] * [entry inside the window of level l]`` for every entry of a leaf.

    A window is a box at the origin, so this is one small product of indicators along the axes, not a mask a level.

    Args:
      weights: [L] float.
      along: [L, C] float instead of ``weights`` for entries along the leaf's class axis.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> spread(fam, ("params", "dense_0", "bias"), jnp.array([2.0, 5.0])).tolist()
    [7.0, 7.0, 2.0, 2.0]
    """
    window = fam.windows[path]
    shape = tuple(int(n) for n in window.extents[0])
    absent = (window.extents == 0).any(1) & (window.extents[0] > 0).all()
    factor = jnp.where(jnp.asarray(absent), 0, weights)
    letters = "abcdefgh"[: len(shape)]
    terms, operands = ["l"], [factor]
    for axis, full in enumerate(shape):
        if axis == window.class_axis and along is not None:
            terms[0], operands[0] = "l", jnp.where(jnp.asarray(absent), 0, jnp.ones_like(weights))
            terms.append(f"l{letters[axis]}")
            operands.append(along)
        elif (window.extents[:, axis] != full).any():
            terms.append(f"l{letters[axis]}")
            inside = np.arange(full) < window.extents[:, axis, None]
            operands.append(jnp.asarray(inside, weights.dtype))
    kept = "".join(term[1] for term in terms[1:])
    product = jnp.einsum(f"{','.join(terms)}->{kept}", *operands, precision=jax.lax.Precision.HIGHEST)
    return jnp.broadcast_to(
        jax.lax.expand_dims(product, [a for a, letter in enumerate(letters) if letter not in kept]), shape
    )


def memory_extents(fam: Family, memory: PyTree) -> tuple[list[tuple[int, ...]], ...]:
    """For each level, the leading extents of every leaf of a client memory ``{name: {"params": tree}}``.

    A leaf that the family does not know has its own shape at every level.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> [extents[0] for extents in memory_extents(fam, {"sum": {"params": fam.shapes[0]["params"]}})]
    [(4,), (2,)]
    """

    def extents(level: int, path: Path, leaf: PyTree) -> tuple[int, ...]:
        known = fam.windows.get(path[1:])
        return tuple(leaf.shape) if known is None else tuple(map(int, known.extents[level]))

    return tuple([extents(level, *item) for item in flat(memory).items()] for level in range(fam.levels))

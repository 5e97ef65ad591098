"""Capacity: a level is the same module with smaller fields, and its parameters are leading slices of the full ones.

``family(module, levels, example)`` builds every level's shapes and compares them leaf by leaf with the full model:
the *window* of a leaf is its leading extents, all zero where a level lacks the leaf (a depth cut). Everything else
here is derived from that table: ``mask``, ``narrow``, ``widen``, ``overlay``, ``view`` and ``costs``.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax import tree
from hetfl_jax.models.adapter import Net, adapt
from hetfl_jax.types import Array, Level, PyTree, Within

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
    masked: bool  #: whether masked execution gives the same answer as the dense net of a level

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.nets)


class Costs(NamedTuple):
    """What a level costs."""

    parameters: np.ndarray  #: [L] trainable entries
    bytes: np.ndarray  #: [L] bytes of all variables: what travels one way
    macs: np.ndarray  #: [L] multiply-adds of one example's forward pass (convolutions and matrix products)
    first_macs: np.ndarray  #: [L] those of the first layer, whose input needs no gradient


class View(NamedTuple):
    """A model at one level, dense or masked; a client written against it serves both."""

    apply: Callable[..., tuple[Array, PyTree]]  #: see ``apply_at``
    variables: PyTree
    active: Array  #: [E] bool, the exits that the level has
    cut: Callable[[PyTree], PyTree]  #: a full tree -> the level's (narrowed, or dead entries set to zero)
    put: Callable[[PyTree, PyTree], PyTree]  #: (full tree, the level's) -> the full tree with the window replaced


def _path(keys: tuple[Any, ...]) -> Path:
    return tuple(str(getattr(key, "key", key)) for key in keys)


def flat(values: PyTree) -> dict[Path, Any]:
    """Leaves by path."""
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(values)[0]}


def map_leaves(fn: Callable[[Path, Any], Any], values: PyTree) -> PyTree:
    """``fn(path, leaf)`` over a tree of variables, the path as strings: a key of ``Family.windows``."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(_path(path), leaf), values)


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


def memory_extents(fam: Family, memory: PyTree) -> tuple[list[tuple[int, ...]], ...]:
    """For each level, the leading extents of every leaf of a client memory ``{name: {"params": tree}}``."""
    parts = [flat(memory[name]) for name in sorted(memory)]
    return tuple(
        [tuple(map(int, fam.windows[path].extents[level])) for part in parts for path in part]
        for level in range(fam.levels)
    )


def _is_struct(example: Any) -> bool:
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(example))


def _window(path: Path, leaf: Any, levels: list[dict[Path, Any]], wider: Any) -> Window:
    extents = []
    for level, leaves in enumerate(levels):
        shape = leaves[path].shape if path in leaves else (0,) * len(leaf.shape)
        if len(shape) != len(leaf.shape) or any(s > f for s, f in zip(shape, leaf.shape)):
            raise ValueError(
                f"level {level} has {'/'.join(path)} of shape {shape}, not inside {leaf.shape} (capacity.family)"
            )
        if extra := set(leaves) - set(levels[0]):
            raise ValueError(f"level {level} has {'/'.join(min(extra))}, which level 0 lacks (capacity.family)")
        extents.append(shape)
    grown = [] if wider is None else [i for i, (a, b) in enumerate(zip(leaf.shape, wider.shape)) if a != b]
    return Window(np.asarray(extents, np.int32).reshape(len(levels), len(leaf.shape)), grown[0] if grown else -1)


def base_of(level: Level) -> int:
    """The static level whose shapes are used."""
    return level.base if isinstance(level, Within) else level


def index_of(level: Level) -> int | Array:
    """The level itself, as a number."""
    return level.level if isinstance(level, Within) else level


def mask(fam: Family, level: int | Array, like: PyTree, base: int = 0) -> PyTree:
    """Which entries of ``like`` (variables, or some of their collections) the level owns; bool, traced level allowed.

    ``like`` has the shapes of level ``base``.

    >>> from hetfl_jax.models import MLP
    >>> fam = family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> mask(fam, 1, fam.shapes[0])["params"]["dense_0"]["bias"].tolist()
    [True, True, False, False]
    """

    return map_leaves(lambda path, value: mask_leaf(fam, path, level, base), like)


def mask_leaf(fam: Family, path: Path, level: int | Array, base: int = 0) -> Array:
    """``mask`` of one leaf, of the shape that level ``base`` gives it."""
    extents = fam.windows[path].extents
    inside = jnp.ones(tuple(extents[base]), bool)
    for axis in range(extents.shape[1]):
        if (extents[:, axis] < extents[base, axis]).any():
            inside &= jax.lax.broadcasted_iota(jnp.int32, inside.shape, axis) < jnp.asarray(extents[:, axis])[level]
    return inside


def narrow(fam: Family, values: PyTree, level: int) -> PyTree:
    """The level's own tree: the leading slice of each leaf it has.

    >>> from hetfl_jax.models import MLP
    >>> fam = family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> narrow(fam, tree.zeros(fam.shapes[0]), 1)["params"]["dense_0"]["kernel"].shape
    (3, 2)
    """
    leaves = flat(values)

    def leaf(path: Path, shape: Any) -> Array:
        return leaves[path][tuple(slice(0, int(extent)) for extent in shape.shape)]

    return map_leaves(leaf, {name: fam.shapes[level][name] for name in values if name in fam.shapes[level]})


def widen(fam: Family, values: PyTree, level: int) -> PyTree:
    """The inverse of ``narrow``: zero outside the window."""
    leaves = flat(values)

    def leaf(path: Path, shape: Any) -> Array:
        if path not in leaves:
            return jnp.zeros(shape.shape, shape.dtype)
        value = leaves[path]
        return jnp.pad(value, [(0, full - own) for full, own in zip(shape.shape, value.shape)])

    return map_leaves(leaf, {name: fam.shapes[0][name] for name in values})


def overlay(fam: Family, old: PyTree, new: PyTree, level: int) -> PyTree:
    """``old`` with the level's window replaced by ``new``; entries outside it survive."""
    leaves = flat(new)

    def leaf(path: Path, value: Array) -> Array:
        if path not in leaves:
            return value
        return value.at[tuple(slice(0, extent) for extent in leaves[path].shape)].set(leaves[path])

    return map_leaves(leaf, old)


def add_inside(fam: Family, total: PyTree, part: PyTree, level: int) -> PyTree:
    """``total + widen(part, level)``, touching only the level's window.

    >>> from hetfl_jax.models import MLP
    >>> fam = family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
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
            raise ValueError("this net runs only at its true shape: use executor bucketed or debugging (capacity.view)")
        numbers = {name: column for name, column in fam.fields.items() if column.dtype.kind in "biuf"}
        capacity = {name: jnp.asarray(column)[level.level] for name, column in numbers.items()}

    def apply(variables: PyTree, x: Array, *, key: Array | None = None, **options: Any) -> tuple[Array, PyTree]:
        augment, dropout = (None, None) if key is None else tuple(jax.random.split(key))
        return net.apply(variables, fam.prepare(x, augment), key=dropout, capacity=capacity, **options)

    return apply


def costs(fam: Family) -> Costs:
    """Parameters, bytes one way, and forward multiply-adds per example, of every level.

    >>> from hetfl_jax.models import MLP
    >>> fam = family(MLP(), [dict(width=1.0)], jnp.zeros((1, 784)))
    >>> costs(fam).parameters.tolist(), costs(fam).macs.tolist()
    ([159010], [158800])
    """
    ready = jax.eval_shape(lambda v: fam.prepare(v, None), fam.example)
    batch = jax.tree.leaves(fam.example)[0].shape[0]

    def macs(net: Net, shapes: PyTree) -> list[int]:
        return [n // batch for n in products(jax.make_jaxpr(lambda v, x: net.counted(v, x))(shapes, ready).jaxpr)]

    layers = [macs(net, s) for net, s in zip(fam.nets, fam.shapes)]
    return Costs(
        np.asarray([sum(leaf.size for leaf in jax.tree.leaves(s["params"])) for s in fam.shapes], np.int64),
        np.asarray([tree.nbytes(s) for s in fam.shapes], np.int64),
        np.asarray([sum(each) for each in layers], np.int64),
        np.asarray([each[0] if each else 0 for each in layers], np.int64),
    )


def products(jaxpr: Any) -> Iterator[int]:
    """Multiply-adds of each convolution and matrix product, in the order of the program."""
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval
        if equation.primitive.name == "dot_general":
            contract = equation.params["dimension_numbers"][0][0]
            yield out.size * math.prod(equation.invars[0].aval.shape[a] for a in contract)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            yield out.size * math.prod(kernel) // out_channels
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)

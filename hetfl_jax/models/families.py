"""A family: one net at several capacity levels, the same module with smaller fields.

``family(module, levels, example)`` builds every level's shapes and compares them leaf by leaf with the full model;
``view`` is the model at one level, dense at its true shape or masked inside a larger one.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from hetfl_jax.core import jaxprs, tree
from hetfl_jax.core.random import draw
from hetfl_jax.core.types import Arguments, Array, Level, PyTree, Within
from hetfl_jax.models.adapter import Net, adapt
from hetfl_jax.models.precision import in_precision
from hetfl_jax.models.windows import Family, Path, Prepare, Window, base_of, flat, mask, masked_by, narrow, overlay


class View(NamedTuple):
    """A model at one level, dense or masked; a client written against it serves both."""

    #: see ``forward_at``: (variables, x prepared, level=None, stats=None, ...) -> (exits, active, stats)
    forward: Callable[..., tuple[Array, Array | np.ndarray, PyTree]]
    inside: Callable[..., tuple[Array, PyTree, PyTree]]  #: see ``inside_at``
    apply: Callable[..., tuple[Array, PyTree]]  #: see ``apply_at``
    variables: PyTree
    active: Array | np.ndarray  #: [E] bool, the exits that the level has; a plain NumPy array where it is dense
    cut: Callable[[PyTree], PyTree]  #: a full tree -> the level's (narrowed, or dead entries set to zero)
    put: Callable[[PyTree, PyTree], PyTree]  #: (full tree, the level's) -> the full tree with the window replaced


class Forward(NamedTuple):
    """The net of a view on given variables: what an objective runs, once or several times, also at smaller levels.

    ``forward(x)`` is the net at the view's level, ``forward(x, level=2)`` a smaller one inside it; see ``forward_at``.
    """

    view: View
    variables: PyTree
    options: Arguments  #: train, valid, key

    def __call__(self, x: Array, **more: PyTree) -> tuple[Array, Array | np.ndarray, PyTree]:
        """See ``forward_at``."""
        return self.view.forward(self.variables, x, **{**self.options, **more})

    def inside(
        self, x: Array, number: Array, value: Callable[..., tuple[Array, PyTree]], *operands: PyTree, **more: PyTree
    ) -> tuple[Array, PyTree, PyTree]:
        """See ``inside_at``."""
        return self.view.inside(self.variables, x, number, value, *operands, **{**self.options, **more})


def _as_stored(x: Array, key: Array | None) -> Array:
    """Examples as they are stored."""
    return x


def family(
    module: Any,
    levels: Sequence[Arguments],
    example: PyTree,
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

    def outline(net: Net) -> tuple[PyTree, PyTree]:
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
    reach = {} if exits.max() == 1 else _reach(nets, shapes, ready, exits)
    one_head = len(set(table.get("depth", (0,)))) > 1 == len(set(exits))
    return Family(nets, table, shapes, windows, example, prepare, exits, reach, masked and not one_head)


def checked(fam: Family, tolerance: float = 1e-4) -> Family:
    """``fam`` that runs dense only, with a warning, if its net masked inside level 0 differs from itself at true shape.

    A net of the user's is compared once, at every level, on random variables and input: some norms and attentions mix
    channels that are in use with those that are not.

    Args:
      tolerance: largest difference of outputs that is still rounding, as a share of the largest output.

    >>> import flax.linen as nn
    >>> class Grouped(nn.Module):
    ...     width: float = 1.0
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(2)(nn.GroupNorm(2)(nn.Dense(int(8 * self.width))(x)))
    >>> with warnings.catch_warnings(record=True, action="always") as said:
    ...     fam = checked(family(Grouped(), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3))))
    >>> fam.masked, len(said)
    (False, 1)
    """
    if not fam.masked:
        return fam
    ready = jax.eval_shape(lambda v: fam.prepare(v, None), fam.example)
    keys = iter(jax.random.split(jax.random.key(0), 1 + len(jax.tree.leaves(fam.shapes[0]))))
    floats = jnp.issubdtype(ready.dtype, jnp.floating)
    shape = (3, *ready.shape[1:])
    x = draw(jax.random.normal, next(keys), shape) if floats else jnp.zeros(shape, ready.dtype)
    variables = jax.tree.map(lambda s: jnp.abs(0.5 * draw(jax.random.normal, next(keys), s.shape)), fam.shapes[0])

    def logits(level: Level) -> Array:
        model = view(fam, variables, level)
        exits, active, _ = model.forward(model.variables, x)
        return exits[jnp.maximum(jnp.asarray(active).sum() - 1, 0)]

    for level in range(fam.levels):
        dense, masked = logits(level), logits(Within(0, jnp.int32(level)))
        apart = float(jnp.abs(dense - masked).max() / jnp.maximum(jnp.abs(dense).max(), 1e-6))
        if not apart <= tolerance:
            warnings.warn(
                f"net {type(fam.nets[0].module).__name__}: level {level} masked inside level 0 differs from itself at "
                f"its true shape by {apart:.2g} of its outputs, so levels run at their true shapes only (family.net)",
                stacklevel=2,
            )
            return fam._replace(masked=False)
    return fam


def computing_in(precision: str, fam: Family) -> Family:
    """``fam`` whose nets compute in ``precision``, see ``precision.in_precision``.

    >>> from hetfl_jax.models import MLP
    >>> fam = computing_in("bfloat16", family(MLP(hidden=(4,)), [{}], jnp.zeros((1, 3))))
    >>> view(fam, init(fam, jax.random.key(0)), 0).apply(init(fam, jax.random.key(0)), jnp.ones((1, 3)))[0].dtype
    dtype('float32')
    """
    return fam._replace(nets=tuple(in_precision(net, precision) for net in fam.nets))


def collects_statistics(fam: Family) -> bool:
    """Whether batch statistics must be collected before evaluation (static batch norm): nothing is tracked."""
    ready = jax.eval_shape(lambda v: fam.prepare(v, None), fam.example)
    stats = jax.eval_shape(fam.nets[0].statistics, fam.shapes[0], ready)
    return bool(jax.tree.leaves(stats)) and "batch_stats" not in fam.shapes[0]


def init(fam: Family, key: Array) -> PyTree:
    """Start variables of the full model.

    Args:
      fam: of the model.
      key: of the run.

    >>> from hetfl_jax.models import MLP
    >>> fam = family(MLP(hidden=(4,)), [{}], jnp.zeros((1, 3)))
    >>> init(fam, jax.random.key(0))["params"]["dense_0"]["kernel"].shape
    (3, 4)
    """
    return fam.nets[0].init(key, fam.prepare(tree.zeros(fam.example), None))


def _is_struct(example: PyTree) -> bool:
    """Whether an example is given by its shape alone."""
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(example))


def _window(path: Path, leaf: PyTree, levels: list[dict[Path, PyTree]], wider: PyTree) -> Window:
    """The window of one leaf: its extents at every level, and which axis grows with the number of classes."""
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


def _reach(nets: Sequence[Net], shapes: Sequence[PyTree], x: PyTree, exits: np.ndarray) -> dict[Path, np.ndarray]:
    """[L, E] which exits each leaf takes part in, from the program of every level's net."""
    found = {path: np.zeros((len(nets), int(exits.max())), bool) for path in flat(shapes[0])}
    for level, (net, shape) in enumerate(zip(nets, shapes)):
        used = jaxprs.used_inputs(net.each_exit, shape, x)
        for exit, of_exit in enumerate(used):
            for path, takes_part in flat(of_exit[0]).items():
                found[path][level, exit] = takes_part
    return found


def trained(fam: Family, path: Path, all_exits: bool) -> np.ndarray:
    """[L] whether clients of a level train a leaf: it takes part in all their exits' loss, or in their deepest one's.

    >>> from hetfl_jax.models import MLP
    >>> fam = family(MLP(hidden=(4, 4)), [dict(depth=2), dict(depth=1)], jnp.zeros((1, 3)))
    >>> trained(fam, ("params", "head_0", "bias"), False).tolist()
    [False, True]
    """
    held = np.asarray((fam.windows[path].extents > 0).all(1))
    if path not in fam.reach:
        return held
    reach = fam.reach[path]
    return np.asarray(reach.any(1) if all_exits else reach[np.arange(fam.levels), fam.exits - 1])


def active_exits(fam: Family, level: Level) -> Array | np.ndarray:
    """[E] bool, which exits of a level's base the level has; a plain NumPy array where it is dense.

    >>> from hetfl_jax.models import MLP
    >>> fam = family(MLP(hidden=(4, 4)), [dict(depth=2), dict(depth=1)], jnp.zeros((1, 3)))
    >>> active_exits(fam, 1).tolist(), active_exits(fam, Within(0, jnp.int32(1))).tolist()
    ([True], [True, False])
    """
    number = np.arange(fam.exits[base_of(level)])
    return jnp.asarray(number) < jnp.asarray(fam.exits)[level.level] if isinstance(level, Within) else number >= 0


def view(fam: Family, variables: PyTree, level: Level) -> View:
    """The model at ``level``: dense at its true shape for an int, masked inside a larger shape for a ``Within``.

    ``cut`` and ``put`` serve any tree of collections; what the family does not know (a counter, a vector of thresholds)
    is kept whole.

    Raises:
      ValueError: a masked level of a family that runs dense only.

    >>> from hetfl_jax.models import MLP
    >>> fam = family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> small = view(fam, init(fam, jax.random.key(0)), 1)
    >>> small.variables["params"]["dense_0"]["kernel"].shape, small.apply(small.variables, jnp.zeros((5, 3)))[0].shape
    ((3, 2), (1, 5, 10))
    """
    base = base_of(level)

    def cut(values: PyTree) -> PyTree:
        small = narrow(fam, values, base)
        return masked_by(fam, level, small) if isinstance(level, Within) else small

    def put(old: PyTree, new: PyTree) -> PyTree:
        if isinstance(level, Within):
            inside = narrow(fam, old, base)
            new = jax.tree.map(jnp.where, mask(fam, level.level, new, base), new, inside)
        return overlay(fam, old, new, base)

    forward, inside = forward_at(fam, level), inside_at(fam, level)
    return View(forward, inside, apply_at(fam, level), cut(variables), active_exits(fam, level), cut, put)


def forward_at(fam: Family, level: Level) -> Callable[..., tuple[Array, Array | np.ndarray, PyTree]]:
    """``forward(variables, x, level=None, stats=None, keep=None, train=, valid=, key=, collect=)`` of a level's net.

    ``x`` is prepared. A masked level runs the net of its base, told the level's own fields. ``level`` runs a smaller
    level inside this one, on its part of the variables: a number at its true shape, a traced one, or any inside a
    masked level, masked. ``stats`` stand in for the statistics in ``variables``. With ``keep``, a width, only as many
    units of each layer stay as it has at that width, drawn by ``key``. ``noise`` is the share of the noise branch of
    norms that have one.

    >>> from hetfl_jax.models import MLP
    >>> fam = family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> forward_at(fam, 0)(init(fam, jax.random.key(0)), jnp.ones((5, 3)), level=1)[0].shape  # [E, B, C]
    (1, 5, 10)
    """

    def forward(
        variables: PyTree, x: Array, *, level: int | Array | None = None, stats: PyTree = None,
        keep: Array | None = None, noise: Array | float | None = None, **options: PyTree,
    ) -> tuple[Array, Array | np.ndarray, PyTree]:  # fmt: skip
        if stats is not None:
            variables = {**variables, "batch_stats": stats}
        where: Level = outer
        if isinstance(level, int) and isinstance(outer, int):
            where = level
            variables = narrow(fam, variables, level)
        elif level is not None:
            where = Within(base_of(outer), jnp.asarray(level, jnp.int32))
            variables = masked_by(fam, where, variables)
        exits, stats = _call(fam, where, keep=keep, noise=noise)(variables, x, **options)
        return exits, active_exits(fam, where), stats

    outer = level
    _call(fam, outer)  # refuses what cannot run
    return forward


def inside_at(fam: Family, level: Level) -> Callable[..., tuple[Array, PyTree, PyTree]]:
    """``inside(variables, x, number, value, *operands, stats=, ...)``: a loss of a smaller, traced level in this one.

    ``value(exits, active, *operands) -> (loss, aux)`` reads nothing traced but its arguments. Returns the loss, aux and
    the statistics, ``{}`` or of this level's shapes; other options as ``forward_at``. One client at a time, the level
    runs at its true shape, by a switch; under vmap it runs masked, since there a switch would run every level.

    The loss has a gradient by ``variables["params"]`` alone, made where the loss is: the derivative of a switch would
    fill in zeros for what the other levels' derivatives need.
    """
    base = base_of(level)
    forward = forward_at(fam, base)

    def inside(
        variables: PyTree, x: Array, number: Array, value: Callable[..., tuple[Array, PyTree]], *operands: PyTree,
        stats: PyTree = None, train: bool = False, **options: PyTree,
    ) -> tuple[Array, PyTree, PyTree]:  # fmt: skip
        rest = {name: part for name, part in variables.items() if name != "params"}
        if stats is not None and "batch_stats" in rest:
            rest["batch_stats"] = stats

        def at(where: int | Array, params: PyTree, given: PyTree) -> tuple[tuple[Array, PyTree], PyTree]:
            rest, x, operands, options = given

            def loss(params: PyTree) -> tuple[Array, PyTree]:
                exits, active, after = forward({**rest, "params": params}, x, level=where, train=train, **options)
                out, aux = value(exits, active, *operands)
                return out, (aux, _put_back(fam, rest.get("batch_stats", {}), after, where, base))

            return jax.value_and_grad(loss, has_aux=True)(params)

        @custom_vmap
        def run(number: Array, params: PyTree, given: PyTree) -> tuple[tuple[Array, PyTree], PyTree]:
            branches = [partial(at, where) for where in range(base, fam.levels)]
            return jax.lax.switch(number - base, branches, params, given)

        @run.def_vmap
        def _(size: int, mapped: PyTree, *args: PyTree) -> tuple[PyTree, PyTree]:
            out = jax.vmap(at, jax.tree.map(lambda m: 0 if m else None, mapped), axis_size=size)(*args)
            return out, jax.tree.map(lambda _: True, out)

        @jax.custom_vjp
        def valued(params: PyTree, number: Array, given: PyTree) -> tuple[Array, PyTree]:
            return run(number, params, given)[0]

        def backward(gradient: PyTree, of: tuple[Array, PyTree]) -> tuple[PyTree, None, None]:
            return jax.tree.map(lambda g: of[0] * g, gradient), None, None

        valued.defvjp(lambda params, number, given: run(number, params, given), backward)
        out, (aux, after) = valued(variables["params"], number, (rest, x, operands, options))
        return out, aux, after

    return inside


def _put_back(fam: Family, before: PyTree, after: PyTree, level: int | Array, base: int) -> PyTree:
    """Statistics of the base's shapes, after a smaller level inside it ran at its own shape, or masked."""
    if not before:
        return {}
    old, new = {"batch_stats": before}, {"batch_stats": after}
    if isinstance(level, int):
        return overlay(fam, old, new, level)["batch_stats"]
    return jax.tree.map(jnp.where, mask(fam, level, old, base), new, old)["batch_stats"]


def _call(fam: Family, level: Level, **traced: Array | float | None) -> Callable[..., tuple[Array, PyTree]]:
    net, capacity = fam.nets[base_of(level)], {name: value for name, value in traced.items() if value is not None}
    if isinstance(level, Within):
        if not fam.masked:
            raise ValueError("this net runs only at its true shape: use executor bucketed or debugging (families.view)")
        numbers = {name: column for name, column in fam.fields.items() if column.dtype.kind in "biuf"}
        capacity |= {name: jnp.asarray(column)[level.level] for name, column in numbers.items()}
    return partial(net.apply, capacity=capacity) if capacity else net.apply


def apply_at(fam: Family, level: Level) -> Callable[..., tuple[Array, PyTree]]:
    """``apply(variables, x, train=, valid=, key=, collect=)`` of a level's net on examples as stored."""
    call = _call(fam, level)

    def apply(variables: PyTree, x: Array, *, key: Array | None = None, **options: PyTree) -> tuple[Array, PyTree]:
        augment, dropout = (None, None) if key is None else tuple(jax.random.split(key))
        return call(variables, fam.prepare(x, augment), key=dropout, **options)

    return apply

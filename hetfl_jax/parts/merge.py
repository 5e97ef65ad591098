"""How replies become one mean: ``lift`` one reply, add, ``settle`` once.

A merge is a monoid of (delta, count per level, rows per level and class). Counts are per level, never per entry and
client: ``settle`` expands them to leaves.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Array, ClientContext, PyTree
from hetfl_jax.models import families, windows
from hetfl_jax.models.classes import with_class_axes
from hetfl_jax.models.windows import Family


class Total(NamedTuple):
    """What is summed over clients."""

    delta: PyTree  #: weighted change of the variables, narrow until the engine widens it
    weight: Array  #: [L] of the replies of each level, added up
    rows: Array  #: [L, C] the same, split by the classes that the clients hold
    extra: PyTree = ()  #: plain sum of what a drift sends besides the model, of the same form as ``delta``


class Weights(NamedTuple):
    """How much a reply counts."""

    #: (context, delta) -> (what multiplies the change, what is added to the denominator), float32 scalars
    of: Callable[[ClientContext, PyTree], tuple[Array, Array]]
    asks_received: bool = False  #: whether it reads ``context.received``


class Merge(NamedTuple):
    """A rule for aggregation."""

    lift: Callable[[PyTree, ClientContext], Total]
    settle: Callable[[Total], tuple[PyTree, PyTree]]  #: total -> (mean delta, coverage), both of full shape
    asks_received: bool = False


def _same(weight: Array) -> tuple[Array, Array]:
    return weight, weight


def share_of(context: ClientContext, own: Array) -> Array:
    """How much a reply counts as the selection says, or ``own`` where it leaves that to the method.

    Args:
      context: of the client.
      own: float32 scalar, e.g. its number of examples.

    >>> from types import SimpleNamespace
    >>> [float(share_of(SimpleNamespace(share=share), jnp.float32(7))) for share in ((), jnp.float32(2))]
    [7.0, 2.0]
    """
    return own if isinstance(context.share, tuple) else context.share


BY_EXAMPLES = Weights(lambda context, delta: _same(share_of(context, context.shard.size.astype(jnp.float32))))
BY_COUNT = Weights(lambda context, delta: _same(share_of(context, jnp.float32(1))))


def overlap_mean(
    family: Family, *, by_examples: bool = True, class_rows: bool = False, own_exit: bool = True,
    count_untrained: bool = False, weights: Weights | None = None,
) -> Merge:  # fmt: skip
    """Every entry is averaged over the clients whose level contains it.

    ``mean = sum_k w_k m_k delta_k / sum_k w_k m_k``; the mean of masked deltas equals the mean of overlapping weights.
    Where the coverage ``sum_k w_k m_k`` is 0, nobody held the entry and the mean is 0.

    Args:
      by_examples: weigh clients by their number of examples (FedAvg) or count them (HeteroFL).
      class_rows: entries along a class axis count only for clients that hold the class (HeteroFL, section 1.6 of the
        official aggregation).
      own_exit: clients train their deepest exit alone, and a leaf of an exit counts only for the clients that train it.
      count_untrained: it counts for the clients that hold and do not train it too, with a change of 0.
      weights: how much a reply counts, in place of ``by_examples``: ``mean = sum_k a_k m_k delta_k / sum_k b_k m_k``.

    Returns:
      A ``Merge``: ``lift`` one reply, add them, ``settle`` into (mean, coverage), both of full shape.

    Source: McMahan et al. 2017 (by examples); Diao et al., ICLR 2021, algorithm 1 (by counts, class rows).

    >>> from hetfl_jax.models import MLP
    >>> fam = families.family(MLP(hidden=(2,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> from types import SimpleNamespace
    >>> rule = overlap_mean(fam, by_examples=False)
    >>> def reply(level, change):
    ...     delta = jax.tree.map(lambda s: jnp.full(s.shape, change), fam.shapes[level])
    ...     shard = SimpleNamespace(size=jnp.int32(1), classes=jnp.ones(10, bool))
    ...     total = rule.lift(delta, SimpleNamespace(level=level, shard=shard, share=()))
    ...     return total._replace(delta=windows.widen(fam, total.delta, level))
    >>> mean, coverage = rule.settle(jax.tree.map(jnp.add, reply(0, 1.0), reply(1, 3.0)))
    >>> mean["params"]["dense_0"]["bias"].tolist(), coverage["params"]["dense_0"]["bias"].tolist()
    ([2.0, 1.0], [2.0, 1.0])
    """
    weights = weights or (BY_EXAMPLES if by_examples else BY_COUNT)
    family = with_class_axes(family) if class_rows else family

    def trains(path: tuple[str, ...]) -> np.ndarray:
        """[L] whether a level's reply counts for a leaf that it holds."""
        held = (family.windows[path].extents > 0).all(1)
        return ~held | families.trained(family, path, all_exits=not own_exit)

    def along(path: tuple[str, ...], d: Array, rows: Array) -> Array:
        axis = family.windows[path].class_axis
        return padded(rows, d.shape[axis]).reshape([-1 if i == axis else 1 for i in range(d.ndim)])

    def has_rows(path: tuple[str, ...]) -> bool:
        return class_rows and family.windows[path].class_axis >= 0

    def lift(delta: PyTree, context: ClientContext) -> Total:
        level, shard = context.level, context.shard
        weight, share = weights.of(context, delta)
        one = jax.nn.one_hot(windows.index_of(level), family.levels) * share

        def weigh(path: tuple[str, ...], d: Array) -> Array:
            if not trains(path).all():
                d = jnp.where(jnp.asarray(trains(path))[windows.index_of(level)], d, 0)
            return jnp.where(along(path, d, shard.classes), d * weight, 0) if has_rows(path) else d * weight

        return Total(windows.map_leaves(weigh, delta), one, one[:, None] * shard.classes)

    def settle(total: Total) -> tuple[PyTree, PyTree]:
        def cover(path: tuple[str, ...], d: Array) -> Array:
            count = total.weight if count_untrained or trains(path).all() else total.weight * trains(path)
            rows = padded(total.rows, d.shape[family.windows[path].class_axis]) if has_rows(path) else None
            return windows.spread(family, path, count, rows)

        coverage = windows.map_leaves(cover, total.delta)
        mean = jax.tree.map(lambda d, c: jnp.where(c > 0, d / jnp.where(c > 0, c, 1), 0), total.delta, coverage)
        return mean, coverage

    return Merge(lift, settle, weights.asks_received)


def padded(rows: Array, size: int) -> Array:
    """[..., C] as [..., size]: rows beyond the classes (the token that hides others) are nobody's.

    A net whose first classes have no entries of their own has fewer rows: those of the last classes.

    >>> padded(jnp.array([1.0, 2.0]), 3).tolist(), padded(jnp.array([1.0, 2.0, 3.0]), 2).tolist()
    ([1.0, 2.0, 0.0], [2.0, 3.0])
    """
    if size < rows.shape[-1]:
        return rows[..., rows.shape[-1] - size :]
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, size - rows.shape[-1])])


def settle_each(merge: Merge, total: Total) -> tuple[PyTree, PyTree]:
    """``settle`` for each row of a total with a leading axis of members.

    Args:
      merge: the rule.
      total: leaves [members, ...], as a bank sums them.

    Returns:
      (mean, coverage), leaves [members, ...].

    >>> from hetfl_jax.models import MLP
    >>> fam = families.family(MLP(hidden=(2,)), [{}], jnp.zeros((1, 3)))
    >>> delta = jax.tree.map(lambda s: jnp.ones((2, *s.shape)), fam.shapes[0])
    >>> total = Total(delta, jnp.array([[1.0], [4.0]]), jnp.ones((2, 1, 10)))
    >>> settle_each(overlap_mean(fam), total)[0]["params"]["dense_0"]["bias"].tolist()
    [[1.0, 1.0], [0.25, 0.25]]
    """
    return jax.vmap(merge.settle)(total)


def mean_of_stacks(
    family: Family, stacks: Sequence[PyTree], weights: Sequence[Array], classes: Sequence[Array] | None = None
) -> tuple[PyTree, PyTree]:
    """The overlap mean of changes that are already stacked, one stack a level at the level's true shapes.

    ``mean = sum_l widen(w_l . stack_l) / coverage``: one dot product a leaf and level, no mask and no full-size copy of
    a client, so it runs at the speed of reading the stacks.

    Args:
      stacks: for each level, a tree of leaves [c_l, *narrow shape].
      weights: for each level, [c_l] float32.
      classes: for each level, [c_l, C] bool: entries along a class axis count only for clients that hold the class.

    Returns:
      (mean, coverage) as ``Merge.settle``.

    >>> from hetfl_jax.models import MLP
    >>> fam = families.family(MLP(hidden=(2,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> stack = lambda c, level: jax.tree.map(lambda s: jnp.full((c, *s.shape), 1.0), fam.shapes[level])
    >>> mean, coverage = mean_of_stacks(fam, [stack(2, 0), stack(3, 1)], [jnp.ones(2), jnp.ones(3)])
    >>> coverage["params"]["dense_0"]["bias"].tolist(), mean["params"]["dense_0"]["bias"].tolist()
    ([5.0, 2.0], [1.0, 1.0])
    """
    held = classes if classes is not None else [jnp.ones((w.shape[0], 1), bool) for w in weights]
    rows = jnp.stack([w @ c.astype(w.dtype) for w, c in zip(weights, held)])

    def dot(weight: Array, has: Array, path: tuple[str, ...], leaf: Array) -> Array:
        axis = family.windows[path].class_axis
        if classes is None or axis < 0:
            return jnp.einsum("c,c...->...", weight, leaf, precision=jax.lax.Precision.HIGHEST)
        last = jnp.moveaxis(leaf, axis + 1, -1)
        per_class = jnp.einsum(
            "cl,c...l->...l", weight[:, None] * padded(has, last.shape[-1]), last, precision=jax.lax.Precision.HIGHEST
        )
        return jnp.moveaxis(per_class, -1, axis)

    def of_level(level: int) -> PyTree:
        return windows.map_leaves(partial(dot, weights[level], held[level]), stacks[level])

    delta = of_level(0)
    for level in range(1, family.levels):
        delta = windows.add_inside(family, delta, of_level(level), level)
    count = jnp.stack([w.sum() for w in weights])
    return overlap_mean(family, class_rows=classes is not None, own_exit=False).settle(Total(delta, count, rows))

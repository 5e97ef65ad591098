"""What ``jax.tree`` and ``optax.tree`` lack."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Array, PyTree


def select(pred: Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """``where`` over two trees of one structure; unlike a product with 0 it does not let NaN through.

    >>> select(jnp.array(False), {"a": jnp.nan}, {"a": 1.0})["a"]
    Array(1., dtype=float32, weak_type=True)
    """
    return jax.tree.map(lambda a, b: jnp.where(pred, a, b), on_true, on_false)


def finite(tree: PyTree) -> Array:
    """Whether every entry of every inexact leaf is finite; a bool scalar.

    >>> bool(finite({"a": jnp.array([1.0, jnp.inf])}))
    False
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    if not leaves:
        return jnp.bool_(True)
    bad = jnp.stack([~jnp.isfinite(leaf).all() for leaf in leaves]).astype(jnp.float32)
    # A product, not a reduction: XLA fuses a reduction into everything that is selected by it, which for a net of 200
    # leaves takes minutes to compile.
    return jnp.dot(bad, jnp.ones_like(bad)) == 0


def take(tree: PyTree, index: PyTree) -> PyTree:
    """``leaf[index]`` for every leaf: rows of a stacked tree.

    Args:
      tree: leaves [K, ...].
      index: anything an array is indexed by, e.g. [k] int.

    >>> take({"a": jnp.arange(6).reshape(3, 2)}, jnp.array([2, 0]))["a"].tolist()
    [[4, 5], [0, 1]]
    """
    return jax.tree.map(lambda leaf: leaf[index], tree)


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The type of sums over numbers of a type: its own, or float32 if that is less precise.

    >>> wide(jnp.dtype("bfloat16")), wide(jnp.dtype("float64"))
    (dtype('float32'), dtype('float64'))
    """
    return jnp.promote_types(dtype, jnp.float32)


def axis_sum(tree: PyTree) -> PyTree:
    """Sum over the leading axis, as one dot product a leaf: reductions over a stack run at memory speed only as dots.

    >>> axis_sum({"a": jnp.ones((3, 2))})["a"]
    Array([3., 3.], dtype=float32)
    """

    def total(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf.sum(0, dtype=leaf.dtype)
        ones = jnp.ones(leaf.shape[:1], leaf.dtype)
        return jnp.einsum("c,c...->...", ones, leaf, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(total, tree)


def packed(values: PyTree, lead: int = 0) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """Leaves joined into one array a dtype, and the way back: a collective on the pack is one, not one a leaf.

    Args:
      values: leaves [*same leading axes, ...].
      lead: how many leading axes stay.

    >>> joined, back = packed({"a": jnp.ones(2), "b": jnp.zeros((2, 3))}, lead=1)
    >>> [v.shape for v in joined], back(joined)["b"].shape
    ([(2, 4)], (2, 3))
    """
    leaves, structure = jax.tree.flatten(values)
    dtypes = list(dict.fromkeys(leaf.dtype for leaf in leaves))
    places = [[i for i, leaf in enumerate(leaves) if leaf.dtype == dtype] for dtype in dtypes]
    rows = [leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves]

    def back(joined: list[Array]) -> PyTree:
        out = list(leaves)
        for array, place in zip(joined, places):
            cuts = np.cumsum([rows[i].shape[-1] for i in place])[:-1]
            for i, part in zip(place, jnp.split(array, cuts, axis=-1)):
                # The leading axes may have grown or shrunk on the way.
                out[i] = part.reshape(*array.shape[:lead], *leaves[i].shape[lead:])
        return jax.tree.unflatten(structure, out)

    def join(place: list[int]) -> Array:
        # Written one after the other: a concatenation would be fused with what made the leaves, entry by entry.
        parts = [rows[i] for i in place]
        out = jnp.zeros((*parts[0].shape[:-1], sum(part.shape[-1] for part in parts)), parts[0].dtype)
        for part, end in zip(parts, np.cumsum([part.shape[-1] for part in parts])):
            out = jax.lax.dynamic_update_slice_in_dim(out, part, int(end) - part.shape[-1], axis=-1)
        return out

    return [join(place) for place in places], back


def as_words(values: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Leaves of 32 bits and bools as uint32, bit for bit, and the way back: one collective moves one dtype.

    >>> words, back = as_words({"a": jnp.array([-1.5]), "b": jnp.array([True])})
    >>> {v.dtype.name for v in words.values()}, back(words)["a"].tolist(), back(words)["b"].tolist()
    ({'uint32'}, [-1.5], [True])
    """
    word = jnp.uint32

    def of(leaf: Array) -> Array:
        if leaf.dtype == bool:
            return leaf.astype(word)
        return jax.lax.bitcast_convert_type(leaf, word) if leaf.dtype.itemsize == 4 else leaf

    def back(words: PyTree) -> PyTree:
        def leaf(moved: Array, kind: np.dtype) -> Array:
            if kind == jnp.bool_.dtype:
                return moved != 0
            return jax.lax.bitcast_convert_type(moved, kind) if moved.dtype != kind else moved

        return jax.tree.map(leaf, words, kinds)

    values = jax.tree.map(jnp.asarray, values)
    kinds = jax.tree.map(lambda leaf: leaf.dtype, values)
    return jax.tree.map(of, values), back


def zeros(shapes: PyTree) -> PyTree:
    """Zero arrays for a tree of ``ShapeDtypeStruct`` (or arrays).

    >>> zeros({"w": jax.ShapeDtypeStruct((2,), jnp.int32)})["w"].tolist()
    [0, 0]
    """
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves.

    >>> nbytes({"a": jnp.zeros((2, 3), jnp.uint8)})
    6
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def fetched(trees: Sequence[PyTree]) -> list[PyTree]:
    """Trees of equal structure and shapes on the host: one transfer for each leaf place, not one a tree.

    >>> fetched([{"a": jnp.arange(2)}, {"a": jnp.arange(2) + 5}])[1]["a"].tolist()
    [5, 6]
    """
    on_device = all(isinstance(leaf, jax.Array) for tree in trees for leaf in jax.tree.leaves(tree))
    if jax.process_count() > 1 or len(trees) == 1 or not on_device:
        return jax.device_get(list(trees))
    leaves = jax.device_get(_stacked([jax.tree.leaves(tree) for tree in trees]))
    structure = jax.tree.structure(trees[0])
    return [jax.tree.unflatten(structure, [leaf[number] for leaf in leaves]) for number in range(len(trees))]


@jax.jit
def _stacked(rows: list[list[Array]]) -> list[Array]:
    return [jnp.stack(column) for column in zip(*rows)]

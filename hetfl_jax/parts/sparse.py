"""One leaf of a message: rounding, sparsifiers, rotations, low rank. ``parts.codec`` makes codecs of it.

A ``Part`` is a leaf of a client's change. Sums over it are taken at its full shape, filled up with zeros, and random
draws are made there and cut: so a masked client sends what a dense one sends, bit for bit.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import bits as counts
from hetfl_jax.core.random import words
from hetfl_jax.core.types import Array, Level, PyTree, Within
from hetfl_jax.models import windows
from hetfl_jax.models.windows import Family, Path
from hetfl_jax.parts import ranks


class Part(NamedTuple):
    """One leaf of a change, and what is known of it."""

    full: tuple[int, ...]  #: its shape at level 0
    entries: np.ndarray  #: [L] int64 how many entries each level has of it
    value: Array  #: float32, of the shape that level ``base`` gives it
    inside: Array | None  #: bool, which entries the level has; None for all
    level: int | Array
    base: int
    key: Array

    def words(self) -> Array:
        """32 random bits an entry, by its place in the full leaf."""
        strides = np.cumprod((1, *self.full[:0:-1]))[::-1][: self.value.ndim]  # a scalar has none
        place = [
            jax.lax.broadcasted_iota(jnp.uint32, self.value.shape, axis) * jnp.uint32(stride)
            for axis, stride in enumerate(strides)
        ]
        return words(self.key, sum(place, jnp.zeros(self.value.shape, jnp.uint32)))

    def uniform(self) -> Array:
        """A float32 in [0, 1) an entry."""
        return (self.words() >> 8).astype(jnp.float32) * 2.0**-24

    def cut(self, values: Array) -> Array:
        """The leading entries of an array of full shape."""
        return values[tuple(slice(0, extent) for extent in self.value.shape)]

    def total(self, values: Array) -> Array:
        """The sum of values that are zero outside."""
        return fill(values, self.full).sum()

    def at(self, table: np.ndarray) -> Array:
        """The level's row of a table [L, ...]."""
        return jnp.asarray(table)[self.level]

    def only(self, values: Array, other: float = 0.0) -> Array:
        """``values`` inside, else ``other``."""
        return values if self.inside is None else jnp.where(self.inside, values, other)


def fill(values: Array, shape: tuple[int, ...]) -> Array:
    """Zeros behind the values along every axis, up to ``shape``.

    >>> fill(jnp.ones((1, 2)), (2, 3)).tolist()
    [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    return jnp.pad(values, [(0, full - own) for full, own in zip(shape, values.shape)])


def sizes(family: Family) -> dict[Path, np.ndarray]:
    """[L] entries of each leaf of the parameters, in the order of the full tree.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> sizes(fam)["dense_0", "kernel"].tolist()
    [12, 6]
    """
    own = [windows.flat(shapes["params"]) for shapes in family.shapes]
    return {path: np.array([leaves[path].size if path in leaves else 0 for leaves in own]) for path in own[0]}


def parts(family: Family, key: Array, delta: PyTree, level: Level) -> dict[Path, Part]:
    """The leaves of a change by path; a leaf's key depends on its place in the full tree.

    Args:
      family: of the model.
      key: of the message.
      delta: the change of the parameters, of the shapes of the level's base.
      level: dense or masked.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> delta = jax.tree.map(lambda s: jnp.ones(s.shape), fam.shapes[1]["params"])
    >>> found = parts(fam, jax.random.key(0), delta, 1)["dense_0", "kernel"]
    >>> found.full, found.value.shape, found.entries.tolist()
    ((3, 4), (3, 2), [12, 6])
    """
    base, number = windows.base_of(level), windows.index_of(level)
    full, leaves, found = windows.flat(family.shapes[0]["params"]), windows.flat(delta), {}
    for place, (path, entries) in enumerate(sizes(family).items()):
        if path in leaves:
            masked = isinstance(level, Within)
            inside = windows.mask_leaf(family, ("params", *path), number, base) if masked else None
            own = jax.random.fold_in(key, place)
            found[path] = Part(full[path].shape, entries, leaves[path], inside, number, base, own)
    return found


def power_of_two(d: int) -> int:
    """The smallest power of two that is at least d.

    >>> [power_of_two(d) for d in (0, 1, 5, 8)]
    [1, 1, 8, 8]
    """
    return 1 << max(d - 1, 0).bit_length()


def chosen(entries: np.ndarray, fraction: float) -> np.ndarray:
    """``k = ceil(fraction d)``, at least 1 of d > 0.

    >>> chosen(np.array([30, 3, 0]), 0.1).tolist()  # 0.1 * 30 is a little more than 3
    [3, 1, 0]
    """
    return np.clip(np.ceil(float(fraction) * entries - 1e-9), np.minimum(entries, 1), entries).astype(np.int32)


def keep(part: Part, k: np.ndarray, score: Array, scaled: bool, ends: Array | None = None) -> Array:
    """The entries with the k [L] largest scores (>= 0), times ``d / k`` if ``scaled``; the others are 0.

    Args:
      part: the leaf.
      k: [L] int32, how many entries each level sends.
      score: of ``part.value``'s shape, >= 0.
      scaled: whether the mean over random sets is to be the leaf.
      ends: see ``ranks.largest``.

    >>> one = Part((4,), np.array([4]), jnp.array([1.0, -3.0, 0.0, 2.0]), None, 0, 0, jax.random.key(0))
    >>> keep(one, np.array([2], np.int32), jnp.abs(one.value), True).tolist()
    [0.0, -6.0, 0.0, 4.0]
    """
    which = ranks.largest(part.only(score, -1), part.at(k), ends)
    factor = part.at((part.entries / np.maximum(k, 1)).astype(np.float32)) if scaled else 1.0
    return jnp.where(which, part.value * factor, 0)


def keep_random(part: Part, k: np.ndarray, scaled: bool) -> Array:
    """``keep`` of random scores: each set of k entries is as likely as another.

    >>> one = Part((4,), np.array([4]), jnp.array([1.0, -3.0, 0.5, 2.0]), None, 0, 0, jax.random.key(0))
    >>> int((keep_random(one, np.array([2], np.int32), False) != 0).sum())
    2
    """
    # 30 random bits as a normal positive float, in the same order.
    score = jax.lax.bitcast_convert_type((part.words() >> 2) + (1 << 23), jnp.float32)
    ends = ranks.uniform_guesses(part.at(k), part.at(part.entries.astype(np.int32)), 1 << 23, 1 << 30)
    return keep(part, k, score, scaled, ends)


def rotated_signs(part: Part, unbiased: bool) -> Array:
    """DRIVE of one leaf, see ``codec.drive``: one bit an entry.

    Args:
      part: the leaf; its key draws the rotation, which the receiver knows.
      unbiased: which scale.

    >>> one = Part((4,), np.array([4]), jnp.array([1.0, -3.0, 0.0, 2.0]), None, 0, 0, jax.random.key(0))
    >>> sent = rotated_signs(one, True)
    >>> round(float(sent @ one.value), 4)  # the product with the leaf is its square, 1 + 9 + 4
    14.0
    """
    size = np.array([power_of_two(int(d)) for d in part.entries])
    turn = jnp.where(part.words() >> 31, 1.0, -1.0)
    front = to_front(part.value * turn, part.inside, int(size[part.base]))
    rotated = hadamard(front, part.at(size))  # sqrt(m) z
    length = fill(jnp.abs(rotated), (int(size[0]),)).sum()
    if unbiased:
        scale = part.total(jnp.square(part.value)) / jnp.where(length > 0, length, 1)
    else:
        scale = length / jnp.square(part.at(size.astype(np.float32)))
    back = hadamard(jnp.where(rotated < 0, -1.0, 1.0), part.at(size))
    return scale * turn * from_front(back, part.inside, part.value.shape)


class Factors(NamedTuple):
    """At which levels a leaf is sent as a product of two thin matrices."""

    pays: np.ndarray  #: [L] bool, the levels where two factors are smaller than the leaf
    columns: np.ndarray  #: [L] int32, its last axis at each level


def factors(family: Family, path: Path, rank: int) -> Factors | None:
    """How a leaf is factored; None if no level does. All its axes but the last are the rows of the matrix.

    Args:
      family: of the model.
      path: of the leaf, below ``params``.
      rank: r, >= 1.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> how = factors(fam, ("dense_0", "kernel"), 1)
    >>> how.pays.tolist(), how.columns.tolist(), factors(fam, ("dense_0", "bias"), 1)
    ([True, True], [4, 2], None)
    """
    extents = family.windows["params", *path].extents
    if extents.shape[1] < 2:
        return None
    m, n = extents[:, :-1].prod(1, dtype=np.int64), extents[:, -1].astype(np.int64)
    pays = rank * (m + n) < m * n
    return Factors(pays, n.astype(np.int32)) if pays.any() else None


def product(part: Part, kept: Array, how: Factors) -> tuple[Array, Array]:
    """PowerSGD of one leaf: what is sent and the next Q^T.

    Args:
      part: the leaf, M as a matrix [m, n].
      kept: [r, n] of the full leaf, Q^T of the message before; columns that the level has not stay as they are.
      how: see ``factors``.

    Source: Vogels, Karimireddy, Jaggi, NeurIPS 2019, algorithm 1.

    >>> value = jnp.outer(jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0, 1.0]))  # of rank 1, so nothing is lost
    >>> one = Part((2, 3), np.array([6]), value, None, 0, 0, jax.random.key(0))
    >>> sent, _ = product(one, jnp.ones((1, 3)), Factors(np.array([True]), np.array([3])))
    >>> np.asarray(sent).round(3).tolist()
    [[3.0, 0.0, 1.0], [6.0, 0.0, 2.0]]
    """
    matrix = fill(part.value, part.full).reshape(-1, part.full[-1])
    left = orthonormal(matmul(matrix, kept.T))
    right = matmul(left.T, matrix)
    pays, own = part.at(how.pays), jnp.arange(part.full[-1]) < part.at(how.columns)
    # A direction in which nothing is left to send starts from where it was.
    new = jnp.where(pays & own & (right != 0).any(1, keepdims=True), right, kept)
    sent = jnp.where(pays, part.cut(matmul(left, right).reshape(part.full)), part.value)
    return part.only(sent), new


def stochastic_levels(values: Array, scale: Array, levels: int, uniform: Array) -> Array:
    """Which of the levels 0..s each ``|x|`` is rounded to: ``a = s |x| / scale``, up with probability ``a - floor(a)``.

    The floor is at most s - 1, so that ``|x| = scale`` always gets level s; a scale of 0 gives level 0.

    Args:
      values: float32, any shape.
      scale: at least the largest ``|x|``.
      levels: s.
      uniform: in [0, 1), of ``values``' shape; it is rounded up where ``a - floor(a) > uniform``.

    Returns:
      float32 whole numbers.

    Source: QSGD (Alistarh et al. 2017), section 3.1.

    >>> stochastic_levels(jnp.array([0.0, -0.3, 1.0]), 1.0, 4, jnp.array([0.0, 0.1, 0.9])).tolist()
    [0.0, 2.0, 4.0]
    """
    positive = scale > 0
    exact = jnp.where(positive, jnp.abs(values) / jnp.where(positive, scale, 1) * levels, 0)
    low = jnp.minimum(jnp.floor(exact), levels - 1)
    return low + (exact - low > uniform)


def elias(number: Array) -> Array:
    """Bits of the Elias omega code of int32 numbers >= 1: ``l(1) = 1, l(n) = l(floor(log2 n)) + floor(log2 n) + 1``.

    Source: the recursive code of Elias 1975 that QSGD (Alistarh et al. 2017, appendix) uses.

    >>> elias(jnp.array([1, 2, 3, 4, 8, 16])).tolist()
    [1, 3, 3, 6, 7, 11]
    """
    number = jnp.asarray(number, jnp.int32)
    length = jnp.ones_like(number)
    for _ in range(4):  # 31 bits, then at most 5, 3 and 2
        digits = 32 - jax.lax.clz(number)
        length += jnp.where(number > 1, digits, 0)
        number = jnp.maximum(digits - 1, 1)
    return length


def gaps(present: Array, inside: Array, before: Array, last: Array) -> tuple[Array, Array]:
    """Distance of each present entry from the present one before it, counted in entries ``inside``.

    Args:
      present: [n] bool, only where ``inside``.
      inside: [n] bool.
      before: int32, entries inside that come before these.
      last: int32, place of the last present entry before these, -1 for none.

    Returns:
      [n] int32, >= 1 where present, and ``last`` for the entries that follow.

    >>> at = jnp.array([False, True, True, False, True])
    >>> gaps(at, jnp.array([True, True, True, False, True]), 0, -1)[0][at].tolist()
    [2, 1, 1]
    """
    place = before + jnp.cumsum(inside.astype(jnp.int32)) - 1
    latest = jnp.maximum(jax.lax.cummax(jnp.where(present, place, -1)), last)
    earlier = jnp.concatenate([jnp.reshape(jnp.asarray(last, jnp.int32), 1), latest[:-1]])
    return jnp.where(present, place - earlier, 1), latest[-1]


def elias_bits(part: Part, level: Array, before: Array, last: Array) -> tuple[Array, tuple[Array, Array]]:
    """[3] bits of a leaf's entries that are not 0, and ``before`` and ``last`` for the next leaf of its scope.

    >>> one = Part((4,), np.array([4]), jnp.array([0.0, -3.0, 0.0, 2.0]), None, 0, 0, jax.random.key(0))
    >>> sent, following = elias_bits(one, jnp.array([0, 2, 0, 1]), jnp.int32(0), jnp.int32(-1))
    >>> sent.tolist(), [int(v) for v in following]  # gap, sign and level of each: (3 + 1 + 3) + (3 + 1 + 1)
    ([12, 0, 0], [4, 3])
    """
    level = level.ravel().astype(jnp.int32)
    inside = jnp.ones(level.shape, bool) if part.inside is None else part.inside.ravel()
    gap, latest = gaps(level > 0, inside, before, last)
    each = jnp.where(level > 0, elias(gap) + 1 + elias(jnp.maximum(level, 1)), 0)
    row = min(each.size, 1 << 20)  # sums of a row stay below 2^31
    rows = jnp.pad(each, (0, -each.size % row)).reshape(-1, row).sum(1)
    return counts.traced(rows).sum(0), (before + inside.sum(dtype=jnp.int32), latest)


def to_front(values: Array, inside: Array | None, length: int) -> Array:
    """[length]: the entries inside, in row-major order, then zeros. ``inside`` None: all entries.

    >>> to_front(jnp.array([5.0, 0.0, 7.0]), jnp.array([True, False, True]), 4).tolist()
    [5.0, 7.0, 0.0, 0.0]
    """
    flat = values.ravel()
    if inside is None:
        return jnp.pad(flat, (0, length - flat.size))
    place = jnp.cumsum(inside.ravel().astype(jnp.int32)) - 1
    return jnp.zeros(length, flat.dtype).at[jnp.where(inside.ravel(), place, length)].set(flat, mode="drop")


def from_front(front: Array, inside: Array | None, shape: tuple[int, ...]) -> Array:
    """The way back from ``to_front``; entries outside get any value.

    >>> from_front(jnp.array([5.0, 7.0, 0.0]), jnp.array([False, True, True]), (3,))[1:].tolist()
    [5.0, 7.0]
    """
    if inside is None:
        return front[: math.prod(shape)].reshape(shape)
    place = jnp.cumsum(inside.ravel().astype(jnp.int32)) - 1
    return front[jnp.maximum(place, 0)].reshape(shape)


def hadamard(values: Array, size: int | Array) -> Array:
    """``H x`` with the Walsh-Hadamard matrix (entries 1 and -1), on every block of ``size`` entries.

    Args:
      values: [n], n a power of two.
      size: a power of two, at most n; may be traced.

    >>> hadamard(jnp.array([1.0, 2.0, 3.0, 4.0]), 4).tolist(), hadamard(jnp.array([1.0, 2.0, 3.0, 4.0]), 2).tolist()
    ([10.0, -2.0, -4.0, 0.0], [3.0, -1.0, 7.0, -1.0])
    """
    bits = values.size.bit_length() - 1

    def stage(number: Array, values: Array) -> Array:
        # The highest bit of the index becomes the lowest; after all stages the order is the old one.
        high, low = values.reshape(2, -1)
        inside = jnp.left_shift(1, bits - 1 - number) < size
        return jnp.stack([jnp.where(inside, high + low, high), jnp.where(inside, high - low, low)], 1).ravel()

    return jax.lax.fori_loop(0, bits, stage, values)


def orthonormal(columns: Array) -> Array:
    """[m, r]: columns of the same span, orthonormal; a column that depends on those before it becomes zero.

    Gram-Schmidt, each column twice.

    >>> orthonormal(jnp.array([[3.0, 6.0, 1.0], [4.0, 8.0, 0.0]])).round(3).tolist()
    [[0.600..., 0.0, 0.800...], [0.800..., 0.0, -0.600...]]
    """
    number = jnp.arange(columns.shape[1])

    def step(k: Array, done: Array) -> Array:
        column = done[:, k]
        before = jnp.linalg.norm(column)
        for _ in range(2):
            shares = jnp.where(number < k, matmul(done.T, column), 0)
            column = column - matmul(done, shares)
        size = jnp.linalg.norm(column)
        kept = size > 1e-5 * before
        return done.at[:, k].set(jnp.where(kept, column / jnp.where(kept, size, 1), 0))

    return jax.lax.fori_loop(0, columns.shape[1], step, columns)


def matmul(a: Array, b: Array) -> Array:
    """``a @ b`` in float32 on every device.

    >>> matmul(jnp.ones((1, 3)), jnp.ones((3, 1))).tolist()
    [[3.0]]
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

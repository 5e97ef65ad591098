"""DivFL's choice of diverse clients: a facility location problem over distances between gradients.

With the gradients g_k of N clients, the cohort S of m clients is chosen to make ``G(S) = sum_k min_{i in S}
||g_k - g_i||`` small (the norm, not its square). Source of all of it: Balakrishnan et al., "Diverse Client Selection
for Federated Learning via Submodular Maximization", ICLR 2022, and its code (melodi-lab/divfl). Memory O(N^2).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core.absent import HIGHEST, LOWEST
from hetfl_jax.core.random import permute
from hetfl_jax.core.types import Array

BY = ("examples", "alike", "clusters")

Among = Callable[[Array, Array], Array]  #: (step, taken [N] bool) -> [r] the clients that a step looks at


class Picks(NamedTuple):
    """A cohort in the order in which it was picked."""

    ids: Array  #: [m] int32
    valid: Array  #: [m] bool, false where nobody was left
    cost: Array  #: [m] G of the picks so far, in units of the distance


def _between(rows: Array, others: Array) -> Array:
    """[M, N] distances by ``|a|^2 + |b|^2 - 2 a.b`` at full precision; give it rows with the mean taken off."""
    product = jnp.matmul(rows, others.T, precision=jax.lax.Precision.HIGHEST)
    square = jnp.square(rows).sum(1)[:, None] + jnp.square(others).sum(1) - 2 * product
    return jnp.sqrt(jnp.maximum(square, 0))


def distances(rows: Array) -> Array:
    """[N, N] euclidean distances ``||g_k - g_i||`` between rows [N, P], with a diagonal of 0.

    The mean row is taken off first, which changes no distance and keeps rounding errors small.

    >>> distances(jnp.array([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[0.0, 5.0], [5.0, 0.0]]
    """
    rows = rows - rows.mean(0)
    return jnp.where(jnp.eye(rows.shape[0], dtype=bool), 0, _between(rows, rows))


def refreshed(table: Array, distance: Array, ids: Array, rows: Array, ok: Array | None = None) -> tuple[Array, Array]:
    """The table of gradients and its distances after some clients sent new rows; the rows of the others are kept.

    Args:
      table: [N, P] the latest gradient of each client.
      distance: [N, N] its ``distances``.
      ids: [K] clients, distinct where ``ok``.
      rows: [K, P] their new gradients.
      ok: [K] bool, whether a row arrived; default: all did.

    Returns:
      (table, distances), where only K rows and K columns of the latter are computed anew: K N P multiply-adds.

    >>> table = jnp.array([[0.0], [1.0], [5.0]])
    >>> table, distance = refreshed(table, distances(table), jnp.array([1]), jnp.array([[3.0]]))
    >>> distance[1].tolist()
    [3.0, 0.0, 2.0]
    """
    if ok is not None:
        ids, rows = jnp.where(ok, ids, table.shape[0]), jnp.where(ok[:, None], rows, 0)  # beyond the end: not written
    table = table.at[ids].set(rows, mode="drop")
    mean = table.mean(0)
    new = _between(rows - mean, table - mean)
    new = jnp.where(ids[:, None] == jnp.arange(table.shape[0]), 0, new)
    return table, distance.at[ids].set(new, mode="drop").at[:, ids].set(new.T, mode="drop")


def greedy(distance: Array, count: int, among: Among | None = None, valid: Array | None = None) -> Picks:
    """Picks one client after the other, each time the one that makes G smallest; of equal ones the lowest id.

    With the current distances to the nearest pick ``c_k`` (``HIGHEST`` before the first), step by step
    ``argmin_j sum_k min(c_k, D_kj)``. Two clients that are each other's nearest neighbour tie exactly, so other correct
    programs may pick another one of them (the official lazy greedy does).

    Args:
      distance: [N, N] symmetric.
      count: m.
      among: which clients a step looks at (``some_remaining`` is the stochastic greedy), the first of equal ones wins;
        default: all.
      valid: [N] bool; the others are neither picked nor represented, their distances may be anything.

    Raises:
      ValueError: a count outside 1..N.

    >>> picks = greedy(distances(jnp.array([[0.0], [1.0], [2.0], [9.0]])), 2)
    >>> picks.ids.tolist(), picks.cost.tolist()
    ([1, 3], [10.0, 2.0])
    """
    clients = distance.shape[0]
    if not 1 <= count <= clients:
        raise ValueError(f"cohort of {count} clients, allowed 1..{clients} (select.args.cohort)")
    here = jnp.ones(clients, bool) if valid is None else valid

    def pick(carry: tuple[Array, Array], step: Array) -> tuple[tuple[Array, Array], Picks]:
        nearest, taken = carry
        ids = jnp.arange(clients) if among is None else among(step, taken)
        columns = distance if among is None else distance[:, ids]
        cost = jnp.where(here[:, None], jnp.minimum(nearest[:, None], columns), 0).sum(0)
        cost = jnp.where(taken[ids], HIGHEST, cost)
        best = jnp.argmin(cost)
        client = ids[best].astype(jnp.int32)
        fine = ~taken[client]
        nearest = jnp.where(fine, jnp.minimum(nearest, distance[:, client]), nearest)
        return (nearest, taken.at[client].set(True)), Picks(client, fine, jnp.where(here, nearest, 0).sum())

    start = jnp.full(clients, HIGHEST, distance.dtype), ~here
    return jax.lax.scan(pick, start, jnp.arange(count))[1]


def some_remaining(key: Array, number: int) -> Among:
    """For the stochastic greedy: ``number`` clients uniformly among those that are not taken, anew at each step.

    The official number is ``max(m, floor(0.1 N))``. Where fewer are left, the list is filled up with taken ones, which
    are not picked.

    >>> some_remaining(jax.random.key(0), 1)(0, jnp.array([True, False, True])).tolist()
    [1]
    """

    def among(step: Array, taken: Array) -> Array:
        noise = jax.random.gumbel(jax.random.fold_in(key, step), taken.shape, jnp.float32, mode="high")
        return jax.lax.top_k(jnp.where(taken, LOWEST, noise), number)[1]

    return among


def nearest_pick(distance: Array, ids: Array, valid: Array | None = None) -> Array:
    """[N] the place in ``ids`` of the ``valid`` pick that represents each client, the earliest of equally near ones.

    >>> nearest_pick(distances(jnp.array([[0.0], [1.0], [2.0], [9.0]])), jnp.array([1, 3])).tolist()
    [0, 0, 0, 1]
    """
    columns = distance[:, ids] if valid is None else jnp.where(valid, distance[:, ids], HIGHEST)
    return jnp.argmin(columns, 1).astype(jnp.int32)


def shares(by: str, size: Array, distance: Array, ids: Array, valid: Array | None = None) -> Array:
    """[m] how much each pick counts in the mean of the replies; they sum to 1.

    ``examples``: ``n_i / sum n`` over the picks, as the official trainer does. ``alike``: ``1 / m``. ``clusters``: the
    share of all clients that the pick represents.

    Args:
      size: [N] examples of each client; one without examples is not there, and nobody represents it.
      valid: [m] bool, which picks there are; default: all. The others count for nothing.

    Raises:
      ValueError: another word.

    >>> distance = distances(jnp.array([[0.0], [1.0], [2.0], [9.0]]))
    >>> shares("clusters", jnp.array([1, 1, 1, 3]), distance, jnp.array([1, 3])).tolist()
    [0.75, 0.25]
    """
    if by not in BY:
        raise ValueError(f"weights by {by!r}, allowed {', '.join(BY)} (select.args.by)")
    there = jnp.ones(ids.shape, bool) if valid is None else valid
    if by == "alike":
        count = there.astype(float)
    elif by == "examples":
        count = jnp.where(there, size[ids], 0).astype(float)
    else:
        count = jnp.zeros(ids.shape, float).at[nearest_pick(distance, ids, valid)].add(size > 0)
    return count / jnp.maximum(count.sum(), 1)


def project(key: Array, rows: Array, dimensions: int) -> Array:
    """[..., dimensions] a random projection of rows [..., P] that keeps distances in the mean.

    A keyed permutation deals the coordinates to the dimensions in equal numbers, and each dimension is their sum with
    random signs, the same for the same key. A squared distance has the right mean and a relative standard deviation of
    at most ``sqrt(2 / dimensions)``, a distance half of that: 2.2 % at 1024. No matrix is drawn: P additions a row. Not
    in DivFL; it saves memory for the table and time for its distances.

    Raises:
      ValueError: dimensions below 1.

    >>> project(jax.random.key(0), jnp.ones((3, 10)), 4).shape
    (3, 4)
    """
    if dimensions < 1:
        raise ValueError(f"projection to {dimensions} dimensions, allowed >= 1 (select.args.dimensions)")
    parameters = rows.shape[-1]
    each = -(-parameters // dimensions)
    sign = jax.random.rademacher(jax.random.fold_in(key, 1), (parameters,), rows.dtype)
    whole = jnp.pad(rows * sign, [*[(0, 0)] * (rows.ndim - 1), (0, each * dimensions - parameters)])
    place = permute(key, jnp.arange(each * dimensions), each * dimensions)
    return whole[..., place].reshape(*rows.shape[:-1], each, dimensions).sum(-2)


def projection_error(distance: Array, approximate: Array) -> tuple[Array, Array]:
    """(largest, root mean square) relative error of the distances over all pairs of distinct rows.

    >>> exact = distances(jnp.array([[0.0], [1.0], [3.0]]))
    >>> [round(float(e), 3) for e in projection_error(exact, exact * 1.1)]
    [0.1, 0.1]
    """
    pairs = distance > 0
    error = jnp.where(pairs, jnp.abs(approximate / jnp.where(pairs, distance, 1) - 1), 0)
    return error.max(), jnp.sqrt(jnp.square(error).sum() / jnp.maximum(pairs.sum(), 1))

"""Splitting a cluster of clients by the directions of their updates (Sattler, Mueller, Samek 2020, arXiv 1910.01991).

All criteria come from the Gram matrix ``G_ij = <u_i, u_j>`` of the updates: one product on the device, the rest is
small and done on the host.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from hetfl_jax.core.types import Array, PyTree

LINKAGES = ("complete", "single")


class Cut(NamedTuple):
    """A cluster in two."""

    first: np.ndarray  #: positions, with the cluster's first client
    second: np.ndarray
    cross: float  #: the largest similarity across the cut
    gamma: float  #: ``sqrt((1 - cross) / 2)``


def gram(updates: PyTree) -> Array:
    """``G = U U^T`` [N, N] of updates whose leaves are [N, ...], in full float32 precision, without copying them.

    >>> gram({"a": jnp.array([[3.0, 4.0], [0.0, 1.0]])}).tolist()
    [[25.0, 4.0], [4.0, 1.0]]
    """

    def one(leaf: Array) -> Array:
        rows = leaf.reshape(leaf.shape[0], -1)
        return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)

    return sum(map(one, jax.tree.leaves(updates)), jnp.float32(0))


def similarity(gram: np.ndarray) -> np.ndarray:
    """Cosine similarity ``G_ij / (|u_i| |u_j| + 1e-12)``; 0 beside an update that is zero.

    Args:
      gram: [N, N] float64, of ``gram``.

    >>> similarity(np.array([[4.0, -4.0], [-4.0, 4.0]])).round(6).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    norm = np.sqrt(np.diag(gram))
    return gram / (norm[:, None] * norm + 1e-12)


def norms(gram: np.ndarray) -> tuple[float, float]:
    """(norm of the MEAN update, largest norm): ``sqrt(1^T G 1) / N`` and ``max_i sqrt(G_ii)``.

    >>> norms(np.array([[4.0, -4.0], [-4.0, 4.0]]))
    (0.0, 2.0)
    """
    return float(np.sqrt(max(gram.sum(), 0.0)) / len(gram)), float(np.sqrt(np.diag(gram)).max())


def bipartition(similar: np.ndarray, method: str = "complete") -> Cut:
    """The two groups in which agglomerative clustering on ``1 - similarity`` ends.

    ``complete`` linkage is the published code's; ``single`` linkage minimises the largest similarity across the cut,
    the paper's rule.

    >>> bipartition(np.array([[1.0, 0.9, -1.0], [0.9, 1.0, -0.8], [-1.0, -0.8, 1.0]])).second.tolist()
    [2]
    """
    distance = 1 - (similar + similar.T) / 2
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method=method)
    side = cut_tree(tree, n_clusters=2).ravel()
    first, second = np.flatnonzero(side == side[0]), np.flatnonzero(side != side[0])
    cross = float(similar[np.ix_(first, second)].max())
    return Cut(first, second, cross, float(np.sqrt(max(0.0, (1 - cross) / 2))))


def split(similar: np.ndarray, clusters: Sequence[np.ndarray], gamma_max: float, method: str) -> list[np.ndarray]:
    """Every cluster of more than two in two, where its cut passes ``gamma > gamma_max``; members are global numbers.

    Args:
      similar: [N, N] similarities of all clients.
      clusters: members of each, global numbers.
      gamma_max: 0 splits whatever has a cut.
      method: one of ``LINKAGES``.

    >>> similar = np.array([[1.0, 0.9, -1.0], [0.9, 1.0, -0.8], [-1.0, -0.8, 1.0]])
    >>> [members.tolist() for members in split(similar, [np.arange(3)], 0.5, "complete")]
    [[0, 1], [2]]
    """
    out: list[np.ndarray] = []
    for members in clusters:
        cut = bipartition(similar[np.ix_(members, members)], method) if len(members) > 2 else None
        # The cut's positions are those inside the cluster: they go through ``members`` back to global numbers.
        out += [members[cut.first], members[cut.second]] if cut and cut.gamma > gamma_max else [members]
    return out

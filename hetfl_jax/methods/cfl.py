"""CFL (Sattler, Mueller, Samek 2020, arXiv 1910.01991, algorithms 1-3): clusters split where training stalls.

All clients start in one cluster. A cluster c whose mean update is small while some client still wants to move,

``|| mean_{i in c} dW_i || < eps1  and  max_{i in c} ||dW_i|| > eps2``,

is cut in two by the cosine similarities of its members' updates, if ``gamma = sqrt((1 - largest similarity across the
cut) / 2) > gamma_max``. Both halves start from the cluster's model and take the mean of their own members' updates of
this very round. Every split is a node of a tree that is kept with the state and places new clients
(``splitting.place_by_tree``).

| slot | here |
|---|---|
| route of the bank | a table of client -> cluster, edited on the host between rounds |
| merge | plain mean over the cluster's clients, or weighted by examples (``weighted``) |
| all others | as FedAvg |

The rounds of a run compile once: the bank has ``max_clusters`` rows from the start. Updates are collected only in
rounds that may split, by running the round again with the same randomness.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.clusters import bipartition, report
from hetfl_jax.clusters.splitting import AtSplit, Clusters, Rule, by_table, splitting
from hetfl_jax.core.types import Algorithm, Arguments
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import merge, select, server
from hetfl_jax.parts.bank import bank
from hetfl_jax.parts.compose import Slots, compose
from hetfl_jax.parts.local import Local

MOST_BYTES = 2**31  #: of the updates that the tree keeps


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    clients: int,
    eps1: float = 0.4,
    eps2: float = 1.6,
    gamma_max: float = 0.74,
    linkage: str = "complete",
    max_clusters: int = 8,
    min_clients: int = 3,
    first_round: int = 20,
    weighted: bool = False,
    keep_updates: bool = True,
    server_optimizer: Arguments = server.PLAIN,
    slots: Slots | None = None,
) -> Algorithm:
    """CFL over a population of ``clients``.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      eps1, eps2: bounds on the norm of the mean update and on the largest norm; about a tenth of the largest mean norm
        seen, and 3 to 4 times that.
      gamma_max: least gamma of a split; 0 is the plain criterion of the published code, which also cuts pure clusters.
      linkage: ``complete`` (published code) or ``single`` (the paper's rule).
      max_clusters: rows of the bank; no further split happens when all are taken.
      min_clients: a cluster with fewer participants is not split.
      first_round: rounds before the first split.
      keep_updates: keep the updates at every split, by which new and absent clients are placed.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: a value out of range, or kept updates that do not fit.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=9, clients=9, eps1=0.2, eps2=0.6).choice.models
    8
    """
    size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(family.shapes[0]["params"])) if keep_updates else 0
    _check(clients, eps1, eps2, gamma_max, linkage, max_clusters, min_clients, 4 * max_clusters * clients * size)
    base = compose(
        family,
        local=local,
        select=select.uniform(cohort),
        merge=merge.overlap_mean(family, by_examples=weighted),
        server=server.optimizer(**server_optimizer),
        slots=slots,
    )

    def start() -> Clusters:
        rows, sent = (max_clusters,), AtSplit(family.shapes[0], jnp.int32(0), {})
        return Clusters(
            jnp.zeros(clients, jnp.int32), jnp.int32(1), jnp.int32(0), jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.int32), jax.tree.map(lambda s: jnp.zeros((*rows, *s.shape), s.dtype), sent),
            jnp.full((*rows, clients), -1, jnp.int8), jnp.zeros((*rows, clients, size), jnp.float32),
        )  # fmt: skip

    inner = bank(base, max_clusters, by_table(start, max_clusters))
    rule = Rule(eps1, eps2, gamma_max, linkage, min_clients, first_round)
    return splitting(inner, base, rule, keep_updates)._replace(
        shown=report.shown(max_clusters, tree=True), clients=clients
    )


def _check(
    clients: int, eps1: float, eps2: float, gamma_max: float, linkage: str, size: int, least: int, kept: int
) -> None:
    if not 0 < eps1 <= eps2:
        raise ValueError(f"eps1 {eps1} and eps2 {eps2}: need 0 < eps1 <= eps2 (method.args.eps1, eps2)")
    if not 0 <= gamma_max < 1:
        raise ValueError(f"gamma_max {gamma_max}, allowed 0 <= gamma < 1 (method.args.gamma_max)")
    if linkage not in bipartition.LINKAGES:
        raise ValueError(f"linkage {linkage!r} is not one of {', '.join(bipartition.LINKAGES)} (method.args.linkage)")
    if not 1 <= size <= clients:
        raise ValueError(f"{size} clusters, allowed 1..{clients}, the clients (method.args.max_clusters)")
    if least < 3:
        raise ValueError(f"min_clients {least}, allowed >= 3: two clients cannot be told apart (method.args)")
    if kept > MOST_BYTES:
        raise ValueError(
            f"the updates of all splits need up to {kept / 1e9:.1f} GB: fewer max_clusters, or keep_updates=False "
            "and no placing of new clients (method.args.keep_updates)"
        )

"""SCAFFOLD (Karimireddy et al., ICML 2020, arXiv 1910.06378, algorithm 1, option II): control variates.

A local step is ``w <- w - rate (g + c - c_k)``; then ``c_k' = c_k - c + (w_received - w_k) / (steps rate)``. The server
averages the models and ``c <- c + sum_k (c_k' - c_k) / N`` over all N clients.

| slot | here |
|---|---|
| drift | the variate c_k of the client against c, which the server sends along |
| merge | plain mean over clients |
| server | mean, and the update of c |
"""

import jax.numpy as jnp

from hetfl_jax.core.types import Algorithm
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import drift, merge, select, server
from hetfl_jax.parts.compose import Slots, compose, refuse
from hetfl_jax.parts.local import Local


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    clients: int,
    mean_examples: float = 0.0,
    participation: float = 0.0,
    server_learning_rate: float = 1.0,
    keep_models: bool = False,
    authors_rate: bool = False,
    slots: Slots | None = None,
) -> Algorithm:
    """SCAFFOLD over a population of ``clients``; its messages are twice as large as FedAvg's.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      clients: N, in the population.
      mean_examples: if > 0, variates are weighed by ``n_k / mean_examples``, as FedDyn's authors do.
      participation, keep_models: as in ``feddyn``.
      server_learning_rate: of the server's step along the mean.
      authors_rate: divide by the learning rate of round 0 in every round, as the code of FedDyn's authors does, in
        place of the round's own.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: a value out of range.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2, clients=6).levels
    2
    """
    refuse("scaffold with a participation probability", slots or Slots(), select=participation > 0)
    if not local.plain:
        raise ValueError(
            "scaffold reads a client's gradient off its change: need optimizer sgd, momentum 0 (train.optimizer)"
        )
    first = local.learning_rate(jnp.int32(0))
    rule = drift.scaffold((lambda round: first) if authors_rate else local.learning_rate, mean_examples)
    return compose(
        family,
        local=local,
        select=select.bernoulli(participation, clients) if participation else select.uniform(cohort),
        drift=drift.remembering(rule) if keep_models else rule,
        merge=merge.overlap_mean(family, by_examples=False),
        server=server.scaffold(clients, server_learning_rate),
        slots=slots,
    )

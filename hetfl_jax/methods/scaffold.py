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
from hetfl_jax.parts.compose import compose
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
) -> Algorithm:
    """SCAFFOLD over a population of ``clients``; its messages are twice as large as FedAvg's.

    Args:
      mean_examples: if > 0, variates are weighed by ``n_k / mean_examples``, as FedDyn's authors do.
      participation, keep_models: as in ``feddyn``.
      server_learning_rate: of the server's step along the mean.

    Raises:
      ValueError: a value out of range.
    """
    rule = drift.scaffold(local.learning_rate(jnp.int32(0)), mean_examples)
    method = compose(
        family,
        local=local,
        select=select.bernoulli(participation, clients) if participation else select.uniform(cohort),
        drift=drift.remembering(rule) if keep_models else rule,
        merge=merge.overlap_mean(family, by_examples=False),
        server=server.scaffold(clients, server_learning_rate),
    )
    return method._replace(broadcast=2, messages=2)  # a variate goes with the model, both ways

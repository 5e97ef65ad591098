"""TERM, tilted empirical risk minimisation over clients (Li, Beirami, Sanjabi, Smith, ICLR 2021, arXiv 2007.01162).

``min_w (1 / t) log sum_k p_k exp(t F_k(w))``. Its gradient is the clients' gradients, weighed by ``p_k exp(t F_k)``
brought to a sum of 1: t > 0 favours the worst clients (towards the largest loss), t < 0 leaves outliers aside (towards
the smallest), t = 0 is FedAvg.

| slot | here |
|---|---|
| select | uniform |
| merge | the weights above, of the losses before training, entry by entry over the clients that hold it |
| server | plain averaging, or an optax optimizer |

The weights of a round are normalised over its participants.
"""

import math

from hetfl_jax.core.types import Algorithm, Arguments
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import fair, losses, merge, select, server
from hetfl_jax.parts.compose import Slots, compose
from hetfl_jax.parts.local import Local


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    tilt: float = 1.0,
    by_examples: bool = True,
    server_optimizer: Arguments = server.PLAIN,
    slots: Slots | None = None,
) -> Algorithm:
    """TERM with ``t = tilt``.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      tilt: 1 / loss, any finite number.
      by_examples: p_k grows with the client's examples, else all are alike.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: a tilt that is not finite.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2, tilt=-1.0).levels
    2
    """
    if not -math.inf < tilt < math.inf:
        raise ValueError(f"tilt {tilt}, allowed any finite number (method.args.tilt)")
    weights = merge.Weights(fair.tilted(tilt, by_examples), asks_received=True)
    return compose(
        family,
        local=local,
        select=select.uniform(cohort),
        merge=merge.overlap_mean(family, weights=weights),
        server=losses.with_level(server.optimizer(**server_optimizer), 0.0, losses.tilted_mean(tilt, by_examples)),
        slots=slots,
    )

"""FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1) and FedOpt (Reddi et al. 2021) by the server slot.

``w_k = LocalSGD(w)``, then ``w <- server(w, sum_k n_k (w_k - w) / sum_k n_k)``.

| slot | here |
|---|---|
| select | uniform cohort without replacement |
| objective | cross-entropy |
| merge | mean weighted by examples |
| server | plain averaging, or an optax optimizer on the pseudo-gradient |
"""

from hetfl_jax.core.types import Algorithm, Arguments
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import select, server
from hetfl_jax.parts.compose import Slots, compose
from hetfl_jax.parts.local import Local


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    server_optimizer: Arguments = server.PLAIN,
    slots: Slots | None = None,
) -> Algorithm:
    """FedAvg with ``cohort`` clients a round; ``server_optimizer`` as in ``parts.server.optimizer``.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2).levels
    2
    """
    return compose(
        family,
        local=local,
        select=select.uniform(cohort),
        server=server.optimizer(**server_optimizer),
        slots=slots,
    )

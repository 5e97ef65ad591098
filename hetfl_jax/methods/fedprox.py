"""FedProx (Li et al. 2020, arXiv 1812.06127, equation 2): FedAvg with a proximal term.

``min_w  F_k(w) + mu / 2 ||w - w_received||^2``; its gradient is added before clipping.

| slot | here |
|---|---|
| drift | proximal term |
| all others | as FedAvg |
"""

from hetfl_jax.core.types import Algorithm, Arguments
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import drift, select, server
from hetfl_jax.parts.compose import Slots, compose
from hetfl_jax.parts.local import Local


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    proximal_weight: float = 0.01,
    server_optimizer: Arguments = server.PLAIN,
    slots: Slots | None = None,
) -> Algorithm:
    """FedProx with ``proximal_weight`` (mu); 0 is FedAvg.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      proximal_weight: mu, >= 0, in units of 1 / learning rate.
      server_optimizer: as in ``parts.server.optimizer``.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2, proximal_weight=0.1).levels
    2
    """
    return compose(
        family,
        local=local,
        select=select.uniform(cohort),
        drift=drift.proximal(proximal_weight),
        server=server.optimizer(**server_optimizer),
        slots=slots,
    )

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
    """FedProx with ``proximal_weight`` (mu); 0 is FedAvg."""
    return compose(
        family,
        local=local,
        select=select.uniform(cohort),
        drift=drift.proximal(proximal_weight),
        server=server.optimizer(**server_optimizer),
        slots=slots,
    )

"""DepthFL (Kim et al., ICLR 2023): sub-models by depth, an exit per level, exits that teach each other, and FedDyn.

A client of depth d trains levels 1..d with all their exits. Every level becomes the plain mean over the clients that
hold it, statistics too, and is corrected by FedDyn's sums, which are kept per level; a level that nobody held stays as
it is. Depths are fixed by client: with depths that change, a client's sums for levels it drops would still count.

| slot | here |
|---|---|
| objective | cross-entropies of all exits, and distillation between every pair (``distill``) |
| drift, server | FedDyn (``feddyn_alpha`` > 0), or none and plain averaging (0) |
| merge | plain mean over the owners of a level |

The global model is judged by its last exit and by the mean of the logits of all of them (``ensemble``).
"""

from collections.abc import Sequence

from hetfl_jax.core.types import Algorithm
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import drift, merge, objective, select, server
from hetfl_jax.parts.compose import Slots, compose, refuse
from hetfl_jax.parts.local import Local


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    clients_per_level: Sequence[int],
    feddyn: bool = True,
    feddyn_alpha: float = 0.1,
    feddyn_denominator: str = "all",
    max_correction: float = 0.0,
    distill: bool = True,
    ramp_rounds: int = 300,
    ramp_power: float = 5.0,
    temperature: float = 1.0,
    train_all: bool = True,
    average_untrained: bool = False,
    slots: Slots | None = None,
) -> Algorithm:
    """DepthFL over a family whose levels differ in depth.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      clients_per_level: [L] clients of each level.
      feddyn: whether FedDyn is there, with alpha ``feddyn_alpha``; else this is DepthFL(FedAvg).
      feddyn_denominator, max_correction: see ``parts.server.feddyn``.
      distill, ramp_rounds, ramp_power, temperature: see ``parts.objective.all_exits``.
      train_all: ``False`` trains only a client's deepest exit: the row that the published table calls InclusiveFL.
      average_untrained: in that case, average exits also over the clients that held but did not train them, as the
        published code does.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: FedDyn's alpha <= 0, or another value out of range.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4, 4)), [dict(depth=2), dict(depth=1)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2, clients_per_level=(3, 3)).levels
    2
    """
    refuse("depthfl", slots or Slots(), objective=True)
    rule = drift.feddyn(feddyn_alpha) if feddyn else None
    return compose(
        family,
        local=local,
        select=select.uniform(cohort),
        objective=objective.all_exits(
            distill, ramp_rounds=ramp_rounds, ramp_power=ramp_power, temperature=temperature, train_all=train_all
        ),
        drift=rule,
        merge=merge.overlap_mean(family, by_examples=False, own_exit=not train_all, count_untrained=average_untrained),
        server=server.feddyn(family, clients_per_level, feddyn_denominator, max_correction) if rule else None,
        slots=slots,
    )

"""FedPAQ (Reisizadeh et al., AISTATS 2020, arXiv 1909.13014, algorithm 1): periodic averaging of quantised changes.

r of n clients make tau local steps and send ``Q(x_k - x)``, the quantised change; ``x <- x + 1/r sum_k Q(x_k - x)``.

| slot | here |
|---|---|
| select | r clients (``cohort``) uniformly without replacement |
| uplink | QSGD with s levels, or none |
| merge | plain mean |

tau is ``train.steps``. ``levels=0`` is FedAvg with a plain mean, ``train.steps=1`` QSGD. The metrics have the simulated
time of the paper's figures, see ``parts.clock``.
"""

from hetfl_jax.core.types import Algorithm
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import clock, codec, merge, select, server, sparse
from hetfl_jax.parts.compose import Slots, compose
from hetfl_jax.parts.local import Local


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    levels: int = 1,
    scope: str = "tensor",
    shift: float = 0.5,
    scale: float = 2.0,
    ratio: float = 100.0,
    bandwidth: float = 0.0,
    slots: Slots | None = None,
) -> Algorithm:
    """FedPAQ with ``levels`` s of the quantiser; a codec in ``slots`` takes its place.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      levels: s, 0 for no quantiser.
      scope: what has a norm of its own, see ``parts.codec.qsgd``; the paper's theory has one for the "whole" change.
      shift, scale, ratio, bandwidth: of the simulated time, see ``parts.clock.clock``; the paper's ratios are 100 for
        logistic regression and 1000 for nets.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: a value out of range.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2, levels=4).price().up.tolist()
    [392, 280]
    """
    slots = slots or Slots()
    if levels and not slots.uplink:
        try:
            slots = slots._replace(uplink=codec.qsgd(family, levels, scope))
        except ValueError as error:
            raise ValueError(str(error).replace("uplink.args", "method.args")) from None
    parameters = sum(int(entries[0]) for entries in sparse.sizes(family).values())
    time = clock.clock(parameters, shift=shift, scale=scale, ratio=ratio, bandwidth=bandwidth)
    base = compose(
        family,
        local=local,
        select=select.uniform(cohort),
        merge=merge.overlap_mean(family, by_examples=False),
        server=clock.remembering(server.optimizer()),
        slots=slots,
    )
    return clock.timed(base, time)

"""HeteroFL (Diao, Ding, Tarokh, ICLR 2021, arXiv 2010.01264, algorithm 1): sub-models by width.

Each client trains the leading ``ceil(R C)`` channels of every layer. Every entry becomes the plain mean over the
clients that held it; entries of the classifier count only for clients that hold the class; entries that nobody held
stay as they are. While training, the Scaler divides by R and logits of absent classes are set to zero.

| slot | here |
|---|---|
| capacity | the client's own level (``fixed``) or drawn every round (``dynamic``, as in the paper's tables) |
| objective | masked cross-entropy |
| merge | mean by counts, with class rows |
| server | plain averaging, or an optax optimizer |
"""

from collections.abc import Sequence

from hetfl_jax.core.types import Algorithm, Arguments
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import merge, objective, select, server
from hetfl_jax.parts.compose import Slots, compose, refuse
from hetfl_jax.parts.local import Local

ASSIGNMENTS = ("dynamic", "fixed")


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    proportions: Sequence[float],
    assignment: str = "dynamic",
    mask: bool = True,
    server_optimizer: Arguments = server.PLAIN,
    slots: Slots | None = None,
) -> Algorithm:
    """HeteroFL over the levels of ``family``.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      proportions: how often each level occurs (``dynamic``); ``fixed`` takes the population's levels.
      mask: the masked loss; class rows in the aggregation are counted either way, as in the official code.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: an unknown assignment, or proportions that do not match the levels.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2, proportions=(1, 3)).drawn
    (1.0, 3.0)
    """
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"assignment {assignment!r} is not one of {', '.join(ASSIGNMENTS)} (method.args.assignment)")
    if len(proportions) != family.levels or min(proportions) <= 0:
        raise ValueError(f"proportions {tuple(proportions)}: need {family.levels} positive numbers (method.args)")
    refuse("heterofl with mask=True", slots or Slots(), objective=mask)
    return compose(
        family,
        local=local,
        select=select.uniform(cohort),
        capacity_of=select.drawn_level(proportions) if assignment == "dynamic" else select.own_level(),
        objective=objective.masked_cross_entropy() if mask else None,
        merge=merge.overlap_mean(family, by_examples=False, class_rows=True),
        server=server.optimizer(**server_optimizer),
        slots=slots,
    )

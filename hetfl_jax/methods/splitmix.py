"""Split-Mix (Hong, Wang, Wang, Zhou, ICLR 2022, arXiv 2203.09747, algorithms 1-3): a wide net is several thin ones.

The full net is split into M independent base nets of width r = 1 / M, each with a start of its own. A client trains as
many of them as its budget holds, all on one stream of batches: first the base whose turn it is, then random others.
Each base becomes the mean of the clients that trained it, weighted by examples; one that nobody trained stays. A net
of width k r is the mean of the logits of the first k bases, for any k, chosen when it is used.

| slot | here |
|---|---|
| members of the bank | M bases, handed out in rotation |
| objective | cross-entropy, or with the logits of classes that a batch lacks set to zero (``class_masks``) |
| merge | mean weighted by examples |
| tiers | numbers of bases |

The family is one base net: ``family.mix`` names its width, as in ``w0.125x1``.
"""

from collections.abc import Sequence

from hetfl_jax.core.types import Algorithm, Arguments
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import ensemble, objective, private, select, server
from hetfl_jax.parts.bank import bank
from hetfl_jax.parts.budgets import base_fraction
from hetfl_jax.parts.budgets import schedule as budgets_by
from hetfl_jax.parts.compose import Slots, compose, refuse
from hetfl_jax.parts.local import Local
from hetfl_jax.parts.rotation import once_a_client, rotation


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    clients: int,
    base_width: float = 0.125,
    budgets: str = "8-4-2-1",
    budget_order: str = "clients",
    bases: Sequence[int] = (),
    class_masks: bool = False,
    local_norms: bool = False,
    post_average: int = 0,
    order_by_validation: bool = False,
    server_optimizer: Arguments = server.PLAIN,
    slots: Slots | None = None,
) -> Algorithm:
    """Split-Mix over ``1 / base_width`` base nets of ``family``.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      clients: in the population.
      base_width: of ``family``, against the full net.
      budgets, budget_order: how wide a net each client can train, see ``parts.budgets.schedule``.
      bases: numbers of bases that are offered and evaluated; default: all budgets, and all bases.
      class_masks: set the logits of classes that a batch lacks to zero while training.
      local_norms: norms, statistics and affine maps, stay on the client (FedBN), one set for each of its bases.
      post_average: with ``family.norm=bn``, passes over a client's training data whose mean statistics its model has
        when it is judged on the client's test data (20 in the paper); 0 for one pass over everybody's.
      order_by_validation: the first bases are those with the best validation accuracy, not those of the least number.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: a value out of range, budgets that are no whole bases, or a family with several levels.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2, clients=6, base_width=0.5, budgets='2-1').members
    2
    """
    slots = slots or Slots()
    refuse("splitmix", slots, capacity=True)
    if family.levels != 1:
        raise ValueError(f"splitmix over {family.levels} levels: name the base net alone, as in w0.125x1 (family.mix)")
    size, shares = int(1 / base_fraction(base_width)), budgets_by(budgets, base_width, clients, budget_order)
    own = private.norms(family) if local_norms else None
    rule = slots.select or select.uniform(cohort)
    base = compose(
        family,
        local=local,
        select=once_a_client(rule),
        capacity_of=select.Capacity(lambda key, ids, population: 0 * ids),
        objective=objective.batch_masked_cross_entropy() if class_masks else None,
        server=server.optimizer(**server_optimizer),
        private=own,
        slots=slots._replace(select=None),
    )
    made = bank(base, size, rotation(size, shares, rule.repeats))
    return ensemble.of_members(
        made, base, family, bases or {*shares.bases, size}, size, shares.mean(),
        adversary=slots.adversary, private=own, passes=post_average, batch=local.batch_size,
        ordered=order_by_validation,
    )  # fmt: skip

"""FedDyn (Acar et al., ICLR 2021): dynamic regularisation; every client corrects for its own drift.

Client k keeps ``s_k``, the sum of its changes ``w_k - w`` over the rounds in which it took part, and trains
``min_w F_k(w) + alpha_k <s_k, w> + alpha_k / 2 ||w - w_received||^2``. The server keeps ``m = mean_k s_k`` over ALL
clients and sends ``w = mean_{participants} w_k + m``. In the paper's terms the dual is ``-alpha_k s_k`` and ``h`` is
``-alpha m``; with clients of unequal size only the sums are well defined, so they are what is kept.

| slot | here |
|---|---|
| select | uniform cohort, or every client independently (``participation``) |
| drift | the sums s_k, linear part inside the clipping, quadratic part as weight decay |
| merge | plain mean over clients |
| server | mean plus m |

Evaluated are the model that is sent (``cld`` in the paper's code), the mean of the round's participants (``sel``), and
with ``keep_models`` the mean of every client's last model (``all``).
"""

from collections.abc import Sequence

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
    clients_per_level: Sequence[int],
    feddyn_alpha: float = 0.01,
    mean_examples: float = 0.0,
    participation: float = 0.0,
    feddyn_denominator: str = "all",
    max_correction: float = 0.0,
    keep_models: bool = False,
    slots: Slots | None = None,
) -> Algorithm:
    """FedDyn with alpha ``feddyn_alpha``.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, if ``participation`` is 0.
      clients_per_level: [L] clients of each level.
      mean_examples: if > 0, ``alpha_k = alpha * mean_examples / n_k`` (as the paper's code does for unequal clients).
      participation: if > 0, every client takes part with this probability instead.
      feddyn_denominator, max_correction: see ``parts.server.feddyn``.
      keep_models: keep every client's last model, a second model-sized memory, and evaluate their mean.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: alpha <= 0, or another value out of range.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2, clients_per_level=(3, 3)).levels
    2
    """
    refuse("feddyn with a participation probability", slots or Slots(), select=participation > 0)
    rule = drift.feddyn(feddyn_alpha, mean_examples)
    return compose(
        family,
        local=local,
        select=select.bernoulli(participation, sum(clients_per_level)) if participation else select.uniform(cohort),
        drift=drift.remembering(rule) if keep_models else rule,
        merge=merge.overlap_mean(family, by_examples=False),
        server=server.feddyn(family, clients_per_level, feddyn_denominator, max_correction),
        slots=slots,
    )

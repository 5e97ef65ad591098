"""q-FFL (Li, Sanjabi, Beirami, Smith, ICLR 2020, arXiv 1905.10497, algorithm 2): clients with a larger loss count more.

``min_w sum_k F_k(w)^(q+1) / (q+1)``. With F_k the loss of the received model on all of client k's examples, before
training, and ``g_k = (w - w_k) / rate``: ``w <- w - sum_k F_k^q g_k / sum_k h_k``,
``h_k = q F_k^(q-1) ||g_k||^2 + F_k^q / rate``. q = 0 is the plain mean of the participants' models.

| slot | here |
|---|---|
| select | clients in proportion to their data, without replacement |
| merge | the weights above, entry by entry over the clients that hold it |

q-FedSGD is one full-batch step (``train.full_batch``, ``train.epochs=1``). Under levels the denominator is counted for
each entry over the clients that hold it, which is our extension.
"""

from hetfl_jax.core.types import Algorithm, Arguments, Array, ClientContext, PyTree
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import choose, fair, losses, merge, server
from hetfl_jax.parts.compose import Slots, compose
from hetfl_jax.parts.local import Local


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    q: float = 1.0,
    static_step_size: bool = False,
    server_optimizer: Arguments = server.PLAIN,
    slots: Slots | None = None,
) -> Algorithm:
    """q-FFL with ``q``.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      q: how much more a client with a large loss counts, >= 0; 0 for not at all.
      static_step_size: every ``h_k`` is ``1 / rate``.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: a negative q.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2, q=2.0).levels
    2
    """
    if not q >= 0:
        raise ValueError(f"q {q}, allowed >= 0 (method.args.q)")

    def weights(context: ClientContext, delta: PyTree) -> tuple[Array, Array]:
        return fair.q_ffl(q, local.learning_rate(context.round), fixed_step=static_step_size)(context, delta)

    averaging = server.optimizer(**server_optimizer)
    return compose(
        family,
        local=local,
        select=choose.weighted(cohort),
        merge=merge.overlap_mean(family, weights=merge.Weights(weights, asks_received=True) if q else merge.BY_COUNT),
        server=losses.with_level(averaging, 1.0, losses.largest) if q else averaging,
        slots=slots,
    )

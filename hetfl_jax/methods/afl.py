"""AFL, agnostic federated learning (Mohri, Sivek, Suresh, ICML 2019, arXiv 1902.00146, algorithm 1).

``min_w max_{lambda in simplex} sum_k lambda_k F_k(w)``: good for any mixture of the clients. The model goes against
``sum_k lambda_k g_k / sum_k lambda_k``; then ``lambda <- projection(lambda + rate F)``, so that clients of large loss
count more. What the theory speaks of is the mean of the models of all rounds, ``average``.

| slot | here |
|---|---|
| select | uniform; the original has all clients in every round: ``method.args.cohort`` = the number of clients |
| merge | lambda_k, entry by entry over the clients that hold it |
| server | plain averaging, the weights of all clients, the mean of the models |

The original's g_k is one full-batch gradient (``train.full_batch``, ``train.epochs=1``). With fewer clients in a round
only their weights grow, which is our extension, and so are more local steps, and levels.
"""

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
    clients: int,
    weight_rate: float = 0.1,
    server_optimizer: Arguments = server.PLAIN,
    slots: Slots | None = None,
) -> Algorithm:
    """AFL with N = ``clients``.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      clients: N, in the population; a weight is kept of each.
      weight_rate: of the weights, 1 / loss, > 0.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: a rate not above 0, or no clients.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2, clients=6).judge is None
    True
    """
    if not weight_rate > 0:
        raise ValueError(f"weight_rate {weight_rate}, allowed > 0 (method.args.weight_rate)")
    if clients < 1:
        raise ValueError(f"{clients} clients, allowed >= 1 (data.clients)")
    made = compose(
        family,
        local=local,
        select=select.uniform(cohort),
        merge=merge.overlap_mean(family, weights=merge.Weights(fair.agnostic, asks_received=True)),
        server=losses.agnostic(server.optimizer(**server_optimizer), clients, weight_rate),
        slots=slots,
    )
    return made._replace(judge=None)  # Weights of one model: several models side by side would need several.

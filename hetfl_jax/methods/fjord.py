"""FjORD (Horvath et al., NeurIPS 2021, arXiv 2102.13451): ordered dropout, and wide nets teach the narrower ones.

A client trains, at every batch, the leading ``ceil(p C)`` units of every layer for a rate p drawn among those not above
its own, p_max; the net of p_max, which learns from the labels, teaches it (``alpha``, ``temperature``). Every entry
becomes the mean over the clients whose p_max covers it, weighted by examples. Norm ``bn_tiers`` keeps statistics for
each rate and one affine map; those of p are averaged over the clients with p_max >= p.

| slot | here |
|---|---|
| capacity | the client's own level, its p_max |
| objective | ordered dropout; or random dropout, the paper's baselines |
| merge | mean weighted by examples, over those that hold an entry |
| server | plain averaging, or an optax optimizer |

Baselines, by ``dropout``. ``random`` (eFD): all clients train the net of the mix's first level, and those below it drop
units at random until their own number is left; one run a level, whose mix begins with it. ``both`` (FjORD + eFD):
ordered dropout from one level above the client's own, where at most ``most_dropped`` of the units are dropped at
random. Units are masked, so what runs and travels, and is counted, is the whole net of the level.
"""

from collections.abc import Sequence
from itertools import pairwise

import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Algorithm, Arguments, Plan, PyTree, Tier
from hetfl_jax.models.costs import costs
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import ordered, select, server
from hetfl_jax.parts.compose import Slots, compose, refuse
from hetfl_jax.parts.local import Local

DROPOUTS = ("ordered", "random", "both")


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    clients_per_level: Sequence[int],
    distill: bool = True,
    alpha: float = 1.0,
    temperature: float = 1.0,
    dropout: str = "ordered",
    most_dropped: float = 0.25,
    server_optimizer: Arguments = server.PLAIN,
    slots: Slots | None = None,
) -> Algorithm:
    """FjORD over the levels of ``family``, nested widths.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      clients_per_level: [L] clients of each level.
      distill, alpha, temperature: see ``parts.ordered.ordered_dropout``.
      dropout: ``ordered``, or a baseline: ``random``, ``both``, both without distillation.
      most_dropped: of ``both``, see ``parts.ordered.random_dropout``.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: a value out of range, levels that are not nested widths, or a norm that all rates would overwrite.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2, clients_per_level=(3, 3)).levels
    2
    """
    if dropout not in DROPOUTS:
        raise ValueError(f"dropout {dropout!r} is not one of {', '.join(DROPOUTS)} (method.args.dropout)")
    widths = _widths(family, units_drop=dropout != "ordered")
    if dropout == "ordered":
        goal = ordered.ordered_dropout(family.levels, distill=distill, alpha=alpha, temperature=temperature)
    else:
        refuse(f"fjord with dropout={dropout}", slots or Slots(), capacity=True)
        if distill:
            raise ValueError(f"distill with dropout {dropout!r}: need false (method.args.distill)")
        goal = ordered.random_dropout(widths, ordered=dropout == "both", most=most_dropped)
    algorithm = compose(
        family,
        local=local,
        select=select.uniform(cohort),
        objective=goal,
        server=server.optimizer(**server_optimizer),
        slots=slots,
    )
    return algorithm if dropout == "ordered" else _above_its_means(algorithm, family, clients_per_level, dropout)


def _above_its_means(algorithm: Algorithm, family: Family, clients: Sequence[int], dropout: str) -> Algorithm:
    """Items run at another level than the client's own, which their ticket says."""
    runs_at = np.zeros(family.levels, int) if dropout == "random" else np.maximum(np.arange(family.levels) - 1, 0)

    def plan(*args: PyTree) -> Plan:
        own = algorithm.plan(*args)
        return own._replace(level=jnp.asarray(runs_at, jnp.int32)[own.level], ticket=own.level)

    drawn = tuple(float(n) for n in np.bincount(runs_at, clients, family.levels))
    cost = costs(family)
    whole = (Tier("whole", *(int(row[0]) for row in (cost.parameters, cost.bytes, cost.macs))),)
    return algorithm._replace(plan=plan, drawn=drawn, tiers=whole if dropout == "random" else ())


def _widths(family: Family, units_drop: bool) -> list[float]:
    """Widths of the levels, checked.

    Raises:
      ValueError: levels of depth, widths that do not fall, or a net that cannot do what is asked.
    """
    net = family.nets[0].module
    widths = [float(w) for w in family.fields.get("width", np.ones(family.levels))]
    if family.exits.max() > 1 or "depth" in family.fields:
        raise ValueError("FjORD needs levels of width alone, such as w1x1-w0.5x1 (family.mix)")
    if any(b >= a for a, b in pairwise(widths)):
        raise ValueError(f"widths {', '.join(f'{w:g}' for w in widths)}: FjORD needs them to fall (family.mix)")
    norm = getattr(net, "norm", "none")
    if len(widths) > 1 and norm in ("bn_tracked", "bn_dual", "bn_dual_shared"):
        raise ValueError(f"norm {norm!r} has one set of statistics for all rates: need bn_tiers (family.norm)")
    if units_drop and not getattr(net, "drops_units", False):
        raise ValueError(
            f"random dropout in net {type(net).__name__}, which has none: need ordered (method.args.dropout)"
        )
    return widths

"""LAG (Chen, Giannakis, Sun, Yin, NeurIPS 2018, arXiv 1805.09965): workers upload a gradient only if it has changed.

``min_theta sum_m L_m(theta)``, L_m a sum over the worker's examples plus ``l2 / 2 ||theta||^2``; all M take part.
``theta <- theta - rate sum_m g^_m``, g^_m the gradient that worker m uploaded last. ``parts.lazy`` says who uploads:

| rule | uploads | computes a gradient | downloads |
|---|---|---|---|
| wk | a worker whose gradient has changed | everybody | everybody |
| ps | a worker whom the server asks, since the model has moved far | who is asked | who is asked |
| gd | everybody: gradient descent | everybody | everybody |
| cyclic_iag | one in turn | it | it |
| num_iag | one, drawn in proportion to its smoothness | it | it |

In the first round all upload. The two IAG rules step by ``rate / M``. The training loss and ``objective``, the sum that
is minimised, are those of all workers at the model of the round, whoever was asked.

| slot | here |
|---|---|
| drift | the gradient of the sum: that of the mean times n_k, plus ``l2 theta`` |
| uplink | all bits and the gradient, or none and the last one |
| merge | the sum |

Extensions, not in the paper: ``same_batch`` compares gradients on one mini-batch at both points (as LASG-WK2 does), and
``local_steps`` compares changes by several deterministic local steps on the mean loss, which are averaged, of any net.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp

from hetfl_jax.core.types import Algorithm, Array, Info, Plan, Population, PyTree
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import convex, drift, lazy, merge, select, uploads
from hetfl_jax.parts.compose import Slots, compose, refuse
from hetfl_jax.parts.local import Local

EXTENSIONS = ("none", "same_batch", "local_steps")


def make(
    family: Family,
    local: Local,
    *,
    clients: int,
    population: Population | None = None,
    rule: str = "wk",
    window: int = 10,
    xi: float = -1.0,
    l2: float = 0.0,
    smoothness: Sequence[float] = (),
    server_learning_rate: float = 0.0,
    lc_start: bool = False,
    extension: str = "none",
    slots: Slots | None = None,
) -> Algorithm:
    """LAG over ``clients`` workers; the paper's rate is ``1 / L``, L the smoothness of the whole sum.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      clients: M, the workers; all of them take part in every round.
      population: the workers' examples, from which ``smoothness`` is found if it is not given.
      rule: one of ``lazy.RULES``.
      window: D, steps that W sums.
      xi: factor of W, >= 0; -1: ``1 / D`` of wk, ``10 / D`` of ps. 0 is gradient descent.
      l2: of every worker.
      smoothness: [M] L_m, of ps and num_iag.
      server_learning_rate: of the step along the sum; 0: 1, of the two IAG rules ``1 / M``.
      lc_start: as the published code starts: gradients of ones count as sent, and nobody uploads in the first D rounds.
      extension: one of ``EXTENSIONS``.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: a value out of range, mini-batches or a net that is not linear without an extension that allows them.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=()), [{}], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.01, batch_size=9, full_batch=True), clients=6).levels
    1
    """
    slots = slots or Slots()
    how = _checked(family, local, rule, extension, lc_start, xi, l2)
    refuse("lag", slots, select=True, uplink=True, capacity=True, downlink=how.by_server)
    averages = extension == "local_steps"
    curved = None
    if how.needs_smoothness:
        squares = bool(slots.objective and slots.objective.numbers)
        curved = convex.given_or_found(smoothness, clients, family, population, squares, l2)
    share = jnp.asarray(1.0 if averages else 1 / clients)  # 1 / M of each makes the mean a sum
    composed = partial(
        compose,
        family,
        local=local,
        select=select.everyone(),
        capacity_of=select.Capacity(lambda key, ids, people: jnp.zeros_like(ids)),
        drift=None if averages else drift.summed(l2),
        merge=merge.overlap_mean(family, weights=merge.Weights(lambda context, delta: (jnp.float32(1), share))),
        server=lazy.server(window, server_learning_rate or (1 / clients if how.turn and how.by_server else 1.0)),
    )
    by = "batch" if extension == "same_batch" else how.by
    uplink = lazy.codec(family, local.learning_rate, by, float(lc_start))
    base = composed(slots=slots._replace(uplink=uplink))
    factor = (xi if xi >= 0 else how.xi / window) / (1 if averages else clients) ** 2
    ticket = lazy.tickets(how, local.learning_rate, factor, window if lc_start else 0, curved)

    def plan(key: Array, round: Array, state: PyTree, people: Population, survey: Callable[..., PyTree]) -> Plan:
        planned = base.plan(key, round, state, people, survey)
        return planned._replace(ticket=ticket(key, round, state.slot, planned.ids))

    def serve(state: PyTree, plan: Plan, sent: PyTree, total: PyTree, seen: PyTree, ok: Array) -> tuple[PyTree, Info]:
        after, info = base.server(state, plan, sent, total, seen, ok)
        numbers = {**info.numbers, "uploads": ((seen.up > 0).any(-1) & ok).sum()}
        if not averages:
            decay = l2 / 2 * clients * lazy.squared(sent.variables["params"])
            numbers["objective"] = jnp.where(ok, seen.tally.loss, 0).sum() + decay
        return after, info._replace(numbers=numbers)

    client = lazy.idle_unless_asked(base.client) if how.by_server else base.client
    if by == "batch":
        client = lazy.at_both_points(composed(slots=slots).client, client)
    return base._replace(plan=plan, client=client, server=serve, shown=uploads.shown())


def _checked(
    family: Family, local: Local, rule: str, extension: str, lc_start: bool, xi: float, l2: float
) -> lazy.Rule:
    """The rule, if all fits."""
    for value, allowed, key in ((rule, tuple(lazy.RULES), "rule"), (extension, EXTENSIONS, "extension")):
        if value not in allowed:
            raise ValueError(f"{key} {value!r} is not one of {', '.join(allowed)} (method.args.{key})")
    if family.levels > 1:
        raise ValueError(f"lag with {family.levels} levels: need one, gradients are of the whole model (family.mix)")
    if set(family.shapes[0]) != {"params"}:
        raise ValueError("lag with batch statistics, which would travel every round: need none (family.norm)")
    if not (xi >= 0 or xi == -1):
        raise ValueError(f"xi {xi}, allowed >= 0, or -1 for the paper's (method.args.xi)")
    if not l2 >= 0:
        raise ValueError(f"l2 {l2}, allowed >= 0 (method.args.l2)")
    if extension != "none" and rule != "wk":
        raise ValueError(f"extension {extension!r} with rule {rule!r}: need wk (method.args.rule)")
    if lc_start and lazy.RULES[rule].turn:
        raise ValueError(f"lc_start with rule {rule!r}: need wk or ps (method.args.lc_start)")
    _check_local(family, local, extension)
    return lazy.RULES[rule]


def _check_local(family: Family, local: Local, extension: str) -> None:
    if extension == "local_steps":
        if local.shuffle:
            raise ValueError("extension 'local_steps' with other steps every round: need train.shuffle=False")
        return
    if (local.steps or local.epochs) != 1 or not local.plain:
        raise ValueError(
            "lag sends gradients: need one local step of sgd without momentum (train.epochs=1, train.optimizer), or "
            "method.args.extension=local_steps"
        )
    if extension == "same_batch":
        if not local.steps:
            raise ValueError("extension 'same_batch' compares one mini-batch a round: need train.steps=1")
        return
    if not local.full_batch:
        raise ValueError(
            "lag with mini-batches, whose noise makes every worker upload: need train.full_batch=True, or "
            "method.args.extension=same_batch"
        )
    if not convex.is_linear(family):
        kind = type(family.nets[0].module).__name__
        raise ValueError(
            f"lag with net {kind}, which is not linear in its parameters: need linear or logistic (family.net), or "
            "method.args.extension=local_steps"
        )

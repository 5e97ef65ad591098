"""IFCA (Ghosh, Chung, Yin, Ramchandran 2020, arXiv 2006.04088, algorithm 1): clusters by least loss, over any method.

All k models go to every client. Before training, client i takes ``a_i = argmin_j F_i(theta_j)``, the mean loss on all
of its examples (lowest number on ties), and trains that one. Then

- model averaging (option II): ``theta_j <- mean of theta_i over a_i = j``;
- gradient averaging (option I): ``theta_j <- theta_j - gamma / m sum_{a_i = j} grad F_i(theta_j)``, divided by all m
  participants: one full-batch step a round.

A model that nobody takes stays as it is. The k starts must differ; some starts never find all clusters, so several
can be tried in one program and the best by training loss goes on.

| slot | here |
|---|---|
| route of the bank | least loss, inside the client |
| merge | plain mean over clients, or weighted by examples (``weighted``, as the LEAF code does) |
| all others | those of the method inside |
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax import methods
from hetfl_jax.clusters import report
from hetfl_jax.core.absent import HIGHEST
from hetfl_jax.core.random import permute
from hetfl_jax.core.types import Algorithm, Arguments, Array, Plan, PyTree
from hetfl_jax.models import windows
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import drift, merge, select, server
from hetfl_jax.parts.bank import Report, Route, bank
from hetfl_jax.parts.compose import Slots, compose
from hetfl_jax.parts.local import Local, Tally

ROUNDING = 1e-6  #: losses this close, relatively, are equal
AVERAGING = ("models", "gradients")


class Restarts(NamedTuple):
    """Which of several random starts leads."""

    leader: Array  #: int32
    decided: Array  #: bool, the others are no longer trained
    rounds: Array  #: int32, rounds done


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    clusters: int = 2,
    averaging: str = "models",
    weighted: bool = False,
    over: str = "",
    over_args: Arguments = MappingProxyType({}),
    restarts: int = 1,
    restart_rounds: int = 3,
    min_share: float = 0.0,
    forced_rounds: int = 0,
    shared: Sequence[str] = (),
    freeze_shared: bool = False,
    warm_start: str = "",
    redraw: Sequence[str] = ("head",),
    server_optimizer: Arguments = server.PLAIN,
    proportions: Sequence[float] = (),
    clients_per_level: Sequence[int] = (),
    clients: int = 0,
    slots: Slots | None = None,
) -> Algorithm:
    """IFCA with ``clusters`` models.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      averaging: ``models`` or ``gradients``.
      weighted: weigh clients by their examples.
      over, over_args: another method inside, e.g. ``heterofl``, with its arguments, in place of plain local training;
        it brings its own loss, weights and server.
      restarts: random starts that are trained side by side. ``restart_rounds`` rounds later, by the losses with which
        the next round begins (all still train in it), the one with the least mean training loss goes on alone. Not
        with client memory (FedDyn, SCAFFOLD, DepthFL, ``keep_momentum``), but for ``min_share``.
      min_share: if > 0, the start is chosen before training instead: the first of ``restarts`` in which every model is
        taken by at least this share of the first cohort (else the one whose least share is largest). Where a method
        inside has several levels, every client judges at the largest.
      forced_rounds: rounds in which every model is trained by a random share of the clients, always the same, before
        they choose (one start only). They count as rounds, and a cohort is drawn from all clients as ever.
      shared: layers that all clusters have in common, averaged over all participants, or without a gradient
        (``freeze_shared``; a weight decay of all layers still moves them, that of ``decay_layers`` need not). Averaged,
        they need a server without a count of steps (not adam, yogi).
      warm_start: file that ``hetfl export`` wrote; all models start there, apart from the layers ``redraw``.
      server_optimizer: as in ``parts.server.optimizer``.
      proportions, clients_per_level, clients: how often each level occurs, and how many clients there are, for a method
        inside that wants to know. FedDyn and DepthFL inside divide a cluster's sums by all clients unless ``over_args``
        gives fewer.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: a value out of range.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=4, clusters=3).choice.models
    3
    """
    _check(cohort, clusters, averaging, min_share, family, [*shared, *(redraw if warm_start else ())])
    if over:
        own = {
            "weighted": weighted,
            "freeze_shared": freeze_shared,
            "server_optimizer": {**server.PLAIN, **server_optimizer} != server.PLAIN,
        }
        if ignored := [name for name, given in own.items() if given]:
            raise ValueError(f"{ignored[0]} with over={over!r}, which has its own (method.args.{ignored[0]})")
        told = {"proportions": proportions, "clients_per_level": clients_per_level, "clients": clients}
        base = _inside(over, over_args, family, local, cohort, told, slots)
    else:
        base = compose(
            family,
            local=local,
            select=select.uniform(cohort),
            drift=drift.frozen(shared) if freeze_shared else None,
            merge=merge.overlap_mean(family, by_examples=weighted),
            server=server.optimizer(**server_optimizer),
            slots=slots,
        )
    if warm_start:
        base = base._replace(init=_warm(base.init, warm_start, redraw))
    _check_starts(base, restarts, restart_rounds, min_share, forced_rounds, clients)
    if shared and not freeze_shared:
        _check_shared(base, family, shared)
    route = least_loss(clusters, restarts, restart_rounds, min_share, forced_rounds, clients)
    made = bank(base, clusters * restarts, route, divide_by_all=averaging == "gradients", shared=shared)
    made = made._replace(shown=report.shown(clusters), clients=clients)
    return made if restarts == 1 or min_share > 0 else _noted(made, restarts, restart_rounds)


def _noted(made: Algorithm, restarts: int, restart_rounds: int) -> Algorithm:
    """The method with a note on what the first rounds cost."""
    note = f"{restarts} times that, and the bytes, in the first {restart_rounds + 1} rounds"
    price = made.price
    assert price is not None
    return made._replace(price=lambda: price()._replace(note=note))


def _inside(
    name: str, args: Arguments, family: Family, local: Local, cohort: int, told: Arguments,
    slots: Slots | None,
) -> Algorithm:  # fmt: skip
    """The method called ``name``, with what it wants to know."""
    if name not in methods.names():
        raise ValueError(f"method {name!r} inside IFCA is not one of {', '.join(methods.names())} (method.args.over)")
    make = methods.find(name)
    known = methods.arguments(make)
    given = {"cohort": cohort, **{k: v for k, v in told.items() if k in known}, **args}
    need = {k for k, p in known.items() if p.default is p.empty}
    if wrong := (set(given) - set(known)) | (need - set(given)):
        raise ValueError(f"argument {min(wrong)!r} of {name} is missing or unknown (method.args.over_args)")
    return methods.build(name, make, family, local, given, slots)


def _check(cohort: int, clusters: int, averaging: str, min_share: float, family: Family, layers: Sequence[str]) -> None:
    if not 1 <= clusters <= cohort:
        raise ValueError(f"{clusters} clusters, allowed 1..{cohort}, the clients of a round (method.args.clusters)")
    if averaging not in AVERAGING:
        raise ValueError(f"averaging {averaging!r} is not one of {', '.join(AVERAGING)} (method.args.averaging)")
    if not 0 <= min_share <= 1 / clusters:  # no arithmetic: a product of a setting is traced
        raise ValueError(f"min_share {min_share}, allowed 0..1/clusters = {1 / clusters:.4g} (method.args.min_share)")
    known = family.shapes[0]["params"]
    if wrong := [name for name in layers if name not in known]:
        raise ValueError(f"layer {wrong[0]!r} is not one of {', '.join(known)} (method.args.shared, redraw)")


def _check_starts(
    base: Algorithm, restarts: int, restart_rounds: int, min_share: float, forced_rounds: int, clients: int
) -> None:
    if restarts < 1 or restart_rounds < 0:
        raise ValueError(f"{restarts} restarts, {restart_rounds} rounds, allowed >= 1 and >= 0 (method.args.restarts)")
    remembers = jax.tree.leaves(jax.eval_shape(base.init, jax.random.key(0))[1])
    if restarts > 1 and min_share == 0 and remembers:
        raise ValueError(
            f"{restarts} restarts of clients with memory, which the starts would share: need 1, or min_share > 0 "
            "(method.args.restarts)"
        )
    if forced_rounds and (restarts > 1 or forced_rounds < 0 or clients < 1):
        raise ValueError(
            f"forced_rounds {forced_rounds} with {restarts} restarts, {clients} clients: need 0, or > 0, 1 and > 0 "
            "(method.args)"
        )


def _check_shared(base: Algorithm, family: Family, shared: Sequence[str]) -> None:
    """A count of steps would be a member's own, and correct the moments of common layers differently for each."""
    state = windows.flat(jax.eval_shape(base.init, jax.random.key(0))[0])
    if counts := [path for path in state if set(path).isdisjoint(family.shapes[0]["params"])]:
        raise ValueError(
            f"shared layers {', '.join(shared)} with a server that keeps {'/'.join(counts[0])}: need one without, sgd, "
            "momentum or adagrad (method.args.shared)"
        )


def least_loss(
    clusters: int, restarts: int = 1, restart_rounds: int = 3, min_share: float = 0.0, forced_rounds: int = 0,
    clients: int = 0,
) -> Route:  # fmt: skip
    """Every item trains the member of its group with the least loss; ``restarts`` groups run as further items.

    In the first ``forced_rounds`` a client's member is fixed, a share of all ``clients`` for each; the ticket says
    which, counted from 1.

    Args:
      clusters: k, models of a group.
      restarts, restart_rounds, min_share, forced_rounds, clients: see ``make``.

    Returns:
      A ``Route`` whose clients judge all models of their group.

    Source: Ghosh, Chung, Yin, Ramchandran 2020, algorithm 1: the estimate of a client's cluster.

    >>> judge = lambda first, count: Tally(jnp.array([3.0, 1.0]), (), ())
    >>> int(least_loss(2).choose((), judge)[0])
    1
    """

    def init() -> Restarts:
        return Restarts(jnp.int32(0), jnp.asarray(restarts == 1), jnp.int32(0))

    def plan(key: Array, state: Restarts, plan: Plan, ask: Callable[[Array], Tally]) -> tuple[Plan, Restarts]:
        if forced_rounds:
            forced = 1 + permute(jax.random.key(0), plan.ids, clients) % clusters
            ticket = jnp.where(state.rounds < forced_rounds, forced, 0)
            return plan._replace(ticket=ticket, stream=ticket), state
        if restarts == 1:
            return plan, state
        if min_share > 0:
            chosen = jax.lax.cond(state.rounds == 0, lambda: shares(ask(plan.ids), plan.valid), lambda: state.leader)
            state = state._replace(leader=chosen, decided=jnp.asarray(True))
        tiled = lambda v: jnp.tile(v, restarts)  # noqa: E731
        everyone = plan._replace(ids=tiled(plan.ids), valid=tiled(plan.valid), level=tiled(plan.level))
        everyone = everyone._replace(share=jax.tree.map(tiled, plan.share), known=jax.tree.map(tiled, plan.known))
        ticket = jnp.repeat(jnp.arange(restarts, dtype=jnp.int32), plan.ids.shape[0])
        going = ~state.decided | (ticket == state.leader)
        return everyone._replace(valid=everyone.valid & going, ticket=ticket, stream=ticket), state

    def shares(judged: Tally, valid: Array) -> Array:
        """The first start that gives every model its share."""
        loss = jnp.where(judged.examples > 0, judged.loss, HIGHEST).reshape(-1, restarts, clusters)
        taken = jax.nn.one_hot(_least(loss), clusters) * valid[:, None, None]
        least = taken.sum(0).min(-1) / valid.sum()
        return jnp.where((least >= min_share).any(), (least >= min_share).argmax(), least.argmax()).astype(jnp.int32)

    def choose(
        ticket: PyTree, judge: Callable[[Array | int, int], Tally]
    ) -> tuple[Array, Tally]:  # fmt: skip
        first = ticket * clusters if restarts > 1 else jnp.int32(0)
        judged = judge(first, clusters)
        chosen = first + _least(judged.loss)
        return jnp.where(ticket > 0, ticket - 1, chosen) if forced_rounds else chosen, judged

    def serve(state: Restarts, plan: Plan, report: Report, ok: Array) -> Restarts:
        state = state._replace(rounds=state.rounds + 1)
        if restarts == 1:
            return state
        judged = report.judged
        loss = (judged.loss / jnp.maximum(judged.examples, 1)).min(-1)
        group = jax.nn.one_hot(report.member // clusters, restarts) * ok[:, None]
        mean = jnp.where(group.sum(0) > 0, jnp.where(ok, loss, 0) @ group / jnp.maximum(group.sum(0), 1), HIGHEST)
        leader = jnp.where(state.decided, state.leader, mean.argmin().astype(jnp.int32))
        return state._replace(leader=leader, decided=state.decided | (state.rounds > restart_rounds))

    return Route(
        init, plan, choose, serve,
        row=lambda state, number: state.leader * clusters + number,
        place=lambda state, losses, ids: losses.argmin(-1),
        models=clusters, groups=restarts, broadcast=clusters,
    )  # fmt: skip


def _least(losses: Array) -> Array:
    """int32 number of the least of [..., k] losses, the lowest on ties; one that is not finite is never the least.

    Equal models may differ by rounding when judged side by side: they are a tie.

    >>> _least(jnp.array([[3.0, 1.0, 1.0 - 1e-8], [jnp.nan, jnp.inf, 2.0]])).tolist()
    [1, 2]
    """
    losses = jnp.where(jnp.isfinite(losses), losses, HIGHEST)
    least = jnp.minimum(losses.min(-1, keepdims=True), HIGHEST / 2)
    return (losses <= least * (1 + ROUNDING)).argmax(-1).astype(jnp.int32)


def _warm(init: Callable[..., PyTree], path: str, redraw: Sequence[str]) -> Callable[..., PyTree]:
    """``init`` whose model comes from a file, but for the layers that are drawn anew."""
    if not Path(path).is_file():
        raise ValueError(
            f"no file {path!r}: `hetfl export RUN --level a --output {path}` writes one (method.args.warm_start)"
        )
    with np.load(path, allow_pickle=False) as file:
        saved = {tuple(name.split("/")): file[name] for name in file.files if "/" in name}

    def warm(key: Array) -> PyTree:
        server, memory = init(key)

        def leaf(where: windows.Path, value: Array) -> Array:
            if set(where) & set(redraw):
                return value
            if where not in saved or saved[where].shape != value.shape:
                raise ValueError(f"{path} has no {'/'.join(where)} of shape {value.shape} (method.args.warm_start)")
            return jnp.asarray(saved[where], value.dtype)

        return server._replace(variables=windows.map_leaves(leaf, server.variables)), memory

    return warm

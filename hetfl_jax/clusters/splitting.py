"""Clusters that are split between rounds by their members' updates: what CFL does around a bank by table."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.flatten_util import ravel_pytree

from hetfl_jax.clusters import bipartition
from hetfl_jax.core import tree
from hetfl_jax.core.absent import HIGHEST
from hetfl_jax.core.types import Algorithm, Array, Between, ClientContext, Level, Plan, PyTree, Reply, Shard, Tally
from hetfl_jax.models.windows import base_of
from hetfl_jax.parts import merge
from hetfl_jax.parts.bank import BankState, Report, Route
from hetfl_jax.parts.compose import Sent


class AtSplit(NamedTuple):
    """What the clients of a cluster had received when it was split; new clients are asked for their update there."""

    variables: PyTree
    round: Array
    context: PyTree


@struct.dataclass
class Clusters:
    """Who is where, and how it came about; cluster ``s`` >= 1 was split off ``parent[s]``, and 0 is the first one.

    ``size`` is the most clusters there can be; rows from ``count`` on are not in use yet.
    """

    table: Array  #: [N] int32 cluster of each client
    count: Array  #: int32, clusters so far
    rounds: Array  #: int32, rounds done
    parent: Array  #: [size] int32
    born: Array  #: [size] int32 round of the split
    sent: AtSplit  #: leaves [size, ...] what the parent's clients had received at the split
    side: Array  #: [size, N] int8: 0 stayed with the parent, 1 went to the new cluster, -1 not there
    updates: Array  #: [size, N, P] unit updates of the members at the split; P = 0 where they are not kept


class Rule(NamedTuple):
    """When and how a cluster is split, see ``splitting``.

    ``eps1``, ``eps2``: bounds of the mean update's norm and of the largest one. ``gamma_max``: a cut counts only if its
    ``gamma``, of ``bipartition``, is above it. ``linkage``: of the hierarchical clustering. ``min_clients``: members
    that a cluster needs in the round. ``first_round``: rounds, from 0, before which nothing is split.
    """

    eps1: float
    eps2: float
    gamma_max: float
    linkage: str
    min_clients: int
    first_round: int


def by_table(start: Callable[[], Clusters], size: int) -> Route:
    """Every item trains the cluster that the table says.

    Args:
      start: -> the clusters before the first round, all clients in one.
      size: rows of the bank, the most clusters there can be.

    Returns:
      A ``Route`` whose clients judge nothing: 0 passes before training.

    >>> from types import SimpleNamespace
    >>> state = SimpleNamespace(table=jnp.array([0, 2, 2]))
    >>> plan = Plan(jnp.array([1, 0]), jnp.ones(2, bool), jnp.zeros(2, int))
    >>> by_table(tuple, 3).plan(jax.random.key(0), state, plan, None)[0].ticket.tolist()  # clients 1 and 0
    [2, 0]
    """
    unjudged = Tally(*(jnp.zeros(size) for _ in Tally._fields))

    def plan(key: Array, state: Clusters, plan: Plan, ask: Callable[..., PyTree]) -> tuple[Plan, PyTree]:
        cluster = state.table[plan.ids]
        return plan._replace(ticket=cluster, stream=cluster), state

    def place(state: Clusters, losses: Array, ids: Array | None) -> Array:
        if ids is not None:
            return state.table[ids]
        return jnp.where(jnp.arange(size) < state.count, losses, HIGHEST).argmin(-1)

    return Route(
        start, plan,
        choose=lambda ticket, judge: (ticket, unjudged),
        server=lambda state, plan, report, ok: state.replace(rounds=state.rounds + 1),
        row=lambda state, number: number,
        place=place, models=size, in_use=lambda state: int(state.count),
    )  # fmt: skip


class Measured(NamedTuple):
    """A client's report in a bank whose clusters are split: that of the bank, and what the split is decided by."""

    bank: Report
    norm: Array  #: of its update
    total: PyTree  #: the whole reply at full shape, where it is collected


def _update(total: merge.Total) -> PyTree:
    """The change of the parameters behind a reply; behind a sum of replies ``sum_i n_i u_i / sum_i n_i``."""
    return jax.tree.map(lambda d: d / jnp.maximum(total.weight.sum(), 1e-12), total.delta["params"])


def splitting(inner: Algorithm, base: Algorithm, rule: Rule, keep_updates: bool) -> Algorithm:
    """A bank by table whose clusters are split between rounds.

    ``fires_c = ||mean_{i in c} u_i|| < eps1 and max_{i in c} ||u_i|| > eps2``, u_i the update of member i. Then the
    round is run once more with the same randomness, updates are collected, and the cluster is cut on the host.

    Args:
      inner: the bank.
      base: the method inside it.
      rule: when and how to split.
      keep_updates: keep the members' updates of every split, [size, N, P] float32, to place new clients by.

    Returns:
      ``inner`` with ``between``, the work on the host.

    Source: Sattler, Mueller, Samek 2020 (arXiv 1910.01991), algorithms 1 and 2.

    >>> from hetfl_jax.core.types import Info
    >>> inner, rule = Algorithm(*[None] * 10), Rule(0.4, 1.6, 0.74, "complete", 3, 20)
    >>> between = splitting(inner, inner, rule, keep_updates=False).between
    >>> [between.needed(Info((), (), {}, {"fires": np.array(fires)})) for fires in ([False, False], [False, True])]
    [False, True]
    """

    def client(context: ClientContext) -> Reply:
        reply = inner.client(context)
        return reply._replace(report=Measured(reply.report, optax.tree.norm(_update(reply.total)), ()))

    def criteria(state: BankState, total: PyTree, report: Measured, ok: Array) -> dict[str, Array]:
        mean = jax.vmap(lambda t: optax.tree.norm(_update(t)))(total)
        here = (report.bank.member == jnp.arange(inner.members)[:, None]) & ok
        most = jnp.where(here, report.norm, 0).max(-1)
        route = state.route
        may = (route.rounds >= rule.first_round) & (route.count < inner.members)
        fires = (mean < rule.eps1) & (most > rule.eps2) & (here.sum(-1) >= rule.min_clients) & may
        return {"mean_norm": mean, "largest_norm": most, "fires": fires}

    def serve(state: BankState, plan: Plan, sent: PyTree, total: PyTree, report: Measured, ok: Array) -> PyTree:
        found = criteria(state, total, report, ok)
        after, info = inner.server(state, plan, sent, total, report.bank, ok)
        return after, info._replace(arrays={**info.arrays, **found, "count": after.route.count})

    def collect(context: ClientContext) -> Reply:
        reply = client(context)
        whole = base.widen(reply.total, base_of(context.level))
        return reply._replace(report=reply.report._replace(total=whole))

    def hand_out(state: BankState, plan: Plan, sent: PyTree, total: PyTree, report: Measured, ok: Array) -> PyTree:
        return state, (plan, sent, report, ok, criteria(state, total, report, ok)["fires"])

    def decide(state: BankState, collected: PyTree, ask: Callable[..., PyTree]) -> tuple[BankState, PyTree]:
        plan, sent, report, ok, fires = collected
        updates = jax.jit(jax.vmap(_update))(report.total)
        similar = bipartition.similarity(np.asarray(jax.jit(bipartition.gram)(updates), np.float64))
        cut = Cutting(state, plan, sent, np.asarray(ok), updates, keep_updates)
        for cluster in np.flatnonzero(fires):
            cut.consider(int(cluster), similar, rule, lambda sent, ids: ask(_asked(base), sent, ids))
        state, member = cut.state(), jnp.asarray(cut.table)[plan.ids]
        report = report._replace(bank=report.bank._replace(member=member))
        plan = plan._replace(notes=plan.notes._replace(route=state.route))

        @jax.jit
        def again(state: BankState, plan: Plan, report: Measured, ok: Array) -> PyTree:
            rows = jnp.where(ok, report.bank.member, inner.members)
            total = jax.tree.map(
                lambda t: jax.ops.segment_sum(t, rows, inner.members + 1)[: inner.members], report.total
            )
            return serve(state, plan, sent, total, report, ok)

        return again(state, plan, report, ok)

    between = Between(
        needed=lambda info: bool(np.asarray(info.arrays["fires"]).any()),
        collecting=inner._replace(client=collect, server=hand_out),
        decide=decide,
        base=base,
    )
    return inner._replace(client=client, server=serve, between=between)


def _asked(base: Algorithm) -> Callable[..., Array]:
    """What a client answers when it is asked for its update at some model: the unit vector of it, [P]."""

    def answer(key: Array, at: AtSplit, level: Level, shard: Shard) -> Array:
        memory = tree.zeros(jax.eval_shape(base.init, key)[1])
        sent = Sent(at.variables, at.context)
        update, _ = ravel_pytree(_update(base.client(ClientContext(key, at.round, 0, shard, (), sent, memory)).total))
        return update / jnp.maximum(jnp.linalg.norm(update), 1e-12)

    return answer


class Cutting:
    """The splits of one round, on the host.

    Make it, ``consider`` each cluster whose criteria fire, then take ``state`` and ``table`` [N].
    """

    def __init__(self, state: BankState, plan: Plan, sent: PyTree, ok: np.ndarray, updates: PyTree, keep: bool):
        """Start from the state before the round.

        Args:
          state: of the bank.
          plan: of the round; ``ids`` [K].
          sent: leaves [clusters, ...], what clients of each cluster had received.
          ok: [K] which replies count.
          updates: leaves [K, ...], of the round's items.
          keep: whether unit updates are kept, for clients that come later.
        """
        self.sent, self.ok, self.updates, self.keep = sent, ok, updates, keep
        self.members, self.route = state.members, state.route
        self.table = np.array(state.route.table)
        self.ids = np.asarray(plan.ids)
        self.was = self.table.copy()

    def consider(self, cluster: int, similar: np.ndarray, rule: Rule, ask: Callable[[PyTree, Array], Array]) -> None:
        """Cut one cluster in two if there is room and the cut passes.

        Clients of the cluster that did not take part this round are asked for their update, and go with the most
        similar member of those that did.

        Args:
          cluster: its number.
          similar: [K, K] cosines between the items' updates.
          ask: (what was sent, ids) -> [ids, P] unit updates.
        """
        count = int(self.route.count)
        items = np.flatnonzero(self.ok & (self.was[self.ids] == cluster))
        if count == self.route.parent.shape[0]:
            return
        cut = bipartition.bipartition(similar[np.ix_(items, items)], rule.linkage)
        if cut.gamma <= rule.gamma_max:
            return
        side = np.full(self.table.size, -1, np.int8)
        side[self.ids[items[cut.first]]], side[self.ids[items[cut.second]]] = 0, 1
        one = tree.take(self.sent, cluster)
        sent = AtSplit(one.variables, self.route.rounds, one.context)
        rows = np.asarray(jax.vmap(lambda u: ravel_pytree(u)[0])(self.updates))
        unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        absent = np.flatnonzero((self.was == cluster) & (side < 0))
        goes = side == 1
        if absent.size:
            closest = np.asarray(ask(sent, jnp.asarray(absent, jnp.int32))) @ unit[items].T
            goes[absent] = side[self.ids[items[closest.argmax(1)]]] == 1
        self.table[goes] = count
        route = self.route
        kept = route.updates
        if self.keep:
            kept = kept.at[count, self.ids[items]].set(unit[items])
        self.route = route.replace(
            count=route.count + 1,
            parent=route.parent.at[count].set(cluster),
            born=route.born.at[count].set(route.rounds),
            sent=jax.tree.map(lambda all, one: all.at[count].set(one), route.sent, sent),
            side=route.side.at[count].set(jnp.asarray(side)),
            updates=kept,
        )
        self.members = jax.tree.map(lambda v: v.at[count].set(v[cluster]), self.members)

    def state(self) -> BankState:
        """The bank with the new clusters, their models still the parents'."""
        return BankState(self.members, self.route.replace(table=jnp.asarray(self.table)))


def place_by_tree(base: Algorithm, state: BankState, ask: Callable[..., PyTree], ids: Array) -> np.ndarray:
    """Which cluster new clients belong to, by walking down the tree of splits.

    At every split on its way a client is asked for its update at the model that was split, and follows the member
    whose update there was the most similar.

    Args:
      base: the method inside the bank, ``algorithm.between.base``.
      state: the server's state, with ``keep_updates``.
      ask: ``ask(fn, sent, ids)`` asks clients, as a survey does.
      ids: [n] int32, the clients that are placed.

    Returns:
      [n] int, the cluster of each client.

    >>> side, updates = jnp.array([[-1, -1], [0, 1]], jnp.int8), jnp.zeros((2, 2, 2)).at[1].set([[1, 0], [-1, 0]])
    >>> parent, born, sent = jnp.array([0, 0]), jnp.array([0, 3]), AtSplit(*[jnp.zeros(2)] * 3)
    >>> route = Clusters(jnp.array([0, 1]), jnp.int32(2), jnp.int32(5), parent, born, sent, side, updates)
    >>> ask = lambda fn, sent, ids: np.array([[-1.0, 0.0], [0.6, 0.8]])[ids]  # their unit updates
    >>> place_by_tree(Algorithm(*[None] * 10), BankState((), route), ask, np.array([0, 1])).tolist()
    [1, 0]
    """
    route = jax.device_get(state.route.replace(sent=()))
    here = np.zeros(len(ids), int)
    for split in range(1, int(route.count)):
        some = np.flatnonzero(here == route.parent[split])
        if some.size:
            unit = np.asarray(ask(_asked(base), tree.take(state.route.sent, split), ids[some]))
            similar = unit @ route.updates[split].T
            best = [np.where(route.side[split] == side, similar, -np.inf).max(1) for side in (0, 1)]
            here[some[best[1] > best[0]]] = split
    return here

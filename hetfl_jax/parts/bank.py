"""``bank``: several models behind one method, each trained by the clients that a route sends to it.

A further member costs memory in the accumulators, not a larger reply: every reply goes into its member's row of the
sums. Any method that can ``judge`` what it sends may be inside, e.g. FedAvg or HeteroFL.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.types import (
    Algorithm,
    Array,
    Choice,
    ClientContext,
    Level,
    Plan,
    Population,
    Price,
    PyTree,
    Reply,
    Seen,
    Shard,
    Tally,
)
from hetfl_jax.models.windows import index_of

LOST = 1e30  #: reported for a loss that is not finite


class BankState(NamedTuple):
    """The servers of all members, and what the route remembers."""

    members: PyTree  #: leaves [size, ...]
    route: PyTree


class Noted(NamedTuple):
    """What goes from a bank's plan to its server."""

    own: PyTree  #: notes of the method inside
    route: PyTree  #: the route's state after its plan


class Report(NamedTuple):
    """A client's report."""

    own: Seen  #: of the method inside, with what it cost to choose
    member: Array  #: int32, the row of the member that was trained
    judged: Tally  #: leaves [models], every model that the client judged, on all of its examples before training


class Route(NamedTuple):
    """Which member an item trains. Filled by a method: IFCA asks the client, CFL looks at a table."""

    init: Callable[[], PyTree]  #: -> the route's state, part of the server's
    #: (key, state, plan, ask) -> (plan, state); ``ask(ids)`` is every member's ``Tally`` [K, size]
    plan: Callable[[Array, PyTree, Plan, Callable[[Array], Tally]], tuple[Plan, PyTree]]
    #: (ticket, judge) -> (member, judged); ``judge(first, count)`` is the ``Tally`` [count] of these members
    choose: Callable[[PyTree, Callable[[Array | int, int], Tally]], tuple[Array, Tally]]
    server: Callable[[PyTree, Plan, Report, Array], PyTree]  #: (state after ``plan``, plan, report, ok) -> state
    row: Callable[[PyTree, Array | int], Array | int]  #: (state, number of a model) -> its row of the bank
    place: Callable[[PyTree, Array, Array], Array]  #: (state, training losses [N, models], ids [N]) -> model [N]
    models: int  #: how many models a client has to choose from
    groups: int = 1  #: independent groups of members (restarts)
    broadcast: int = 1  #: how many models an item receives
    in_use: Callable[[PyTree], int] | None = None  #: (state) -> how many models there are yet; all by default


def bank(
    base: Algorithm, size: int, route: Route, *, divide_by_all: bool = False, shared: Sequence[str] = ()
) -> Algorithm:
    """``base`` with ``size`` models, member ``m`` being the mean of the replies that ``route`` sends to it.

    ``theta_m <- server(theta_m, sum_{i: a_i = m} w_i delta_i / sum_{i: a_i = m} w_i)``. A member that nobody chose
    keeps model and optimizer state bit for bit. A client has one private memory, whatever it trains.

    Args:
      base: the method inside; it must have a ``judge``.
      size: number of members.
      route: which member an item trains.
      divide_by_all: divide by the weights of all participants instead (gradient averaging).
      shared: names of layers that all members of a group have in common: averaged over all participants.

    Raises:
      ValueError: a size below 1, or a method that cannot be inside.

    >>> from hetfl_jax.methods import fedavg
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts import budgets, local, rotation
    >>> fam = families.family(MLP(hidden=(8,)), [{}], jnp.zeros((1, 3)))
    >>> base = fedavg.make(fam, local.local(learning_rate=0.1, batch_size=4), cohort=2)
    >>> made = bank(base, 4, rotation.rotation(4, budgets.schedule("4-2-1", 0.25, 6)))
    >>> jax.eval_shape(made.init, jax.random.key(0))[0].members.variables["params"]["dense_0"]["bias"].shape
    (4, 8)
    """
    if size < 1:
        raise ValueError(f"a bank of {size} models, allowed >= 1 (bank)")
    if base.judge is None or base.members != 1:
        raise ValueError("the method inside a bank needs one model and a judge (bank)")
    per_group = size // route.groups
    judge_one = base.judge

    def init(key: Array) -> tuple[BankState, PyTree]:
        keys = jnp.stack([jax.random.fold_in(key, m) if m else key for m in range(size)])
        members, memories = jax.lax.map(base.init, keys)  # a loop: one draw is compiled, not a draw a member
        common = tree.take(members, jnp.zeros(size, int))
        return BankState(_by_name(shared, common, members), route.init()), tree.take(memories, 0)

    def plan(key: Array, round: Array, state: BankState, population: Population, survey: Callable[..., PyTree]) -> Plan:
        first = base.plan(key, round, tree.take(state.members, 0), population, survey)

        def ask(ids: Array) -> Tally:
            judged = lambda key, sent, level, shard: _judge(sent, level, shard, 0, size)  # noqa: E731
            return survey(judged, send(state, round), ids)

        planned, routed = route.plan(key, state.route, first, ask)
        return planned._replace(notes=Noted(first.notes, routed))

    def send(state: BankState, round: Array) -> PyTree:
        return jax.vmap(lambda server: base.send(server, round))(state.members)

    def _judge(sent: PyTree, level: Level, shard: Shard, first: Array | int, count: int) -> Tally:
        if count < size:
            sent = jax.tree.map(lambda v: jax.lax.dynamic_slice_in_dim(v, first, count), sent)
        return jax.vmap(lambda one: judge_one(one, level, shard))(sent)

    def client(context: ClientContext) -> Reply:
        sent, level, shard = context.sent, context.level, context.shard
        member, judged = route.choose(context.ticket, lambda first, count: _judge(sent, level, shard, first, count))
        # A model that is lost to one client must not cost the client's reply.
        judged = judged._replace(loss=jnp.where(jnp.isfinite(judged.loss), judged.loss, LOST))
        reply = base.client(context._replace(sent=tree.take(sent, member), ticket=()))
        own: Seen = reply.report
        models = (judged.examples > 0).sum().astype(jnp.int32)
        forward = own.work.at[0, index_of(level)].add(models * shard.size)
        own = own._replace(work=forward, down=own.down * route.broadcast)
        return reply._replace(member=member, report=Report(own, member, judged))

    def server(state: BankState, plan: Plan, sent: PyTree, total: PyTree, report: Report, ok: Array) -> PyTree:
        rows = jnp.arange(size)[:, None]
        own = plan._replace(notes=plan.notes.own)

        def serve(totals: PyTree, chosen: Array) -> PyTree:
            def one(server: PyTree, sent: PyTree, total: PyTree, chosen: Array) -> PyTree:
                total = jax.tree.map(lambda t: t[None], total)
                after = base.server(server, own, sent, total, report.own, chosen & ok)[0]
                # Divided by all, a member that nobody chose has a mean, 0, which old moments would go on from.
                return tree.select((chosen & ok).any(), after, server)

            return jax.vmap(one)(state.members, sent, totals, chosen)

        together = _of_group(total, route.groups)
        if divide_by_all:
            total = total._replace(weight=together.weight, rows=together.rows)
        members = serve(total, report.member == rows)
        if shared:
            common = serve(together, report.member // per_group == rows // per_group)
            members = _by_name(shared, common, members)
        first = tree.take((state.members, sent), 0)
        # One selection serves all members: it saw every item.
        seen_by_all, info = base.server(first[0], own, first[1], jax.tree.map(lambda t: t[:1], total), report.own, ok)
        members = jax.vmap(lambda member: base.same_selection(member, seen_by_all))(members)
        routed = route.server(plan.notes.route, plan, report, ok)
        shown = plan.valid & (report.member // per_group == route.row(routed, 0) // per_group)
        trained = {
            "member": jnp.where(shown, report.member % per_group, -1),
            "member_ids": jnp.where(shown, plan.ids, -1),
        }
        return BankState(members, routed), info._replace(arrays={**info.arrays, **trained})

    def model(state: BankState, level: Level, member: Array | int = 0) -> PyTree:
        return base.model(tree.take(state.members, route.row(state.route, member)), level)

    def price() -> Price:
        assert base.price is not None
        one = base.price()
        needs = one.needs._replace(bytes=one.needs.bytes * size)  # every member keeps the selection's state
        compared = route.models if route.broadcast > 1 else 0
        down, up = one.plain or (one.down, one.up)
        plain = (down * route.broadcast, up)
        return one._replace(down=one.down * route.broadcast, compared=compared, needs=needs, plain=plain)

    choice = Choice(
        route.models,
        lambda state, losses, ids: route.place(state.route, losses, ids),
        lambda state: route.in_use(state.route) if route.in_use else route.models,
    )
    asked = base.questions[0]._replace(variables=lambda server, memory, tier: model(server, tier))
    return base._replace(
        members=size, init=init, plan=plan, send=send, client=client, server=server, model=model, judge=None,
        questions=(asked,), choice=choice, price=price,
    )  # fmt: skip


def _of_group(total: PyTree, groups: int) -> PyTree:
    """The sum over each group of members, in every row of it."""

    def leaf(t: Array) -> Array:
        grouped = t.reshape(groups, -1, *t.shape[1:])
        return jnp.broadcast_to(grouped.sum(1, keepdims=True), grouped.shape).reshape(t.shape)

    return jax.tree.map(leaf, total)


def _by_name(names: Sequence[str], of_names: PyTree, others: PyTree) -> PyTree:
    """Leaves below one of the names from the first tree, all others from the second."""

    def leaf(path: PyTree, a: Array, b: Array) -> Array:
        return a if {str(getattr(key, "key", getattr(key, "name", key))) for key in path} & set(names) else b

    return jax.tree_util.tree_map_with_path(leaf, of_names, others) if names else others


def alike(state: PyTree) -> bool:
    """Whether a bank's members all start equal: then every client prefers the first, and the bank is a single model.

    >>> alike(BankState({"w": np.zeros((2, 3))}, ())), alike(BankState({"w": np.arange(2)}, ()))
    (True, False)
    """
    if not isinstance(state, BankState):
        return False
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.members)]
    return leaves[0].shape[0] > 1 and all((leaf == leaf[:1]).all() for leaf in leaves)

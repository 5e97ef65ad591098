"""FedBuff: clients work all the time, and the server makes a step whenever K replies are in.

``concurrency`` clients are at work. Each received the model of some step, and its reply arrives when its device is
done. A round of the engine is one step of the server: the K replies that arrive next. They are computed from the models
that their clients received, which are kept for ``max_staleness`` steps, and count ``(1 + s)^-exponent``, s the steps
since then: ``w <- w + 1/K sum_i (1 + s_i)^-exponent delta_i`` for a plain mean.

Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, algorithm 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import (
    Account,
    Algorithm,
    Array,
    ClientContext,
    Plan,
    Population,
    PyTree,
    Reply,
)
from hetfl_jax.parts.compose import ServerState
from hetfl_jax.parts.merge import Total
from hetfl_jax.parts.online import among, coming, devices_of, later, present
from hetfl_jax.parts.pace import Rule, pace_of
from hetfl_jax.parts.simulate import Spent, around, check, dropped, told

REFILLS = ("at_once", "after_step")


class Work(NamedTuple):
    """Clients with a model; leaves [M].

    A client is in it once at most: a selection sees those at work as clients that cannot be chosen.
    """

    there: Array  #: bool
    ids: Array
    level: Array
    version: Array  #: int32, the step whose model they received
    seconds: Array  #: that they take
    left: Array  #: seconds until they are done, from the step's time on: small numbers, which float32 tells apart
    rest: PyTree  #: what the method's plan says of them: ticket, stream, share, known


class Buffered(NamedTuple):
    """The server of a method, the time, the models of the latest steps, and who is at work.

    It needs ``max_staleness + 1`` times the bytes of a model, whatever the number of clients at work.
    """

    server: PyTree
    seconds: Array  #: float32 since the start
    rest: Array  #: float32, what ``seconds`` cannot hold, see ``online.later``
    versions: PyTree  #: leaves [V, ...] of what was sent at step ``v % V``
    work: Work


class Stale(NamedTuple):
    """What the server knows of an item; leaves [K].

    A reply counts ``(1 + staleness)^-exponent``, or not at all if it is ``lost``.
    """

    known: PyTree  #: of the method inside
    version: Array
    seconds: Array
    staleness: Array
    lost: Array  #: bool, its model is no longer kept


class Noted(NamedTuple):
    """What goes from the plan to the server."""

    own: PyTree  #: of the method inside
    round: Array
    seconds: Array  #: that the step takes
    work: Work


class Queue(NamedTuple):
    """Clients that the method's plan names to be next, those that may come first."""

    work: Work  #: leaves [Q]; ``left`` is all that they take
    number: Array  #: how many there are
    notes: PyTree


def buffered(
    base: Algorithm, rule: Rule, population: Population, *, concurrency: int, exponent: float = 0.5,
    max_staleness: int = 20, refill: str = "at_once",
) -> Algorithm:  # fmt: skip
    """``base`` as buffered asynchronous method: K, the replies of a step, are the items of its plan.

    Times are those expected when a client begins. The method's own selection says who begins next, among clients that
    are not at work; a client that goes offline goes on all the same.

    Args:
      base: a method with one model that ``compose`` made, whose selection asks nobody.
      population: the clients, for shapes.
      concurrency: clients at work, >= K.
      exponent: of the staleness weight, >= 0.
      max_staleness: replies from models that are older are left out, and counted as late.
      refill: ``at_once``, as in FedBuff: who is done is replaced at that time; or ``after_step``: all that are done
        are replaced when the server has the next model. With ``concurrency`` K the latter is the synchronous round.

    Returns:
      The method, whose server is a ``Buffered`` and whose numbers have the mean ``staleness`` of a step's replies.

    Raises:
      ValueError: a value out of range, or a method that cannot be inside.

    >>> import numpy as np
    >>> from hetfl_jax.core.types import Devices
    >>> from hetfl_jax.data.population import population
    >>> from hetfl_jax.methods import fedavg
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,), classes=2), [{}], jnp.zeros((1, 3)))
    >>> settings = local(learning_rate=0.1, batch_size=4)
    >>> base = fedavg.make(fam, settings, cohort=2)
    >>> people = population(np.zeros((6, 3)), np.arange(6) % 2, np.arange(6), np.full(6, 1))
    >>> people = people._replace(devices=Devices(*[jnp.arange(1.0, 7.0)] * 3))
    >>> steps = buffered(base, Rule(costs(fam).macs, base.price(), settings), people, concurrency=4)
    >>> state, now = steps.init(jax.random.key(0))[0], jnp.int32(0)
    >>> plan = steps.plan(jax.random.key(1), now, state, people, None)
    >>> plan.ids.shape, int(plan.notes.work.there.sum())  # the place of the second that was done waits for the model
    ((2,), 3)
    """
    check(base, rule)
    _check_values(rule, concurrency, exponent, max_staleness, refill)
    template = _template(base, population)
    step, kept = template.ids.shape[0], max_staleness + 1
    if concurrency < step:
        raise ValueError(f"concurrency {concurrency} below the {step} replies of a step (devices.concurrency)")
    at_once = refill == "at_once"
    begin = _beginners(base, rule, template, concurrency, at_once)

    def init(key: Array) -> tuple[Buffered, PyTree]:
        server, memory = base.init(key)
        sent = jax.eval_shape(base.send, server, jnp.int32(0))
        versions = jax.tree.map(lambda s: jnp.zeros((kept, *s.shape), s.dtype), sent)
        none = jnp.float32(0)
        return Buffered(server, none, none, versions, _nobody(template, concurrency)), memory

    def plan(key: Array, round: Array, state: Buffered, people: Population, survey: Callable[..., PyTree]) -> Plan:
        queue = begin(key, round, state, people)
        work, used = _filled(state.work, queue)
        work, arrived, lasts = _arrivals(work, queue, used, step, at_once)
        lasts = jnp.where(arrived.there.any(), lasts, coming(devices_of(people), state.seconds))
        ticket, stream, share, known = arrived.rest
        staleness = round - arrived.version
        known = Stale(known, arrived.version, arrived.seconds, staleness, staleness > max_staleness)
        notes = Noted(queue.notes, round, lasts, work)
        return Plan(arrived.ids, arrived.there, arrived.level, ticket, stream, notes=notes, share=share, known=known)

    def send(state: Buffered, round: Array) -> PyTree:
        sent = base.send(state.server, round)
        return jax.tree.map(lambda ring, new: ring.at[round % kept].set(new), state.versions, sent)

    def client(context: ClientContext) -> Reply:
        known: Stale = context.known
        sent = jax.tree.map(lambda ring: ring[known.version % kept], context.sent)
        reply = base.client(context._replace(sent=sent, round=known.version, known=known.known))
        weight = (1.0 + known.staleness) ** -exponent if exponent else 1.0
        total: Total = reply.total
        reply = reply._replace(total=total._replace(delta=jax.tree.map(lambda v: weight * v, total.delta)))
        return dropped(reply, known.lost, context)._replace(report=Spent(reply.report, known.seconds, known.lost))

    def server(state: Buffered, plan: Plan, sent: PyTree, total: PyTree, report: Spent, ok: Array) -> PyTree:
        known, notes, late = plan.known, plan.notes, plan.valid & report.late
        latest = jax.tree.map(lambda ring: ring[notes.round % kept], sent)
        inner = plan._replace(notes=notes.own, known=known.known)
        after, info = base.server(state.server, inner, latest, total, report.own, ok & ~late)
        mean = jnp.where(plan.valid, known.staleness, 0).sum() / jnp.maximum(plan.valid.sum(), 1)
        now, rest = later(state.seconds, state.rest, notes.seconds)
        numbers = {"round_seconds": notes.seconds, "simulated_seconds": now}
        info = told(info, plan, report.seconds, late, {**numbers, "staleness": mean})
        return Buffered(after, now, rest, sent, notes.work), info

    return around(base)._replace(init=init, plan=plan, send=send, client=client, server=server)


def _check_values(rule: Rule, concurrency: int, exponent: float, max_staleness: int, refill: str) -> None:
    if rule.deadline < math.inf or rule.first:
        raise ValueError("a deadline or first replies without rounds: need concurrency 0 (devices.concurrency)")
    if not 0 <= exponent < math.inf:
        raise ValueError(f"staleness_exponent {exponent:g}, allowed >= 0 (devices.staleness_exponent)")
    if max_staleness < 0:
        raise ValueError(f"max_staleness {max_staleness}, allowed >= 0 (devices.max_staleness)")
    if refill not in REFILLS:
        raise ValueError(f"refill {refill!r} is not one of {', '.join(REFILLS)} (devices.refill)")
    if concurrency < 1:
        raise ValueError(f"concurrency {concurrency}, allowed >= 1 (devices.concurrency)")


def _asks_nobody(*_: PyTree, **__: PyTree) -> PyTree:
    raise ValueError("a selection that asks clients, in an asynchronous run: need another one (select.name)")


def _template(base: Algorithm, population: Population) -> Plan:
    """Shapes of a plan of the method.

    Args:
      base: the method.
      population: with devices.

    Raises:
      ValueError: a method whose plan is more than a selection.
    """
    key, now = jax.random.key(0), jnp.int32(0)
    server = jax.eval_shape(base.init, key)[0]
    devices = devices_of(population)
    people = population._replace(devices=devices._replace(here=jnp.ones(population.size.shape, bool)))
    plan: Plan = jax.eval_shape(lambda s: base.plan(key, now, s, people, _asks_nobody), server)
    own = isinstance(server, ServerState) and base.members == 1 and plan.row is None
    notes: PyTree = jax.tree.structure(plan.notes)
    if not own or notes != jax.tree.structure(server.select):
        raise ValueError("this method plans more than who takes part: need rounds, concurrency 0 (devices.concurrency)")
    if isinstance(plan.asked, Account):
        _asks_nobody()
    return plan


def _rest(plan: Plan) -> PyTree:
    stream = jnp.broadcast_to(jnp.asarray(plan.stream, jnp.int32), plan.ids.shape)
    return plan.ticket, stream, plan.share, plan.known


def _nobody(template: Plan, places: int) -> Work:
    rest = jax.eval_shape(_rest, template)
    none = jnp.zeros(places, jnp.int32)
    empty = jax.tree.map(lambda s: jnp.zeros((places, *s.shape[1:]), s.dtype), rest)
    return Work(none > 0, none, none, none, jnp.zeros(places), jnp.zeros(places), empty)


def _beginners(
    base: Algorithm, rule: Rule, template: Plan, concurrency: int, at_once: bool
) -> Callable[[Array, Array, Buffered, Population], Queue]:
    """Who begins next, as often as the method's plan has to be asked: once a step, at the start until all are at work.

    Where everybody is done at every step, the selection sees the population as it is.

    Args:
      base: the method, whose selection names K clients at a time.
      rule: how time goes.
      template: shapes of its plan.
      concurrency: clients at work.
      at_once: whether K - 1 more are wanted, who follow those that are done within a step.

    Returns:
      (key, round, state, population) -> ``Queue``.
    """
    step = template.ids.shape[0]
    extra = step - 1 if at_once else 0  # the last that is done is replaced by the next step, with the next model
    plans = -(-(concurrency + extra) // step)
    alone = concurrency == step and not at_once

    def begin(key: Array, round: Array, state: Buffered, people: Population) -> Queue:
        here = present(people, state.seconds)
        free = jnp.ones(people.size.shape, bool) if here is None else here
        free = free.at[state.work.ids].min(~state.work.there)

        def ask(i: Array, carry: tuple[Work, Array, PyTree]) -> tuple[Work, Array, PyTree]:
            queue, free, _ = carry
            own = key if alone else jnp.where(i == 0, key, jax.random.fold_in(key, i))
            among_whom = people if alone and here is None else among(people, free)
            planned = base.plan(own, round, state.server, among_whom, _asks_nobody)
            planned = planned._replace(valid=planned.valid & free[planned.ids])
            seconds = pace_of(rule, own, planned, people)[1]
            version = jnp.broadcast_to(round, planned.ids.shape).astype(jnp.int32)
            new = Work(planned.valid, planned.ids, planned.level, version, seconds, seconds, _rest(planned))
            queue = jax.tree.map(lambda q, n: jax.lax.dynamic_update_slice_in_dim(q, n, i * step, 0), queue, new)
            return queue, free.at[planned.ids].min(~planned.valid), planned.notes

        wanted = (~state.work.there).sum() + extra
        notes = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), template.notes)
        carry = (_nobody(template, plans * step), free, notes)
        queue, _, notes = jax.lax.fori_loop(0, jnp.maximum(-(-wanted // step), 1), ask, carry)
        order = jnp.argsort(~queue.there, stable=True)
        return Queue(jax.tree.map(lambda v: v[order], queue), queue.there.sum(), notes)

    return begin


def _filled(work: Work, queue: Queue) -> tuple[Work, Array]:
    """All free places taken from the queue, as far as it goes; how many of it are used.

    Args:
      work: who is at work.
      queue: who begins now.
    """
    rank = jnp.cumsum(~work.there) - 1
    takes = ~work.there & (rank < queue.number)
    new = jax.tree.map(lambda v: v[jnp.minimum(rank, queue.work.ids.shape[0] - 1)], queue.work)

    def leaf(old: Array, new: Array) -> Array:
        return jnp.where(takes.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(leaf, work, new), takes.sum()


def _arrivals(
    work: Work, queue: Queue, used: Array, step: int, at_once: bool
) -> tuple[Work, Work, Array]:  # fmt: skip
    """The next ``step`` that are done, in their order; who is at work then, and how long it takes.

    Args:
      work: who is at work.
      queue: who begins next, of which ``used`` have begun.
      step: K.
      at_once: whether the next in the queue takes the place of who is done; the last place waits for the next model.

    Returns:
      (who is at work then, the K that arrived, seconds until the last of them). Where fewer than K are at work, the
      rest is not ``there``.
    """

    def one(k: Array, carry: tuple[Work, Work, Array, Array]) -> tuple[Work, Work, Array, Array]:
        work, arrived, used, now = carry
        place = jnp.argmin(jnp.where(work.there, work.left, jnp.inf))
        row = jax.tree.map(lambda v: v[place], work)
        arrived = jax.tree.map(lambda rows, v: rows.at[k].set(v), arrived, row)
        now = jnp.where(row.there, jnp.maximum(now, row.left), now)
        new = row._replace(there=jnp.zeros((), bool))
        if at_once:
            follows = row.there & (used < queue.number) & (k < step - 1)
            next_one = jax.tree.map(lambda v: v[jnp.minimum(used, queue.work.ids.shape[0] - 1)], queue.work)
            next_one = next_one._replace(left=now + next_one.seconds)
            new = jax.tree.map(lambda a, b: jnp.where(follows, a, b), next_one, new)
            used = used + follows
        return jax.tree.map(lambda rows, v: rows.at[place].set(v), work, new), arrived, used, now

    empty = jax.tree.map(lambda v: jnp.zeros((step, *v.shape[1:]), v.dtype), work)
    work, arrived, _, now = jax.lax.fori_loop(0, step, one, (work, empty, used, jnp.float32(0)))
    return work._replace(left=work.left - now), arrived, now

"""A clock for any method: how long every item takes on its client's device, whose reply is late, how long a round is.

An item takes ``(forward + 2 backward) . MACs / speed * (shift + spread * Exp(1))`` for its work, as it is counted, plus
``bits / bandwidth`` of what it receives and of what it sends. A round lasts as long as its slowest item, or until a
deadline, or until its first replies are in; a survey before it adds its own slowest answer.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import bits
from hetfl_jax.core.types import (
    Account,
    Algorithm,
    Array,
    ClientContext,
    Devices,
    Info,
    Plan,
    Population,
    Price,
    PyTree,
    Reply,
    Seen,
)
from hetfl_jax.models.costs import BACKWARD
from hetfl_jax.parts.clock import waits
from hetfl_jax.parts.local import Local, examples_trained
from hetfl_jax.parts.survey import brought


class Rule(NamedTuple):
    """How time goes."""

    macs: np.ndarray  #: [L] multiply-adds of one example's forward pass
    price: Price  #: what an item is expected to send and receive
    local: Local
    shift: float = 1.0  #: of the time for computation, what is certain
    spread: float = 0.0  #: mean of the exponential part, drawn for every round and client
    deadline: float = math.inf  #: seconds after which a reply does not count
    first: int = 0  #: replies that a round waits for, 0 for all


class Simulated(NamedTuple):
    """The server of a method and the time."""

    server: PyTree
    seconds: Array  #: float32 since the start


class Pace(NamedTuple):
    """What an item's time depends on; leaves [K]."""

    known: PyTree  #: of the method inside
    speed: Array  #: multiply-adds a second, this round's draw counted
    down: Array  #: bits a second
    up: Array
    brought: Array  #: bits that a survey has brought already
    after: Array  #: seconds that earlier items of the same client are expected to take
    limit: Array | tuple[()]  #: seconds after which the reply does not count, -1 if others are awaited; () for none


class Spent(NamedTuple):
    """A client's report with its time."""

    own: PyTree  #: of the method inside
    seconds: Array
    late: Array  #: bool


class Noted(NamedTuple):
    """What goes from the plan to the server."""

    own: PyTree  #: of the method inside
    asked: Array  #: seconds of a survey
    idle: Array  #: seconds until somebody comes online


def simulated(base: Algorithm, rule: Rule) -> Algorithm:
    """``base`` on a population with ``Devices``, with ``round_seconds`` and ``simulated_seconds`` in its numbers.

    A late reply adds nothing, its client's memory stays, and the server hears of it as of one that failed; what it cost
    counts. A client that goes offline before it is done is late. Which replies are the first ones is decided by the
    times expected before the round: they are the true ones unless messages are as long as the data makes them.

    Raises:
      ValueError: a method that works on the host between rounds, or a value out of range.
    """
    check(base, rule)

    def init(key: Array) -> tuple[Simulated, PyTree]:
        server, memory = base.init(key)
        return Simulated(server, jnp.float32(0)), memory

    def plan(key: Array, round: Array, state: Simulated, people: Population, survey: Callable[..., PyTree]) -> Plan:
        devices, here = devices_of(people), present(people, state.seconds)
        planned = base.plan(key, round, state.server, among(people, here), survey)
        if here is not None:
            planned = planned._replace(valid=planned.valid & here[planned.ids])
        pace, expected = pace_of(rule, key, planned, people)
        limit = _limit(rule, pace.after + expected, planned, devices, state.seconds)
        asked = survey_seconds(rule, planned.asked, devices)
        idle = jnp.where(planned.valid.any(), 0, coming(devices, state.seconds))
        return planned._replace(known=pace._replace(limit=limit), notes=Noted(planned.notes, asked, idle))

    def client(context: ClientContext) -> Reply:
        pace: Pace = context.known
        reply = base.client(context._replace(known=pace.known))
        seconds = seconds_of(rule, pace, seen_of(reply.report))
        late = jnp.zeros((), bool) if isinstance(pace.limit, tuple) else pace.after + seconds > pace.limit
        reply = reply if isinstance(pace.limit, tuple) else dropped(reply, late, context)
        return reply._replace(report=Spent(reply.report, seconds, late))

    def server(state: Simulated, plan: Plan, sent: PyTree, total: PyTree, report: Spent, ok: Array) -> PyTree:
        pace, late = plan.known, plan.valid & report.late
        inner = plan._replace(notes=plan.notes.own, known=pace.known)
        after, info = base.server(state.server, inner, sent, total, report.own, ok & ~late)
        waited = pace.after + report.seconds
        waited = waited if isinstance(pace.limit, tuple) else jnp.minimum(waited, pace.limit)
        lasts = jnp.where(plan.valid, waited, 0).max(initial=0) + plan.notes.asked + plan.notes.idle
        now = state.seconds + lasts
        numbers = {"round_seconds": lasts, "simulated_seconds": now}
        return Simulated(after, now), told(info, plan, report.seconds, late, numbers)

    return around(base)._replace(init=init, plan=plan, client=client, server=server)


def check(base: Algorithm, rule: Rule) -> None:
    """Refuse values out of range, and methods that time cannot go through.

    Raises:
      ValueError: with the key.
    """
    if base.between is not None:
        raise ValueError("this method works on the host between rounds: need none (devices.name)")
    check_waits(rule.shift, rule.spread)
    if not rule.deadline >= 0:
        raise ValueError(f"deadline {rule.deadline:g}, allowed >= 0 (devices.deadline)")
    if rule.first < 0:
        raise ValueError(f"first {rule.first}, allowed >= 0 (devices.first)")


def check_waits(shift: float, spread: float) -> None:
    """Refuse factors of computing time that are out of range.

    Raises:
      ValueError: with the key.
    """
    for name, value in (("shift", shift), ("spread", spread)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} {value:g}, allowed >= 0 and finite (devices.{name})")
    if not shift + spread > 0:
        raise ValueError("shift 0 and spread 0: need one above 0 (devices.shift)")


def around(base: Algorithm) -> Algorithm:
    """``base`` whose server is the field ``server`` of another state: all that only reads it."""

    def inside(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda state, *args, **named: fn(state.server, *args, **named)

    questions = tuple(q._replace(variables=inside(q.variables)) for q in base.questions)
    choice, order, shown = base.choice, base.order, base.shown
    if choice is not None:
        choice = choice._replace(place=inside(choice.place), in_use=inside(choice.in_use))
    if order is not None:
        by = order.by
        order = order._replace(
            each=inside(order.each), by=lambda state, number: state._replace(server=by(state.server, number))
        )
    figures = shown.figures
    if figures is not None:
        shown = shown._replace(figures=lambda folder, lines, state, *rest: figures(folder, lines, state.server, *rest))
    return base._replace(
        send=inside(base.send), model=inside(base.model), questions=questions, choice=choice, order=order,
        shown=shown._replace(warning=inside(shown.warning)),
        same_selection=lambda state, other: state._replace(server=base.same_selection(state.server, other.server)),
    )  # fmt: skip


def devices_of(people: Population) -> Devices:
    """The devices of a population.

    Raises:
      ValueError: it has none.
    """
    if not isinstance(people.devices, Devices):
        raise ValueError("the population has no devices: population._replace(devices=Devices(...)) (data.population)")
    return people.devices


def pace_of(rule: Rule, key: Array, plan: Plan, people: Population) -> tuple[Pace, Array]:
    """What the items' times depend on, without a limit, and [K] seconds that each should take.

    Draws depend on the key and the client alone. Items of one client run one after the other.
    """
    devices, ids = devices_of(people), plan.ids
    factor = rule.shift + (rule.spread * waits(key, ids) if rule.spread else jnp.zeros(ids.shape))
    had = brought(plan, rule.macs.size)
    received = jnp.zeros(ids.shape) if had is None else bits.approximate(had)
    none = jnp.zeros(ids.shape)
    pace = Pace(plan.known, devices.speed[ids] / factor, devices.down[ids], devices.up[ids], received, none, ())
    expected = jnp.where(plan.valid, expected_seconds(rule, pace, plan.level, people.size[ids]), 0)
    return pace._replace(after=earlier(ids, expected)), expected


def earlier(ids: Array, seconds: Array) -> Array:
    """[K] the sum over earlier items of the same client.

    >>> earlier(jnp.array([7, 3, 7, 7]), jnp.array([1.0, 2.0, 4.0, 8.0])).tolist()
    [0.0, 0.0, 1.0, 5.0]
    """
    order = jnp.argsort(ids, stable=True)
    before = jnp.cumsum(seconds[order]) - seconds[order]
    begins = jnp.concatenate([jnp.ones(1, bool), jnp.diff(ids[order]) != 0])
    start = jax.lax.cummax(jnp.where(begins, jnp.arange(ids.size, dtype=jnp.int32), 0))
    return jnp.zeros(ids.shape).at[order].set(before - before[start])


def seconds_of(rule: Rule, pace: Pace, seen: Seen) -> Array:
    """float32 seconds of one item from what it did.

    >>> from types import SimpleNamespace
    >>> rule = Rule(np.array([100.0]), None, None)
    >>> none = jnp.float32(0.0)
    >>> pace = Pace((), jnp.float32(1000.0), jnp.float32(10.0), jnp.float32(5.0), none, none, ())
    >>> seen = Seen((), jnp.array([[4], [4]]), jnp.array([50, 0, 0]), jnp.array([50, 0, 0]))
    >>> round(float(seconds_of(rule, pace, seen)), 4)  # 4 * (1 + 2) * 100 / 1000 + 50 / 10 + 50 / 5
    16.2
    """
    macs = jnp.asarray(rule.macs, jnp.float32)
    work = (seen.work.astype(jnp.float32) * macs).sum(-1)
    steps = work[..., 0] + BACKWARD * work[..., 1]
    down = jnp.maximum(bits.approximate(seen.down) - pace.brought, 0)
    return steps / pace.speed + down / pace.down + bits.approximate(seen.up) / pace.up


def expected_seconds(rule: Rule, pace: Pace, level: Array, size: Array) -> Array:
    """[K] seconds that items of these levels and sizes should take, before they run."""
    macs = jnp.asarray(rule.macs, jnp.float32)[level]
    examples = (1 + BACKWARD) * examples_trained(rule.local, size) + rule.price.compared * size
    down, up = (jnp.asarray(number, jnp.float32)[level] for number in (rule.price.down, rule.price.up))
    return examples * macs / pace.speed + jnp.maximum(down - pace.brought, 0) / pace.down + up / pace.up


def survey_seconds(rule: Rule, asked: Account | tuple[()], devices: Devices) -> Array:
    """float32 seconds until the slowest client of a survey has answered."""
    if not isinstance(asked, Account):
        return jnp.float32(0)
    ids, none = asked.ids, jnp.zeros(asked.ids.shape)
    pace = Pace((), devices.speed[ids], devices.down[ids], devices.up[ids], none, none, ())
    each = seconds_of(rule, pace, asked.seen)
    return jnp.where(asked.valid, each, 0).max(initial=0)


def _limit(rule: Rule, expected: Array, plan: Plan, devices: Devices, now: Array) -> Array | tuple[()]:
    """[K] seconds after which a reply does not count; -1 for those that come after enough others; () for no limit."""
    if rule.deadline == math.inf and not rule.first and not devices.online:
        return ()
    limit = jnp.minimum(rule.deadline, leaving(devices, plan.ids, now))
    if not rule.first:
        return limit
    fails = ~plan.valid | (expected > limit)
    rank = jnp.zeros_like(plan.ids).at[jnp.lexsort((expected, fails))].set(jnp.arange(plan.ids.size, dtype=jnp.int32))
    return jnp.where(rank < rule.first, limit, -1.0)


def seen_of(report: PyTree) -> Seen:
    """What an item did, wherever a method's report has it.

    Raises:
      ValueError: nowhere.
    """
    found = [leaf for leaf in jax.tree.leaves(report, is_leaf=lambda v: isinstance(v, Seen)) if isinstance(leaf, Seen)]
    if not found:
        raise ValueError("this method's clients do not report what they did (Seen): need none (devices.name)")
    return found[0]


def dropped(reply: Reply, late: Array, context: ClientContext) -> Reply:
    """A reply that, if it is late, adds nothing and leaves its client's memory alone."""
    total = jax.tree.map(lambda v: jnp.where(late, jnp.zeros_like(v), v), reply.total)
    memory = jax.tree.map(lambda new, old: jnp.where(late, old, new), reply.memory, context.memory)
    return reply._replace(total=total, memory=memory)


def told(info: Info, plan: Plan, seconds: Array, late: Array, numbers: dict[str, Array]) -> Info:
    """``info`` with the time of every item and who was late."""
    failed = (plan.valid & ~info.items.ok & ~late).sum()
    items = info.items._replace(seconds=jnp.where(plan.valid, seconds, 0), late=late)
    return info._replace(items=items, numbers={**info.numbers, "failed": failed, "late": late.sum(), **numbers})


def present(people: Population, now: Array) -> Array | None:
    """[N] bool, who can be chosen at this time; ``None`` for everybody."""
    devices = devices_of(people)
    here = None if isinstance(devices.able, tuple) else devices.able
    if devices.online:
        start, end, period = devices.online
        at = (now % period)[:, None]
        on = ((start <= at) & (at < end)).any(1)
        here = on if here is None else here & on
    return here


def among(people: Population, here: Array | None) -> Population:
    """A population in which a selection finds only some clients; the others have no examples."""
    if here is None:
        return people
    devices = devices_of(people)._replace(here=here)
    return people._replace(size=jnp.where(here, people.size, 0), devices=devices)


def leaving(devices: Devices, ids: Array, now: Array) -> Array:
    """[K] seconds until these clients, which are online, go; an interval that ends with the period may go on."""
    if not devices.online:
        return jnp.full(ids.shape, jnp.inf)
    start, end, period = (part[ids] for part in devices.online)
    at = (now % period)[:, None]
    inside = (start <= at) & (at < end)
    till = jnp.where(inside, end, 0).max(1)
    again = jnp.where((till >= period) & (start[:, 0] <= 0), end[:, 0], 0)
    whole = (again >= period) & inside.any(1)
    return jnp.where(whole, jnp.inf, till + again - at[:, 0])


def coming(devices: Devices, now: Array) -> Array:
    """Seconds until the next client that is able comes online; 0 where clients are always online."""
    if not devices.online:
        return jnp.float32(0)
    start, _, period = devices.online
    at = (now % period)[:, None]
    first = jnp.where(start > at, start - at, jnp.inf).min(1)
    first = jnp.minimum(first, start[:, 0] + period - at[:, 0])
    able = jnp.ones(first.shape, bool) if isinstance(devices.able, tuple) else devices.able
    return jnp.where(able, first, jnp.inf).min()

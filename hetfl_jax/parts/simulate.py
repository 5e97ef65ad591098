"""A clock for any method: whose reply is late, and how long a round is.

A round lasts as long as its slowest item, or until a deadline, or until its first replies are in; a survey before it
adds its own slowest answer. ``parts.pace`` says how long an item takes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Algorithm, Array, ClientContext, Info, Plan, Population, PyTree, Reply
from hetfl_jax.parts.online import among, coming, devices_of, later, present
from hetfl_jax.parts.pace import Pace, Rule, check_waits, limit_of, pace_of, seconds_of, seen_of, survey_seconds


class Simulated(NamedTuple):
    """The server of a method and the time."""

    server: PyTree
    seconds: Array  #: float32 since the start
    rest: Array  #: float32, what ``seconds`` cannot hold, see ``online.later``


class Spent(NamedTuple):
    """A client's report with its time.

    Reports are stacked, so that the server sees the time of every item.
    """

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

    Args:
      base: any method whose clients report what they did (``Seen``).
      rule: how time goes; its ``macs`` and ``price`` are those of the method's family.

    Returns:
      The method, whose server is a ``Simulated``. Its ``Info`` has the seconds of every item and who was late.

    Raises:
      ValueError: a method that works on the host between rounds, or a value out of range.

    >>> from hetfl_jax.methods import fedavg
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [{}], jnp.zeros((1, 3)))
    >>> settings = local(learning_rate=0.1, batch_size=4)
    >>> base = fedavg.make(fam, settings, cohort=2)
    >>> clocked = simulated(base, Rule(costs(fam).macs, base.price(), settings, deadline=60.0))
    >>> float(clocked.init(jax.random.key(0))[0].seconds)
    0.0
    """
    check(base, rule)

    def init(key: Array) -> tuple[Simulated, PyTree]:
        server, memory = base.init(key)
        return Simulated(server, jnp.float32(0), jnp.float32(0)), memory

    def plan(key: Array, round: Array, state: Simulated, people: Population, survey: Callable[..., PyTree]) -> Plan:
        devices, here = devices_of(people), present(people, state.seconds)
        planned = base.plan(key, round, state.server, among(people, here), survey)
        if here is not None:
            planned = planned._replace(valid=planned.valid & here[planned.ids])
        pace, expected = pace_of(rule, key, planned, people)
        limit = limit_of(rule, pace.after + expected, planned, devices, state.seconds)
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
        now, rest = later(state.seconds, state.rest, lasts)
        numbers = {"round_seconds": lasts, "simulated_seconds": now}
        return Simulated(after, now, rest), told(info, plan, report.seconds, late, numbers)

    return around(base)._replace(init=init, plan=plan, client=client, server=server)


def check(base: Algorithm, rule: Rule) -> None:
    """Refuse values out of range, and methods that time cannot go through.

    Args:
      base: the method.
      rule: its clock.

    Raises:
      ValueError: with the key.

    >>> from types import SimpleNamespace
    >>> check(SimpleNamespace(between=None), Rule(None, None, None, deadline=-1.0))
    Traceback (most recent call last):
    ValueError: deadline -1, allowed >= 0 (devices.deadline)
    """
    if base.between is not None:
        raise ValueError("this method works on the host between rounds: need none (devices.name)")
    check_waits(rule.shift, rule.spread)
    if not rule.deadline >= 0:
        raise ValueError(f"deadline {rule.deadline:g}, allowed >= 0 (devices.deadline)")
    if rule.first < 0:
        raise ValueError(f"first {rule.first}, allowed >= 0 (devices.first)")


def around(base: Algorithm) -> Algorithm:
    """``base`` whose server is the field ``server`` of another state: all that only reads it.

    What makes or changes a state is left to the caller: ``init``, ``plan``, ``client`` and ``server``.

    Args:
      base: any method.

    Returns:
      The method with ``send``, ``model``, ``questions``, ``choice``, ``order``, ``shown`` and ``same_selection`` that
      look inside the field.

    >>> base = Algorithm(*[None] * 10)._replace(send=lambda server, round: server + round)
    >>> around(base).send(Simulated(10, 0.0, 0.0), 5)
    15
    """

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


def dropped(reply: Reply, late: Array, context: ClientContext) -> Reply:
    """A reply that, if it is late, adds nothing and leaves its client's memory alone.

    Args:
      reply: of a client, finite or not.
      late: bool scalar.
      context: what the client knew, with its memory before the round.

    >>> from types import SimpleNamespace
    >>> reply = Reply({"w": jnp.array([jnp.nan, 2.0])}, 0, {"m": jnp.array(5.0)}, ())
    >>> after = dropped(reply, jnp.array(True), SimpleNamespace(memory={"m": jnp.array(1.0)}))
    >>> after.total["w"].tolist(), float(after.memory["m"])
    ([0.0, 0.0], 1.0)
    """
    total = jax.tree.map(lambda v: jnp.where(late, jnp.zeros_like(v), v), reply.total)
    memory = jax.tree.map(lambda new, old: jnp.where(late, old, new), reply.memory, context.memory)
    return reply._replace(total=total, memory=memory)


def told(info: Info, plan: Plan, seconds: Array, late: Array, numbers: dict[str, Array]) -> Info:
    """``info`` with the time of every item and who was late.

    Args:
      info: of the method inside, for which late replies have failed.
      plan: of the round.
      seconds, late: [K] of its items.
      numbers: further ones.

    >>> from hetfl_jax.core.types import Account
    >>> items = Account(jnp.array([4, 2]), (), jnp.ones(2, bool), jnp.array([True, False]), ())
    >>> plan, late = Plan(items.ids, items.valid, ()), jnp.array([False, True])
    >>> after = told(Info(items, (), {"failed": 1}, {}), plan, jnp.array([3.0, 90.0]), late, {})
    >>> {name: int(number) for name, number in after.numbers.items()}, after.items.seconds.tolist()
    ({'failed': 0, 'late': 1}, [3.0, 90.0])
    """
    failed = (plan.valid & ~info.items.ok & ~late).sum()
    items = info.items._replace(seconds=jnp.where(plan.valid, seconds, 0), late=late)
    return info._replace(items=items, numbers={**info.numbers, "failed": failed, "late": late.sum(), **numbers})

"""The time model of FedPAQ: shifted exponential computation, uploads that share one channel."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core import bits
from hetfl_jax.core.types import Account, Algorithm, Array, Info, Plan, Population, PyTree, Seen
from hetfl_jax.parts.server import Server


class Clock(NamedTuple):
    """How long a round takes. The unit of time is what one example costs if ``shift + 1 / scale`` is 1."""

    shift: float  #: time for the gradient of an example that every client needs
    scale: float  #: 1 / the mean of what it needs besides; 0 for nothing
    bandwidth: float  #: bits that all uploads together send in a unit of time


class Timed(NamedTuple):
    """The slot of a server rule, and how long the run has taken."""

    slot: PyTree
    time: Array  #: float32 scalar


def clock(parameters: int, *, shift: float, scale: float, ratio: float, bandwidth: float = 0.0) -> Clock:
    """A clock by its ratio of communication to computation, ``(32 P / bandwidth) / (shift + 1 / scale)``.

    Args:
      parameters: P, of the full model.
      bandwidth: if > 0, in place of the ratio.

    Raises:
      ValueError: a value out of range.

    >>> clock(785, shift=0.5, scale=2.0, ratio=100.0).bandwidth  # a float32 model takes as long as 100 examples
    251.2
    """
    for name, value in (("shift", shift), ("scale", scale), ("bandwidth", bandwidth)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} {value}, allowed >= 0 and finite (method.args.{name})")
    if not (shift > 0 or scale > 0):
        raise ValueError(f"shift {shift} and scale {scale}: need one above 0 (method.args.shift)")
    each = shift + (1 / scale if scale else 0.0)
    if not bandwidth and not 0 < ratio < float("inf"):
        raise ValueError(f"ratio {ratio}, allowed > 0 and finite, or bandwidth > 0 (method.args.ratio)")
    return Clock(shift, scale, bandwidth or 32 * parameters / (ratio * each))


def durations(clock: Clock, items: Account, waits: Array) -> tuple[Array, Array]:
    """(computation of the slowest client, all uploads one after the other) of a round, float32 scalars.

    A client that goes backward through e examples needs ``e shift + e / scale`` times its exponential draw.

    Args:
      items: what every item did.
      waits: [K] exponential draws of mean 1.

    >>> from types import SimpleNamespace
    >>> seen = SimpleNamespace(work=jnp.array([[[0], [10]], [[0], [4]]]), up=jnp.array([[100, 0, 0], [60, 0, 0]]))
    >>> items = SimpleNamespace(valid=jnp.array([True, True]), seen=seen)
    >>> [float(part) for part in durations(Clock(1.0, 0.0, 8.0), items, jnp.zeros(2))]  # 10 examples; 160 bits
    [10.0, 20.0]
    """
    there = jnp.asarray(items.valid)
    examples = items.seen.work[:, 1].sum(-1).astype(jnp.float32)
    each = clock.shift + (waits / clock.scale if clock.scale else 0.0)
    sent = bits.approximate(items.seen.up)
    return jnp.where(there, examples * each, 0).max(), jnp.where(there, sent, 0).sum() / clock.bandwidth


def waits(key: Array, ids: Array) -> Array:
    """[K] exponential draws of mean 1 that depend on the key, of a round's plan, and the client alone.

    >>> bool((waits(jax.random.key(0), jnp.array([7, 2]))[1] == waits(jax.random.key(0), jnp.array([2]))[0]))
    True
    """
    own = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, 1 << 20), ids)
    return jax.vmap(jax.random.exponential)(own)


def remembering(server: Server) -> Server:
    """A server rule with room for the time in its slot.

    Args:
      server: any; its own slot stays inside.

    >>> from hetfl_jax.parts.server import optimizer
    >>> float(remembering(optimizer()).init({"params": {"w": jnp.zeros(1)}}).time)
    0.0
    """

    def update(slot: Timed, *args: PyTree) -> tuple[PyTree, PyTree]:
        inner, variables = server.update(slot.slot, *args)
        return slot._replace(slot=inner), variables

    def learn(slot: Timed, plan: Plan, seen: Seen, ok: Array) -> Timed:
        return slot._replace(slot=server.learn(slot.slot, plan, seen, ok))

    return server._replace(
        init=lambda variables: Timed(server.init(variables), jnp.float32(0)),
        update=update,
        learn=learn,
        context=lambda slot: server.context(slot.slot),
        known=lambda slot, ids: server.known(slot.slot, ids),
        info=lambda slot, variables: server.info(slot.slot, variables),
    )


def timed(base: Algorithm, clock: Clock) -> Algorithm:
    """``base``, whose server rule is ``remembering``, with ``compute_time``, ``upload_time`` and ``simulated_time``.

    Draws depend on the run, the round and the client alone. Downloads take no time.

    Args:
      base: a composed method.
      clock: how long a round takes.

    Returns:
      The method, in whose numbers the three are float32 scalars in the unit of ``Clock``.

    Source: Reisizadeh et al., "FedPAQ", AISTATS 2020, the cost model of its experiments.

    >>> from types import SimpleNamespace
    >>> from hetfl_jax.parts.compose import ServerState
    >>> seen = SimpleNamespace(work=jnp.array([[[0], [10]]]), up=jnp.array([[160, 0, 0]]))
    >>> info = Info(SimpleNamespace(valid=jnp.ones(1, bool), seen=seen), (), {}, {})
    >>> base = Algorithm(*[None] * 10)._replace(server=lambda state, *_: (state, info))
    >>> state, plan = ServerState((), Timed((), jnp.float32(5))), Plan((), (), (), notes=((), jnp.zeros(1)))
    >>> after = timed(base, Clock(1.0, 0.0, 8.0)).server(state, plan, (), (), (), ())[1]
    >>> {name: float(time) for name, time in after.numbers.items()}  # 10 examples, 160 bits, on top of 5
    {'compute_time': 10.0, 'upload_time': 20.0, 'simulated_time': 35.0}
    """

    def plan(key: Array, round: Array, state: PyTree, people: Population, survey: Callable[..., PyTree]) -> Plan:
        planned = base.plan(key, round, state, people, survey)
        return planned._replace(notes=(planned.notes, waits(key, planned.ids)))

    def serve(state: PyTree, plan: Plan, sent: PyTree, total: PyTree, seen: Seen, ok: Array) -> tuple[PyTree, Info]:
        notes, drawn = plan.notes
        after, info = base.server(state, plan._replace(notes=notes), sent, total, seen, ok)
        compute, upload = durations(clock, info.items, drawn)
        slot = after.slot._replace(time=after.slot.time + compute + upload)
        times = {"compute_time": compute, "upload_time": upload, "simulated_time": slot.time}
        return after._replace(slot=slot), info._replace(numbers={**info.numbers, **times})

    return base._replace(plan=plan, server=serve)

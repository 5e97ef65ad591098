"""How long an item takes on its client's device.

It takes ``(forward + 2 backward) . MACs / speed * (shift + spread * Exp(1))`` for its work, as it is counted, plus
``bits / bandwidth`` of what it receives and of what it sends.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import bits
from hetfl_jax.core.types import Account, Array, Devices, Plan, Population, Price, PyTree, Seen
from hetfl_jax.models.costs import BACKWARD
from hetfl_jax.parts.clock import waits
from hetfl_jax.parts.local import Local, examples_trained
from hetfl_jax.parts.online import devices_of, leaving
from hetfl_jax.parts.survey import brought


class Rule(NamedTuple):
    """How time goes.

    A round lasts ``max_k min(t_k, deadline)`` over its items, or over the ``first`` of them, t_k the seconds of item k:
    ``t_k = (shift + spread Exp(1)) (F_k + 2 B_k) . macs / speed_k + down_k bits / down rate + up_k bits / up rate``
    with F_k and B_k the [L] examples that went forward and backward at each level.
    """

    macs: np.ndarray  #: [L] multiply-adds of one example's forward pass
    price: Price  #: what an item is expected to send and receive
    local: Local
    shift: float = 1.0  #: of the time for computation, what is certain
    spread: float = 0.0  #: mean of the exponential part, drawn for every round and client
    deadline: float = math.inf  #: seconds after which a reply does not count
    first: int = 0  #: replies that a round waits for, 0 for all


class Pace(NamedTuple):
    """What an item's time depends on; leaves [K].

    It goes from the plan to the client and the server as ``Plan.known``, of which nothing travels.
    """

    known: PyTree  #: of the method inside
    speed: Array  #: multiply-adds a second, this round's draw counted
    down: Array  #: bits a second
    up: Array
    brought: Array  #: bits that a survey has brought already
    after: Array  #: seconds that earlier items of the same client are expected to take
    limit: Array | tuple[()]  #: seconds after which the reply does not count, -1 if others are awaited; () for none


def check_waits(shift: float, spread: float) -> None:
    """Refuse factors of computing time that are out of range.

    Args:
      shift, spread: of ``Rule``.

    Raises:
      ValueError: with the key.

    >>> check_waits(0.0, 0.0)
    Traceback (most recent call last):
    ValueError: shift 0 and spread 0: need one above 0 (devices.shift)
    """
    for name, value in (("shift", shift), ("spread", spread)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} {value:g}, allowed >= 0 and finite (devices.{name})")
    if not shift + spread > 0:
        raise ValueError("shift 0 and spread 0: need one above 0 (devices.shift)")


def pace_of(rule: Rule, key: Array, plan: Plan, people: Population) -> tuple[Pace, Array]:
    """What the items' times depend on, without a limit, and [K] seconds that each should take.

    Draws depend on the key and the client alone. Items of one client run one after the other.

    Args:
      rule: how time goes.
      key: of the round's plan.
      plan: of the method inside; what its survey brought is not sent again.
      people: with devices.

    Returns:
      The pace, and float32 [K]: 0 of items that are not valid.

    >>> from hetfl_jax.parts.local import local
    >>> devices = Devices(jnp.array([9.0, 1000.0]), jnp.array([9.0, 10.0]), jnp.array([9.0, 10.0]))
    >>> people = Population(None, None, None, None, jnp.array([5, 5]), None, None, devices=devices)
    >>> rule = Rule(np.array([100]), Price(np.array([50]), np.array([50])), local(learning_rate=0.1, batch_size=4))
    >>> plan = Plan(jnp.array([1, 1]), jnp.ones(2, bool), jnp.zeros(2, int))
    >>> pace, expected = pace_of(rule, jax.random.key(0), plan, people)
    >>> expected.tolist(), pace.after.tolist()  # client 1 runs its two items one after the other
    ([11.5, 11.5], [0.0, 11.5])
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

    Args:
      ids: [K] int32 clients.
      seconds: [K] float32 of each item.

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

    Args:
      rule: the multiply-adds of each level.
      pace: of the item, leaves without an axis; or of all items, leaves [K].
      seen: what it did, ``work`` [..., 2, L].

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
    """[K] seconds that items of these levels and sizes should take, before they run.

    Args:
      rule: what an item of each level sends and receives, and how clients train.
      pace: of the items.
      level: [K] int32.
      size: [K] int32 examples of their clients.

    >>> from hetfl_jax.parts.local import local
    >>> price = Price(np.array([50]), np.array([50]))
    >>> rule = Rule(np.array([100]), price, local(learning_rate=0.1, batch_size=4))
    >>> rate, none = jnp.array([10.0]), jnp.zeros(1)
    >>> pace = Pace((), jnp.array([1000.0]), rate, rate, none, none, ())
    >>> expected_seconds(rule, pace, jnp.array([0]), jnp.array([5])).tolist()  # 5 * 3 * 100 / 1000 + 50 / 10 + 50 / 10
    [11.5]
    """
    macs = jnp.asarray(rule.macs, jnp.float32)[level]
    examples = (1 + BACKWARD) * examples_trained(rule.local, size) + rule.price.compared * size
    down, up = (jnp.asarray(number, jnp.float32)[level] for number in (rule.price.down, rule.price.up))
    return examples * macs / pace.speed + jnp.maximum(down - pace.brought, 0) / pace.down + up / pace.up


def survey_seconds(rule: Rule, asked: Account | tuple[()], devices: Devices) -> Array:
    """float32 seconds until the slowest client of a survey has answered.

    Args:
      rule: how time goes; computing has no waits here.
      asked: what the survey cost, ``()`` without one.
      devices: of all clients.

    >>> float(survey_seconds(Rule(np.array([1]), None, None), (), None))
    0.0
    """
    if not isinstance(asked, Account):
        return jnp.float32(0)
    ids, none = asked.ids, jnp.zeros(asked.ids.shape)
    pace = Pace((), devices.speed[ids], devices.down[ids], devices.up[ids], none, none, ())
    each = seconds_of(rule, pace, asked.seen)
    return jnp.where(asked.valid, each, 0).max(initial=0)


def limit_of(rule: Rule, expected: Array, plan: Plan, devices: Devices, now: Array) -> Array | tuple[()]:
    """[K] seconds after which a reply does not count; -1 for those that come after enough others; () for no limit.

    Args:
      rule: the deadline, and how many replies are awaited.
      expected: [K] seconds after which each item should be done.
      plan: of the items.
      devices: when their clients are online.
      now: seconds since the start.

    >>> plan = Plan(jnp.arange(3), jnp.ones(3, bool), jnp.zeros(3, int))
    >>> rule = Rule(np.array([1]), None, None, deadline=9.0, first=1)
    >>> limit_of(rule, jnp.array([8.0, 5.0, 12.0]), plan, Devices(*[jnp.ones(3)] * 3), jnp.float32(0)).tolist()
    [-1.0, 9.0, -1.0]
    """
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

    Args:
      report: of a client.

    Raises:
      ValueError: nowhere.

    >>> seen_of({"losses": 3.0, "own": Seen((), 1, 2, 3)}).down
    2
    """
    found = [leaf for leaf in jax.tree.leaves(report, is_leaf=lambda v: isinstance(v, Seen)) if isinstance(leaf, Seen)]
    if not found:
        raise ValueError("this method's clients do not report what they did (Seen): need none (devices.name)")
    return found[0]

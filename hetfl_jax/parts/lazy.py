"""Lazily aggregated gradients (LAG): a worker sends its gradient anew only where it has changed enough.

M workers; the server adds what they sent last: ``theta <- theta - rate sum_m g^_m``. Worker m sends anew if

``||g_m - g^_m||^2 > W / (rate M)^2`` or, judged without its gradient, ``L_m^2 ||theta - theta^_m||^2 > W / (rate M)^2``

with g_m its gradient at theta, g^_m the one it sent last, from theta^_m, L_m the smoothness of its loss, and
``W = xi sum_d ||theta^(k+1-d) - theta^(k-d)||^2`` over the latest D steps.

Source: Chen, Giannakis, Sun, Yin 2018 (NeurIPS), "LAG: Lazily Aggregated Gradient".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core import tree
from hetfl_jax.core.absent import HIGHEST
from hetfl_jax.core.types import Array, ClientContext, PyTree, Reply
from hetfl_jax.models.windows import Family
from hetfl_jax.parts.codec import none
from hetfl_jax.parts.message import Codec
from hetfl_jax.parts.server import Server

Client = Callable[[ClientContext], Reply]


class Ticket(NamedTuple):
    """What an item is told besides the model; nothing of it travels, since both sides know it."""

    asked: Array  #: bool, whether the worker has to send in any case
    threshold: Array  #: float, ``W / (rate M)^2``; ``HIGHEST`` where only those who are asked send
    smoothness: Array | tuple[()] = ()  #: float, L_m
    before: PyTree = ()  #: ``{"params": tree}``, the change from theta^_m on the batch of this round


class Rule(NamedTuple):
    """Who uploads."""

    xi: float = 0.0  #: the paper's factor of W, times D
    by: str = "gradient"  #: what is compared, see ``codec``
    by_server: bool = False  #: whether the server decides, so that the others hear nothing and compute nothing
    #: (key, round, ids, smoothness [M] or None) -> [K] bool, whose turn it is, whatever has changed
    turn: Callable[[Array, Array, Array, PyTree], Array] | None = None
    needs_smoothness: bool = False


def _drawn(key: Array, round: Array, ids: Array, smoothness: Array) -> Array:
    return ids == jax.random.categorical(key, jnp.log(smoothness))


RULES = {
    "wk": Rule(1.0),
    "ps": Rule(10.0, "point", by_server=True, needs_smoothness=True),
    "gd": Rule(turn=lambda key, round, ids, smoothness: ids >= 0),
    "cyclic_iag": Rule(turn=lambda key, round, ids, smoothness: ids == round % ids.size, by_server=True),
    "num_iag": Rule(turn=_drawn, by_server=True, needs_smoothness=True),
}


def tickets(
    rule: Rule, rate: Callable[[Array], Array], factor: float, silent: int, smoothness: Array | None
) -> Callable[[Array, Array, Array, Array], Ticket]:
    """``ticket(key, round, squared lengths of the latest steps [D], ids)`` for the items of a round.

    Args:
      factor: ``xi / M^2``.
      silent: rounds at the start in which nobody sends; without any, all send in the first.
      smoothness: [M] L_m.

    Returns:
      ``ticket``; its ``Ticket`` has leaves [K]: bool, float32 and, with ``smoothness``, float32.

    >>> ticket, args = tickets(RULES["wk"], lambda round: 0.5, 0.25, 0, None), (jnp.array([1.0, 3.0]), jnp.arange(2))
    >>> ticket(jax.random.key(0), jnp.int32(1), *args).threshold.tolist()  # 0.25 (1 + 3) / 0.5^2
    [4.0, 4.0]
    >>> ticket = tickets(RULES["cyclic_iag"], lambda round: 0.5, 0.25, 0, None)
    >>> ticket(jax.random.key(0), jnp.int32(1), *args).asked.tolist()
    [False, True]
    """

    def ticket(key: Array, round: Array, steps: Array, ids: Array) -> Ticket:
        asked = ids < 0 if rule.turn is None else rule.turn(key, round, ids, smoothness)
        threshold = factor * steps.sum() / jnp.square(rate(round))
        if rule.turn is not None:
            threshold = jnp.full_like(threshold, HIGHEST)
        elif silent:
            threshold = jnp.where(round < silent, HIGHEST, threshold)
        asked = asked if silent else asked | (round == 0)
        curved = () if smoothness is None else smoothness[ids]
        return Ticket(asked, jnp.broadcast_to(threshold, ids.shape), curved)

    return ticket


def squared(values: PyTree) -> Array:
    """Sum of the squares of all entries.

    >>> float(squared({"a": jnp.array([1.0, 2.0]), "b": jnp.array(2.0)}))
    9.0
    """
    return jnp.stack([jnp.square(leaf).sum() for leaf in jax.tree.leaves(values)]).sum()


def codec(family: Family, rate: Callable[[Array], Array], by: str = "gradient", first: float = 0.0) -> Codec:
    """What a worker sent last stands in for what it has not sent; a message has ``32 d`` bits or none.

    The memory ``gradient`` is ``g^_m``, what was sent as a gradient: a change divided by ``-rate``; ``point`` is
    ``theta^_m``. The context's ticket is a ``Ticket``.

    Args:
      family: of one level.
      rate: (round) -> the learning rate of local training.
      by: what decides: the "gradient" (LAG-WK), the "point" (LAG-PS), or the change of the gradient between the point
        and here on one "batch".
      first: every entry of the gradient that counts as sent before the first round.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=()), [{}], jnp.zeros((1, 3)))
    >>> list(codec(fam, lambda round: 0.1, "point").init({"head": {"bias": jnp.ones(2)}}))
    ['gradient', 'point']
    """
    plain = none(family)

    def init(params: PyTree) -> PyTree:
        sent = {"gradient": {"params": jax.tree.map(lambda leaf: jnp.full_like(leaf, first), params)}}
        return sent if by == "gradient" else {**sent, "point": {"params": params}}

    def encode(key: Array, delta: PyTree, context: ClientContext, memory: PyTree) -> tuple[PyTree, PyTree, Array]:
        ticket, here, step = context.ticket, context.sent.variables["params"], rate(context.round)
        new, old = _gradient(delta, step), memory["gradient"]["params"]
        if by == "point":
            far = jnp.square(ticket.smoothness) * squared(jax.tree.map(jnp.subtract, here, memory["point"]["params"]))
        else:
            other = old if by == "gradient" else _gradient(ticket.before["params"], step)
            far = squared(jax.tree.map(jnp.subtract, new, other))
        fires = ticket.asked | (far > ticket.threshold)
        kept = tree.select(fires, new, old)
        memory = {**memory, "gradient": {"params": kept}}
        if by != "gradient":
            memory["point"] = {"params": tree.select(fires, here, memory["point"]["params"])}
        whole = plain.encode(key, delta, context, {})[2]
        return jax.tree.map(lambda g: -step * g, kept), memory, jnp.where(fires, whole, jnp.zeros_like(whole))

    return Codec(init, encode, plain.length)


def _gradient(delta: PyTree, rate: Array) -> PyTree:
    return jax.tree.map(lambda d: -d / rate, delta)


def server(window: int, learning_rate: float = 1.0) -> Server:
    """``theta <- theta + learning_rate * mean``; the slot [D] has squared lengths of the latest steps, newest first.

    Args:
      window: D, steps that W sums, >= 1.
      learning_rate: of the step along the mean, > 0.

    Raises:
      ValueError: a window or a learning rate out of range.

    >>> rule = server(2)
    >>> variables, mean = {"params": {"w": jnp.zeros(2)}}, {"params": {"w": jnp.array([3.0, 4.0])}}
    >>> slot, after = rule.update(rule.init(variables), variables, mean, mean, jnp.array(True))
    >>> slot.tolist(), after["params"]["w"].tolist()
    ([25.0, 0.0], [3.0, 4.0])
    """
    if window < 1:
        raise ValueError(f"window of {window} steps, allowed >= 1 (method.args.window)")
    if not learning_rate > 0:
        raise ValueError(f"server learning rate {learning_rate}, allowed > 0 (method.args.server_learning_rate)")

    def update(
        slot: Array, variables: PyTree, mean: PyTree, coverage: PyTree, any_ok: Array, extra: PyTree = ()
    ) -> tuple[PyTree, PyTree]:
        step = jax.tree.map(lambda d: learning_rate * d, mean["params"])
        after = {**variables, "params": jax.tree.map(jnp.add, variables["params"], step)}
        return jnp.where(any_ok, jnp.roll(slot, 1).at[0].set(squared(step)), slot), after

    return Server(lambda variables: jnp.zeros(window), update)


def idle_unless_asked(client: Client) -> Client:
    """Who does not send was not asked: nothing came and nothing was computed.

    Args:
      client: of a method whose uplink may send no bits.

    Returns:
      ``client`` whose report has no work and no bits received where it sent none.

    >>> from hetfl_jax.core.types import Seen
    >>> report = lambda up: Seen((), jnp.array([[8], [8]]), jnp.array([64, 0, 0]), up)
    >>> client = idle_unless_asked(lambda up: Reply((), 0, (), report(up)))
    >>> [client(jnp.array([up, 0, 0])).report.work.tolist() for up in (0, 32)]
    [[[0], [0]], [[8], [8]]]
    """

    def run(context: ClientContext) -> Reply:
        reply = client(context)
        seen = reply.report
        idle = seen._replace(work=jnp.zeros_like(seen.work), down=jnp.zeros_like(seen.down))
        return reply._replace(report=tree.select(seen.up.any(), seen, idle))

    return run


def at_both_points(plainly: Client, client: Client) -> Client:
    """The client's step on the batch of this round, also from where its last upload was.

    Args:
      plainly: the client without a codec and without memory.
      client: the client whose ticket takes the change from the old point.

    Returns:
      A client of twice the work.

    >>> from hetfl_jax.core.types import Seen
    >>> from hetfl_jax.parts.compose import Sent
    >>> from hetfl_jax.parts.merge import Total
    >>> plainly = lambda context: Reply(Total(-context.sent.variables["params"], (), ()), 0, (), ())
    >>> client = lambda context: Reply(context.ticket.before, 0, (), Seen((), jnp.int32(4), (), ()))
    >>> context = ClientContext((), 0, 0, (), Ticket((), ()), Sent({"params": 5.0}), {"point": {"params": 2.0}})
    >>> reply = at_both_points(plainly, client)(context)
    >>> reply.total, int(reply.report.work)
    (-2.0, 8)
    """

    def run(context: ClientContext) -> Reply:
        there = context.sent._replace(variables={**context.sent.variables, **context.memory["point"]})
        before = plainly(context._replace(sent=there, memory={})).total.delta
        reply = client(context._replace(ticket=context.ticket._replace(before=before)))
        seen = reply.report
        return reply._replace(report=seen._replace(work=2 * seen.work))

    return run

"""InclusiveFL (Liu et al., KDD 2022): one model per depth, which share all layers but their last.

A client trains the model of its own depth, the largest it can afford. After a round the models' layers become means
over the models that have them, weighted by examples; every model's last layer and head stay its own, and the last
layer also learns from the mean change of the layers that the next larger model has in its place (momentum
distillation): ``g <- beta m_s + (1 - beta) g``, ``m_s = mean_{j = L_s - 1 .. L_s' - 1} G^s'_j``.

As the paper's text intends it; the released code never applies the momentum and divides by zero when the only owners of
a layer are absent. Layers must be told by their numbers, ``dense_2``, and be equal where a momentum is taken (else use
``beta=0``), as in the MLP or the Transformer; the multi-exit ResNet has no such layers and is refused.

| slot | here |
|---|---|
| members | one a level, the item's own |
| objective | the deepest exit |
| server | written by hand: mean, momentum, sharing |
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.types import (
    Algorithm,
    Array,
    ClientContext,
    Gradient,
    Info,
    Level,
    Plan,
    PyTree,
    Reply,
    Seen,
    Tally,
)
from hetfl_jax.models import families, windows
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import merge, select, sharing
from hetfl_jax.parts.compose import Sent, Slots, compose, down_bits, questions_of, refuse, round_info
from hetfl_jax.parts.local import Local
from hetfl_jax.parts.survey import planner

TIMINGS = ("previous", "same")


class Types(NamedTuple):
    """The models of all depths, leaves [L, ...] at full shape, and what their last layers are to learn."""

    variables: PyTree
    momentum: PyTree
    known: Array  #: [L] bool, whether there is a momentum yet
    select: PyTree = ()  #: what the selection remembers


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    beta: float = 0.2,
    timing: str = "previous",
    slots: Slots | None = None,
) -> Algorithm:
    """InclusiveFL over a family whose levels differ in depth.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      beta: weight of the momentum, 0 for none.
      timing: take the momentum of the ``previous`` round, or of the ``same``.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: a value out of range, a family without depths, or layers of unlike shape.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4, 4, 4)), [dict(depth=3), dict(depth=2)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2).members
    2
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta {beta}, allowed 0..1 (method.args.beta)")
    if timing not in TIMINGS:
        raise ValueError(f"timing {timing!r} is not one of {', '.join(TIMINGS)} (method.args.timing)")
    _check(family)
    slots = slots or Slots()
    refuse("inclusivefl", slots, capacity=True, downlink=True, objective=True)
    depths, count = family.fields["depth"].tolist(), family.levels
    rule = merge.overlap_mean(family)
    chosen = slots.select or select.uniform(cohort)
    base = compose(family, local=local, select=chosen, merge=rule, slots=slots)

    whole = jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), family.shapes[0]["params"])
    empty = jax.eval_shape(partial(_momentum, depths=depths, beta=beta), whole)  # layers of unlike shape are found here

    def init(key: Array) -> tuple[Types, PyTree]:
        server, memory = base.init(key)
        start = jax.tree.map(lambda v: jnp.tile(v[None], (count, *[1] * v.ndim)), server.variables)
        return Types(start, tree.zeros(empty), jnp.zeros(count, bool), server.select), memory

    def send(state: Types, round: Array) -> Sent:
        return Sent(state.variables)

    def judge(sent: Sent, level: Level, *rest: Any) -> Tally:
        assert base.judge is not None
        return base.judge(_own_model(sent, level), level, *rest)

    gradient, sizes = _own_gradient(base), lambda sent: down_bits(family, _own_model(sent, 0))
    plan = planner(chosen, select.own_level(), send, judge, sizes, count, gradient)

    def client(context: ClientContext) -> Reply:
        reply = base.client(context._replace(sent=_own_model(context.sent, context.level)))
        return reply._replace(member=windows.index_of(context.level))

    def server(state: Types, plan: Plan, sent: Sent, total: merge.Total, seen: Seen, ok: Array) -> tuple[Types, Info]:
        mean, _ = merge.settle_each(rule, total)
        after = _served(state, mean["params"], total.weight.sum(1), depths, beta, timing)
        after = after._replace(select=chosen.update(plan.notes, plan, seen, ok))
        return after, round_info(plan, seen, ok, chosen.info(after.select))

    def model(state: Types, level: Level, member: int = 0) -> PyTree:
        return families.view(family, tree.take(state.variables, windows.index_of(level)), level).variables

    def predict(variables: PyTree, level: Level, x: Array, *seen: Any) -> Array:
        return base.predict(variables, level, x, *seen)[-1:]  # the exits before are nobody's: they were never trained

    return base._replace(
        members=count, predict=predict, init=init, plan=plan, send=send, client=client, server=server, model=model,
        judge=None, gradient=gradient, questions=questions_of(model, predict, {}, {}),
    )  # fmt: skip


def _own_model(sent: Sent, level: Level) -> Sent:
    """What clients of one level receive."""
    return sent._replace(variables=tree.take(sent.variables, windows.index_of(level)))


def _own_gradient(base: Algorithm) -> Gradient:
    """The gradient of the method inside, of the client's own model."""
    assert base.gradient is not None
    of = base.gradient.of
    return base.gradient._replace(of=lambda sent, level, shard: of(_own_model(sent, level), level, shard))


def _momentum(change: PyTree, depths: Sequence[int], beta: float) -> PyTree:
    return sharing.momentum(change, depths) if beta else {}


def _served(
    state: Types, change: PyTree, examples: Array, depths: Sequence[int], beta: float, timing: str
) -> Types:  # fmt: skip
    """All models after a round: their own change and what they learn from a larger one, then what they share."""
    count, params = len(depths), state.variables["params"]
    larger = [t if above is None else above for t, above in enumerate(sharing.next_larger(depths))]
    fresh = (examples > 0)[np.asarray(larger)] & (np.asarray(larger) != np.arange(count))
    new = _momentum(change, depths, beta)
    taught = jax.tree.map(lambda n, o: jnp.where(_rows(fresh, n), n, o), new, state.momentum)
    known = state.known | fresh
    used, there = (taught, known) if timing == "same" else (state.momentum, state.known)
    mixed = sharing.mix(change, used, beta, depths, there & (examples > 0))
    moved = jax.tree.map(lambda p, d: jnp.where(_rows(examples > 0, p), p + d, p), params, mixed)
    return Types({"params": sharing.share(moved, examples, depths)}, taught, known)


def _check(family: Family) -> None:
    if "depth" not in family.fields:
        raise ValueError("InclusiveFL needs levels of depth, such as 4x1-2x1 (family.mix)")
    if len(set(family.fields.get("width", np.ones(1)).tolist())) > 1:
        raise ValueError("InclusiveFL with levels of several widths: need levels of depth alone (family.mix)")
    missing = {name for shapes in family.shapes for name in family.shapes[0]["params"] if name not in shapes["params"]}
    if unknown := sorted(name for name in missing if not sharing.known(name)):
        raise ValueError(f"InclusiveFL cannot tell who has layer {unknown[0]}: need names as dense_2 (family.net)")
    if "batch_stats" in family.shapes[0]:
        raise ValueError("InclusiveFL keeps no statistics for each model: need another norm (family.norm)")


def _rows(which: Array, like: Array) -> Array:
    return which.reshape(-1, *[1] * (like.ndim - 1))

"""What a client minimises, and how its own test data is judged."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hetfl_jax.core.types import ACCURACY, Array, Batch, ClientContext, PyTree, Score, Shard, Tally
from hetfl_jax.models.families import Forward

Active = Array | np.ndarray  #: [E] bool, which exits there are


class Aux(NamedTuple):
    """What a step says besides its loss."""

    stats: PyTree  #: batch statistics after it, ``{}`` if the net tracks none
    correct: Array  #: hits among the counted labels
    examples: Array  #: counted labels
    work: Array | None = None  #: [2, L] int32 examples forward and backward at each level, if the objective counts them


class Objective(NamedTuple):
    """A local loss, which runs the net as often and at whichever levels it likes."""

    #: (forward, batch, context) -> (scalar, a mean over valid examples; what else is to be known); the context's key
    #: is the step's own
    loss: Callable[[Forward, Batch, ClientContext], tuple[Array, Aux]]
    #: (exits, shard) -> exits as the client's own evaluation sees them
    local: Callable[[Array, Shard], Array] = lambda exits, shard: exits
    score: Score = ACCURACY  #: by what its models are judged
    all_exits: bool = False  #: whether all exits are trained, or a client's deepest one alone
    work_levels: int = 0  #: L where ``Aux.work`` is given; else all work is at the client's own level
    asks_received: bool = False  #: whether it reads ``context.received``
    numbers: bool = False  #: whether labels are numbers to predict, of a net with one output, and not classes


def of_exits(
    value: Callable[[Array, Active, Array, Array, ClientContext], Array],
    local: Callable[[Array, Shard], Array] = lambda exits, shard: exits,
    **options: Any,
) -> Objective:
    """An objective that runs the net once: ``value(exits [E, B, C], active [E], labels [B], valid [B], context)``.

    Args:
      value: a mean over the valid rows, a scalar.
      local: (exits, shard) -> exits as the client's own evaluation sees them; hits are counted on these.
      options: further fields of ``Objective``.

    >>> constant = of_exits(lambda exits, active, labels, valid, context: exits.mean())
    >>> constant.all_exits, constant.score.name
    (False, 'accuracy')
    """

    def loss(forward: Forward, batch: Batch, context: ClientContext) -> tuple[Array, Aux]:
        exits, active, stats = forward(batch.x)
        exits, labels, counts = by_label(exits, batch.labels, batch.valid)
        right = counts & hits(last_exit(local(exits, context.shard), active), labels)
        return value(exits, active, labels, counts, context), Aux(stats, right.sum(), counts.sum())

    return Objective(loss, local, **options)


def hits(outputs: Array, labels: Array) -> Array:
    """[..., B] bool: whether the largest of outputs [..., B, C] is the label's; of a number to predict, never.

    >>> hits(jnp.eye(2), jnp.array([0, 0])).tolist(), hits(jnp.eye(2), jnp.array([0.0, 0.0])).tolist()
    ([True, False], [False, False])
    """
    right = outputs.argmax(-1) == labels
    return jnp.zeros_like(right) if jnp.issubdtype(labels.dtype, jnp.floating) else right


def last_exit(exits: Array, active: Active) -> Array:
    """Logits of the deepest active exit, [B, C].

    Args:
      exits: [E, B, C].
      active: [E] bool, the first ones; NumPy where it is known, else traced.

    >>> exits = jnp.arange(3.0).reshape(3, 1, 1)
    >>> float(last_exit(exits, np.array([True, True, False]))[0, 0]), float(last_exit(exits, jnp.ones(3, bool))[0, 0])
    (1.0, 2.0)
    """
    if isinstance(active, np.ndarray):
        return exits[max(int(active.sum()) - 1, 0)]
    return exits[jnp.maximum(active.sum() - 1, 0)]


def readings(exits: Array) -> dict[str, Array]:
    """How exits [E, B, C] are read: the last one, and with several the mean of their logits, the ``ensemble``.

    >>> {name: z.tolist() for name, z in readings(jnp.arange(4.0).reshape(2, 1, 2)).items()}
    {'': [[2.0, 3.0]], 'ensemble': [[1.0, 2.0]]}
    """
    return {"": exits[-1]} | ({"ensemble": exits.mean(0)} if exits.shape[0] > 1 else {})


def by_label(exits: Array, labels: Array, valid: Array) -> tuple[Array, Array, Array]:
    """Sequences as rows: every label of a window counts as one example, and -1 is no label.

    [..., B, S, C], [B, S], [B] -> [..., B S, C], [B S], [B S]; labels [B] stay as they are.

    >>> [v.shape for v in by_label(jnp.zeros((1, 2, 3, 5)), jnp.zeros((2, 3), int), jnp.ones(2, bool))]
    [(1, 6, 5), (6,), (6,)]
    """
    if labels.ndim == 1:
        return exits, labels, valid
    there = valid.reshape(-1, *[1] * (labels.ndim - 1)) & (labels >= 0)
    rows = exits.reshape(*exits.shape[: exits.ndim - labels.ndim - 1], -1, exits.shape[-1])
    return rows, jnp.maximum(labels, 0).reshape(-1), there.reshape(-1)


def mean_cross_entropy(logits: Array, labels: Array, valid: Array) -> Array:
    """Cross-entropy averaged over the valid rows.

    >>> mean_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 1]), jnp.array([True, False])).round(4)
    Array(1.3863, dtype=float32)
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(valid, loss, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def cross_entropy() -> Objective:
    """Mean cross-entropy of the deepest exit, in nats: ``- 1 / B sum_b log softmax(z_b)[y_b]`` over valid rows.

    >>> run = lambda x: (jnp.zeros((1, 2, 4)), np.ones(1, bool), {})
    >>> context = ClientContext(None, 0, 0, None, (), (), {})
    >>> batch = Batch(None, jnp.array([0, 1]), jnp.array([True, True]))
    >>> round(float(cross_entropy().loss(run, batch, context)[0]), 4)
    1.3863
    """

    def value(exits: Array, active: Active, labels: Array, valid: Array, context: ClientContext) -> Array:
        return mean_cross_entropy(last_exit(exits, active), labels, valid)

    return of_exits(value)


def _squares(outputs: Array, labels: Array) -> Array:
    return jnp.square(outputs[:, 0] - labels)


def _root_of_mean(tally: Tally) -> Array:
    return jnp.sqrt(tally.loss / jnp.maximum(tally.examples, 1))


#: root of the mean of ``(f(x) - y)^2``, in units of the labels
RMSE = Score("rmse", _squares, _root_of_mean, least=True)


def squared_error() -> Objective:
    """Mean of ``(f(x) - y)^2`` (no 1/2) of a net with one output; the labels are numbers, the score is ``RMSE``.

    >>> run = lambda x: (jnp.array([[[1.0], [5.0]]]), np.ones(1, bool), {})
    >>> batch = Batch(None, jnp.array([0.0, 2.0]), jnp.array([True, True]))
    >>> float(squared_error().loss(run, batch, ClientContext(None, 0, 0, None, (), (), {}))[0])
    5.0
    """

    def value(exits: Array, active: Active, labels: Array, valid: Array, context: ClientContext) -> Array:
        errors = _squares(last_exit(exits, active), labels)
        return jnp.where(valid, errors, 0.0).sum() / jnp.maximum(valid.sum(), 1)

    return of_exits(value, score=RMSE, numbers=True)


def all_exits(
    distill: bool = True,
    *,
    ramp_rounds: int = 300,
    ramp_power: float = 5.0,
    temperature: float = 1.0,
    train_all: bool = True,
) -> Objective:
    """DepthFL's loss (equation 1): the exits' cross-entropies summed, and every exit learns from every other one.

    With M active exits, logits z_i and ``q_j = softmax(z_j / T) + 1e-7`` (detached, not renormalised):
    ``sum_i CE(z_i, y) + c(t) / (M - 1) sum_i sum_{j != i} T^2 KL(q_j || softmax(z_i / T))``.

    Args:
      distill: whether the second term is there; with one exit it never is.
      ramp_rounds, ramp_power: ``c(t) = exp(-power (1 - min(t, R) / R)^2)`` in round t from 0; R = 0 is c = 1.
      temperature: T.
      train_all: ``False`` trains only the deepest active exit (the table's "InclusiveFL" row).

    Raises:
      ValueError: a ramp or temperature out of range.

    Source: Kim et al., ICLR 2023, equation 1, with the smoothing of the published code.

    >>> same = lambda x: (jnp.zeros((2, 1, 4)), np.ones(2, bool), {})
    >>> batch = Batch(None, jnp.array([0]), jnp.array([True]))
    >>> round(float(all_exits().loss(same, batch, ClientContext(None, 0, 0, None, (), (), {}))[0]), 4)  # 2 log 4
    2.7726
    """
    if ramp_rounds < 0 or ramp_power < 0:
        raise ValueError(f"ramp of {ramp_rounds} rounds, power {ramp_power}: allowed >= 0 (method.args.ramp_rounds)")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}, allowed > 0 (method.args.temperature)")

    def value(exits: Array, active: Active, labels: Array, valid: Array, context: ClientContext) -> Array:
        count = active.sum()
        student = active if train_all else active & (jnp.arange(active.size) == count - 1)
        each = jax.vmap(lambda z: mean_cross_entropy(z, labels, valid))(exits)
        total = jnp.where(student, each, 0).sum()
        if not distill or active.size == 1:
            return total
        log_p = jax.nn.log_softmax(exits / temperature)
        q = jax.lax.stop_gradient(jax.nn.softmax(exits / temperature)) + 1e-7
        rows = valid.astype(exits.dtype) / jnp.maximum(valid.sum(), 1)
        entropy = jnp.einsum("jbc,b->j", q * jnp.log(q), rows)
        cross = jnp.einsum("jbc,ibc,b->ij", q, log_p, rows, precision=jax.lax.Precision.HIGHEST)
        pair = student[:, None] & active[None, :] & ~jnp.eye(active.size, dtype=bool)
        divergence = jnp.where(pair, temperature**2 * (entropy[None, :] - cross), 0).sum()
        return total + ramp(context.round, ramp_rounds, ramp_power) * divergence / jnp.maximum(count - 1, 1)

    return of_exits(value, all_exits=train_all)


def ramp(round: Array, rounds: int, power: float) -> Array:
    """DepthFL's consistency weight of a round (from 0), ``exp(-power (1 - min(t, R) / R)^2)``; 1 if R is 0.

    >>> ramp(jnp.int32(150), 300, 5.0).round(4)
    Array(0.2865, dtype=float32)
    """
    if not rounds:
        return jnp.ones(())
    return jnp.exp(-power * jnp.square(1 - jnp.clip(round, 0, rounds) / rounds))


def batch_masked_cross_entropy() -> Objective:
    """Split-Mix's loss for clients of few classes: logits of classes that the BATCH does not hold become zero.

    Unlike ``masked_cross_entropy``, which asks what the client holds; evaluation sees the logits as they are.

    >>> run = lambda x: (jnp.full((1, 2, 4), 9.0), np.ones(1, bool), {})
    >>> batch = Batch(None, jnp.array([0, 0]), jnp.array([True, True]))
    >>> loss, _ = batch_masked_cross_entropy().loss(run, batch, ClientContext(None, 0, 0, None, (), (), {}))
    >>> round(float(loss), 6) == round(float(jnp.log(1 + 3 * jnp.exp(-9.0))), 6)  # three absent classes at logit 0
    True
    """

    def value(exits: Array, active: Active, labels: Array, valid: Array, context: ClientContext) -> Array:
        held = (jax.nn.one_hot(labels, exits.shape[-1], dtype=bool) & valid[:, None]).any(0)
        return mean_cross_entropy(last_exit(jnp.where(held, exits, 0.0), active), labels, valid)

    return of_exits(value)


def masked_cross_entropy() -> Objective:
    """HeteroFL's masked loss: logits of classes that the client does not hold are set to ZERO before the softmax.

    Not to minus infinity: absent classes still add ``exp(0)`` each to the denominator and may win the argmax; they get
    no gradient. The same holds in the client's own evaluation.

    Source: Diao et al., ICLR 2021, section 3.

    >>> from types import SimpleNamespace
    >>> holds = SimpleNamespace(classes=jnp.array([True, True, False]))
    >>> masked_cross_entropy().local(jnp.array([[[1.0, -2.0, 5.0]]]), holds).tolist()
    [[[1.0, -2.0, 0.0]]]
    """

    def held(exits: Array, shard: Shard) -> Array:
        return jnp.where(shard.classes, exits, 0.0)

    def value(exits: Array, active: Active, labels: Array, valid: Array, context: ClientContext) -> Array:
        return mean_cross_entropy(last_exit(held(exits, context.shard), active), labels, valid)

    return of_exits(value, held)


#: objectives by name, as a config chooses them
OBJECTIVES: Mapping[str, Callable[[], Objective]] = {"cross_entropy": cross_entropy, "squared_error": squared_error}

"""Ordered dropout: every batch trains one of the nested nets that a client can afford, and the widest one may teach it.

Levels are numbered from the widest, so a client at level l affords l, l + 1 ... L - 1: numbers, never rates.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Array, Batch, ClientContext, PyTree
from hetfl_jax.models.families import Forward
from hetfl_jax.models.windows import index_of
from hetfl_jax.parts.objective import Aux, Objective, by_label, hits, last_exit, mean_cross_entropy

#: (key, own level, levels) -> level of this batch's net, int32 scalars
Draw = Callable[[Array, Array | int, int], Array]


def uniform_draw(key: Array, own: Array | int, levels: int) -> Array:
    """One of ``own .. levels - 1``, each with the same probability.

    >>> sorted({int(uniform_draw(jax.random.key(i), 1, 3)) for i in range(9)})
    [1, 2]
    """
    return jax.random.randint(key, (), own, levels, jnp.int32)


def ordered_dropout(
    levels: int,
    *,
    distill: bool = True,
    alpha: float = 1.0,
    temperature: float = 1.0,
    draw: Draw = uniform_draw,
) -> Objective:
    """FjORD's loss of a batch (equation 1), with p drawn anew among the client's levels, p_max its own level.

    With z the logits of p and t those of p_max: ``CE(z, y)`` alone, or with ``distill``
    ``CE(t, y) + (1 - alpha) CE(z, y) + alpha T^2 KL(softmax(t / T) || softmax(z / T))``, t detached in the last term.
    The factor T^2 is ours. Both nets run as in training; p_max comes first, and p starts from its statistics.

    Hits are those of the net that meets the labels: of p_max with ``distill``, else of p.

    Args:
      levels: L, how many there are.
      distill: whether the client's widest net teaches.
      alpha: weight of the teaching, 0..1.
      temperature: T, > 0.
      draw: of p.

    Raises:
      ValueError: alpha or temperature out of range.

    Source: Horvath et al., "FjORD", NeurIPS 2021.

    >>> from types import SimpleNamespace
    >>> inside = lambda x, number, value, *labels: (*value(jnp.zeros((1, 2, 4)), jnp.array([True]), *labels), {})
    >>> batch = Batch(jnp.zeros((2, 3)), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> context = ClientContext(jax.random.key(0), 0, 1, (), (), (), ())
    >>> aux = ordered_dropout(3, distill=False).loss(SimpleNamespace(inside=inside), batch, context)[1]
    >>> aux.work[0].tolist()  # the two examples went through one of the levels 1 and 2
    [0, 0, 2]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}, allowed 0..1 (method.args.alpha)")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature {temperature}, allowed > 0 and finite (method.args.temperature)")

    def taught(exits: Array, active: Array, labels: Array, valid: Array, teacher: Array) -> tuple[Array, tuple[()]]:
        t, _, _ = by_label(teacher, labels, valid)
        z, labels, counts = by_label(last_exit(exits, active), labels, valid)
        log_q, log_p = (jax.nn.log_softmax(v / temperature) for v in (t, z))
        apart = jnp.where(counts, (jnp.exp(log_q) * (log_q - log_p)).sum(-1), 0).sum() / jnp.maximum(counts.sum(), 1)
        value = alpha * temperature**2 * apart
        return value + (1 - alpha) * mean_cross_entropy(z, labels, counts) if alpha < 1 else value, ()

    def loss(forward: Forward, batch: Batch, context: ClientContext) -> tuple[Array, Aux]:
        own, examples = index_of(context.level), batch.valid.sum()
        number = draw(context.key, own, levels)
        work = jax.nn.one_hot(number, levels, dtype=jnp.int32) * examples
        if not distill:
            value, (right, counted), stats = forward.inside(batch.x, number, of_labels, batch.labels, batch.valid)
            return value, Aux(stats, right, counted, jnp.stack([work, work]))
        exits, active, stats = forward(batch.x)
        teacher = last_exit(exits, active)
        value, (right, counted) = of_labels(exits, active, batch.labels, batch.valid)
        target = jax.lax.stop_gradient(teacher)
        more, _, stats = forward.inside(batch.x, number, taught, batch.labels, batch.valid, target, stats=stats)
        work = work + jax.nn.one_hot(own, levels, dtype=jnp.int32) * examples
        return value + more, Aux(stats, right, counted, jnp.stack([work, work]))

    return Objective(loss, work_levels=levels)


def random_dropout(widths: Sequence[float], *, ordered: bool = False, most: float = 0.25) -> Objective:
    """Cross-entropy of a net without random units: extended Federated Dropout (eFD), section 5 of FjORD.

    The net of the item's level l loses as many units of every layer at random, anew every batch, as leave the number
    that the client affords by its own level ``context.ticket``; nothing is rescaled. With ``ordered`` (FjORD + eFD) the
    level is drawn as in ``ordered_dropout``, and units are dropped only where it is above the client's own, at most
    the share ``most``.

    Args:
      widths: [L] of the levels, the widest first.
      ordered: whether the level is drawn.
      most: the largest share of units that is dropped then.

    Raises:
      ValueError: a share outside [0, 1).

    Source: Horvath et al., "FjORD", NeurIPS 2021, section 5.

    >>> kept = []
    >>> forward = lambda x, keep: kept.append(float(keep)) or (jnp.zeros((1, 2, 4)), jnp.array([True]), {})
    >>> batch = Batch(jnp.zeros((2, 3)), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> context = ClientContext(jax.random.key(0), 0, 0, (), jnp.int32(1), (), ())  # affords half of level 0
    >>> work = random_dropout([1.0, 0.5]).loss(forward, batch, context)[1].work
    >>> kept, work[0].tolist()
    ([0.5], [2, 0])
    """
    if not 0 <= most < 1:
        raise ValueError(f"most_dropped {most}, allowed 0 <= share < 1 (method.args.most_dropped)")
    levels = len(widths)

    def loss(forward: Forward, batch: Batch, context: ClientContext) -> tuple[Array, Aux]:
        level, width = index_of(context.level), jnp.asarray(widths, jnp.float32)
        here = jax.nn.one_hot(level, levels, dtype=jnp.int32)
        own = width[context.ticket]
        if ordered:
            level = uniform_draw(context.key, level, levels)
            here = jax.nn.one_hot(level, levels, dtype=jnp.int32)
            kept = jnp.minimum(jnp.maximum(own, (1 - most) * width[level]), width[level])
            options = {"keep": kept}
            value, (right, counted), stats = forward.inside(
                batch.x, level, of_labels, batch.labels, batch.valid, **options
            )  # fmt: skip
        else:
            exits, active, stats = forward(batch.x, keep=own)
            value, (right, counted) = of_labels(exits, active, batch.labels, batch.valid)
        work = here * batch.valid.sum()
        return value, Aux(stats, right, counted, jnp.stack([work, work]))

    return Objective(loss, work_levels=levels)


def of_labels(exits: Array, active: PyTree, labels: Array, valid: Array) -> tuple[Array, tuple[Array, Array]]:
    """Mean cross-entropy of the last exit; its hits, and how many labels count.

    Args:
      exits: [E, B, C] logits.
      active: [E] bool, the exits that the level has.
      labels: [B] int32.
      valid: [B] bool, which rows count.

    Returns:
      (float32, (int32, int32)) scalars.

    >>> exits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0]]]))
    >>> value, (right, counted) = of_labels(exits, jnp.array([True]), jnp.array([1, 0]), jnp.array([True, False]))
    >>> round(float(value), 4), int(right), int(counted)  # -log(3 / 4)
    (0.2877, 1, 1)
    """
    z, labels, counts = by_label(last_exit(exits, active), labels, valid)
    return mean_cross_entropy(z, labels, counts), ((counts & hits(z, labels)).sum(), counts.sum())

"""SHeteroFL, the baseline of Split-Mix (Hong, Wang, Wang, Zhou, ICLR 2022): HeteroFL whose clients train all widths.

A client takes the leading channels of its own width and, on every batch, trains that net and all narrower ones inside
it: the gradients of their losses are added, for one step. Every entry becomes the mean, weighted by examples, of the
clients whose net has it. Statistics of norms are those of the batch, in evaluation too, so a width has none of its own.

| slot | here |
|---|---|
| objective | sum of the cross-entropies of all widths up to the client's own |
| merge | mean weighted by examples, by levels |
"""

import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Algorithm, Arguments, Array, Batch, ClientContext, PyTree
from hetfl_jax.models.windows import Family, base_of, index_of
from hetfl_jax.parts import merge, select, server
from hetfl_jax.parts.compose import Slots, compose, refuse
from hetfl_jax.parts.local import Local
from hetfl_jax.parts.objective import Aux, Forward, Objective, last_exit, mean_cross_entropy


def make(
    family: Family,
    local: Local,
    *,
    cohort: int,
    multiplicity: bool = False,
    server_optimizer: Arguments = server.PLAIN,
    slots: Slots | None = None,
) -> Algorithm:
    """SHeteroFL over the widths of ``family``; a client's budget is the level of the population.

    Args:
      family: the net at its levels, see ``models.families.family``.
      local: local training, see ``parts.local.local``.
      cohort: clients a round, >= 1.
      multiplicity: a client counts once for every width it trains, as in the published code and its table; else once.
      slots: what is chosen apart from the method, see ``parts.compose.Slots``.

    Returns:
      An ``Algorithm``: pure functions that ``engine.rounds.make_round`` runs.

    Raises:
      ValueError: levels that do not lie inside each other, or a net with running statistics.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> make(fam, local(learning_rate=0.1, batch_size=4), cohort=2).levels
    2
    """
    refuse("sheterofl", slots or Slots(), objective=True)
    if any((np.diff(window.extents, axis=0) > 0).any() for window in family.windows.values()):
        raise ValueError("sheterofl over levels that do not lie inside each other: need widths that fall (family.mix)")
    if "batch_stats" in family.shapes[0]:
        raise ValueError("sheterofl with running statistics, one set for all widths: need norm bn_batch (family.norm)")
    return compose(
        family,
        local=local,
        select=select.uniform(cohort),
        objective=all_widths(family.levels),
        merge=by_widths(family, multiplicity),
        server=server.optimizer(**server_optimizer),
        slots=slots,
    )


def by_widths(family: Family, multiplicity: bool = False) -> merge.Merge:
    """The mean weighted by examples, or by examples times the widths that the client trained.

    Args:
      family: the net at its L levels.
      multiplicity: a client at level l counts ``L - l`` times.

    >>> from types import SimpleNamespace
    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> shard = SimpleNamespace(size=jnp.int32(5), classes=jnp.ones(10, bool))
    >>> context = SimpleNamespace(level=0, shard=shard, share=())
    >>> [by_widths(fam, times).lift({}, context).weight.tolist() for times in (False, True)]
    [[5.0, 0.0], [10.0, 0.0]]
    """

    def weights(context: ClientContext, delta: PyTree) -> tuple[Array, Array]:
        times = family.levels - index_of(context.level) if multiplicity else 1
        weight = merge.share_of(context, context.shard.size.astype(jnp.float32)) * times
        return weight, weight

    return merge.overlap_mean(family, weights=merge.Weights(weights))


def all_widths(levels: int) -> Objective:
    """The sum of the cross-entropies of a client's own level and of all smaller ones inside it.

    Args:
      levels: L, how many there are.

    Returns:
      An objective whose hits are those of the client's own level.

    >>> import jax
    >>> forward = lambda x, level: (jnp.zeros((1, 2, 4)), jnp.array([True]), {})
    >>> batch = Batch(jnp.zeros((2, 3)), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> context = ClientContext((), 0, 1, (), (), (), ())
    >>> value, aux = jax.jit(lambda: all_widths(3).loss(forward, batch, context))()
    >>> round(float(value / jnp.log(4)), 4), aux.work[0].tolist()  # two losses of log 4, at the levels 1 and 2
    (2.0, [0, 2, 2])
    """

    def loss(forward: Forward, batch: Batch, context: ClientContext) -> tuple[Array, Aux]:
        own, total, hits = index_of(context.level), jnp.float32(0), jnp.int32(0)
        trained = jnp.arange(levels) >= own
        for level in range(base_of(context.level), levels):
            exits, active, _ = forward(batch.x, level=level)
            logits = last_exit(exits, active)
            total += jnp.where(trained[level], mean_cross_entropy(logits, batch.labels, batch.valid), 0)
            right = (batch.valid & (logits.argmax(-1) == batch.labels)).sum()
            hits = jnp.where(level == own, right, hits)
        count = batch.valid.sum()
        return total, Aux({}, hits, count, jnp.stack([trained * count] * 2).astype(jnp.int32))

    return Objective(loss, work_levels=levels)

"""The gradient that a client could send before it trains, for selections that compare clients by it."""

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.shards import examples as examples_of
from hetfl_jax.core.types import Array, Batch, Gradient, Level, PyTree, Shard
from hetfl_jax.models import families
from hetfl_jax.models.windows import Family
from hetfl_jax.parts.local import Local
from hetfl_jax.parts.objective import Objective, by_label, last_exit


def full_gradient(family: Family, local: Local, objective: Objective) -> Gradient:
    """``g_k = grad F_k(w)``: of the mean loss over all n_k examples, by which a model is judged, in evaluation mode.

    One pass in batches, as ``Algorithm.judge``. A row has the full model's P entries, leaf after leaf; those that the
    client's level does not hold are 0, so that the rows of all levels can be compared.

    Example: with ``row = full_gradient(family, local, objective).of(sent, 0, shard)``, one full-batch step of rate r
    moves the parameters by ``-r * row``.

    >>> from hetfl_jax.models import MLP
    >>> from hetfl_jax.parts.local import local
    >>> from hetfl_jax.parts.objective import cross_entropy
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> full_gradient(fam, local(learning_rate=0.1, batch_size=4), cross_entropy()).parameters.tolist()
    [66, 38]
    """

    def of(sent: PyTree, level: Level, shard: Shard) -> Array:
        view = families.view(family, sent.variables, level)
        params = view.variables["params"]

        def loss(params: PyTree, batch: Batch) -> tuple[Array, Array]:
            exits, _ = view.apply({**view.variables, "params": params}, batch.x, valid=batch.valid)
            logits = last_exit(objective.local(exits, shard), view.active)
            logits, labels, valid = by_label(logits, batch.labels, batch.valid)
            return jnp.where(valid, objective.score.each(logits, labels), 0).sum(), valid.sum()

        def step(i: Array, total: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
            position = i * local.batch_size + jnp.arange(local.batch_size)
            valid = position < shard.size
            x, labels = examples_of(shard, shard.rows[shard.offset + jnp.minimum(position, shard.size - 1)])
            gradient, count = jax.grad(loss, has_aux=True)(params, Batch(x, labels, valid))
            return jax.tree.map(jnp.add, total[0], gradient), total[1] + count

        start = jax.tree.map(jnp.zeros_like, params), jnp.int32(0)
        gradient, count = jax.lax.fori_loop(0, -(-shard.size // local.batch_size), step, start)
        mean = jax.tree.map(lambda g: g / jnp.maximum(count, 1), gradient)
        empty = {"params": tree.zeros(family.shapes[0]["params"])}
        whole = view.put(empty, view.cut({"params": mean}))
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(whole)])

    count = [sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) for shapes in family.shapes]
    return Gradient(of, np.asarray(count, np.int64))

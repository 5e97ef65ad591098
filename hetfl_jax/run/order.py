"""Models whose order is chosen by their accuracy on the validation set, just before they are evaluated or exported."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Algorithm, Array, Batch, Level, Population, PyTree, Shard, Tally
from hetfl_jax.engine.execute import compiled, query
from hetfl_jax.engine.executors import Executor
from hetfl_jax.engine.rounds import Remake, Settings
from hetfl_jax.parts.local import tally


def ordered(
    algorithm: Algorithm, executor: Executor, validation: range, batch: int, remake: Remake | None = None
) -> Callable[[PyTree, Population, Settings], PyTree]:
    """``(server, test, settings) -> server``, its models in falling order of validation accuracy, if that is asked for.

    Args:
      validation: which batches of ``test`` are the validation set's.
      batch: examples of one of them.
      remake: settings -> the algorithm with these numbers.

    Raises:
      ValueError: there is no validation set.
    """
    if algorithm.order is None:
        return lambda server, test, settings: server
    if not validation:
        raise ValueError("an order by validation accuracy without a validation set: need data.validation > 0")

    def arranged(server: PyTree, test: Population, settings: Settings) -> PyTree:
        made = remake(settings) if remake else algorithm
        rule, read, score = made.order, made.questions[0].read, made.score
        assert rule is not None

        def one(key: Array, sent: PyTree, level: Level, shard: Shard) -> tuple[PyTree, Tally]:
            def of(variables: PyTree) -> Tally:
                def logits(batch: Batch) -> Array:
                    return next(iter(read(variables, 0, batch, shard).values()))

                return tally(logits, score.each, batch, shard)

            return (), jax.lax.map(of, sent)

        seen = query(executor, one, rule.each(server), test, jnp.asarray(validation), jax.random.key(0)).report
        value = score.of(jax.tree.map(lambda v: v.sum(0), seen))
        return rule.by(server, jnp.argsort(value if score.least else -value))

    return compiled(arranged, executor)

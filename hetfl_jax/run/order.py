"""Models whose order is chosen by their accuracy on the validation set, just before they are evaluated or exported."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Algorithm, Array, Batch, Level, Population, PyTree, Shard, Tally
from hetfl_jax.engine.executors import Executor
from hetfl_jax.engine.rounds import compiled, query
from hetfl_jax.parts.local import tally


def ordered(
    algorithm: Algorithm, executor: Executor, test: Population, validation: range, batch: int
) -> Callable[[PyTree], PyTree]:
    """``server -> server`` with its models in falling order of validation accuracy, or as it is if none is asked for.

    Args:
      test: batches of the test set, of the validation set, and more.
      validation: which of them are the validation set's.

    Raises:
      ValueError: there is no validation set.
    """
    rule = algorithm.order
    if rule is None:
        return lambda server: server
    if not validation:
        raise ValueError("an order by validation accuracy without a validation set: need data.validation > 0")
    read, score = algorithm.questions[0].read, algorithm.score

    def one(key: Array, sent: PyTree, level: Level, shard: Shard) -> tuple[PyTree, Tally]:
        def of(variables: PyTree) -> Tally:
            def logits(batch: Batch) -> Array:
                return next(iter(read(variables, 0, batch, shard).values()))

            return tally(logits, score.each, batch, shard)

        return (), jax.lax.map(of, sent)

    def arranged(server: PyTree, test: Population) -> PyTree:
        seen = query(executor, one, rule.each(server), test, jnp.asarray(validation), jax.random.key(0)).report
        value = score.of(jax.tree.map(lambda v: v.sum(0), seen))
        return rule.by(server, jnp.argsort(value if score.least else -value))

    run = compiled(arranged, executor)
    return lambda server: run(server, test)

"""Evaluation through the executor: statistics pass, global accuracy, and the clients' local accuracy."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hetfl_jax.engine import Executor, compiled, query
from hetfl_jax.types import Algorithm, Array, Level, Population, PyTree, Shard, Within


class Tally(NamedTuple):
    """Sums over examples."""

    loss: Array
    correct: Array
    examples: Array


class Scores(NamedTuple):
    """One model's scores, device scalars; local ones are NaN where clients have no test data of their own."""

    accuracy: Array
    loss: Array
    validation_accuracy: Array  #: NaN without a validation set
    local_accuracy: Array  #: over all clients' test examples, each judged as its client sees it
    client_accuracy: Array  #: [clients with test data]


def tally(algorithm: Algorithm, variables: PyTree, level: Level, batch: int, shard: Shard) -> Tally:
    """Loss and hits of the deepest exit over one shard, in batches, judged as the shard's owner would."""

    def step(i: Array, seen: Tally) -> Tally:
        rows, valid = _rows(shard, i * batch + jnp.arange(batch))
        labels = shard.y[rows]
        logits = algorithm.predict(variables, level, shard.x[rows], shard)[-1]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = valid & (logits.argmax(-1) == labels)
        new = Tally(jnp.where(valid, loss, 0).sum(), hits.sum().astype(jnp.float32), valid.sum().astype(jnp.float32))
        return jax.tree.map(jnp.add, seen, new)

    return jax.lax.fori_loop(0, -(-shard.size // batch), step, Tally(*(jnp.float32(0) for _ in Tally._fields)))


def _rows(shard: Shard, position: Array) -> tuple[Array, Array]:
    """Pool rows at positions of the shard, and which of them exist."""
    return shard.index[shard.offset + jnp.minimum(position, shard.size - 1)], position < shard.size


def with_statistics(
    algorithm: Algorithm, executor: Executor, variables: PyTree, level: Level, data: Population, batch: int
) -> PyTree:
    """``variables`` with the batch statistics of one pass over ``data``, whose "clients" are single batches.

    Mean := plain average over batches of batch means, variance := plain average of unbiased batch variances; each batch
    weighs the same, the short last one too (HeteroFL's static batch norm). Unchanged where nothing is to be collected.
    """
    if algorithm.statistics is None:
        return variables
    collect = algorithm.statistics
    sent, level_of = _at_level(variables, level)

    def one(key: Array, sent: PyTree, shard: Shard) -> tuple[PyTree, PyTree]:
        rows, valid = _rows(shard, jnp.arange(batch))
        return collect(sent[0], level_of(sent), shard.x[rows], valid), ()

    count = data.size.shape[0]
    total = query(executor, one, sent, data, jnp.arange(count), jax.random.key(0)).total
    return {**variables, "batch_stats": jax.tree.map(lambda v: v[0] / count, total)}


def _at_level(variables: PyTree, level: Level) -> tuple[PyTree, Callable[[PyTree], Level]]:
    """What to send, and how to read the level from it: a static level stays a Python int, a traced one must travel."""
    if not isinstance(level, Within):
        return (variables,), lambda sent: level
    base = level.base
    return (variables, level.level), lambda sent: Within(base, sent[1])


def over_clients(accuracy: np.ndarray) -> dict[str, float]:
    """How accuracy is distributed over clients: mean, population deviation, means of the worst and the best tenth.

    >>> over_clients(np.array([0.5, 1.0]))
    {'mean': 0.75, 'deviation': 0.25, 'worst_tenth': 0.5, 'best_tenth': 1.0}
    """
    ordered = np.sort(np.asarray(accuracy, np.float64))
    tenth = max(1, ordered.size // 10)
    return {
        "mean": float(ordered.mean()),
        "deviation": float(ordered.std()),
        "worst_tenth": float(ordered[:tenth].mean()),
        "best_tenth": float(ordered[-tenth:].mean()),
    }


def evaluator(
    algorithm: Algorithm,
    executor: Executor,
    *,
    test_batches: int,
    validation_batches: int = 0,
    statistics_batch: int,
    eval_batch: int,
    masked: bool = False,
) -> Callable[[int, PyTree, Population, Population], Scores]:
    """``evaluate(level, server, train_batches, test) -> Scores``, jitted.

    Args:
      test_batches: how many leading "clients" of ``test`` are batches of the global test set.
      validation_batches: how many after those are batches of the validation set; the others are clients' own test
        shares, judged as their clients see them.
      masked: one program at full shape for all levels, which compiles once but costs a full-size pass a level; else
        one program a level, at its true shape.
    """

    @jax.named_scope("evaluation")
    def evaluate(level: Level, server: PyTree, train: Population, test: Population) -> Scores:
        variables = algorithm.model(server, level)
        variables = with_statistics(algorithm, executor, variables, level, train, statistics_batch)
        sent, level_of = _at_level(variables, level)

        def one(key: Array, sent: PyTree, shard: Shard) -> tuple[PyTree, Tally]:
            return (), tally(algorithm, sent[0], level_of(sent), eval_batch, shard)

        seen = query(executor, one, sent, test, jnp.arange(test.size.shape[0]), jax.random.key(0)).report
        shared = test_batches + validation_batches
        everyone = jax.tree.map(lambda v: v[:test_batches].sum(), seen)
        validation = jax.tree.map(lambda v: v[test_batches:shared].sum(), seen)
        own = jax.tree.map(lambda v: v[shared:], seen)
        return Scores(
            everyone.correct / everyone.examples,
            everyone.loss / everyone.examples,
            validation.correct / validation.examples,
            own.correct.sum() / own.examples.sum(),
            own.correct / own.examples,
        )

    if not masked:
        return compiled(evaluate, executor, static_argnums=0)
    run = compiled(lambda level, *data: evaluate(Within(0, level), *data), executor)
    return lambda level, *data: run(jnp.int32(level), *data)

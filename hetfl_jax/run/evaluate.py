"""Evaluation through the executor: statistics pass, global accuracy, and the clients' local accuracy."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hetfl_jax.core import tree
from hetfl_jax.core.shards import examples
from hetfl_jax.core.types import Algorithm, Array, Level, Population, PyTree, Shard, Within
from hetfl_jax.engine.rounds import Executor, compiled, query
from hetfl_jax.parts.local import Tally, tally


class Scores(NamedTuple):
    """One model's scores, device scalars; local ones are NaN where clients have no test data of their own."""

    accuracy: Array
    loss: Array
    validation_accuracy: Array  #: NaN without a validation set
    placed: Array  #: [test and validation batches] the model that each is judged by, where there are several
    local_accuracy: Array  #: over all clients' test examples, each judged as its client sees it
    client_accuracy: Array  #: [clients with test data]
    ensemble_accuracy: Array  #: of the mean of the logits of all exits, NaN with one exit
    perplexity: Array  #: mean over test batches of exp(their loss), NaN where examples are not sequences


def judged(
    algorithm: Algorithm, executor: Executor, server: PyTree, level: Level, data: Population, batch: int
) -> Tally:
    """Loss and hits of every model on every client's examples, leaves [N, models]; [N] where there is one model."""
    if algorithm.models == 1:
        models = algorithm.model(server, level)
    else:
        models = jax.vmap(lambda m: algorithm.model(server, level, m))(jnp.arange(algorithm.models))
    return _judged(algorithm, executor, models, level, data, batch)


def _judged(
    algorithm: Algorithm, executor: Executor, models: PyTree, level: Level, data: Population, batch: int
) -> Tally:
    sent, level_of = _at_level(models, level)

    def one(key: Array, sent: PyTree, shard: Shard) -> tuple[PyTree, Tally]:
        def of(variables: PyTree) -> Tally:
            def logits(x: Array) -> Array:
                exits = algorithm.predict(variables, level_of(sent), x, shard)
                return readings(exits) if algorithm.models == 1 else exits[-1]

            return tally(logits, optax.softmax_cross_entropy_with_integer_labels, batch, shard)

        return (), of(sent[0]) if algorithm.models == 1 else jax.vmap(of)(sent[0])

    return query(executor, one, sent, data, jnp.arange(data.size.shape[0]), jax.random.key(0)).report


def readings(exits: Array) -> Array:
    """How exits [E, B, C] are read: the last one [B, C]; with several, [2, B, C], the last and the ensemble.

    The ensemble is the mean of the logits.

    >>> readings(jnp.arange(4.0).reshape(2, 1, 2))[:, 0].tolist()
    [[2.0, 3.0], [1.0, 2.0]]
    """
    return exits[-1] if exits.shape[0] == 1 else jnp.stack([exits[-1], exits.mean(0)])


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
        return collect(sent[0], level_of(sent), examples(shard, rows)[0], valid), ()

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
    owners: Array | None = None,
) -> Callable[..., Scores]:
    """``evaluate(level, server, train, train_batches, test) -> Scores``, jitted.

    Where clients choose among several models, a batch is judged by the model that is best on it (its labels are used:
    a client that only tests), and a client's own test share by the model that its training data puts it with.

    Args:
      owners: [clients with test data of their own] their ids, where there are several models.
      test_batches: how many leading "clients" of ``test`` are batches of the global test set.
      validation_batches: how many after those are batches of the validation set; the others are clients' own test
        shares, judged as their clients see them.
      masked: one program at full shape for all levels, which compiles once but costs a full-size pass a level; else
        one program a level, at its true shape.
    """

    shared = test_batches + validation_batches
    if algorithm.models > 1 and algorithm.statistics is not None:
        raise ValueError("static batch norm has one set of statistics: several models need another norm (family.norm)")

    @jax.named_scope("evaluation")
    def evaluate(level: Level, server: PyTree, train: Population, batches: Population, test: Population) -> Scores:
        if algorithm.models == 1:
            variables = algorithm.model(server, level)
            variables = with_statistics(algorithm, executor, variables, level, batches, statistics_batch)
            seen, placed = _judged(algorithm, executor, variables, level, test, eval_batch), jnp.zeros(shared, int)
        else:
            seen, placed = _of_own_model(level, server, train, test)
        ensemble = jnp.asarray(jnp.nan)
        if seen.loss.ndim > 1:  # several exits: the last one is the model, all of them together the ensemble
            together = seen.correct[:test_batches, 1].sum() / seen.examples[:test_batches, 1].sum()
            seen, ensemble = tree.take(seen, (slice(None), 0)), together
        everyone = jax.tree.map(lambda v: v[:test_batches].sum(), seen)
        validation = jax.tree.map(lambda v: v[test_batches:shared].sum(), seen)
        own = jax.tree.map(lambda v: v[shared:], seen)
        return Scores(
            everyone.correct / everyone.examples,
            everyone.loss / everyone.examples,
            validation.correct / validation.examples,
            placed[:shared],
            own.correct.sum() / own.examples.sum(),
            own.correct / own.examples,
            ensemble,
            jnp.exp(tree.take(seen.loss / seen.examples, slice(test_batches))).mean()
            if train.y.ndim > 1
            else jnp.asarray(jnp.nan),
        )

    def _of_own_model(level: Level, server: PyTree, train: Population, test: Population) -> tuple[Tally, Array]:
        every = judged(algorithm, executor, server, level, test, eval_batch)
        assert algorithm.place is not None
        placed = algorithm.place(server, (every.loss / every.examples)[:shared], None)
        if owners is not None and owners.size:
            fitted = judged(algorithm, executor, server, level, train, eval_batch)
            home = algorithm.place(server, (fitted.loss / fitted.examples)[owners], owners)
            placed = jnp.concatenate([placed, home])
        return jax.tree.map(lambda v: jnp.take_along_axis(v, placed[:, None], 1)[:, 0], every), placed

    if not masked:
        return compiled(evaluate, executor, static_argnums=0)
    run = compiled(lambda level, *data: evaluate(Within(0, level), *data), executor)
    return lambda level, *data: run(jnp.int32(level), *data)

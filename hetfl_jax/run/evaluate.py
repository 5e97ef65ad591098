"""Evaluation through the executor: statistics pass, a method's questions, and the clients' own test data."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.shards import examples, shards
from hetfl_jax.core.types import (
    Algorithm,
    Array,
    Batch,
    Level,
    Population,
    PyTree,
    Question,
    Score,
    Shard,
    State,
    Tally,
    Within,
)
from hetfl_jax.engine.execute import compiled, query
from hetfl_jax.engine.executors import Executor
from hetfl_jax.engine.rounds import Remake, Settings
from hetfl_jax.parts.local import tally

#: (outputs [B, C], labels [B], valid [B]) -> [B], a value for each example; its mean over examples is shown
Metric = Callable[[Array, Array, Array], Array]
Scores = dict[str, Array]


class Asked:
    """How a question's answers are read: their sums, and the names of the readings, known once it was traced.

    A reading is one of several outputs that a question has of the same batch, e.g. the mean of several exits beside the
    deepest one. The first is judged as the model, the others are further scores.
    """

    def __init__(self, question: Question, score: Score, metrics: Mapping[str, Metric]):
        """Read ``question``, judged by ``score``, with further ``metrics`` of its first reading."""
        self.question, self.score, self.metrics = question, score, metrics
        self.names: list[str] = [""]

    def logits(self, variables: PyTree, tier: Level, batch: Batch, shard: Shard) -> Array:
        """[B, C], or [R, B, C] of several readings, of one batch as it is stored."""
        found = self.question.read(variables, tier, batch, shard)
        self.names = list(found)
        return jnp.stack(list(found.values())) if len(found) > 1 else next(iter(found.values()))

    def each(self, logits: Array, labels: Array) -> Array:
        """[B] losses, or [1 + metrics, B] with the further metrics below them."""
        loss = self.score.each(logits, labels)
        if not self.metrics:
            return loss
        everyone = jnp.ones(labels.shape, bool)
        return jnp.stack([loss, *(of(logits, labels, everyone).astype(loss.dtype) for of in self.metrics.values())])


def tallies(
    algorithm: Algorithm, executor: Executor, server: PyTree, tier: Level, data: Population, batch: int
) -> Tally:
    """Loss and hits on every client's examples, leaves [N]; [N, models] where there is a choice of models.

    Args:
      server: of the state.
      tier: which of the models that are offered.
      data: whose clients are tested; those of an evaluation are batches of a test set.
      batch: examples of one forward pass; the answer does not depend on it.
    """
    asked = Asked(algorithm.questions[0], algorithm.score, {})
    if algorithm.choice is None:
        return _tallies(asked, executor, asked.question.variables(server, (), tier), tier, data, batch)
    models = jax.vmap(lambda m: algorithm.model(server, tier, m))(jnp.arange(algorithm.choice.models))
    return _tallies(asked, executor, models, tier, data, batch, several=True)


def _tallies(
    asked: Asked, executor: Executor, variables: PyTree, tier: Level, data: Population, batch: int,
    several: bool = False,
) -> Tally:  # fmt: skip
    """``Tally`` of each client of ``data``; with ``several``, ``variables`` have a leading axis of models."""
    sent, tier_of = _at_tier(variables, tier)

    def one(key: Array, sent: PyTree, level: Level, shard: Shard) -> tuple[PyTree, Tally]:
        def of(variables: PyTree) -> Tally:
            def logits(batch: Batch) -> Array:
                found = asked.logits(variables, tier_of(sent), batch, shard)
                return found[0] if several and len(asked.names) > 1 else found

            return tally(logits, asked.each, batch, shard)

        return (), jax.vmap(of)(sent[0]) if several else of(sent[0])

    return query(executor, one, sent, data, jnp.arange(data.size.shape[0]), jax.random.key(0)).report


def _rows(shard: Shard, position: Array) -> tuple[Array, Array]:
    """Pool rows at positions of the shard, and which of them exist.

    Args:
      position: [B] int32 from 0; those past the end read the last row.
    """
    return shard.rows[shard.offset + jnp.minimum(position, shard.size - 1)], position < shard.size


def with_statistics(
    algorithm: Algorithm, executor: Executor, variables: PyTree, tier: Level, data: Population, batch: int
) -> PyTree:
    """``variables`` with the batch statistics of one pass over ``data``, whose "clients" are single batches.

    Mean := plain average over batches of batch means, variance := plain average of unbiased batch variances; each batch
    weighs the same, the short last one too (HeteroFL's static batch norm). Unchanged where nothing is to be collected.

    Args:
      variables: of the model at ``tier``.
      data: training data in batches, see ``data.population.batches``.
      batch: examples of the largest of them.
    """
    if algorithm.statistics is None:
        return variables
    collect = algorithm.statistics
    sent, tier_of = _at_tier(variables, tier)

    def one(key: Array, sent: PyTree, level: Level, shard: Shard) -> tuple[PyTree, PyTree]:
        rows, valid = _rows(shard, jnp.arange(batch))
        return collect(sent[0], tier_of(sent), examples(shard, rows)[0], valid), ()

    count = data.size.shape[0]
    total = query(executor, one, sent, data, jnp.arange(count), jax.random.key(0)).total
    return {**variables, "batch_stats": jax.tree.map(lambda v: v[0] / count, total)}


def _at_tier(variables: PyTree, tier: Level) -> tuple[PyTree, Callable[[PyTree], Level]]:
    """What to send, and how to read the tier from it: a static one stays a Python int, a traced one must travel."""
    if not isinstance(tier, Within):
        return (variables,), lambda sent: tier
    base = tier.base
    return (variables, tier.level), lambda sent: Within(base, sent[1])


def over_clients(scores: np.ndarray, least: bool = False) -> dict[str, float]:
    """How a score is distributed over clients: mean, population deviation, means of the worst and the best tenth.

    Args:
      scores: [clients], of those with test data.
      least: whether less is better, so that the largest are the worst.

    >>> over_clients(np.array([0.5, 1.0]))
    {'mean': 0.75, 'deviation': 0.25, 'worst_tenth': 0.5, 'best_tenth': 1.0}
    """
    ordered = np.sort(np.asarray(scores, np.float64))[:: -1 if least else 1]
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
    metrics: Mapping[str, Metric] | None = None,
    remake: Remake | None = None,
) -> Callable[..., Scores]:
    """``evaluate(question, tier, server, memory, train, train_batches, test, settings) -> scores by name``, jitted.

    ``question`` is the number of one of the algorithm's questions. Scores are scalars, but for ``client_accuracy`` (or
    by the name of another score) [clients with test data] and, where clients choose among several models, ``placed``
    [batches], which model a batch was judged by. There a batch is judged by the model that is best on it (its labels
    are used: a client that only tests), and a client's own test share by the model that its training data puts it with.
    What does not apply is absent.

    Args:
      owners: [clients with test data of their own] their ids, where there are several models.
      test_batches: how many leading "clients" of ``test`` are batches of the global test set.
      validation_batches: how many after those are batches of the validation set; the others are clients' own test
        shares, judged as their clients see them.
      masked: one program at full shape for all levels, which compiles once but costs a full-size pass a level; else
        one program a level, at its true shape.
      metrics: further scores by name, means over the test set.
      remake: settings -> the algorithm with these numbers; without it ``settings`` is left away.

    Raises:
      ValueError: several models with one set of statistics.
    """
    shared, given = test_batches + validation_batches, algorithm
    if algorithm.choice is not None and algorithm.statistics is not None:
        raise ValueError("static batch norm has one set of statistics: several models need another norm (family.norm)")
    if any(question.own for question in algorithm.questions) and (owners is None or not owners.size):
        raise ValueError("models of clients' own: need test data of theirs, e.g. data.own_test=0.2 (data.split)")

    @jax.named_scope("evaluation")
    def evaluate(
        number: int, tier: Level, server: PyTree, memory: PyTree, train: Population, batches: Population,
        test: Population, settings: Settings = MappingProxyType({}),
    ) -> Scores:  # fmt: skip
        algorithm = remake(settings) if remake else given
        asked = Asked(algorithm.questions[number], algorithm.score, metrics or {})
        if asked.question.own is not None:
            state, data = (server, memory), (train, test, jnp.asarray(owners), shared)
            return _own_scores(asked, _of_own_data(asked, algorithm, executor, tier, state, data, eval_batch))
        if algorithm.choice is None:
            variables = asked.question.variables(server, memory, tier)
            variables = with_statistics(algorithm, executor, variables, tier, batches, statistics_batch)
            seen, placed = _tallies(asked, executor, variables, tier, test, eval_batch), None
        else:
            seen, placed = _of_own_model(algorithm, tier, server, train, test)
        found = _scores(asked, seen, test_batches, shared, train.y.ndim > 1)
        return found if placed is None else {**found, "placed": placed[:shared]}

    def _of_own_model(
        algorithm: Algorithm, tier: Level, server: PyTree, train: Population, test: Population
    ) -> tuple[Tally, Array]:
        assert algorithm.choice is not None
        every = tallies(algorithm, executor, server, tier, test, eval_batch)
        placed = algorithm.choice.place(server, _mean_loss(every)[:shared], None)
        if owners is not None and owners.size:
            fitted = tallies(algorithm, executor, server, tier, train, eval_batch)
            home = algorithm.choice.place(server, _mean_loss(fitted)[owners], owners)
            placed = jnp.concatenate([placed, home])
        return jax.tree.map(lambda v: jnp.take_along_axis(v, placed[:, None], 1)[:, 0], every), placed

    if not masked:
        return compiled(evaluate, executor, static_argnums=(0, 1))
    run = compiled(lambda number, tier, *data: evaluate(number, Within(0, tier), *data), executor, static_argnums=0)
    return lambda number, tier, *data: run(number, jnp.int32(tier), *data)


def _of_own_data(
    asked: Asked, algorithm: Algorithm, executor: Executor, tier: Level, state: tuple[PyTree, PyTree],
    data: tuple[Population, Population, Array, int], batch: int,
) -> Tally:  # fmt: skip
    """Each client's test data by a model made for it, from its memory and training data; leaves [clients].

    Args:
      state: server, and the memory of all clients.
      data: training data, test data, the clients that have any of their own, and where theirs begin.
    """
    (server, memory), (train, test, owners, first) = state, data
    rows = jax.tree.map(lambda v: v.reshape(-1, algorithm.memory_rows, *v.shape[1:])[owners], memory)
    sent, tier_of = _at_tier((asked.question.variables(server, memory, tier), train.rows), tier)

    def one(key: Array, sent: PyTree, level: Level, shard: Shard, own: PyTree) -> tuple[PyTree, Tally]:
        assert asked.question.own is not None
        (variables, train_rows), at, (row, held) = sent[0], tier_of(sent), own
        held = held._replace(x=shard.x, y=shard.y, rows=train_rows, views=shard.views)
        variables = asked.question.own(variables, row, held, at)
        return (), tally(lambda batch: asked.logits(variables, at, batch, shard), asked.each, batch, shard)

    tested = first + jnp.arange(owners.size)
    return query(executor, one, sent, test, tested, jax.random.key(0), own=(rows, shards(train, owners))).report


def _own_scores(asked: Asked, seen: Tally) -> Scores:
    """Means over clients of the scores on their own test data, each of its own model.

    Every client counts the same, however many test examples it has; ``local_...`` pools all examples instead.
    """
    name, of = asked.score.name, asked.score.of
    several, found = len(asked.names) > 1, dict[str, Array]()
    if asked.metrics:
        first = seen.loss[:, 0] if several else seen.loss
        examples = seen.examples[:, 0] if several else seen.examples
        found |= {m: (first[:, place] / examples).mean() for place, m in enumerate(asked.metrics, 1)}
        seen = seen._replace(loss=seen.loss[..., 0])
    if several:
        found |= {f"{reading}_{name}": of(seen)[:, place].mean() for place, reading in enumerate(asked.names[1:], 1)}
        seen = tree.take(seen, (slice(None), 0))
    found |= {name: of(seen).mean(), "loss": _mean_loss(seen).mean(), f"client_{name}": of(seen)}
    return found | {f"local_{name}": of(jax.tree.map(lambda v: v.sum(0), seen))}


def _mean_loss(seen: Tally) -> Array:
    """Mean over examples; 0 where there is none."""
    return seen.loss / jnp.maximum(seen.examples, 1)


def _scores(asked: Asked, seen: Tally, test_batches: int, shared: int, sequences: bool) -> Scores:
    """Scores from the sums over batches of the test set, of the validation set, and clients' own test shares.

    Args:
      seen: leaves [batches and clients], or [.., R] of several readings; losses [.., M] with further metrics.
      test_batches: how many of the first entries are batches of the test set.
      shared: where clients' own shares begin.
      sequences: whether an example has a label a token: then there is ``perplexity = exp(mean loss)`` too.
    """
    found: Scores = {}
    name, of = asked.score.name, asked.score.of

    def summed(first: int, end: int | None) -> Tally:
        return jax.tree.map(lambda v: v[first:end].sum(0), seen)

    several = len(asked.names) > 1  # readings: the first one is the model, the others have a name
    if asked.metrics:
        losses, examples = seen.loss[:test_batches].sum(0), seen.examples[:test_batches].sum(0)
        means = losses[0] / examples[0] if several else losses / examples
        found |= {metric: means[place] for place, metric in enumerate(asked.metrics, 1)}
        seen = seen._replace(loss=seen.loss[..., 0])
    if several:
        each = of(summed(0, test_batches))
        found |= {f"{reading}_{name}": each[place] for place, reading in enumerate(asked.names[1:], 1)}
        seen = tree.take(seen, (slice(None), 0))
    if test_batches:
        found[name], found["loss"] = of(summed(0, test_batches)), _mean_loss(summed(0, test_batches))
        if sequences:
            found["perplexity"] = jnp.exp(_mean_loss(tree.take(seen, slice(test_batches)))).mean()
    if shared > test_batches:
        found[f"validation_{name}"] = of(summed(test_batches, shared))
    if seen.loss.shape[0] > shared:
        found[f"local_{name}"] = of(summed(shared, None))
        found[f"client_{name}"] = of(tree.take(seen, slice(shared, None)))
    return found


def evaluate(
    algorithm: Algorithm, state: PyTree, data: Population, *, level: int = 0, statistics: Population | None = None,
    batch_size: int = 100, executor: Executor | None = None, metrics: Mapping[str, Metric] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Scores of the model of ``state`` at a level on all of ``data``, whatever the batches it is cut into.

    Args:
      state: of the run, or its server.
      data: a population; its clients do not matter here.
      level: 0 is the largest model.
      statistics: training data, where the net collects batch statistics only before evaluation (static batch norm).
      batch_size: examples of one forward pass.
      executor: by default ``bucketed`` on one device.
      metrics: further scores: (logits, labels, valid) -> a value for each example.

    Returns:
      ``accuracy`` (or the method's score), ``loss``, the metrics, and what else the method's first question reads.

    Raises:
      ValueError: statistics that are wanted and not given, or a level that is not there.
    """
    from hetfl_jax.data.population import batches
    from hetfl_jax.engine.executors import executor as make_executor

    tiers = len(algorithm.tiers) or algorithm.levels
    if not 0 <= level < tiers:
        raise ValueError(f"level {level}, allowed 0..{tiers - 1} (evaluate)")
    if algorithm.statistics is not None and statistics is None:
        raise ValueError("this net collects batch statistics before evaluation: give statistics=, training data")
    run = executor or make_executor("bucketed")
    test, passes = batches(data, batch_size), batches(statistics if statistics is not None else data, batch_size)
    score = evaluator(
        algorithm, run, test_batches=test.size.shape[0], statistics_batch=batch_size, eval_batch=batch_size,
        metrics=metrics,
    )  # fmt: skip
    server = state.server if isinstance(state, State) else state
    found = score(0, level, *run.place((server, (), data, passes, test)))
    return {name: float(value) for name, value in found.items() if value.ndim == 0}

"""A lab: a federation with everything that runs it, and its evaluation."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hetfl_jax import methods
from hetfl_jax.core import machine, platform
from hetfl_jax.core.fairness import fairness, quantiles
from hetfl_jax.core.types import ACCURACY, Config, Line, Population, PyTree, State, Tally
from hetfl_jax.data.population import stored_as
from hetfl_jax.engine import executors, rounds
from hetfl_jax.engine.stores import Store
from hetfl_jax.results.scores import is_share
from hetfl_jax.run.buckets import chosen
from hetfl_jax.run.client_memory import store_for
from hetfl_jax.run.config import complete
from hetfl_jax.run.evaluate import Metric, over_clients
from hetfl_jax.run.federation import Federation, Own, build
from hetfl_jax.run.lockstep import Seat, alone, whole
from hetfl_jax.run.programs import Inputs, Shared, numbers, programs_of
from hetfl_jax.run.selections import check_memory

#: names that every metrics line has
TAKEN = ("round", "loss", "score", "placed", "perplexity", "clients", "failed", "items", "seconds", "start", "last",
         "best", "local", "parameters", "macs", "bytes", "level", "width", "depth", "shares")  # fmt: skip


class Lab(NamedTuple):
    """A federation with everything that runs it.

    Rounds without files: ``state = lab.start()``, then ``state, info = lab.step(state, lab.population, lab.key)``.
    """

    config: Config  #: complete
    federation: Federation
    executor: executors.Executor
    step: rounds.Step
    evaluate: Callable[..., dict[str, jax.Array]]  #: (question, tier, server, memory) -> scores by name
    place: Callable[[PyTree], PyTree]
    start: Callable[[], State]
    population: Population
    key: jax.Array
    store: Store
    ordered: Callable[[PyTree], PyTree]  #: server -> the server as it is evaluated, its models in order
    losses: Callable[[PyTree], Tally]  #: server -> of every client's examples, where there is a choice of models
    plain: tuple[np.ndarray, np.ndarray] | tuple[()]  #: [L] bits of an item down and up, were nothing coded
    buckets: tuple[tuple[int, ...], ...] = ()  #: levels that share one; empty: one a level


def prepare(
    config: Config, own: Own | None = None, metrics: Mapping[str, Metric] | None = None, shared: Shared | None = None,
    device: jax.Device | None = None, seat: Seat | None = None,
) -> Lab:  # fmt: skip
    """Build a config's federation and its compiled functions; nothing compiles yet.

    Args:
      config: complete or not.
      own: what the user brings in place of what the config names.
      metrics: further scores, as of ``train``.
      shared: programs of other runs, which this one shares if it can; then they are traced here.
      device: on which the run is, if it is on one of several.
      seat: through which the run calls its programs, if it may run together with others.

    Raises:
      ValueError: a value that is out of range.
    """
    own = own or Own()
    config = complete(config, method=own.method)
    check_run(config)
    check_metrics(metrics)
    machine.warn_of_idle_cores()
    fed = build(config, own, None if shared is None else shared.known)
    if shared is not None:
        fed = shared.in_room(config, fed)
    if config.run.eval_masked and fed.mix.depths:
        raise ValueError("eval_masked with levels of depth: need False, each depth has its own exits (run.eval_masked)")
    train = config.train
    devices = train.devices or jax.device_count()
    buckets, wanted = chosen(config, fed, devices, platform.current(), own.method)
    executor = executors.executor(train.executor, train.clients_per_chunk, devices, buckets, wanted)
    store = store_for(config, fed, executor)
    _check_size(fed)
    check_memory(fed.algorithm)

    def place(values: PyTree) -> PyTree:
        values = whole(values)
        return executor.place(values) if device is None else jax.device_put(values, device)

    key = place(jax.random.key(config.run.seed))
    populations = fed.train, fed.train_batches, fed.test
    if shared is None:
        population, batches, test = place(populations)
    else:
        x, y = shared.pool(fed.train, device, place)
        none = stored_as(np.zeros(0, np.float32))
        rest = place(tuple(pop._replace(x=none, y=none) for pop in populations))
        population, batches, test = (pop._replace(x=x, y=y) for pop in rest)
    clients, asks = fed.partition.size.size, tuple(bool(question.memory) for question in fed.algorithm.questions)
    inputs = Inputs(key, clients, population, batches, test, numbers(config, fed), asks)
    packaged = (own.method or config.method.name) in methods.names() if isinstance(own.method, str | None) else False
    fed, programs = programs_of(config, fed, executor, store, metrics, inputs, shared, buckets, packaged)
    told = numbers(config, fed)
    if seat is not None and alone(fed.algorithm, executor, store) is None:
        programs = seat.seated(programs, fed.algorithm)
    return Lab(
        config,
        fed,
        executor,
        rounds.stepper(programs.round, fed.algorithm, executor, store, told),
        lambda question, tier, server, memory: programs.evaluate(
            question, tier, server, memory, population, batches, test, told
        ),
        place,
        lambda: place(rounds.start(fed.algorithm, store, clients, key, first=programs.first, settings=told)),
        population,
        key,
        store,
        lambda server: programs.order(server, test, told),
        lambda server: programs.losses(server, population, told),
        fed.algorithm.price().plain if fed.algorithm.price else (),
        buckets,
    )


def check_metrics(metrics: Any) -> None:
    """Refuse metrics that are no functions, or whose names lines of a run have already.

    Raises:
      ValueError: with the first that is wrong.

    >>> check_metrics({"top5": lambda logits, labels, valid: labels})
    >>> check_metrics({"loss": max})
    Traceback (most recent call last):
    ValueError: metric 'loss': this name is taken, allowed another one (metrics)
    """
    if not isinstance(metrics, Mapping | None):
        raise ValueError(f"metrics is a {type(metrics).__name__}: allowed a dict of functions by name (metrics)")
    for name, metric in (metrics or {}).items():
        if not isinstance(name, str) or not callable(metric):
            raise ValueError(f"metric {name!r} is a {type(metric).__name__}: need a function by its name (metrics)")
        if name in TAKEN or name.endswith(("accuracy", "rmse")) or name.startswith("train_"):
            raise ValueError(f"metric {name!r}: this name is taken, allowed another one (metrics)")


def check_run(config: Config) -> None:
    """Refuse rounds, seeds and sizes that are out of range.

    Raises:
      ValueError: with the key.

    >>> from hetfl_jax.run.config import changed
    >>> check_run(changed(train=dict(rounds=0)))
    Traceback (most recent call last):
    ValueError: rounds 0, allowed >= 1 (train.rounds)
    """
    if config.train.rounds < 1:
        raise ValueError(f"rounds {config.train.rounds}, allowed >= 1 (train.rounds)")
    if config.train.points_at_once < 0:
        raise ValueError(f"points_at_once {config.train.points_at_once}, allowed >= 0 (train.points_at_once)")
    for block, name, low in (("run", "seed", 0), ("data", "seed", -1)):
        if not low <= config[block][name] < 2**32:
            raise ValueError(f"seed {config[block][name]}, allowed {low}..{2**32 - 1} ({block}.{name})")
    for name in ("eval_every", "checkpoint_every", "keep", "eval_batch_size", "statistics_batch_size"):
        if config.run[name] < 1:
            raise ValueError(f"{name} {config.run[name]}, allowed >= 1 (run.{name})")


def _check_size(fed: Federation) -> None:
    """A model must fit into a device beside its gradient and its change: three times its bytes."""
    size, room = int(fed.costs.bytes[0]), machine.device_memory()
    if 3 * size > room:
        raise ValueError(
            f"a net of {size / 1e9:,.1f} GB, its gradient and its change do not fit into {room / 1e9:,.1f} GB: need a "
            "smaller one (family.hidden, family.net)"
        )


def evaluate_tiers(lab: Lab, state: State) -> Line:
    """Scores of every tier by name, and the distribution of the first one's over clients, if they have test data.

    The first question gives all scores; the others, which have a name, that by which models are judged. ``score`` says
    its name where it is no accuracy.

    Returns:
      A part of a metrics line: ``accuracy`` (or another score), ``loss``, ``validation_accuracy``, ``local_accuracy``,
      each a dict by tier; ``client_accuracy`` with mean, deviation, tenths, quantiles and figures of fairness.
      ``own_level`` is the distribution over clients of each one's score by the model of its own level, where levels are
      fixed.
    """
    fed, server, score = lab.federation, lab.ordered(state.server), lab.federation.algorithm.score
    names = [tier.name for tier in fed.tiers]
    clients = fed.partition.size.size * fed.algorithm.memory_rows
    line: Line = {} if score.name == ACCURACY.name else {"score": score.name}
    for number, question in enumerate(fed.algorithm.questions):
        memory = jax.tree.map(lambda rows: rows[:clients], state.memory) if question.memory else ()
        memory = lab.place(memory)
        found = [jax.device_get(lab.evaluate(number, tier, server, memory)) for tier in range(len(names))]
        if number:
            more = [f"{reading}_{score.name}" for reading in question.further]
            for name in [score.name, *more]:
                line[f"{question.name}_{name}"] = dict(zip(names, (_number(f[name]) for f in found)))
            continue
        for name in found[0]:
            if name not in (f"client_{score.name}", "placed"):
                line[name] = dict(zip(names, (_number(f.get(name)) for f in found)))
        if "placed" in found[0] and fed.test_groups is not None:
            scores = [fed.algorithm.shown.placed(f["placed"], fed.test_groups) for f in found]
            line |= {name: dict(zip(names, (s[name] for s in scores))) for name in scores[0]}
        if (own := f"client_{score.name}") in found[0]:
            each, tested = np.asarray(found[0][own]), np.asarray(fed.partition.test_size)
            line[own] = over_clients(each, score.least) | {"quantiles": quantiles(each)}
            if is_share(score.name):
                line[own] |= fairness(each, tested[tested > 0])
            if len(names) == fed.algorithm.levels > 1 and not fed.algorithm.drawn:
                each = np.stack([f[own] for f in found])[np.asarray(fed.train.level)[tested > 0], np.arange(each.size)]
                line["own_level"] = over_clients(each, score.least)
    return line


def _number(value: Any) -> float | None:
    """A score; one that a tier has not, or that is not finite, is none.

    >>> _number(0.5), _number(float("nan")), _number(None)
    (0.5, None, None)
    """
    return float(value) if value is not None and math.isfinite(value) else None


def draw_figures(lab: Lab, state: State, lines: list[Line], folder: Path) -> list[Path]:
    """The figures that the method brings; every process takes part, the first one draws.

    Args:
      lines: of metrics.
      folder: gets the files, which are returned; none of methods that bring no figures.
    """
    fed = lab.federation
    algorithm, draw = fed.algorithm, fed.algorithm.shown.figures
    if draw is None:
        return []
    losses = None
    if algorithm.choice is not None:
        seen = jax.device_get(lab.losses(state.server))
        losses = (seen.loss / seen.examples)[:, : models_in_use(lab, state)]
    server = jax.device_get(state.server)
    return draw(folder, lines, server, losses, fed.groups) if machine.is_first() else []


def models_in_use(lab: Lab, state: State) -> int:
    """How many models there are yet; 1 where clients have no choice among several."""
    choice = lab.federation.algorithm.choice
    return 1 if choice is None else choice.in_use(state.server)

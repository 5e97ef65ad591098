"""The compiled programs of a run, which runs that differ in numbers only may share."""

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from hetfl_jax.core.settings import Guard, agree, numbers_of, replaced, settings
from hetfl_jax.core.types import Algorithm, Array, Config, Population, PyTree, State
from hetfl_jax.engine import rounds
from hetfl_jax.engine.execute import compiled
from hetfl_jax.engine.executors import Executor
from hetfl_jax.engine.rounds import Settings
from hetfl_jax.engine.runners import Buckets
from hetfl_jax.engine.stores import Store
from hetfl_jax.run import room
from hetfl_jax.run.evaluate import Metric, evaluator, tallies
from hetfl_jax.run.federation import Federation
from hetfl_jax.run.known import Known
from hetfl_jax.run.order import ordered

#: blocks whose floats programs take as arguments; of the others every value is part of the program
TRACED = ("train", "method", "select", "uplink", "downlink", "adversary")
#: keys that no program depends on: they say where a run writes, and when
APART = {
    "run": ("name", "folder", "seed", "eval_every", "checkpoint_every", "keep"),
    "data": ("seed",),
    "capacity": ("order",),  # how many clients a level has is told apart
}


class Programs(NamedTuple):
    """Compiled functions of runs that differ in numbers; each is told them last."""

    first: rounds.First
    round: rounds.Programs
    evaluate: Callable[..., dict[str, jax.Array]]
    order: Callable[[PyTree, Population, Settings], PyTree]
    losses: Callable[[PyTree, Population, Settings], PyTree]
    guards: list[Guard]  #: for which numbers they are right; complete after ``trace``


class Shared:
    """What runs of a sweep share: data, families, lengths of arrays, and programs by structure.

    >>> Shared().count()
    0
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.known = Known()
        self.programs: dict[str, list[Programs]] = {}
        self.rooms: dict[str, list[room.Room]] = {}
        self.together: dict[tuple[int, int], dict[Hashable, Callable[..., PyTree]]] = {}
        self.said: set[str] = set()  #: what holds for all runs and is told once
        self._placed: dict[tuple[jax.Device | None, str], tuple[Array, Array]] = {}

    def count(self) -> int:
        """How many programs of a round there are."""
        return sum(map(len, self.programs.values()))

    def pool(
        self, population: Population, device: jax.Device | None, place: Callable[[PyTree], PyTree]
    ) -> tuple[Array, Array]:
        """Examples and labels on a device, the same arrays for all runs that have the same ones in a row."""

        def placed(name: str, array: Array) -> Array:
            known = self._placed.get((device, name))
            if known is None or known[0] is not array:
                known = self._placed[device, name] = array, place(array)
            return known[1]

        return placed("x", population.x), placed("y", population.y)

    def in_room(self, config: Config, fed: Federation) -> Federation:
        """The federation with arrays as long as those of other runs, where that changes nothing else."""
        needs = room.needed(fed)
        if needs is None:
            return fed
        kind = json.dumps([fixed(config, fed.remake is not None), fed.train.x.shape[1:], fed.train.size.shape])
        return room.placed(fed, room.chosen(self.rooms.setdefault(kind, []), needs))


def numbers(config: Config, fed: Federation) -> dict[str, float]:
    """What programs of a run are told: floats that are on (not 0), by dotted key; none where nothing is built anew.

    A float that is 0 is a switch that is off, so that it is part of the program: momentum 0 has no momentum buffer.
    """
    return _on(config) if fed.remake is not None else {}


def _on(config: Config) -> dict[str, float]:
    """Floats of the traced blocks that are not 0, by dotted key.

    >>> from hetfl_jax.run.config import changed
    >>> found = _on(changed(train=dict(learning_rate=0.2)))
    >>> found["train.learning_rate"], "train.momentum" in found
    (0.2, False)
    """
    blocks = config.to_dict()
    found = numbers_of({block: blocks[block] for block in TRACED})
    return {name: value for name, value in found.items() if value}


def programs_of(
    config: Config, fed: Federation, executor: Executor, store: Store, metrics: Mapping[str, Metric] | None,
    inputs: "Inputs", shared: Shared | None = None, buckets: Buckets = (), packaged: bool = True,
) -> tuple[Federation, Programs]:  # fmt: skip
    """The programs of a run: those of an earlier one, if they are right for it too, else new ones.

    Args:
      shared: where to look for them, and where new ones are kept, traced.
      buckets: of the executor.
      packaged: whether the method came with the package. One that did not may do with a number what no traced number
        allows (give it to ``jnp.maximum`` as it is); its numbers are then part of its programs.

    Returns:
      The federation, ``remake`` ``None`` where numbers are part of programs, and its programs.
    """
    values = numbers(config, fed)
    known = [] if shared is None else shared.programs.setdefault(structure(config, fed, buckets), [])
    if found := next((programs for programs in known if agree(programs.guards, values)), None):
        return fed, found
    made = new_programs(config, fed, executor, store, metrics, values)
    if shared is not None or not packaged:
        try:
            trace(made, executor, len(fed.tiers), inputs)
        except Exception:  # what is wrong with the method itself comes up again below, or in its first round
            if packaged or not values:
                raise
            bare, inputs = fed._replace(remake=None), inputs._replace(told={})
            return programs_of(config, bare, executor, store, metrics, inputs, shared, buckets)
    known.append(made)
    return fed, made


def new_programs(
    config: Config, fed: Federation, executor: Executor, store: Store, metrics: Mapping[str, Metric] | None,
    values: Mapping[str, float],
) -> Programs:  # fmt: skip
    """Programs that are told ``values``, not traced yet.

    Args:
      values: numbers by dotted key, which become arguments; without any the algorithm is built once.
    """
    guards, blocks = list[Guard](), config.to_dict()

    def again(told: Settings) -> Algorithm:
        assert fed.remake is not None
        return fed.remake(replaced(blocks, settings(values, told, guards)))

    remake = again if values else None
    batch = config.run.eval_batch_size
    validation = range(fed.test_batches, fed.test_batches + fed.validation_batches)
    own = fed.partition.test_size

    def losses(server: PyTree, population: Population, told: Settings) -> PyTree:
        return tallies(remake(told) if remake else fed.algorithm, executor, server, 0, population, batch)

    return Programs(
        rounds.first_program(fed.algorithm, store, remake),
        rounds.round_programs(fed.algorithm, executor, store, remake),
        evaluator(
            fed.algorithm,
            executor,
            test_batches=fed.test_batches,
            validation_batches=fed.validation_batches,
            statistics_batch=config.run.statistics_batch_size,
            eval_batch=batch,
            masked=config.run.eval_masked,
            owners=None if own is None else executor.place(np.flatnonzero(own)),
            metrics=metrics,
            remake=remake,
        ),
        ordered(fed.algorithm, executor, validation, batch, remake),
        compiled(losses, executor),
        guards,
    )


def fixed(config: Config, told: bool = True) -> str:
    """What of a config is part of programs, as text: all but numbers that are on, and what no program depends on.

    Args:
      told: whether programs are told the numbers; else they are part of them.

    >>> from hetfl_jax.run.config import changed
    >>> slow, fast = (changed(train=dict(learning_rate=rate)) for rate in (0.1, 0.2))
    >>> fixed(slow) == fixed(fast), fixed(slow, told=False) == fixed(fast, told=False)
    (True, False)
    """
    kept = replaced(config.to_dict(), dict.fromkeys(_on(config) if told else (), "a number"))
    for block, names in APART.items():
        kept[block] = {name: value for name, value in kept[block].items() if name not in names}
    return json.dumps(kept, sort_keys=True, default=str)


def structure(config: Config, fed: Federation, buckets: Buckets = ()) -> str:
    """A name of all that is fixed in a run's programs; runs with the same name can differ in numbers only.

    It covers the config (``fixed``), shapes and dtypes of the data, levels of clients, and the data itself where the
    method looks at it while it is built.
    """
    own = fed.partition.test_size
    shapes = jax.tree.map(lambda v: f"{v.dtype}{v.shape}", (fed.train, fed.train_batches, fed.test))
    data = [fed.local.batch_size, fed.test_batches, fed.validation_batches, str(shapes)]
    data += [np.bincount(np.asarray(fed.train.level)).tolist(), [] if own is None else np.flatnonzero(own).tolist()]
    if config.method.args.get("mean_examples"):
        data.append(float(np.mean(fed.train.size)))
    if fed.reads_population:
        data.append(fed.fingerprint)
    text = json.dumps([fixed(config, fed.remake is not None), data, buckets], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def trace(programs: Programs, executor: Executor, tiers: int, run: "Inputs") -> None:
    """Trace every program once, which completes the guards; nothing compiles, and nothing is computed.

    Args:
      tiers: how many models are evaluated.
      run: what the programs are given; only shapes matter.
    """
    if not executor.jit:
        return
    state = jax.eval_shape(lambda key, told: programs.first(key, run.clients, told), run.key, run.told)
    of_round = programs.round
    if of_round.executed is None:
        for step in (of_round.usual, of_round.again):
            if step is not None:
                jax.eval_shape(step, state, run.population, run.key, run.told)
    else:
        assert of_round.planned is not None
        one, state = state.memory, State(state.server, (), state.round)
        planned = jax.eval_shape(of_round.planned, state, run.population, run.key, run.told)
        items = planned[1].ids.shape
        rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*items, *leaf.shape), leaf.dtype), one)
        jax.eval_shape(of_round.executed, state, *planned, rows, run.population, run.told)
    server = jax.eval_shape(programs.order, state.server, run.test, run.told)
    for number, asks in enumerate(run.asks_memory):
        memory = state.memory if asks else ()
        for tier in range(tiers):
            jax.eval_shape(
                lambda *data, n=number, t=tier: programs.evaluate(n, t, *data),
                server, memory, run.population, run.batches, run.test, run.told,
            )  # fmt: skip


class Inputs(NamedTuple):
    """What the programs of one run are given: its key, data and numbers, placed on its devices."""

    key: jax.Array
    clients: int
    population: Population
    batches: Population
    test: Population
    told: dict[str, float]
    asks_memory: tuple[bool, ...]

"""Rounds: plan, execution and the server's step as one compiled program, or as few as the host needs to see between.

The method may be built anew inside a program from numbers that the program is told, so that runs share it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core import tree
from hetfl_jax.core.random import CLIENT, INIT, PLAN, SURVEY, purpose_key
from hetfl_jax.core.shards import shards
from hetfl_jax.core.types import (
    Algorithm,
    Array,
    Between,
    Items,
    Plan,
    Population,
    PyTree,
    State,
)
from hetfl_jax.engine.execute import client_keys, compiled, execute, pool_of, survey
from hetfl_jax.engine.executors import Executor
from hetfl_jax.engine.stores import Store, device_store

Step = Callable[[State, Population, Array], tuple[State, PyTree]]
Settings = Mapping[str, Array | float]  #: numbers that a program is told, by name
Remake = Callable[[Settings], Algorithm]  #: the algorithm of these numbers, built inside a program


def start(
    algorithm: Algorithm, store: Store, clients: int, key: Array, *, first: "First | None" = None,
    settings: Settings = MappingProxyType({}),
) -> State:  # fmt: skip
    """The state before the first round.

    Args:
      clients: N, of the population that the rounds will get.
      key: the run's constant key; the start values are drawn from it, for the purpose ``INIT``.
      first, settings: the program of ``first_program``, if it is shared, and the numbers that it takes.

    Returns:
      A ``State`` of round 0 with memory for N clients, in the form of the store.

    Raises:
      ValueError: another number of clients than the algorithm or the store was made for.

    >>> method = Algorithm(*[None] * 10)._replace(init=lambda key: (jnp.float32(7), {"visits": jnp.int32(0)}))
    >>> state = start(method, device_store(), 3, jax.random.key(0))
    >>> float(state.server), state.memory["visits"].tolist(), int(state.round)
    (7.0, [0, 0, 0], 0)
    """
    _check_clients(algorithm, clients)
    if store.rows not in (0, clients * algorithm.memory_rows):
        raise ValueError(f"a store of {store.rows} rows of client memory, but {clients} clients (engine.rounds.start)")
    state = (first or first_program(algorithm, store))(key, clients, dict(settings))
    rows = clients * algorithm.memory_rows
    return state._replace(memory=store.init(state.memory, rows)) if store.on_host else state


#: (key, clients, settings) -> state, its memory of one row where the store is on the host
First = Callable[[Array, int, Settings], State]


def first_program(algorithm: Algorithm, store: Store, remake: Remake | None = None) -> First:
    """What draws the first state, compiled: op by op, a net's start values take seconds.

    A CPU's compiler takes seconds to optimise the draws of kernels well, more than the one run of this program can
    gain; the numbers are the same without.

    Args:
      remake: settings -> the algorithm with these numbers; without it ``algorithm`` is taken as it is.

    Returns:
      ``(key, clients, settings) -> State``; where the store is on the host, its memory is ONE client's.
    """

    def init(key: Array, clients: int, settings: Settings) -> State:
        made = remake(settings) if remake else algorithm
        server, one = made.init(key)
        rows = clients * made.memory_rows
        return State(server, one if store.on_host else store.init(one, rows), jnp.int32(0))

    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}
    quick, inside = jax.jit(init, static_argnums=1, compiler_options=options), jax.jit(init, static_argnums=1)

    def first(key: Array, clients: int, settings: Settings) -> State:
        own = purpose_key(key, INIT)
        # Within another program that one's options hold.
        return (inside if isinstance(own, jax.core.Tracer) else quick)(own, clients, settings)

    return first


def _check_clients(algorithm: Algorithm, clients: int) -> None:
    """Refuse another population than the method was made for: its selection has a row for each client."""
    if algorithm.clients not in (0, clients):
        raise ValueError(f"the method was made for {algorithm.clients} clients, but there are {clients} (clients)")


def _check_memory(algorithm: Algorithm, store: Store, memory: PyTree, clients: int) -> None:
    """Refuse memory with too few rows: JAX clamps an index past the end, so a client would read somebody else's row."""
    _check_clients(algorithm, clients)
    if not store.rows:
        for leaf in jax.tree.leaves(memory):
            if leaf.shape[0] < clients * algorithm.memory_rows:
                raise ValueError(
                    f"client memory of {leaf.shape[0]} rows for a population of {clients} clients: need "
                    f"start(..., {clients}, key) (engine.rounds.start)"
                )


def make_round(algorithm: Algorithm, executor: Executor, store: Store) -> Step:
    """``step(state, population, key) -> (state, info)``: one round, compiled once; the state's buffers are reused.

    Place state, population and key with ``executor.place`` first, or the first round compiles for itself. After a call
    the state that was passed in is gone (its buffers are donated), unless the method works between rounds.

    Args:
      algorithm: from a method's ``make``.
      executor: how the items are run.
      store: where client memory lives; the one that ``start`` got.

    Returns:
      ``step``. Its ``key`` is the run's constant key, the same in every round; the round's number is folded into it.
      Its ``info`` is the algorithm's, and ``device`` [K] says which device ran each item.

    A method by hand, with one number as its model, to which each client adds how many examples it holds:

    >>> from hetfl_jax.core.types import Info, Reply
    >>> from hetfl_jax.data.population import population
    >>> from hetfl_jax.engine.executors import executor
    >>> def plan(key, round, server, population, survey):
    ...     return Plan(ids=jnp.arange(2), valid=jnp.ones(2, bool), level=jnp.zeros(2, jnp.int32))
    >>> method = Algorithm(
    ...     levels=1, members=1, plan=plan, send=lambda server, round: server,
    ...     init=lambda key: (jnp.float32(0), ()),
    ...     client=lambda context: Reply(context.shard.size.astype(jnp.float32), 0, (), ()),
    ...     widen=lambda total, level: total,
    ...     server=lambda server, plan, sent, total, report, ok: (server + total[0], Info((), (), {}, {})),
    ...     model=lambda server, tier: server, predict=lambda *_: None)
    >>> toy = population(jnp.zeros((5, 1)), jnp.zeros(5, int), jnp.arange(5), jnp.array([2, 3]))
    >>> key, step = jax.random.key(0), make_round(method, executor("bucketed"), device_store())
    >>> state, info = step(start(method, device_store(), 2, key), toy, key)
    >>> float(state.server), int(state.round)
    (5.0, 1)
    """
    return stepper(round_programs(algorithm, executor, store), algorithm, executor, store)


class Programs(NamedTuple):
    """The compiled parts of a round, of runs that differ in numbers only; those that a method does not need are absent.

    Each takes ``settings`` last, from which the method is built anew inside the program: two runs with another learning
    rate share one program.
    """

    usual: Callable[..., PyTree] | None = None  #: (state, population, key, settings) -> (state, info)
    again: Callable[..., PyTree] | None = None  #: the same round, for work on the host
    planned: Callable[..., PyTree] | None = None  #: (state, population, key, settings) -> plan, items, refused
    executed: Callable[..., PyTree] | None = None  #: (state, plan, items, refused, rows, population, settings)


def round_programs(algorithm: Algorithm, executor: Executor, store: Store, remake: Remake | None = None) -> Programs:
    """The programs of a round: one, or two where the host has something to do in between.

    Args:
      remake: settings -> the algorithm with these numbers; without it ``algorithm`` is what it is.

    Raises:
      ValueError: a method that works on the host between rounds, with memory on the host.
    """

    def made(settings: Settings) -> Algorithm:
        return remake(settings) if remake else algorithm

    def step(
        algorithm: Algorithm, state: State, population: Population, key: Array
    ) -> tuple[State, tuple[PyTree, dict[str, PyTree]]]:
        _check_memory(algorithm, store, state.memory, population.size.shape[0])
        plan, items, refused = _planned(algorithm, executor, state, population, key)
        sent = algorithm.send(state.server, state.round)
        outcome, memory, device = execute(
            executor, algorithm, sent, pool_of(population), items, store, state.memory, plan.row
        )
        with jax.named_scope("server"):
            server, info = algorithm.server(state.server, plan, sent, outcome.total, outcome.report, outcome.ok)
        marks: dict[str, PyTree] = {"device": device, "refused": refused, "ran": outcome.ran}
        return State(server, memory, state.round + 1), (info, marks)

    def usual(state: State, population: Population, key: Array, settings: Settings) -> tuple[State, PyTree]:
        state, (info, marks) = step(made(settings), state, population, key)
        return state, info._replace(**marks)

    def again(state: State, population: Population, key: Array, settings: Settings) -> tuple[State, PyTree]:
        between = made(settings).between
        assert between is not None
        return step(between.collecting, state, population, key)

    def planned(state: State, population: Population, key: Array, settings: Settings) -> PyTree:
        return _planned(made(settings), executor, state, population, key)

    def executed(
        state: State, plan: Plan, items: Items, refused: Array, memory: PyTree, population: Population,
        settings: Settings,
    ) -> tuple[State, PyTree, PyTree]:  # fmt: skip
        algorithm = made(settings)
        slot = jnp.arange(items.ids.shape[0], dtype=jnp.int32)
        sent = algorithm.send(state.server, state.round)
        outcome, rows, device = execute(
            executor, algorithm, sent, pool_of(population), items, device_store(), memory, slot
        )
        with jax.named_scope("server"):
            server, info = algorithm.server(state.server, plan, sent, outcome.total, outcome.report, outcome.ok)
        marks: dict[str, PyTree] = {"device": device, "refused": refused, "ran": outcome.ran}
        return State(server, (), state.round + 1), info._replace(**marks), rows

    if store.on_host:
        if algorithm.between is not None:
            raise ValueError("this method splits on the host between rounds: need store 'device' (train.store)")
        run = compiled(executed, executor, donate_argnums=(0, 4))
        return Programs(planned=compiled(planned, executor), executed=run)
    if algorithm.between is None:
        return Programs(compiled(usual, executor, donate_argnums=0))
    return Programs(compiled(usual, executor), compiled(again, executor))  # buffers are kept: it may be run again


def stepper(
    programs: Programs, algorithm: Algorithm, executor: Executor, store: Store,
    settings: Settings = MappingProxyType({}),
) -> Step:  # fmt: skip
    """``step(state, population, key) -> (state, info)`` of one run, from programs that others may share.

    Args:
      programs: of ``round_programs``, made for this algorithm, executor and store.
      settings: the numbers of this run, those that ``remake`` takes.
    """
    told, main = dict(settings), programs.usual or programs.executed
    assert main is not None
    if programs.executed is not None:
        run = _with_host_memory(programs, executor, store, told)
    elif algorithm.between is not None:
        run = _with_host_work(programs, algorithm.between, executor, told)
    else:

        def run(state: State, population: Population, key: Array) -> tuple[State, PyTree]:
            return main(state, population, key, told)

    if executor.jit:
        jitted: PyTree = getattr(main, "jitted", main)
        run.jitted = _Lowered(jitted, told)  # type: ignore[attr-defined]
        run._cache_size = jitted._cache_size  # type: ignore[attr-defined]
    return run


class _Lowered(NamedTuple):
    """A jitted round whose settings are filled in, so that ``lower`` takes what a step takes."""

    jitted: PyTree
    settings: Settings

    def lower(self, *args: PyTree) -> PyTree:
        """The round for these arguments, as jax lowers it."""
        return self.jitted.lower(*args, self.settings)


def _with_host_memory(programs: Programs, executor: Executor, store: Store, settings: Settings) -> Step:
    """Rounds of two programs, plan and execution; in between the cohort's rows come from the store.

    Only ``[K, ...]`` rows are ever on the device, however many clients there are.
    """
    planned, run = programs.planned, programs.executed
    assert planned is not None
    assert run is not None

    def step(state: State, population: Population, key: Array) -> tuple[State, PyTree]:
        plan, items, refused = planned(state, population, key, settings)
        places, valid = jax.device_get((plan.ids if plan.row is None else plan.row, plan.valid))
        own = executor.place(State((), jax.tree.map(jnp.asarray, store.gather((), places)), jnp.int32(0))).memory
        state, info, rows = run(state, plan, items, refused, own, population, settings)
        store.scatter((), places, valid, jax.device_get(rows))
        return executor.place(state), info

    return step


def _with_host_work(programs: Programs, between: Between, executor: Executor, settings: Settings) -> Step:
    """Rounds after which the host may want to decide; their buffers are kept, since a round may be run again."""
    usual, again = programs.usual, programs.again
    assert usual is not None
    assert again is not None

    def run(state: State, population: Population, key: Array) -> tuple[State, PyTree]:
        after, info = usual(state, population, key, settings)
        if not between.needed(info):
            return after, info

        def ask(fn: Callable[..., PyTree], sent: PyTree, ids: Array) -> PyTree:
            return survey(executor, fn, sent, population, ids, purpose_key(key, SURVEY, state.round))

        after, (collected, marks) = again(state, population, key, settings)
        server, info = between.decide(state.server, collected, ask)
        return after._replace(server=executor.place(server)), info._replace(**marks)

    return run


def _planned(
    algorithm: Algorithm, executor: Executor, state: State, population: Population, key: Array
) -> tuple[Plan, Items, Array]:
    """A round's plan, its items without their memory, and how many the plan may not hold, which are left out."""

    def ask(
        fn: Callable[..., PyTree], sent: PyTree, ids: Array, levels: Array | None = None, valid: Array | None = None
    ) -> PyTree:
        asked = purpose_key(key, SURVEY, state.round)
        return survey(executor, fn, sent, population, ids, asked, levels, algorithm.levels, valid)

    with jax.named_scope("plan"):
        plan = algorithm.plan(purpose_key(key, PLAN, state.round), state.round, state.server, population, ask)
    memory = jax.tree.leaves(jax.eval_shape(algorithm.init, key)[1])
    allowed = _allowed(plan, population.size.shape[0], unique=bool(memory))
    refused = (plan.valid & ~allowed).sum()
    plan = plan._replace(valid=plan.valid & allowed, ids=jnp.where(allowed, plan.ids, 0))
    keys = client_keys(purpose_key(key, CLIENT, state.round), plan.ids)
    if not (isinstance(plan.stream, int) and plan.stream == 0):
        number = jnp.asarray(plan.stream).astype(jnp.uint32)
        keys = jnp.where(number == 0, keys, jax.vmap(jax.random.fold_in)(keys, number))
    rounds = jnp.broadcast_to(state.round, plan.ids.shape)
    rows = shards(population, plan.ids)
    items = Items(plan.ids, keys, plan.valid, plan.level, rounds, plan.ticket, rows, (), plan.share, plan.known)
    return plan, items, refused


def _allowed(plan: Plan, clients: int, unique: bool) -> Array:
    """[K] bool, which items are of clients that exist, and no copy of an earlier one.

    Args:
      clients: N; ids outside 0 .. N - 1 are refused.
      unique: whether clients have memory. Then two valid items may not share a row of it; else they may not share both
        client and stream, unless tickets tell them apart.

    >>> plan = Plan(jnp.array([3, 1, 3, 9]), jnp.ones(4, bool), jnp.zeros(4, int))
    >>> _allowed(plan, clients=5, unique=True).tolist()
    [True, True, False, False]
    """
    inside = (plan.ids >= 0) & (plan.ids < clients)
    if not unique and jax.tree.leaves(plan.ticket):
        return inside
    row = jnp.where(plan.valid & inside, plan.ids if plan.row is None else plan.row, -1)
    stream = jnp.zeros_like(row) if unique else jnp.broadcast_to(jnp.asarray(plan.stream, row.dtype), row.shape)
    order = jnp.lexsort((stream, row))
    row, stream = row[order], stream[order]
    again = jnp.pad((row[1:] == row[:-1]) & (stream[1:] == stream[:-1]), (1, 0)) & (row >= 0)
    return inside & ~jnp.zeros_like(inside).at[order].set(again)


def program(step: Callable[..., PyTree], *args: PyTree) -> str:
    """The compiled text (HLO) of a function that ``compiled`` made, for these arguments. It compiles, and runs nothing.

    >>> from hetfl_jax.engine.executors import executor
    >>> text = program(compiled(lambda x: x * 2, executor("bucketed")), jnp.ones(3))
    >>> "HloModule" in text, "multiply" in text
    (True, True)
    """
    jitted: PyTree = getattr(step, "jitted", step)
    return jitted.lower(*args).compile().as_text()


def moved_bytes(
    executor: Executor, algorithm: Algorithm, state: State, population: Population, key: Array
) -> dict[str, int]:
    """Bytes that a round puts through each collective on every device; empty on one device. Nothing runs or compiles.

    Returns:
      ``totals``: bytes of the sums (one all-reduce). ``memory to clients`` (reduce-scatter) and ``memory back``
      (all-gather), where clients keep memory: a row for each item, items padded to equal shares. Reports, a few numbers
      an item, are not counted.

    >>> moved_bytes(Executor(lambda *_: None), None, None, None, None)  # one device
    {}
    """
    if executor.mesh is None:
        return {}

    def outcome(state: State, population: Population, key: Array) -> tuple[PyTree, Array]:
        plan, items, _ = _planned(algorithm, executor, state, population, key)
        sent = algorithm.send(state.server, state.round)
        done = execute(executor, algorithm, sent, pool_of(population), items, device_store(), state.memory, plan.row)
        return done[0].total, plan.ids

    total, ids = jax.eval_shape(outcome, state, population, key)
    places = -(-ids.shape[0] // executor.devices) * executor.devices
    row = sum(tree.nbytes(leaf) // leaf.shape[0] for leaf in jax.tree.leaves(state.memory))
    rows = {"memory to clients": places * row, "memory back": places * row} if row else {}
    return {"totals": tree.nbytes(total), **rows}

"""Rounds and queries, on one device or over a mesh; with ``runners``, all that knows of devices and client axes.

An executor is a value, chosen by configuration. Over a mesh three things cross devices, each in one collective: totals
(an all-reduce), reports (an all-gather), and, where clients keep memory, the cohort's rows of it (a reduce-scatter to
the devices that run them, an all-gather back to those that keep them).
"""

from collections.abc import Callable
from functools import partial, wraps

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hetfl_jax.core import tree
from hetfl_jax.core.random import CLIENT, INIT, PLAN, SURVEY, purpose_key
from hetfl_jax.core.shards import shards
from hetfl_jax.core.types import (
    Algorithm,
    Array,
    Between,
    ClientContext,
    Items,
    Outcome,
    Plan,
    Population,
    PyTree,
    Reply,
    State,
)
from hetfl_jax.engine.executors import AXIS, EVERYWHERE, SPLIT, Executor, deal
from hetfl_jax.engine.runners import Pool
from hetfl_jax.engine.stores import Store, device_store

Step = Callable[[State, Population, Array], tuple[State, PyTree]]


def _execute(
    executor: Executor, algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items, store: Store, memory: PyTree,
    rows: Array | None = None,
) -> tuple[Outcome, PyTree, Array]:  # fmt: skip
    """Run items with the rows of ``memory``: (outcome in the order of the items, memory, device of each item).

    ``rows`` [K] says which row of ``memory`` is an item's own; by default its client's id.
    """
    slots = items.valid.shape[0]
    mesh = executor.mesh
    rows = items.ids if rows is None else rows
    if mesh is None:
        items = items._replace(memory=store.gather(memory, rows))
        outcome = executor.run(algorithm, sent, pool, items)
        kept = store.scatter(memory, rows, items.valid, outcome.memory)
        return outcome._replace(memory=()), kept, jnp.zeros(slots, jnp.int32)

    order = deal(items.level, items.shard.size, items.valid, mesh.size)
    dealt, rows = tree.take((items, rows), jnp.where(order < slots, order, 0))
    dealt = dealt._replace(valid=dealt.valid & (order < slots))
    with jax.named_scope("collective"):
        dealt = dealt._replace(memory=_fetch(mesh, store, memory, rows))
    outcome = executor.run(algorithm, sent, pool, dealt)
    with jax.named_scope("collective"):
        kept = _hand_back(mesh, store, memory, rows, dealt.valid, outcome.memory)
    place = jnp.argsort(order)[:slots]
    report, ok = tree.take((outcome.report, outcome.ok), place)
    return Outcome(outcome.total, (), report, ok), kept, place // (order.shape[0] // mesh.size)


def _fetch(mesh: Mesh, store: Store, memory: PyTree, ids: Array) -> PyTree:
    """Rows of ``ids`` from the devices that keep them to those that run them, in one reduce-scatter."""
    if not jax.tree.leaves(memory):
        return memory

    def on_device(block: PyTree, ids: Array) -> PyTree:
        rows, back = tree.packed(store.gather(block, ids, jax.lax.axis_index(AXIS)), lead=1)
        return back([jax.lax.psum_scatter(v, AXIS, tiled=True) for v in rows])

    specs = (SPLIT, EVERYWHERE)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=SPLIT, check_vma=False)(memory, ids)


def _hand_back(mesh: Mesh, store: Store, memory: PyTree, ids: Array, valid: Array, rows: PyTree) -> PyTree:
    """Rows from the devices that ran them to those that keep them, in one all-gather."""
    if not jax.tree.leaves(memory):
        return memory

    def on_device(block: PyTree, ids: Array, valid: Array, rows: PyTree) -> PyTree:
        own, back = tree.packed(rows, lead=1)
        everyone = back([jax.lax.all_gather(v, AXIS, tiled=True) for v in own])
        return store.scatter(block, ids, valid, everyone, jax.lax.axis_index(AXIS))

    specs = (SPLIT, EVERYWHERE, EVERYWHERE, SPLIT)
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=SPLIT, check_vma=False)
    return mapped(memory, ids, valid, rows)


def start(algorithm: Algorithm, store: Store, clients: int, key: Array) -> State:
    """The state before the first round.

    Raises:
      ValueError: another number of clients than the algorithm or the store was made for.
    """
    _check_clients(algorithm, clients)
    if store.rows not in (0, clients * algorithm.memory_rows):
        raise ValueError(f"a store of {store.rows} rows of client memory, but {clients} clients (engine.rounds.start)")

    @jax.jit  # op by op, drawing a net's start values takes seconds
    def init(key: Array) -> State:
        server, one = algorithm.init(purpose_key(key, INIT))
        return State(server, one if store.on_host else store.init(one, rows), jnp.int32(0))

    rows = clients * algorithm.memory_rows
    state = init(key)
    return state._replace(memory=store.init(state.memory, rows)) if store.on_host else state


def _check_clients(algorithm: Algorithm, clients: int) -> None:
    if algorithm.clients not in (0, clients):
        raise ValueError(f"the method was made for {algorithm.clients} clients, but there are {clients} (clients)")


def _check_memory(algorithm: Algorithm, store: Store, memory: PyTree, clients: int) -> None:
    """A row too few would be a row of somebody else's."""
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

    ``key`` is the run's constant key. Place state, population and key with ``executor.place`` first. ``info`` is the
    algorithm's, and ``device`` [K], which device ran each item.
    """

    def step(algorithm: Algorithm, state: State, population: Population, key: Array) -> tuple[State, PyTree]:
        _check_memory(algorithm, store, state.memory, population.size.shape[0])
        plan, items, refused = _planned(algorithm, executor, state, population, key)
        sent = algorithm.send(state.server, state.round)
        outcome, memory, device = _execute(
            executor, algorithm, sent, _pool(population), items, store, state.memory, plan.row
        )
        with jax.named_scope("server"):
            server, info = algorithm.server(state.server, plan, sent, outcome.total, outcome.report, outcome.ok)
        return State(server, memory, state.round + 1), (info, device, refused)

    def usual(state: State, population: Population, key: Array) -> tuple[State, PyTree]:
        state, (info, device, refused) = step(algorithm, state, population, key)
        return state, info._replace(device=device, refused=refused)

    if store.on_host:
        return _with_host_memory(algorithm, executor, store)
    if algorithm.between is None:
        return compiled(usual, executor, donate_argnums=0)
    return _with_host_work(algorithm.between, executor, compiled(usual, executor), step)


def _with_host_memory(algorithm: Algorithm, executor: Executor, store: Store) -> Step:
    """Rounds of two programs, plan and execution; in between the cohort's rows come from the store.

    Raises:
      ValueError: a method that works on the host between rounds.
    """
    if algorithm.between is not None:
        raise ValueError("this method splits on the host between rounds: need store 'device' (train.store)")

    def execute(
        state: State, plan: Plan, items: Items, refused: Array, memory: PyTree, population: Population
    ) -> tuple[State, PyTree, PyTree]:
        slot = jnp.arange(items.ids.shape[0], dtype=jnp.int32)
        sent = algorithm.send(state.server, state.round)
        outcome, rows, device = _execute(
            executor, algorithm, sent, _pool(population), items, device_store(), memory, slot
        )
        with jax.named_scope("server"):
            server, info = algorithm.server(state.server, plan, sent, outcome.total, outcome.report, outcome.ok)
        return State(server, (), state.round + 1), info._replace(device=device, refused=refused), rows

    planned = compiled(partial(_planned, algorithm, executor), executor)
    run = compiled(execute, executor, donate_argnums=(0, 4))

    def step(state: State, population: Population, key: Array) -> tuple[State, PyTree]:
        plan, items, refused = planned(state, population, key)
        places, valid = jax.device_get((plan.ids if plan.row is None else plan.row, plan.valid))
        own = executor.place(State((), jax.tree.map(jnp.asarray, store.gather((), places)), jnp.int32(0))).memory
        state, info, rows = run(state, plan, items, refused, own, population)
        store.scatter((), places, valid, jax.device_get(rows))
        return executor.place(state), info

    if executor.jit:
        step.jitted, step._cache_size = getattr(run, "jitted", run), run._cache_size  # type: ignore[attr-defined]
    return step


def _with_host_work(between: Between, executor: Executor, usual: Step, step: Callable[..., PyTree]) -> Step:
    """Rounds after which the host may want to decide; their buffers are kept, since a round may be run again."""
    again = compiled(partial(step, between.collecting), executor)

    def run(state: State, population: Population, key: Array) -> tuple[State, PyTree]:
        after, info = usual(state, population, key)
        if not between.needed(info):
            return after, info

        def ask(fn: Callable[..., PyTree], sent: PyTree, ids: Array) -> PyTree:
            return survey(executor, fn, sent, population, ids, purpose_key(key, SURVEY, state.round))

        after, (collected, device, refused) = again(state, population, key)
        server, info = between.decide(state.server, collected, ask)
        return after._replace(server=executor.place(server)), info._replace(device=device, refused=refused)

    if executor.jit:
        run.jitted, run._cache_size = getattr(usual, "jitted", usual), usual._cache_size  # type: ignore[attr-defined]
    return run


def survey(
    executor: Executor, fn: Callable[..., PyTree], sent: PyTree, population: Population, ids: Array, key: Array,
    levels: Array | None = None, count: int = 1, valid: Array | None = None,
) -> PyTree:  # fmt: skip
    """What clients ``ids`` answer: ``fn(key, sent, level, shard)`` stacked; see ``query``."""
    return query(executor, lambda *args: ((), fn(*args)), sent, population, ids, key, levels, count, valid).report


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
    keys = _client_keys(purpose_key(key, CLIENT, state.round), plan.ids)
    if not (isinstance(plan.stream, int) and plan.stream == 0):
        number = jnp.asarray(plan.stream).astype(jnp.uint32)
        keys = jnp.where(number == 0, keys, jax.vmap(jax.random.fold_in)(keys, number))
    rounds = jnp.broadcast_to(state.round, plan.ids.shape)
    rows = shards(population, plan.ids)
    items = Items(plan.ids, keys, plan.valid, plan.level, rounds, plan.ticket, rows, (), plan.share, plan.known)
    return plan, items, refused


def _allowed(plan: Plan, clients: int, unique: bool) -> Array:
    """[K] which items are of clients that exist, and no copy of an earlier one.

    Where rows of memory are ``unique``, items of one row are; else those of one client and stream, without tickets.
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


def compiled(fn: Callable[..., PyTree], executor: Executor, **options: PyTree) -> Callable[..., PyTree]:
    """``jax.jit(fn)`` for this executor.

    Over several CPU devices it waits for the result: two programs with collectives in flight at once can deadlock
    there, because they share one thread pool.
    """
    if not executor.jit:
        return fn
    jitted = jax.jit(fn, **options)
    if executor.mesh is None or jax.default_backend() != "cpu":
        return jitted

    @wraps(jitted)
    def run(*args: PyTree) -> PyTree:
        return jax.block_until_ready(jitted(*args))

    run.jitted, run._cache_size = jitted, jitted._cache_size  # type: ignore[attr-defined]
    return run


def program(step: Callable[..., PyTree], *args: PyTree) -> str:
    """The compiled text of a function that ``compiled`` made."""
    jitted: PyTree = getattr(step, "jitted", step)
    return jitted.lower(*args).compile().as_text()


def moved_bytes(
    executor: Executor, algorithm: Algorithm, state: State, population: Population, key: Array
) -> dict[str, int]:
    """Bytes that a round puts through each collective on every device; empty on one device.

    ``totals`` are summed (all-reduce), ``memory`` goes to the devices that run it (reduce-scatter) and back
    (all-gather); reports, a few numbers an item, are not counted.
    """
    if executor.mesh is None:
        return {}

    def outcome(state: State, population: Population, key: Array) -> tuple[PyTree, Array]:
        plan, items, _ = _planned(algorithm, executor, state, population, key)
        sent = algorithm.send(state.server, state.round)
        done = _execute(executor, algorithm, sent, _pool(population), items, device_store(), state.memory, plan.row)
        return done[0].total, plan.ids

    total, ids = jax.eval_shape(outcome, state, population, key)
    places = -(-ids.shape[0] // executor.devices) * executor.devices
    row = sum(tree.nbytes(leaf) // leaf.shape[0] for leaf in jax.tree.leaves(state.memory))
    rows = {"memory to clients": places * row, "memory back": places * row} if row else {}
    return {"totals": tree.nbytes(total), **rows}


def query(
    executor: Executor,
    fn: Callable[..., tuple[PyTree, PyTree]],
    sent: PyTree,
    population: Population,
    ids: Array,
    key: Array,
    levels: Array | None = None,
    count: int = 1,
    valid: Array | None = None,
    own: PyTree = (),
) -> Outcome:
    """Ask clients ``ids`` something through the executor: ``fn(key, sent, level, shard) -> (summed, stacked)``.

    Surveys, the statistics pass and evaluation are all this; the sums come back with a leading axis of one.

    Args:
      levels: [K] the level of each, of ``count``: the executor's buckets run them at their shapes, and nothing can be
        summed; without it the level is 0.
      valid: [K] who is asked at all; the others answer 0.
      own: leaves [K, ...], what each of them is told apart from the others, as a last argument of ``fn``.
    """

    def client(context: ClientContext) -> Reply:
        told = (context.ticket,) if jax.tree.leaves(own) else ()
        total, report = fn(context.key, context.sent, context.level, context.shard, *told)
        return Reply(total, 0, (), report)

    def absent(*_: PyTree) -> PyTree:
        raise NotImplementedError("a query has no server")

    count = 1 if levels is None else count
    asked = Algorithm(
        count, 1, absent, absent, absent, client, lambda total, level: total, absent, absent, absent
    )  # fmt: skip
    there = jnp.ones(ids.shape, bool) if valid is None else valid
    at = jnp.zeros_like(ids) if levels is None else levels
    items = Items(ids, _client_keys(key, ids), there, at, jnp.zeros_like(ids), own, shards(population, ids), ())
    return _execute(executor, asked, sent, _pool(population), items, device_store(), ())[0]


def _client_keys(key: Array, ids: Array) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def _pool(population: Population) -> Pool:
    return population.x, population.y, population.rows, population.views

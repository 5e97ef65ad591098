"""Rounds and queries, on one device or over a mesh; with ``runners``, all that knows of devices and client axes.

An executor is a value, chosen by configuration. Over a mesh three things cross devices, each in one collective: totals
(an all-reduce), reports (an all-gather), and, where clients keep memory, the cohort's rows of it (a reduce-scatter to
the devices that run them, an all-gather back to those that keep them).
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hetfl_jax import tree
from hetfl_jax.data.population import shards
from hetfl_jax.random import CLIENT, INIT, PLAN, SURVEY, purpose_key
from hetfl_jax.runners import Buckets, Pool, Runner, bucketed, chunked, debugging, vmapped
from hetfl_jax.store import Store, device_store
from hetfl_jax.types import Algorithm, Array, Between, Items, Outcome, Plan, Population, PyTree, Reply, Shard, State

Step = Callable[[State, Population, Array], tuple[State, PyTree]]

EXECUTORS = ("vmapped", "chunked", "bucketed", "debugging")
_AXIS = "clients"
_EVERYWHERE, _SPLIT = PartitionSpec(), PartitionSpec(_AXIS)


class Executor(NamedTuple):
    """How the items of a round are run."""

    run: Runner
    jit: bool = True
    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """Over how many devices the items are spread."""
        return 1 if self.mesh is None else self.mesh.size

    def place(self, values: PyTree) -> PyTree:
        """Put values where the first round expects them, so that it compiles like the others.

        Over a mesh everything is replicated, but for the client memory of a ``State``: its rows are split by client id,
        padded to a multiple of the devices. On one device nothing moves.
        """
        mesh = self.mesh
        if mesh is None:
            return values

        def put(values: PyTree, spec: PartitionSpec) -> PyTree:
            return jax.tree.map(lambda v: _put(v, NamedSharding(mesh, spec)), values)

        def split(rows: Array) -> Array:
            return jnp.pad(rows, [(0, -rows.shape[0] % mesh.size), *[(0, 0)] * (rows.ndim - 1)])

        def one(value: PyTree) -> PyTree:
            if not isinstance(value, State):
                return put(value, _EVERYWHERE)
            memory = put(jax.tree.map(split, value.memory), _SPLIT)
            return State(put(value.server, _EVERYWHERE), memory, put(value.round, _EVERYWHERE))

        return jax.tree.map(one, values, is_leaf=lambda v: isinstance(v, State))


def _put(value: Array, sharding: NamedSharding) -> Array:
    """``device_put``; with several processes from the host, since no device of one reaches those of another."""
    if jax.process_count() == 1 or not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, sharding)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(value), sharding), impl=jax.random.key_impl(value))
    return jax.device_put(np.asarray(value), sharding)


def executor(name: str, clients_per_chunk: int = 0, devices: int = 1, buckets: Buckets = ()) -> Executor:
    """The executor called ``name``.

    Args:
      name: ``vmapped`` (all items at once), ``chunked`` (a loop over chunks of vmapped items; memory does not grow with
        the cohort), ``bucketed`` (the same, each level at its true shape), or ``debugging`` (no jit, one at a time,
        stops at the first client whose reply is not finite).
      clients_per_chunk: items that run under one vmap; 0 chooses by backend (1 on CPU, 16 elsewhere).
      devices: spread items over this many devices.
      buckets: of ``bucketed``: which levels share a bucket, e.g. ``((0,), (1, 2))``; a shared bucket has the shape of
        its largest level and masks the others, which saves a program. Default: one a level.

    Raises:
      ValueError: an unknown name, or more devices than there are.
    """
    if name not in EXECUTORS:
        raise ValueError(f"executor {name!r} is not one of {', '.join(EXECUTORS)} (train.executor)")
    if clients_per_chunk < 0:
        raise ValueError(f"clients_per_chunk {clients_per_chunk}, allowed >= 0 (train.clients_per_chunk)")
    if not 1 <= devices <= jax.device_count():
        raise ValueError(f"{devices} devices, allowed 1..{jax.device_count()}, those of all hosts (train.devices)")
    if devices < jax.device_count() and jax.process_count() > 1:
        raise ValueError(f"{devices} devices, need all {jax.device_count()} of {jax.process_count()} processes, or 0")
    chunk = clients_per_chunk or (1 if jax.default_backend() == "cpu" else 16)
    if name == "debugging":
        return Executor(debugging(), jit=False)
    makers: dict[str, Callable[[], Runner]] = {
        "vmapped": vmapped,
        "chunked": partial(chunked, chunk),
        "bucketed": partial(bucketed, chunk, buckets),
    }
    inner = makers[name]()
    if devices == 1:
        return Executor(inner)
    return sharded(jax.make_mesh((devices,), (_AXIS,), axis_types=(AxisType.Auto,)), inner)


def sharded(mesh: Mesh, inner: Runner) -> Executor:
    """``inner`` on each device of the mesh axis ``clients``, on its equal share of items that ``deal`` put in order.

    Totals cross devices in one sum at the end, reports in one gather; memory rows stay with the device that ran them.
    """

    def run(algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items) -> Outcome:
        def on_device(sent: PyTree, pool: Pool, items: Items) -> Outcome:
            outcome = inner(algorithm, sent, pool, items)
            with jax.named_scope("collective"):
                total, whole = tree.packed(outcome.total)
                rows, stacked = tree.packed((outcome.report, outcome.ok), lead=1)
                report, ok = stacked([jax.lax.all_gather(v, _AXIS, tiled=True) for v in rows])
                return Outcome(whole([jax.lax.psum(v, _AXIS) for v in total]), outcome.memory, report, ok)

        specs = Outcome(_EVERYWHERE, _SPLIT, _EVERYWHERE, _EVERYWHERE)  # type: ignore[arg-type]
        # check_vma would sum gradients of the replicated model over devices; here the one psum is ours.
        return jax.shard_map(
            on_device, mesh=mesh, in_specs=(_EVERYWHERE, _EVERYWHERE, _SPLIT), out_specs=specs, check_vma=False
        )(sent, pool, items)

    return Executor(run, mesh=mesh)


def deal(level: Array, size: Array, valid: Array, devices: int) -> Array:
    """[K'] which item each place runs, place after place and device after device; K' is K padded to equal shares.

    Items are sorted by (level, size descending) and dealt to devices 0 .. D-1, then D-1 .. 0, and so on, so that no
    device waits for one that got all the wide clients. Numbers from K on are padding.

    >>> deal(jnp.array([0, 0, 0, 0, 1]), jnp.array([6, 9, 7, 8, 5]), jnp.ones(5, bool), 2).tolist()
    [1, 0, 4, 3, 2, 5]
    """
    missing = -valid.shape[0] % devices
    absent = jnp.pad(~valid, (0, missing), constant_values=True)
    order = jnp.lexsort((-jnp.pad(size, (0, missing)), jnp.pad(level, (0, missing)), absent))
    hands = order.reshape(-1, devices)
    return hands.at[1::2].set(hands[1::2, ::-1]).T.reshape(-1)


def _execute(
    executor: Executor, algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items, store: Store, memory: PyTree
) -> tuple[Outcome, PyTree, Array]:
    """Run items with the rows of ``memory``: (outcome in the order of the items, memory, device of each item)."""
    slots = items.valid.shape[0]
    mesh = executor.mesh
    if mesh is None:
        items = items._replace(memory=store.gather(memory, items.ids))
        outcome = executor.run(algorithm, sent, pool, items)
        kept = store.scatter(memory, items.ids, items.valid, outcome.memory)
        return outcome._replace(memory=()), kept, jnp.zeros(slots, jnp.int32)

    order = deal(items.level, items.shard.size, items.valid, mesh.size)
    dealt = tree.take(items, jnp.where(order < slots, order, 0))
    dealt = dealt._replace(valid=dealt.valid & (order < slots))
    with jax.named_scope("collective"):
        dealt = dealt._replace(memory=_fetch(mesh, store, memory, dealt.ids))
    outcome = executor.run(algorithm, sent, pool, dealt)
    with jax.named_scope("collective"):
        kept = _hand_back(mesh, store, memory, dealt, outcome.memory)
    place = jnp.argsort(order)[:slots]
    report, ok = tree.take((outcome.report, outcome.ok), place)
    return Outcome(outcome.total, (), report, ok), kept, place // (order.shape[0] // mesh.size)


def _block(store_rows: PyTree, ids: Array) -> tuple[Array, Array]:
    """Which ids live in this device's block of the memory, and their rows in it."""
    rows = jax.tree.leaves(store_rows)[0].shape[0]
    local = ids - jax.lax.axis_index(_AXIS) * rows
    mine = (local >= 0) & (local < rows)
    return mine, jnp.where(mine, local, 0)


def _fetch(mesh: Mesh, store: Store, memory: PyTree, ids: Array) -> PyTree:
    """Rows of ``ids`` from the devices that keep them to those that run them, in one reduce-scatter."""
    if not jax.tree.leaves(memory):
        return memory

    def on_device(block: PyTree, ids: Array) -> PyTree:
        mine, local = _block(block, ids)
        rows, back = tree.packed(store.gather(block, local), lead=1)
        return back([jax.lax.psum_scatter(jnp.where(mine[:, None], v, 0), _AXIS, tiled=True) for v in rows])

    specs = (_SPLIT, _EVERYWHERE)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=_SPLIT, check_vma=False)(memory, ids)


def _hand_back(mesh: Mesh, store: Store, memory: PyTree, items: Items, rows: PyTree) -> PyTree:
    """Rows from the devices that ran them to those that keep them, in one all-gather."""
    if not jax.tree.leaves(memory):
        return memory

    def on_device(block: PyTree, ids: Array, valid: Array, rows: PyTree) -> PyTree:
        own, back = tree.packed(rows, lead=1)
        everyone = back([jax.lax.all_gather(v, _AXIS, tiled=True) for v in own])
        mine, local = _block(block, ids)
        return store.scatter(block, local, valid & mine, everyone)

    specs = (_SPLIT, _EVERYWHERE, _EVERYWHERE, _SPLIT)
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=_SPLIT, check_vma=False)
    return mapped(memory, items.ids, items.valid, rows)


def start(algorithm: Algorithm, store: Store, clients: int, key: Array) -> State:
    """The state before the first round."""

    @jax.jit  # op by op, drawing a net's start values takes seconds
    def init(key: Array) -> State:
        server, one = algorithm.init(purpose_key(key, INIT))
        return State(server, store.init(one, clients), jnp.int32(0))

    return init(key)


def make_round(algorithm: Algorithm, executor: Executor, store: Store) -> Step:
    """``step(state, population, key) -> (state, info)``: one round, compiled once; the state's buffers are reused.

    ``key`` is the run's constant key. Place state, population and key with ``executor.place`` first. ``info`` is the
    algorithm's, and ``device`` [K], which device ran each item.
    """

    def step(algorithm: Algorithm, state: State, population: Population, key: Array) -> tuple[State, PyTree]:
        plan, items = _planned(algorithm, executor, state, population, key)
        outcome, memory, device = _execute(
            executor, algorithm, plan.sent, _pool(population), items, store, state.memory
        )
        with jax.named_scope("server"):
            server, info = algorithm.server(state.server, plan, outcome.total, outcome.report, outcome.ok)
        return State(server, memory, state.round + 1), (info, device)

    def usual(state: State, population: Population, key: Array) -> tuple[State, PyTree]:
        state, (info, device) = step(algorithm, state, population, key)
        return state, {**info, "device": device}

    if algorithm.between is None:
        return compiled(usual, executor, donate_argnums=0)
    return _with_host_work(algorithm.between, executor, compiled(usual, executor), step)


def _with_host_work(between: Between, executor: Executor, usual: Step, step: Callable[..., Any]) -> Step:
    """Rounds after which the host may want to decide; their buffers are kept, since a round may be run again."""
    again = compiled(partial(step, between.collecting), executor)

    def run(state: State, population: Population, key: Array) -> tuple[State, PyTree]:
        after, info = usual(state, population, key)
        if not between.needed(info):
            return after, info

        def ask(fn: Callable[..., PyTree], sent: PyTree, ids: Array) -> PyTree:
            return survey(executor, fn, sent, population, ids, purpose_key(key, SURVEY, state.round))

        after, (collected, device) = again(state, population, key)
        server, info = between.decide(state.server, collected, ask)
        return after._replace(server=executor.place(server)), {**info, "device": device}

    if executor.jit:
        run.jitted, run._cache_size = getattr(usual, "jitted", usual), usual._cache_size  # type: ignore[attr-defined]
    return run


def survey(
    executor: Executor, fn: Callable[..., PyTree], sent: PyTree, population: Population, ids: Array, key: Array
) -> PyTree:
    """What clients ``ids`` answer: ``fn(key, sent, shard)`` stacked."""
    return query(executor, lambda *args: ((), fn(*args)), sent, population, ids, key).report


def _planned(
    algorithm: Algorithm, executor: Executor, state: State, population: Population, key: Array
) -> tuple[Plan, Items]:
    """A round's plan, and its items without their memory."""

    def ask(fn: Callable[..., PyTree], sent: PyTree, ids: Array) -> PyTree:
        return survey(executor, fn, sent, population, ids, purpose_key(key, SURVEY, state.round))

    with jax.named_scope("plan"):
        plan = algorithm.plan(purpose_key(key, PLAN, state.round), state.round, state.server, population, ask)
    keys = _client_keys(purpose_key(key, CLIENT, state.round), plan.ids)
    if jax.tree.leaves(plan.ticket):
        number = jax.tree.leaves(plan.ticket)[0].astype(jnp.uint32)
        keys = jnp.where(number == 0, keys, jax.vmap(jax.random.fold_in)(keys, number))
    return plan, Items(plan.ids, keys, plan.valid, plan.level, plan.ticket, shards(population, plan.ids), ())


def compiled(fn: Callable[..., Any], executor: Executor, **options: Any) -> Callable[..., Any]:
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
    def run(*args: Any) -> Any:
        return jax.block_until_ready(jitted(*args))

    run.jitted, run._cache_size = jitted, jitted._cache_size  # type: ignore[attr-defined]
    return run


def program(step: Callable[..., Any], *args: Any) -> str:
    """The compiled text of a function that ``compiled`` made."""
    jitted: Any = getattr(step, "jitted", step)
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
        plan, items = _planned(algorithm, executor, state, population, key)
        done = _execute(executor, algorithm, plan.sent, _pool(population), items, device_store(), state.memory)
        return done[0].total, plan.ids

    total, ids = jax.eval_shape(outcome, state, population, key)
    places = -(-ids.shape[0] // executor.devices) * executor.devices
    row = sum(tree.nbytes(leaf) // leaf.shape[0] for leaf in jax.tree.leaves(state.memory))
    rows = {"memory to clients": places * row, "memory back": places * row} if row else {}
    return {"totals": tree.nbytes(total), **rows}


def query(
    executor: Executor,
    fn: Callable[[Array, PyTree, Shard], tuple[PyTree, PyTree]],
    sent: PyTree,
    population: Population,
    ids: Array,
    key: Array,
) -> Outcome:
    """Ask clients ``ids`` something through the executor: ``fn(key, sent, shard) -> (summed, stacked)``.

    Surveys, the statistics pass and evaluation are all this; the sums come back with a leading axis of one.
    """

    def client(key: Array, sent: PyTree, level: Any, ticket: PyTree, shard: Shard, memory: PyTree) -> Reply:
        total, report = fn(key, sent, shard)
        return Reply(total, 0, (), report)

    def absent(*_: Any) -> Any:
        raise NotImplementedError("a query has no server")

    asked = Algorithm(1, 1, absent, absent, client, lambda total, level: total, absent, absent, absent)
    some = jnp.ones(ids.shape, bool)
    items = Items(ids, _client_keys(key, ids), some, jnp.zeros_like(ids), (), shards(population, ids), ())
    return _execute(executor, asked, sent, _pool(population), items, device_store(), ())[0]


def _client_keys(key: Array, ids: Array) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def _pool(population: Population) -> Pool:
    return population.x, population.y, population.index, population.views

"""What clients do, on one device or over a mesh: items of a round, and questions to clients.

With ``runners``, all that knows of devices and client axes. Over a mesh three things cross devices, each in one
collective: totals (an all-reduce), reports (an all-gather), and, where clients keep memory, the cohort's rows of it (a
reduce-scatter to the devices that run them, an all-gather back to those that keep them).
"""

from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hetfl_jax.core import tree
from hetfl_jax.core.platform import made_for
from hetfl_jax.core.shards import shards
from hetfl_jax.core.types import Algorithm, Array, ClientContext, Items, Outcome, Population, PyTree, Reply
from hetfl_jax.engine.executors import AXIS, EVERYWHERE, SPLIT, Executor, deal
from hetfl_jax.engine.runners import Pool
from hetfl_jax.engine.stores import Store, device_store


def compiled(fn: Callable[..., PyTree], executor: Executor, **options: PyTree) -> Callable[..., PyTree]:
    """``jax.jit(fn)`` for this executor; ``fn`` itself where the executor does not compile.

    Over several CPU devices it waits for the result: two programs with collectives in flight at once can deadlock
    there, because they share one thread pool.

    Args:
      fn: is traced for the platform of the executor, whatever this machine has (``core.platform.current``).
      executor: with its platform, its mesh and ``jit``.
      options: of ``jax.jit``, e.g. ``donate_argnums``.

    >>> from hetfl_jax.engine.executors import executor
    >>> int(compiled(lambda x: x + 1, executor("bucketed"))(jnp.int32(2)))
    3
    """
    fn = made_for(executor.kind(), fn)
    if not executor.jit:
        return fn
    jitted = jax.jit(fn, **options)
    if executor.mesh is None or executor.kind().name != "cpu":
        return jitted

    @wraps(jitted)
    def run(*args: PyTree) -> PyTree:
        return jax.block_until_ready(jitted(*args))

    run.jitted, run._cache_size = jitted, jitted._cache_size  # type: ignore[attr-defined]
    return run


def execute(
    executor: Executor, algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items, store: Store, memory: PyTree,
    rows: Array | None = None,
) -> tuple[Outcome, PyTree, Array]:  # fmt: skip
    """Run the items of a round, each with its row of client memory.

    Over a mesh items are dealt to the devices first (``executors.deal``); replies come back in the order of ``items``.

    Args:
      sent: what the server sends, the same for all items.
      pool: what all clients read their examples from, see ``pool_of``.
      items: leaves [K, ...]; their field ``memory`` is filled in here.
      store: reads and writes rows of ``memory``, which has the form that ``store.init`` gave it.
      rows: [K] int32, which row of ``memory`` is an item's own; by default its client's id.

    Returns:
      The outcome with an empty ``memory``; the memory with the rows of valid items replaced; [K] int32, the device that
      ran each item.

    >>> from hetfl_jax.data.population import population
    >>> from hetfl_jax.engine.executors import executor
    >>> toy, ids = population(jnp.zeros((4, 2)), jnp.zeros(4, int), jnp.arange(4), jnp.array([3, 1])), jnp.array([1])
    >>> items = Items(ids, client_keys(jax.random.key(0), ids), ids > 0, 0 * ids, 0 * ids, (), shards(toy, ids), ())
    >>> counts = lambda context: Reply(context.shard.size, 0, context.memory + 7, ())
    >>> method = Algorithm(1, 1, *[None] * 8)._replace(client=counts, widen=lambda total, level: total)
    >>> args = pool_of(toy), items, device_store(), device_store().init(jnp.int32(0), 2)
    >>> outcome, memory, _ = jax.jit(lambda: execute(executor("bucketed"), method, (), *args))()
    >>> outcome.total.tolist(), memory.tolist()  # the sum of one model; a row for each of two clients
    ([1], [0, 7])
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
    return Outcome(outcome.total, (), report, ok, outcome.ran), kept, place // (order.shape[0] // mesh.size)


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


def survey(
    executor: Executor, fn: Callable[..., PyTree], sent: PyTree, population: Population, ids: Array, key: Array,
    levels: Array | None = None, count: int = 1, valid: Array | None = None,
) -> PyTree:  # fmt: skip
    """What clients answer to a question: ``fn(key, sent, level, shard)`` of each, stacked to leaves [K, ...].

    Args:
      sent: what each of them gets, e.g. parameters.
      ids: [K] int32, who is asked.
      key: of the purpose and the round; each client's own is folded out of it.
      levels, count, valid: see ``query``.

    >>> from hetfl_jax.data.population import population
    >>> from hetfl_jax.engine.executors import executor
    >>> toy = population(jnp.zeros((4, 2)), jnp.array([0, 1, 1, 0]), jnp.arange(4), jnp.array([3, 1]))
    >>> ask = lambda key, sent, level, shard: sent * shard.size
    >>> survey(executor("debugging"), ask, jnp.int32(10), toy, jnp.array([1, 0, 1]), jax.random.key(0)).tolist()
    [10, 30, 10]
    """
    return query(executor, lambda *args: ((), fn(*args)), sent, population, ids, key, levels, count, valid).report


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
      executor: how they are run.
      fn: what each of them computes; leaves of any shape, the same for all.
      sent: what each of them gets.
      population: the clients.
      ids: [K] int32, who is asked.
      key: of the purpose and the round; each client's own is folded out of it.
      levels: [K] the level of each, of ``count``: the executor's buckets run them at their shapes, and nothing can be
        summed; without it the level is 0.
      valid: [K] who is asked at all; the others answer 0.
      own: leaves [K, ...], what each of them is told apart from the others, as a last argument of ``fn``.

    >>> from hetfl_jax.data.population import population
    >>> from hetfl_jax.engine.executors import executor
    >>> toy = population(jnp.zeros((4, 2)), jnp.array([0, 1, 1, 0]), jnp.arange(4), jnp.array([3, 1]))
    >>> ask = lambda key, sent, level, shard: (shard.size, sent * shard.size)
    >>> found = query(executor("debugging"), ask, jnp.int32(10), toy, jnp.array([1, 0]), jax.random.key(0))
    >>> found.total.tolist(), found.report.tolist()
    ([4], [10, 30])
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
    items = Items(ids, client_keys(key, ids), there, at, jnp.zeros_like(ids), own, shards(population, ids), ())
    return execute(executor, asked, sent, pool_of(population), items, device_store(), ())[0]


def client_keys(key: Array, ids: Array) -> Array:
    """[K] the key of each client, ``fold_in(key, id)``; ``key`` is that of a purpose and a round.

    A client's key does not depend on who else takes part, nor on its place in the cohort.

    >>> keys = client_keys(jax.random.key(0), jnp.array([7, 3]))
    >>> bool(keys[1] == jax.random.fold_in(jax.random.key(0), 3))
    True
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def pool_of(population: Population) -> Pool:
    """What all clients read their examples from: x, y, rows and views; it goes to devices apart from the items.

    >>> from hetfl_jax.data.population import population
    >>> toy = population(jnp.zeros((4, 2)), jnp.array([0, 1, 1, 0]), jnp.array([3, 1, 2]), jnp.array([2, 1]))
    >>> x, y, rows, views = pool_of(toy)
    >>> x.shape, y.tolist(), rows.tolist(), views
    ((4, 2), [0, 1, 1, 0], [3, 1, 2], ())
    """
    return population.x, population.y, population.rows, population.views

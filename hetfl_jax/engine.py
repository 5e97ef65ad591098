"""Running a round: the only library file, apart from the run itself, that knows of devices and client axes.

An executor is a value, chosen by configuration: ``run(algorithm, sent, pool, items) -> Outcome``. Where and how clients
run cannot change the answer, because everything they send passes through a sum or is a small stacked report.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hetfl_jax import tree
from hetfl_jax.data.population import shards
from hetfl_jax.random import CLIENT, INIT, PLAN, SURVEY, purpose_key
from hetfl_jax.store import Store
from hetfl_jax.types import Algorithm, Array, Items, Level, Outcome, Population, PyTree, Reply, Shard, State, Within

Buckets = Sequence[Sequence[int]]
Pool = tuple[Array, Array, Array]  #: x, y, index: shared by all items, never mapped
Step = Callable[[State, Population, Array], tuple[State, PyTree]]

EXECUTORS = ("vmapped", "chunked", "bucketed", "debugging")
_AXIS = "clients"


class Executor(NamedTuple):
    """How the items of a round are run."""

    run: Callable[[Algorithm, PyTree, Pool, Items], Outcome]
    jit: bool = True
    mesh: Mesh | None = None

    def place(self, values: PyTree) -> PyTree:
        """Replicate a tree over the mesh (a no-op on one device), so that the first round compiles like the others."""
        return values if self.mesh is None else jax.device_put(values, NamedSharding(self.mesh, PartitionSpec()))


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
        raise ValueError(f"{devices} devices, allowed 1..{jax.device_count()} on this host (train.devices)")
    chunk = clients_per_chunk or (1 if jax.default_backend() == "cpu" else 16)
    if name == "debugging":
        return debugging()
    makers: dict[str, Callable[[], Executor]] = {
        "vmapped": vmapped,
        "chunked": partial(chunked, chunk),
        "bucketed": partial(bucketed, chunk, buckets),
    }
    inner = makers[name]()
    if devices == 1:
        return inner
    return sharded(jax.make_mesh((devices,), (_AXIS,), axis_types=(AxisType.Auto,)), inner)


# ---------------------------------------------------------------------------------------------- one item


def _run_item(algorithm: Algorithm, sent: PyTree, pool: Pool, item: Items, level: Level) -> tuple[PyTree, ...]:
    """Run one client; a reply that is not finite, or an item that is not valid, adds nothing and keeps its memory."""
    shard = Shard(*pool, *item.shard[3:])
    reply = algorithm.client(item.key, sent, level, item.ticket, shard, item.memory)
    ok = item.valid & tree.finite((reply.total, reply.memory, reply.report))
    total = tree.select(ok, reply.total, jax.tree.map(jnp.zeros_like, reply.total))
    return total, reply.member, (tree.select(ok, reply.memory, item.memory), reply.report, ok)


def _client_at(algorithm: Algorithm, levels: Sequence[int]) -> Callable[..., tuple[PyTree, ...]]:
    """``_run_item`` dense at the one level of a bucket, or masked inside the largest of several."""

    def run(sent: PyTree, pool: Pool, item: Items) -> tuple[PyTree, ...]:
        level = levels[0] if len(levels) == 1 else Within(min(levels), item.level)
        return _run_item(algorithm, sent, pool, item, level)

    return run


def _add(total: PyTree, member: Any, accumulated: PyTree) -> PyTree:
    """Add one reply, or a chunk of them along a leading axis of ``member``, to ``[members, ...]`` accumulators."""
    members = jax.tree.leaves(accumulated)[0].shape[0] if jax.tree.leaves(accumulated) else 1
    if members > 1:
        return jax.tree.map(lambda a, t: a.at[member].add(t), accumulated, total)
    summed = tree.axis_sum(total) if jnp.ndim(member) else total
    return jax.tree.map(lambda a, t: a + t[None], accumulated, summed)


def _widen(algorithm: Algorithm, total: PyTree, level: int) -> PyTree:
    return jax.vmap(lambda t: algorithm.widen(t, level), axis_size=algorithm.members)(total)


# ---------------------------------------------------------------------------------------------- executors


def vmapped() -> Executor:
    """One vmap over all items, at full shape with traced levels."""

    def run(algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items) -> Outcome:
        run_item = _client_at(algorithm, range(algorithm.levels))
        total, member, rows = jax.vmap(run_item, (None, None, 0))(sent, pool, items)
        member = jnp.broadcast_to(member, items.valid.shape)
        zero = jax.tree.map(lambda t: jnp.zeros((algorithm.members, *t.shape[1:]), t.dtype), total)
        return Outcome(_add(total, member, zero), *rows)

    return Executor(run)


def chunked(clients_per_chunk: int) -> Executor:
    """A loop over chunks of vmapped items, at full shape with traced levels."""

    def run(algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items) -> Outcome:
        return _loops(algorithm, sent, pool, items, clients_per_chunk, (tuple(range(algorithm.levels)),))

    return Executor(run)


def bucketed(clients_per_chunk: int, buckets: Buckets = ()) -> Executor:
    """Items grouped into buckets of levels, each at the true shape of its largest level; its sum is widened once."""

    def run(algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items) -> Outcome:
        each = tuple((level,) for level in range(algorithm.levels))
        # A query has one level, whatever the buckets of the training.
        return _loops(algorithm, sent, pool, items, clients_per_chunk, buckets if len(each) > 1 and buckets else each)

    return Executor(run)


def _order(items: Items, levels: Array) -> Array:
    """Items sorted by level, then by size descending (chunks of like step counts); those not valid come last."""
    return jnp.lexsort((-items.shard.size, levels))


def _loops(algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items, chunk: int, buckets: Buckets) -> Outcome:
    """One loop over chunks for each bucket, with a traced trip count: no padding, and no new program ever."""
    if sorted(level for levels in buckets for level in levels) != list(range(algorithm.levels)):
        raise ValueError(f"buckets {buckets}: need each of the levels 0..{algorithm.levels - 1} once (train.buckets)")
    bucket_of = np.zeros(algorithm.levels, np.int32)
    for number, levels in enumerate(buckets):
        bucket_of[list(levels)] = number
    bucket = jnp.where(items.valid, jnp.asarray(bucket_of)[items.level], len(buckets))
    order = _order(items, bucket)
    counts = jnp.zeros(len(buckets) + 1, jnp.int32).at[bucket].add(1)
    starts = jnp.cumsum(counts) - counts

    # One inner jit a bucket: its trace is made once and serves both the shapes and the loop.
    runs = [jax.jit(_client_at(algorithm, levels)) for levels in buckets]
    shapes = [jax.eval_shape(run, sent, pool, tree.take(items, 0)) for run in runs]
    slots = items.valid.shape[0]
    report = jax.tree.map(lambda s: jnp.zeros((slots, *s.shape), s.dtype), shapes[0][2][1])
    rows = (items.memory, report, jnp.zeros(slots, bool))
    total: PyTree = None
    for number, levels in enumerate(buckets):
        empty = jax.tree.map(lambda s: jnp.zeros((algorithm.members, *s.shape), s.dtype), shapes[number][0])
        one = partial(_chunk, runs[number], sent, pool, items, order, starts[number], counts[number], chunk)
        part, rows = jax.lax.fori_loop(0, -(-counts[number] // chunk), one, (empty, rows))
        part = _widen(algorithm, part, min(levels))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return Outcome(total, *rows)


def _chunk(
    run: Any, sent: PyTree, pool: Pool, items: Items, order: Array, start: Array, count: Array, chunk: int,
    i: Array, carry: tuple[PyTree, PyTree],
) -> tuple[PyTree, PyTree]:  # fmt: skip
    """Run chunk ``i`` of a bucket and add it to (accumulated total, rows by item)."""
    accumulated, rows = carry
    slots = order.shape[0]
    if chunk == 1:
        slot: Array = order[start + i]
        reply, member, row = run(sent, pool, tree.take(items, slot))
    else:
        place = i * chunk + jnp.arange(chunk)
        inside = place < count
        slot = order[jnp.minimum(start + place, slots - 1)]
        item = tree.take(items, slot)
        item = item._replace(valid=item.valid & inside)
        reply, member, row = jax.vmap(run, (None, None, 0))(sent, pool, item)
        member = jnp.broadcast_to(member, slot.shape)
        slot = jnp.where(inside, slot, slots)  # what lies past the bucket's end is written nowhere
    rows = jax.tree.map(lambda whole, new: whole.at[slot].set(new, mode="drop"), rows, row)
    return _add(reply, member, accumulated), rows


def sharded(mesh: Mesh, inner: Executor) -> Executor:
    """Items dealt over the mesh axis ``clients``, ``inner`` on each device, one sum over devices at the end.

    Items are sorted by (level, size) and device d of D takes ``order[d::D]``, so no device waits for one that got all
    the wide clients. Cohorts that do not divide are padded with items that are not valid.
    """

    def run(algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items) -> Outcome:
        slots = items.valid.shape[0]
        missing = -slots % mesh.size
        padded = jax.tree.map(lambda v: jnp.concatenate([v, jnp.repeat(v[:1], missing, 0)]), items)
        padded = padded._replace(valid=padded.valid & (jnp.arange(slots + missing) < slots))
        level = jnp.where(padded.valid, padded.level, algorithm.levels)
        deal = _order(padded, level).reshape(-1, mesh.size).T.reshape(-1)

        def on_device(sent: PyTree, pool: Pool, items: Items) -> Outcome:
            outcome = inner.run(algorithm, sent, pool, items)
            return outcome._replace(total=jax.lax.psum(outcome.total, _AXIS))

        everywhere, split = PartitionSpec(), PartitionSpec(_AXIS)
        # check_vma would sum gradients of the replicated model over devices; here the one psum is ours.
        mapped = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(everywhere, everywhere, split),
            out_specs=Outcome(everywhere, split, split, split),  # type: ignore[arg-type]
            check_vma=False,
        )
        outcome = mapped(sent, pool, tree.take(padded, deal))
        back = jnp.argsort(deal)[:slots]
        return Outcome(outcome.total, *tree.take(tuple(outcome[1:]), back))

    return Executor(run, mesh=mesh)


def debugging() -> Executor:
    """No jit, one item at a time, dense; raises at the first client whose reply is not finite.

    Raises:
      FloatingPointError: naming the client, its level and the leaf.
    """

    def run(algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items) -> Outcome:
        total: PyTree = None
        rows = []
        for slot in range(items.valid.shape[0]):
            item = tree.take(items, slot)
            level = int(item.level)
            reply, member, row = _run_item(algorithm, sent, pool, item, level)
            if item.valid and not row[2]:
                raise FloatingPointError(
                    f"client {int(item.ids)} at level {level} replied with values that are not finite"
                )
            empty = jax.tree.map(lambda t: jnp.zeros((algorithm.members, *jnp.shape(t)), t.dtype), reply)
            wide = _widen(algorithm, _add(reply, member, empty), level)
            total = wide if total is None else jax.tree.map(jnp.add, total, wide)
            rows.append(row)
        return Outcome(total, *jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))

    return Executor(run, jit=False)


# ---------------------------------------------------------------------------------------------- rounds and queries


def start(algorithm: Algorithm, store: Store, clients: int, key: Array) -> State:
    """The state before the first round."""

    @jax.jit  # op by op, drawing a net's start values takes seconds
    def init(key: Array) -> State:
        server, one = algorithm.init(purpose_key(key, INIT))
        return State(server, store.init(one, clients), jnp.int32(0))

    return init(key)


def make_round(algorithm: Algorithm, executor: Executor, store: Store) -> Step:
    """``step(state, population, key) -> (state, info)``: one round, compiled once; the state's buffers are reused.

    ``key`` is the run's constant key. Place state, population and key with ``executor.place`` first.
    """

    def step(state: State, population: Population, key: Array) -> tuple[State, PyTree]:
        def survey(fn: Callable[..., PyTree], sent: PyTree, ids: Array) -> PyTree:
            asking = purpose_key(key, SURVEY, state.round)
            return query(executor, lambda *args: ((), fn(*args)), sent, population, ids, asking).report

        plan = algorithm.plan(purpose_key(key, PLAN, state.round), state.round, state.server, population, survey)
        keys = _client_keys(purpose_key(key, CLIENT, state.round), plan.ids)
        if jax.tree.leaves(plan.ticket):
            keys = jax.vmap(jax.random.fold_in)(keys, jax.tree.leaves(plan.ticket)[0].astype(jnp.uint32))
        items = Items(
            plan.ids,
            keys,
            plan.valid,
            plan.level,
            plan.ticket,
            shards(population, plan.ids),
            store.gather(state.memory, plan.ids),
        )
        outcome = executor.run(algorithm, plan.sent, _pool(population), items)
        server, info = algorithm.server(state.server, plan, outcome.total, outcome.report, outcome.ok)
        memory = store.scatter(state.memory, plan.ids, plan.valid, outcome.memory)
        return State(server, memory, state.round + 1), info

    return compiled(step, executor, donate_argnums=0)


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

    run._cache_size = jitted._cache_size  # type: ignore[attr-defined]
    return run


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
    return executor.run(asked, sent, _pool(population), items)


def _client_keys(key: Array, ids: Array) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def _pool(population: Population) -> Pool:
    return population.x, population.y, population.index

"""Running the items of a round on one device: one at a time, in chunks, level by level, or by hand.

A runner is ``run(algorithm, sent, pool, items) -> Outcome``. How clients run cannot change the answer, because
everything they send passes through a sum or is a small stacked report. Spreading items over devices is ``engine``'s.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import machine, platform, tree
from hetfl_jax.core.jaxprs import computed_bytes
from hetfl_jax.core.types import Algorithm, Array, ClientContext, Items, Level, Outcome, PyTree, Within
from hetfl_jax.engine.chunks import clients_at_once, that_fit

_COLUMNS = 1 << 14  # 64 KB of each member's sums

Buckets = Sequence[Sequence[int]]
Pool = tuple[Array, Array, Array, PyTree]  #: x, y, rows, views: shared by all items, never mapped
Runner = Callable[[Algorithm, PyTree, Pool, Items], Outcome]


def _run_item(algorithm: Algorithm, sent: PyTree, pool: Pool, item: Items, level: Level) -> tuple[PyTree, ...]:
    """Run one client; a reply that is not finite, or an item that is not valid, adds nothing and keeps its memory."""
    x, y, rows, views = pool
    shard = item.shard._replace(x=x, y=y, rows=rows, views=views)
    with jax.named_scope("local_training"):
        context = ClientContext(
            item.key, item.round, level, shard, item.ticket, sent, item.memory, share=item.share, known=item.known
        )
        reply = algorithm.client(context)
    ok = item.valid & tree.finite((reply.total, reply.memory, reply.report))
    total = tree.select(ok, reply.total, jax.tree.map(jnp.zeros_like, reply.total))
    return total, reply.member, (tree.select(ok, reply.memory, item.memory), reply.report, ok)


def _client_at(algorithm: Algorithm, levels: Sequence[int]) -> Callable[..., tuple[PyTree, ...]]:
    """``_run_item`` dense at the one level of a bucket, or masked inside the largest of several."""

    def run(sent: PyTree, pool: Pool, item: Items) -> tuple[PyTree, ...]:
        level = levels[0] if len(levels) == 1 else Within(min(levels), item.level)
        return _run_item(algorithm, sent, pool, item, level)

    return run


@jax.named_scope("merge")
def add_reply(total: PyTree, member: PyTree, accumulated: PyTree) -> PyTree:
    """Add one reply, or a chunk of them along a leading axis of ``member``, to ``[members, ...]`` accumulators.

    Args:
      total: what is added, leaves [...] of one reply or [c, ...] of a chunk.
      member: int32 scalar or [c], the row that each reply goes to; 0 in methods with one model.
      accumulated: leaves [members, ...].

    >>> chunk = {"w": jnp.array([[1.0], [2.0], [4.0]])}
    >>> add_reply(chunk, jnp.array([0, 1, 0]), {"w": jnp.zeros((2, 1))})["w"].tolist()
    [[5.0], [2.0]]
    """
    members = jax.tree.leaves(accumulated)[0].shape[0] if jax.tree.leaves(accumulated) else 1
    if members > 1 and jnp.ndim(member) and platform.current().name == "cpu":
        return jax.tree.map(lambda a, t: _by_columns(t, member, a), accumulated, total)
    if members > 1 and jnp.ndim(member):
        # A product reads the chunk once, and in one order; a scatter on an accelerator adds in any order.
        def into_rows(a: Array, t: Array) -> Array:
            one_hot = jax.nn.one_hot(member, members, dtype=t.dtype)
            return a + jnp.matmul(one_hot.T, t.reshape(len(t), -1), precision="highest").reshape(a.shape)

        return jax.tree.map(into_rows, accumulated, total)
    if members > 1:
        # One row is read and written in place; a scatter would go through all of them.
        rows = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, member), accumulated)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=member, axis=0)
        return jax.tree.map(lambda a, row, t: put(a, row + t[None]), accumulated, rows, total)
    summed = tree.axis_sum(total) if jnp.ndim(member) else total
    return jax.tree.map(lambda a, t: a + t[None], accumulated, summed)


def _by_columns(replies: Array, member: Array, sums: Array) -> Array:
    """``add_reply`` of a chunk, a block of columns after the other: all members' sums of a block stay in cache."""
    shape, sums, replies = sums.shape, sums.reshape(len(sums), -1), replies.reshape(len(member), -1)
    columns = sums.shape[1]

    def add(sums: Array, start: PyTree, width: int) -> Array:
        def one(i: Array, block: Array) -> Array:
            reply = jax.lax.dynamic_slice(replies, (i, start), (1, width))
            row = jax.lax.dynamic_index_in_dim(block, member[i])
            return jax.lax.dynamic_update_index_in_dim(block, row + reply, member[i], 0)

        block = jax.lax.dynamic_slice(sums, (0, start), (len(sums), width))
        block = jax.lax.fori_loop(0, len(member), one, block)
        return jax.lax.dynamic_update_slice(sums, block, (0, start))

    blocks, rest = divmod(columns, _COLUMNS)
    if blocks:
        sums = jax.lax.fori_loop(0, blocks, lambda j, sums: add(sums, j * _COLUMNS, _COLUMNS), sums)
    return (add(sums, columns - rest, rest) if rest else sums).reshape(shape)


@jax.named_scope("merge")
def _widen(algorithm: Algorithm, total: PyTree, level: int) -> PyTree:
    """Sums [members, ...] of a level's shape at full shape, zero outside the level's window."""
    return jax.vmap(lambda t: algorithm.widen(t, level), axis_size=algorithm.members)(total)


def vmapped() -> Runner:
    """One vmap over all items, at full shape with traced levels: memory grows with the cohort.

    >>> from hetfl_jax.data.population import population
    >>> from hetfl_jax.engine.execute import survey
    >>> from hetfl_jax.engine.executors import Executor
    >>> toy = population(jnp.zeros((4, 2)), jnp.zeros(4, int), jnp.arange(4), jnp.array([3, 1]))
    >>> ask, run = lambda key, sent, level, shard: shard.size, Executor(vmapped())
    >>> survey(run, ask, (), toy, jnp.array([1, 0]), jax.random.key(0)).tolist()
    [1, 3]
    """

    def run(algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items) -> Outcome:
        run_item = _client_at(algorithm, range(algorithm.levels))
        total, member, rows = jax.vmap(run_item, (None, None, 0))(sent, pool, items)
        member = jnp.broadcast_to(member, items.valid.shape)
        zero = jax.tree.map(lambda t: jnp.zeros((algorithm.members, *t.shape[1:]), t.dtype), total)
        everyone = np.full(algorithm.levels, items.valid.shape[0], np.int32)
        memory, report, ok = rows
        ran = jnp.asarray(np.stack([0 * everyone, everyone]))
        return Outcome(add_reply(total, member, zero), memory, report, ok, ran)

    return run


def chunked(clients_per_chunk: int) -> Runner:
    """A loop over chunks of vmapped items, at full shape with traced levels.

    Args:
      clients_per_chunk: items under one vmap; 0 takes what fits, see ``chunks.clients_at_once``.

    >>> from hetfl_jax.data.population import population
    >>> from hetfl_jax.engine.execute import survey
    >>> from hetfl_jax.engine.executors import Executor
    >>> toy = population(jnp.zeros((4, 2)), jnp.zeros(4, int), jnp.arange(4), jnp.array([3, 1]))
    >>> ask, run = lambda key, sent, level, shard: shard.size, Executor(chunked(1))
    >>> survey(run, ask, (), toy, jnp.array([1, 0]), jax.random.key(0)).tolist()
    [1, 3]
    """

    def run(algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items) -> Outcome:
        return _loops(algorithm, sent, pool, items, clients_per_chunk, (tuple(range(algorithm.levels)),))

    return run


def bucketed(clients_per_chunk: int, buckets: Buckets = (), wanted: Sequence[int] = ()) -> Runner:
    """Items grouped into buckets of levels, each at the true shape of its largest level; its sum is widened once.

    Args:
      clients_per_chunk: items under one vmap in every bucket; 0 takes ``wanted``, or what fits.
      buckets: levels that share a bucket, e.g. ``((0,), (1, 2))``, each level once; by default one a level.
      wanted: for each bucket, how many of its clients should run at once where ``clients_per_chunk`` is 0.

    Raises:
      ValueError: by the runner, a level that is in no bucket, or in two.

    >>> from hetfl_jax.data.population import population
    >>> from hetfl_jax.engine.execute import survey
    >>> from hetfl_jax.engine.executors import Executor
    >>> toy = population(jnp.zeros((4, 2)), jnp.zeros(4, int), jnp.arange(4), jnp.array([3, 1]), level=[1, 0], levels=2)
    >>> ask, ids = lambda key, sent, level, shard: jnp.int32(10 * level + shard.size), jnp.array([1, 0])
    >>> survey(Executor(bucketed(1)), ask, (), toy, ids, jax.random.key(0), toy.level[ids], 2).tolist()
    [1, 13]
    """

    def run(algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items) -> Outcome:
        each = tuple((level,) for level in range(algorithm.levels))
        # A query has one level, whatever the buckets of the training.
        own = len(each) > 1 and buckets
        return _loops(algorithm, sent, pool, items, clients_per_chunk, buckets if own else each, wanted if own else ())

    return run


def _order(items: Items, levels: Array) -> Array:
    """[K] items sorted by level, then by size descending, so that a chunk's items take about as many steps.

    ``levels`` [K] are the buckets; items that are not valid have the largest number and come last.
    """
    return jnp.lexsort((-items.shard.size, levels))


def executed_steps(steps: np.ndarray, chunk: int) -> int:
    """Local steps that one bucket's loop runs for items with these step counts; ``steps.sum()`` are needed.

    A chunk runs as long as its longest item, and items come sorted.

    Args:
      steps: [items] int, steps of each item.
      chunk: items at once, at least 1.

    >>> executed_steps(np.array([1, 5, 4, 2]), chunk=2), executed_steps(np.array([1, 5, 4, 2]), chunk=1)
    (14, 12)
    """
    ordered = -np.sort(-steps)
    return int(sum(ordered[i] * min(chunk, len(ordered)) for i in range(0, len(ordered), chunk)))


def _loops(
    algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items, chunk: int, buckets: Buckets,
    wanted: Sequence[int] = (),
) -> Outcome:  # fmt: skip
    """One loop over chunks for each bucket, with a traced trip count: no padding, and no new program ever.

    Args:
      chunk: items under one vmap; 0 chooses.
      buckets: of levels, each level once.
      wanted: see ``bucketed``.

    Raises:
      ValueError: a level that is in no bucket, or in two.
    """
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
    item = jax.eval_shape(lambda: tree.take(items, 0))
    shapes = [jax.eval_shape(run, sent, pool, item) for run in runs]
    slots = items.valid.shape[0]
    sizes = [0 if chunk else computed_bytes(run, sent, pool, item) for run in runs]
    chunks = _chunks(algorithm, slots, chunk, sizes, wanted)
    report = jax.tree.map(lambda s: jnp.zeros((slots, *s.shape), s.dtype), shapes[0][2][1])
    rows = (items.memory, report, jnp.zeros(slots, bool))
    total: PyTree = None
    for number, levels in enumerate(buckets):
        empty = jax.tree.map(lambda s: jnp.zeros((algorithm.members, *s.shape), s.dtype), shapes[number][0])
        one = partial(_chunk, runs[number], sent, pool, items, order, starts[number], counts[number], chunks[number])
        with jax.named_scope(f"bucket_{number}_of_{chunks[number]}"):
            part, rows = jax.lax.fori_loop(0, -(-counts[number] // chunks[number]), one, (empty, rows))
        part = _widen(algorithm, part, min(levels))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    base = np.asarray([min(levels) for levels in buckets])
    ran = np.stack([base, np.asarray(chunks)])[:, bucket_of].astype(np.int32)
    memory, report, ok = rows
    return Outcome(total, memory, report, ok, jnp.asarray(ran))


def _chunks(
    algorithm: Algorithm, slots: int, asked: int, sizes: Sequence[int], wanted: Sequence[int]
) -> list[int]:  # fmt: skip
    """How many clients of each bucket run at once.

    Args:
      slots: K, the items of the round.
      asked: by the user; 0 chooses.
      sizes: bytes that one client of each bucket computes.
      wanted: what the cost model would have for each bucket; memory may allow fewer.
    """
    memory = machine.device_memory()
    if wanted and not asked:
        return [that_fit(min(number, slots), each, memory) for number, each in zip(wanted, sizes, strict=True)]
    tried = algorithm.members // algorithm.choice.models if algorithm.choice else 1
    going = -(-slots // tried)  # of several starts one soon goes on alone
    return [clients_at_once(asked, going, len(sizes), each, memory) for each in sizes]


def _chunk(
    run: Callable[..., PyTree], sent: PyTree, pool: Pool, items: Items, order: Array, start: Array, count: Array,
    chunk: int, i: Array, carry: tuple[PyTree, PyTree],
) -> tuple[PyTree, PyTree]:  # fmt: skip
    """Run chunk ``i`` of a bucket and add it to (accumulated total, rows by item).

    Args:
      order: [K] items, those of a bucket side by side.
      start, count: int32 scalars, where the bucket begins in ``order`` and how many items it has.
      chunk: items at once; the last chunk of a bucket is filled up with items that are not valid.
    """
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
    return add_reply(reply, member, accumulated), rows


def debugging() -> Runner:
    """No jit, one item at a time, dense; raises at the first client whose reply is not finite.

    Raises:
      FloatingPointError: naming the client, its level and the leaf.

    >>> from hetfl_jax.data.population import population
    >>> from hetfl_jax.engine.execute import survey
    >>> from hetfl_jax.engine.executors import Executor
    >>> toy, ids = population(jnp.zeros((4, 2)), jnp.zeros(4, int), jnp.arange(4), jnp.array([3, 1])), jnp.arange(2)
    >>> ask = lambda key, sent, level, shard: 1 / (shard.size - 1)
    >>> survey(Executor(debugging(), jit=False), ask, (), toy, ids, jax.random.key(0))
    Traceback (most recent call last):
    FloatingPointError: client 1 at level 0 replied with values that are not finite
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
            wide = _widen(algorithm, add_reply(reply, member, empty), level)
            total = wide if total is None else jax.tree.map(jnp.add, total, wide)
            rows.append(row)
        ran = jnp.stack([jnp.arange(algorithm.levels), jnp.ones(algorithm.levels, int)]).astype(jnp.int32)
        memory, report, ok = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        return Outcome(total, memory, report, ok, ran)

    return run

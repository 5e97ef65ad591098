"""Executors: how the items of a round are run, as values chosen by configuration, on one device or over a mesh."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hetfl_jax.core import platform as platforms
from hetfl_jax.core import tree
from hetfl_jax.core.platform import Platform
from hetfl_jax.core.types import Algorithm, Array, Items, Outcome, PyTree, State
from hetfl_jax.engine.runners import Buckets, Pool, Runner, bucketed, chunked, debugging, vmapped

EXECUTORS = ("vmapped", "chunked", "bucketed", "debugging")
AXIS = "clients"
EVERYWHERE, SPLIT = PartitionSpec(), PartitionSpec(AXIS)


class Executor(NamedTuple):
    """How the items of a round are run. Made by ``executor``; every executor gives the same answer up to rounding.

    >>> chosen = executor("bucketed")
    >>> chosen.devices, chosen.jit
    (1, True)
    """

    run: Runner
    jit: bool = True
    mesh: Mesh | None = None
    platform: Platform | None = None  #: of its devices; by default that of this machine's
    described: bool = False  #: whether its devices are only described: nothing can be put there

    def kind(self) -> Platform:
        """For which platform its programs are made: cpu, gpu or tpu, with the memory of a device."""
        return self.platform or platforms.current()

    @property
    def devices(self) -> int:
        """Over how many devices the items are spread; 1 without a mesh."""
        return 1 if self.mesh is None else self.mesh.size

    def place(self, values: PyTree) -> PyTree:
        """Put values where the first round expects them, so that it compiles like the others.

        Over a mesh everything is replicated, but for the client memory of a ``State``: its rows are split by client id,
        padded to a multiple of the devices. On one device nothing moves.
        """
        mesh = self.mesh
        if mesh is None or self.described:
            return values

        def put(values: PyTree, spec: PartitionSpec) -> PyTree:
            """Put every leaf over the mesh as ``spec`` says."""
            return jax.tree.map(lambda v: _put(v, NamedSharding(mesh, spec)), values)

        def split(rows: Array) -> Array:
            """Rows of client memory [N, ...], padded with zeros to a multiple of the devices."""
            return jnp.pad(rows, [(0, -rows.shape[0] % mesh.size), *[(0, 0)] * (rows.ndim - 1)])

        def one(value: PyTree) -> PyTree:
            if not isinstance(value, State):
                return put(value, EVERYWHERE)
            memory = put(jax.tree.map(split, value.memory), SPLIT)
            return State(put(value.server, EVERYWHERE), memory, put(value.round, EVERYWHERE))

        return jax.tree.map(one, values, is_leaf=lambda v: isinstance(v, State))


def _put(value: Array, sharding: NamedSharding) -> Array:
    """``device_put``; with several processes from the host, since no device of one reaches those of another.

    Args:
      value: an array or a key; whole on every process.
    """
    if jax.process_count() == 1 or not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, sharding)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(value), sharding), impl=jax.random.key_impl(value))
    return jax.device_put(np.asarray(value), sharding)


def check_chunk(clients_per_chunk: int) -> None:
    """Refuse a number of clients at once below 0; 0 itself lets ``chunks`` choose.

    Raises:
      ValueError: with the number, what is allowed and the key.

    >>> check_chunk(-1)
    Traceback (most recent call last):
    ValueError: clients_per_chunk -1, allowed >= 0 (train.clients_per_chunk)
    """
    if clients_per_chunk < 0:
        raise ValueError(f"clients_per_chunk {clients_per_chunk}, allowed >= 0 (train.clients_per_chunk)")


def executor(
    name: str, clients_per_chunk: int = 0, devices: int = 1, buckets: Buckets = (), wanted: Sequence[int] = (),
    mesh: Mesh | None = None, platform: Platform | None = None,
) -> Executor:  # fmt: skip
    """The executor called ``name``.

    Args:
      name: ``vmapped`` (all items at once), ``chunked`` (a loop over chunks of vmapped items; memory does not grow with
        the cohort), ``bucketed`` (the same, each level at its true shape), or ``debugging`` (no jit, one at a time,
        stops at the first client whose reply is not finite).
      clients_per_chunk: items that run under one vmap; 0 chooses: 1 on a CPU, elsewhere as many as the device surely
        holds, at most 256 (``chunks``).
      devices: spread items over this many devices.
      buckets: of ``bucketed``: which levels share a bucket, e.g. ``((0,), (1, 2))``; a shared bucket has the shape of
        its largest level and masks the others, which saves a program. Default: one a level.
      wanted: of ``bucketed`` with ``clients_per_chunk`` 0: clients at once of each bucket, fewer if they do not fit.
      mesh, platform: in place of ``devices``, such as devices that are not here (``engine.topology``).

    Raises:
      ValueError: an unknown name, or more devices than there are.

    >>> executor("debugging").jit
    False
    >>> executor("fast")
    Traceback (most recent call last):
    ValueError: executor 'fast' is not one of vmapped, chunked, bucketed, debugging (train.executor)
    """
    if name not in EXECUTORS:
        raise ValueError(f"executor {name!r} is not one of {', '.join(EXECUTORS)} (train.executor)")
    check_chunk(clients_per_chunk)
    if not 1 <= devices <= jax.device_count():
        raise ValueError(f"{devices} devices, allowed 1..{jax.device_count()}, those of all hosts (train.devices)")
    if devices < jax.device_count() and jax.process_count() > 1:
        raise ValueError(f"{devices} devices, need all {jax.device_count()} of {jax.process_count()} processes, or 0")
    kind = platform or platforms.current()
    chunk = clients_per_chunk or (1 if kind.name == "cpu" else 0)
    if name == "debugging":
        return Executor(debugging(), jit=False, platform=kind)
    makers: dict[str, Callable[[], Runner]] = {
        "vmapped": vmapped,
        "chunked": partial(chunked, chunk),
        "bucketed": partial(bucketed, chunk, buckets, wanted),
    }
    inner = makers[name]()
    if devices == 1 and mesh is None:
        return Executor(inner, platform=kind)
    here = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,)) if mesh is None else mesh
    return sharded(here, inner)._replace(platform=kind, described=mesh is not None)


def sharded(mesh: Mesh, inner: Runner) -> Executor:
    """``inner`` on each device of the mesh axis ``clients``, on its equal share of items that ``deal`` put in order.

    Totals cross devices in one sum at the end, reports in one gather; memory rows stay with the device that ran them.

    Args:
      mesh: one axis, ``clients``; the number of items must be a multiple of its devices, as ``deal`` pads it.
      inner: what each device runs.

    >>> from hetfl_jax.data.population import population
    >>> from hetfl_jax.engine.execute import survey
    >>> toy = population(jnp.zeros((4, 2)), jnp.zeros(4, int), jnp.arange(4), jnp.array([3, 1]))
    >>> spread = sharded(jax.make_mesh((1,), (AXIS,), axis_types=(AxisType.Auto,)), vmapped())
    >>> ask = lambda key, sent, level, shard: sent * shard.size
    >>> asked = jax.jit(lambda ids: survey(spread, ask, jnp.int32(10), toy, ids, jax.random.key(0)))
    >>> asked(jnp.array([1, 0, 1])).tolist()
    [10, 30, 10]
    """

    def run(algorithm: Algorithm, sent: PyTree, pool: Pool, items: Items) -> Outcome:
        share = items.valid.shape[0] // mesh.size

        def on_device(sent: PyTree, pool: Pool, items: Items, memory: PyTree) -> Outcome:
            # All devices know all items and take their own: nothing has to cross for that.
            first = jax.lax.axis_index(AXIS) * share
            mine = jax.tree.map(lambda v: jax.lax.dynamic_slice_in_dim(v, first, share), items)
            outcome = inner(algorithm, sent, pool, mine._replace(memory=memory))
            with jax.named_scope("collective"):
                totals, whole = tree.packed(outcome.total)
                words, read = tree.as_words((outcome.report, outcome.ok))
                rows, stacked = tree.packed(words, lead=1)
                total = whole([jax.lax.psum(v, AXIS) for v in totals])
                report, ok = read(stacked([jax.lax.all_gather(v, AXIS, tiled=True) for v in rows]))
                return Outcome(total, outcome.memory, report, ok, outcome.ran)

        specs = Outcome(EVERYWHERE, SPLIT, EVERYWHERE, EVERYWHERE, EVERYWHERE)  # type: ignore[arg-type]
        # check_vma would sum gradients of the replicated model over devices; here the one psum is ours.
        return jax.shard_map(
            on_device, mesh=mesh, in_specs=(EVERYWHERE, EVERYWHERE, EVERYWHERE, SPLIT), out_specs=specs, check_vma=False
        )(sent, pool, items._replace(memory=()), items.memory)

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

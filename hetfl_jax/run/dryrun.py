"""What a run would take: memory, programs, work and bytes, without training."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.types import Config, Price, State
from hetfl_jax.data import partition
from hetfl_jax.engine import rounds
from hetfl_jax.models.costs import BACKWARD
from hetfl_jax.results import tables
from hetfl_jax.run.buckets import expected_shares
from hetfl_jax.run.federation import Own
from hetfl_jax.run.lab import Lab, prepare
from hetfl_jax.run.selections import sentences

#: Share of a matrix product's rate that local training was seen to reach; the estimate is no better than this.
ASSUMED_EFFICIENCY = 0.4
SMALLEST_STEP = 5e-4  #: seconds that a client step of the smallest net takes


def describe(config: Config, own: Own | None = None) -> str:
    """The dry run of ``config`` as text; builds the data, compiles only one matrix product, and allocates no state.

    The time is a rough estimate: expected multiply-adds over 40 % of the rate of a matrix product that is measured
    here, and no less than 0.5 ms a local step of a client.

    Args:
      config: complete or not.
      own: what the user brings in place of what the config names.

    Raises:
      ValueError: as ``train``.
    """
    lab = prepare(config, own)
    config, fed = lab.config, lab.federation
    state = _shapes(lab)
    price = fed.algorithm.price() if fed.algorithm.price else Price(8 * fed.costs.bytes, 8 * fed.costs.bytes)
    share = expected_shares(fed)
    cohort = config.method.args.get("cohort", fed.partition.size.size) * price.items
    size = float(np.mean(fed.partition.size))
    examples = config.train.steps * config.train.batch_size if config.train.steps else config.train.epochs * size
    macs = float(share @ fed.costs.macs) * cohort * (examples * (1 + BACKWARD) + price.compared * size)
    down, up = (float(share @ bits) * cohort / 8e6 for bits in (price.down, price.up))
    moved = rounds.moved_bytes(lab.executor, fed.algorithm, state, lab.population, lab.key)
    steps = config.train.steps or config.train.epochs * np.ceil(fed.partition.size / config.train.batch_size).mean()
    rate = 2 * macs / (matmul_rate() * ASSUMED_EFFICIENCY)
    seconds = max(rate, cohort * steps * SMALLEST_STEP) / lab.executor.devices
    between = ", ".join(f"{name} {size / 1e6:,.2f} MB" for name, size in moved.items())
    rows = {
        **_memory(lab, state),
        **({"selection": "; ".join(known)} if (known := sentences(price.needs, least=1)) else {}),
        **({"clients' devices": "; ".join(fed.outfit.notes)} if fed.outfit else {}),
        "programs": _programs(lab),
        "client work a round": f"{macs / 1e9:,.2f} GMACs expected" + (f", {price.note}" if price.note else ""),
        "bytes a round": f"{down:,.2f} MB down, {up:,.2f} MB up expected",
        "between devices": f"{between} a round" if moved else "nothing, one device",
        "training": f"about {seconds * config.train.rounds:,.0f} s for {config.train.rounds} rounds, compile, "
        "evaluate apart",
        "estimate from": f"{ASSUMED_EFFICIENCY:.0%} of a matrix product's rate, at least {1e3 * SMALLEST_STEP:g} ms a "
        "client step",
    }
    text = "\n".join(f"{name:22s}{value}" for name, value in rows.items())
    about = tables.describe(partition.summary(fed.labels, fed.partition))
    return f"{tables.headline(config, fed.named, fed.partition.size.size)}\n{about}\n{text}"


def _shapes(lab: Lab) -> State:
    """Shapes of the state before the first round, with one row of client memory a client; nothing is allocated."""
    algorithm, rows = lab.federation.algorithm, lab.federation.partition.size.size
    server, one = jax.eval_shape(algorithm.init, lab.key)
    rows *= algorithm.memory_rows
    memory = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape), leaf.dtype), one)
    return State(server, memory, jax.eval_shape(lambda: jnp.int32(0)))


def _memory(lab: Lab, state: State) -> dict[str, str]:
    """Lines on the memory of a device: the data, and the state with what client memory can take at most.

    Rows of client memory count with the state only where they live on the device (``train.store``).
    """
    fed = lab.federation
    shared = tree.nbytes((fed.train.x, fed.train.y))
    index = tree.nbytes((fed.train, fed.train_batches, fed.test)) - 3 * shared
    data = f"{(shared + index) / 1e6:,.1f} MB ({shared / 1e6:,.1f} pool, {index / 1e6:,.1f} index)"
    server, memory = tree.nbytes(state.server), tree.nbytes(state.memory)
    where = lab.config.train.store
    on_device = memory // lab.executor.devices if where == "device" else 0
    text = f"{(server + on_device) / 1e6:,.1f} MB"
    if memory:
        text += f"; client memory of at most {memory / 1e6:,.1f} MB in store {where!r}"
    return {"data on each device": data, "state on each device": text}


def _programs(lab: Lab) -> str:
    """A line on the programs that a run compiles: a round's client bodies, one a bucket, and evaluations."""
    fed, config = lab.federation, lab.config
    groups = lab.buckets or [(level,) for level in range(fed.family.levels)]
    bodies = len(groups) if config.train.executor == "bucketed" else 1
    names = "-".join("".join(fed.mix.names[level] for level in group) for group in groups)
    evaluations = (1 if config.run.eval_masked else len(fed.tiers)) * len(fed.algorithm.questions)
    return (
        f"1 round with {bodies} client bodies" + (f" ({names})" if bodies > 1 else "") + f", {evaluations} evaluation"
    )


def matmul_rate(size: int = 1024) -> float:
    """Floating-point operations a second of a float32 matrix product ``[size, size] @ [size, size]``, median of five.

    It counts two operations a multiply-add, and runs on one device.

    >>> matmul_rate(64) > 0
    True
    """
    x = jnp.ones((size, size))
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / float(np.median(seconds))

"""What a run would take: memory, programs, work and bytes, without training."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.data import partition
from hetfl_jax.engine import rounds
from hetfl_jax.results import report
from hetfl_jax.run.federation import Federation, draws_levels, parse_buckets
from hetfl_jax.run.train import TRAINING_PASSES, prepare

#: Share of a matrix product's rate that local training was seen to reach; the estimate is no better than this.
ASSUMED_EFFICIENCY = 0.4
SMALLEST_STEP = 5e-4  #: seconds that a client step of the smallest net takes


def describe(config: Any) -> str:
    """The dry run of ``config`` as text; builds the data, compiles only one matrix product.

    Raises:
      ValueError: as ``run.train``.
    """
    lab = prepare(config)
    fed = lab.federation
    state = jax.eval_shape(lab.start)
    share = expected_shares(config, fed)
    cohort = config.method.args.get("cohort", fed.partition.size.size)
    size = float(np.mean(fed.partition.size))
    examples = config.train.steps * config.train.batch_size if config.train.steps else config.train.epochs * size
    choice = fed.algorithm.models if min(fed.algorithm.models, fed.algorithm.broadcast) > 1 else 0
    judged = choice * size  # examples that only go forward, before training
    macs = float(share @ fed.costs.macs) * cohort * (examples * TRAINING_PASSES + judged)
    one_way = float(share @ fed.costs.bytes) * cohort
    devices = lab.executor.devices
    moved = rounds.moved_bytes(lab.executor, fed.algorithm, lab.start(), lab.population, lab.key)
    steps = config.train.steps or config.train.epochs * np.ceil(fed.partition.size / config.train.batch_size).mean()
    seconds = max(2 * macs / (matmul_rate() * ASSUMED_EFFICIENCY), cohort * steps * SMALLEST_STEP) / devices
    shared = tree.nbytes((fed.train.x, fed.train.y))
    per_client = tree.nbytes((fed.train, fed.train_batches, fed.test)) - 3 * shared
    buckets = parse_buckets(config.train.buckets, fed.mix)
    bodies = {"bucketed": len(buckets) or fed.family.levels}.get(config.train.executor, 1)
    evaluations = 1 if config.run.eval_masked else fed.family.levels
    rows = (
        (
            "data on each device",
            f"{(shared + per_client) / 1e6:,.1f} MB ({shared / 1e6:,.1f} pool, {per_client / 1e6:,.1f} index)",
        ),
        ("state on each device", f"{tree.nbytes(state) / 1e6:,.1f} MB"),
        ("programs", f"1 round with {bodies} client bodies, {evaluations} evaluation"),
        ("client work a round", f"{macs / 1e9:,.2f} GMACs expected{_of_starts(config)}"),
        (
            "bytes a round",
            f"{one_way * fed.algorithm.broadcast / 1e6:,.2f} MB down, "
            f"{one_way * fed.algorithm.messages / 1e6:,.2f} MB up expected",
        ),
        (
            "between devices",
            ", ".join(f"{name} {size / 1e6:,.2f} MB" for name, size in moved.items()) + " a round"
            if moved
            else "nothing, one device",
        ),
        (
            "training",
            f"about {seconds * config.train.rounds:,.0f} s for {config.train.rounds} rounds, compile, evaluate apart",
        ),
        (
            "estimate from",
            f"{ASSUMED_EFFICIENCY:.0%} of a matrix product's rate, at least {1e3 * SMALLEST_STEP:g} ms a client step",
        ),
    )
    text = "\n".join(f"{name:22s}{value}" for name, value in rows)
    about = report.describe(partition.summary(fed.labels, fed.partition))
    return f"{report.headline(config, fed.partition.size.size)}\n{about}\n{text}"


def _of_starts(config: Any) -> str:
    starts = config.method.args.get("restarts", 1)
    together = config.method.args.get("restart_rounds", 0) + 1
    if starts == 1 or config.method.args.get("min_share", 0) > 0:
        return ""
    return f", {starts} times that, and the bytes, in the first {together} rounds"


def expected_shares(config: Any, fed: Federation) -> np.ndarray:
    """[L] expected share of the items at each level."""
    if draws_levels(config):
        weights = np.asarray(fed.mix.proportions, float)
        return weights / weights.sum()
    return np.bincount(np.asarray(fed.train.level), minlength=fed.family.levels) / fed.train.level.shape[0]


def matmul_rate(size: int = 1024) -> float:
    """Multiply-adds x 2 a second of a square float32 matrix product on one device, median of five."""
    x = jnp.ones((size, size))
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / float(np.median(seconds))

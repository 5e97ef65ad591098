"""Which levels of a run share a bucket: as the config says, or what costs least on the devices that run it."""

import numpy as np

from hetfl_jax.core.platform import Platform
from hetfl_jax.core.types import Algorithm, Config
from hetfl_jax.engine import buckets
from hetfl_jax.engine.chunks import MOST
from hetfl_jax.engine.constants import CONSTANTS
from hetfl_jax.engine.executors import check_chunk
from hetfl_jax.models.costs import BACKWARD
from hetfl_jax.run.federation import Federation
from hetfl_jax.run.ledger import mean_steps
from hetfl_jax.run.mix import Mix, parse_buckets

Chosen = tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]


def chosen(config: Config, fed: Federation, devices: int, kind: Platform, given: object = None) -> Chosen:
    """Levels of each bucket, and how many of its clients to run at once; empty: a bucket a level, as many as fit.

    ``auto`` minimises the seconds of the whole run, compiling counted as with an empty cache: few rounds make few
    buckets. A net that runs only at its true shapes, and a hand-written algorithm, have a bucket a level.

    Args:
      devices: over which the clients of a round are spread.
      kind: the platform, whose constants the cost model takes.
      given: the method that the user brings, if any.

    Raises:
      ValueError: as ``parse_buckets``; a number of clients at once below 0.
    """
    train, levels = config.train, fed.family.levels
    check_chunk(train.clients_per_chunk)
    if train.buckets != "auto":
        return parse_buckets(train.buckets, fed.mix), ()
    if train.executor != "bucketed" or levels == 1 or not fed.family.masked or isinstance(given, Algorithm):
        return (), ()
    most = train.clients_per_chunk or (1 if kind.name == "cpu" else MOST)
    found = buckets.best(work_of(config, fed, devices), holds(fed.mix), CONSTANTS[kind.name], most)
    return tuple(bucket.levels for bucket in found), tuple(bucket.clients for bucket in found)


def work_of(config: Config, fed: Federation, devices: int) -> buckets.Work:
    """What a round of the config is expected to ask of its buckets: multiply-adds, shares, items on a device, steps.

    Clients' sizes enter by their mean, levels by their expected share; nothing is drawn.
    """
    items = config.method.args.get("cohort", fed.partition.size.size) * (
        fed.algorithm.price().items if fed.algorithm.price else 1
    )
    return buckets.Work(
        macs=(fed.costs.macs * float((1 + BACKWARD) * fed.local.batch_size)).tolist(),
        share=expected_shares(fed).tolist(),
        layers=int(fed.costs.layers.max()),
        items=int(np.ceil(items / devices)),
        steps=mean_steps(fed.local, fed.partition.size),
        rounds=config.train.rounds,
    )


def holds(mix: Mix) -> np.ndarray:
    """[L, L] bool, whether a level (row) has all the width and depth of another (column).

    >>> from hetfl_jax.run.mix import parse_mix
    >>> holds(parse_mix("a4x1-b4x1-a2x1")).astype(int).tolist()
    [[1, 1, 1], [0, 1, 0], [0, 0, 1]]
    """
    width, depth = np.asarray(mix.widths), np.asarray(mix.depths or [0] * len(mix.widths))
    return (width[:, None] >= width) & (depth[:, None] >= depth)


def expected_shares(fed: Federation) -> np.ndarray:
    """[L] expected share of the items at each level: of drawn levels by how often each is drawn, else by who has it."""
    if fed.algorithm.drawn:
        weights = np.asarray(fed.algorithm.drawn, float)
        return weights / weights.sum()
    return np.bincount(np.asarray(fed.train.level), minlength=fed.family.levels) / fed.train.level.shape[0]

"""Which levels share a bucket, and how many of its clients run at once: what costs least by a model of the device.

A bucket runs at the shape of its largest level, and masks the others. More buckets waste less work; fewer make fewer
and fuller launches, and fewer programs to compile.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import lgamma, log, log1p
from typing import NamedTuple

import numpy as np

from hetfl_jax.engine.constants import Constants


class Work(NamedTuple):
    """What a run asks of its buckets."""

    macs: Sequence[float]  #: [L] multiply-adds of one local step of one client of each level, forward and backward
    share: Sequence[float]  #: [L] of the items of a round that are of each level, as expected
    layers: int  #: convolutions and matrix products of the net
    items: int  #: of a round, on one device
    steps: float  #: local steps of a client
    rounds: int  #: of the run, over which compiling is spread


class Bucket(NamedTuple):
    """Levels that run in one loop."""

    levels: tuple[int, ...]  #: the largest first
    clients: int  #: at once


def best(work: Work, holds: np.ndarray, constants: Constants, most: int) -> tuple[Bucket, ...]:
    """The partition of the levels into buckets that takes least time, compiling included.

    Levels are sorted by their work, and buckets are runs of them: ``cost(first i levels) = min over j < i of cost(first
    j) + seconds(bucket of j .. i - 1)``, which tries all partitions in L^2 steps.

    Args:
      holds: [L, L] bool, whether a level (row) can run another (column) masked inside itself.
      most: clients that may run at once; 1 on a CPU.

    >>> halves = Work(macs=[4e6, 1e6], share=[0.5, 0.5], layers=2, items=10, steps=5, rounds=100)
    >>> quick, slow = Constants(1e-9, 1e9, 0.0), Constants(1e-2, 1e12, 0.0)
    >>> [[b.levels for b in best(halves, np.ones((2, 2), bool), device, 10)] for device in (quick, slow)]
    [[(0,), (1,)], [(0, 1)]]
    """
    order = sorted(range(len(work.macs)), key=lambda level: (-work.macs[level], level))
    cost, chosen = [0.0], [tuple[Bucket, ...]()]
    for end in range(1, len(order) + 1):
        options = []
        for begin in range(end):
            levels = order[begin:end]
            if begin + 1 < end and not (levels[0] == min(levels) and holds[levels[0], levels].all()):
                continue
            clients = at_once(work, levels, constants, most)
            options.append((cost[begin] + seconds(work, levels, clients, constants), begin, clients))
        least, begin, clients = min(options)
        cost.append(least)
        chosen.append((*chosen[begin], Bucket(tuple(order[begin:end]), clients)))
    return chosen[-1]


def at_once(work: Work, levels: Sequence[int], constants: Constants, most: int) -> int:
    """How many clients of a bucket to run at once, so that it takes least time; of equally good numbers the largest.

    Args:
      work: what the run asks of its buckets.
      levels: of the bucket, the largest first.
      constants: of the device.
      most: the largest number that is tried.

    >>> one = Work(macs=[1e9], share=[1.0], layers=1, items=30, steps=1, rounds=1)
    >>> at_once(one, [0], Constants(1e-3, 1e12, 0.0), 256), at_once(one, [0], Constants(1e-9, 1e12, 0.0), 4)
    (30, 3)
    """
    numbers = range(min(most, max(1, work.items)), 0, -1)
    return min(numbers, key=lambda clients: round(seconds(work, levels, clients, constants), 12))


def seconds(work: Work, levels: Sequence[int], clients: int, constants: Constants) -> float:
    """Seconds of a bucket over the whole run, with ``clients`` at once.

    With c clients at once, s local steps a client and R rounds it is ``program + R (s chunks(c) step(c) + launch)``,
    where ``step(c) = launch + c macs / rate``. ``launch`` is ``constants.launch`` times the layers; it is paid once
    more a round for sorting, summing and widening. ``macs`` are those of the bucket's largest level, whose shape all
    of it has.

    >>> work = Work(macs=[1e9], share=[1.0], layers=2, items=4, steps=3, rounds=10)
    >>> device = Constants(launch=1e-3, rate=1e12, program=1.0)
    >>> round(seconds(work, [0], 2, device), 3)  # 1 + 10 (3 * 2 * 0.004 + 0.002)
    1.26
    """
    each = chunks(work.items, sum(work.share[level] for level in levels), clients)
    launch = constants.launch * work.layers
    step = launch + clients * work.macs[levels[0]] / constants.rate
    return constants.program + work.rounds * (work.steps * each * step + launch)


def chunks(items: int, share: float, clients: int) -> float:
    """How many chunks a bucket is expected to have: ``E[ceil(X / clients)]`` with X ~ Binomial(items, share).

    Args:
      items: of a round, on one device.
      share: the probability that an item falls into this bucket, from 0 to 1.
      clients: of a chunk, at least 1.

    >>> chunks(10, 1.0, 4), chunks(2, 0.5, 1)
    (3.0, 1.0)
    """
    return round(float(_binomial(items, share) @ -(-np.arange(items + 1) // clients)), 9)


@lru_cache(1024)
def _binomial(items: int, share: float) -> np.ndarray:
    """[items + 1] how likely each number of items is in a bucket."""
    if not 0 < share < 1 - 1e-9:
        return np.eye(items + 1)[items if share > 0 else 0]
    hits = range(items + 1)
    ways = [lgamma(items + 1) - lgamma(k + 1) - lgamma(items - k + 1) for k in hits]
    return np.exp([way + k * log(share) + (items - k) * log1p(-share) for way, k in zip(ways, hits)])

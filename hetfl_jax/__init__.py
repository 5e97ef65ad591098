"""Federated learning with heterogeneous clients, simulated in JAX.

A federated round is: **plan** who gets what, run **client** for each of them, **sum** the replies, let the **server**
use the sum. Start at ``hetfl_jax.types``.
"""

from hetfl_jax.capacity import Family, costs, family, mask, narrow, overlay, view, widen
from hetfl_jax.compose import compose
from hetfl_jax.data.population import population
from hetfl_jax.engine import make_round, query, start
from hetfl_jax.executors import executor
from hetfl_jax.parts.local import local
from hetfl_jax.run import Result, over_seeds, train
from hetfl_jax.store import device_store
from hetfl_jax.types import Algorithm, Population, State

__all__ = [
    "Algorithm",
    "Family",
    "Population",
    "Result",
    "State",
    "compose",
    "costs",
    "device_store",
    "executor",
    "family",
    "local",
    "make_round",
    "mask",
    "narrow",
    "over_seeds",
    "overlay",
    "population",
    "query",
    "start",
    "train",
    "view",
    "widen",
]

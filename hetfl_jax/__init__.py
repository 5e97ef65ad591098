"""Federated learning with heterogeneous clients, simulated in JAX.

A federated round is: **plan** who gets what, run **client** for each of them, **sum** the replies, let the **server**
use the sum. Start at ``hetfl_jax.core.types``.
"""

from typing import TYPE_CHECKING

from hetfl_jax.core.types import Algorithm, ClientContext, Population, State
from hetfl_jax.data.population import population
from hetfl_jax.engine.execute import query
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.models.costs import costs
from hetfl_jax.models.families import family, view
from hetfl_jax.models.windows import Family, mask, narrow, overlay, widen
from hetfl_jax.parts.compose import Slots, compose
from hetfl_jax.parts.local import local
from hetfl_jax.run.config import load_config
from hetfl_jax.run.evaluate import evaluate
from hetfl_jax.run.plan import plan
from hetfl_jax.run.report import report
from hetfl_jax.run.sweep import Sweep, over_seeds, sweep
from hetfl_jax.run.train import Result, train

if TYPE_CHECKING:  # the room of this name can be called, which type checkers do not see
    from hetfl_jax.results.reading import results
else:
    from hetfl_jax import results

__all__ = [
    "Algorithm",
    "ClientContext",
    "Family",
    "Population",
    "Result",
    "Slots",
    "State",
    "Sweep",
    "compose",
    "costs",
    "device_store",
    "evaluate",
    "executor",
    "family",
    "load_config",
    "local",
    "make_round",
    "mask",
    "narrow",
    "over_seeds",
    "overlay",
    "plan",
    "population",
    "query",
    "report",
    "results",
    "start",
    "sweep",
    "train",
    "view",
    "widen",
]

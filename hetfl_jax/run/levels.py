"""Levels that nothing else decides: who has which, and which are evaluated."""

import numpy as np

from hetfl_jax.core.types import Config, Tier
from hetfl_jax.models.costs import Costs
from hetfl_jax.run.devices import BUDGET
from hetfl_jax.run.given import Own, is_population
from hetfl_jax.run.mix import Mix, assigned


def levels_of(config: Config, own: Own, mix: Mix, size: np.ndarray) -> np.ndarray:
    """[N] the fixed level of every client: of the user's population, or as the config assigns them.

    Args:
      size: [N] examples.
    """
    level = assigned(mix, size.size, config.capacity.order, size)
    if is_population(own.data) and np.asarray(own.data[0].level).any():
        level = np.asarray(own.data[0].level)
    return level


def unused_order(order: str, capacity: str, drawn: bool, levels: int) -> list[str]:
    """What to say of an order of fixed levels that nothing follows.

    Args:
      order, capacity: ``capacity.order`` and ``capacity.name``.
      drawn: whether levels are drawn in every round.
      levels: how many there are.

    >>> unused_order("by_data", "none", True, 2)
    ['levels are drawn in every round; capacity.order=by_data is not used']
    """
    why = "levels are drawn in every round" if drawn else "levels are those that devices afford"
    unused = order != "usual" and levels > 1 and (drawn or capacity == BUDGET)
    return [f"{why}; capacity.order={order} is not used"] if unused else []


def tiers_of(mix: Mix, price: Costs) -> tuple[Tier, ...]:
    """The levels as models that are offered: what a method without tiers of its own evaluates."""
    rows = zip(price.parameters.tolist(), price.bytes.tolist(), price.macs.tolist())
    return tuple(Tier(name, *row) for name, row in zip(mix.names, rows))

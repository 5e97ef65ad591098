"""What stands for "no value" where numbers are compared: finite, so that a search for NaN and infinity finds none."""

import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Array

LOWEST = float(np.finfo(np.float32).min)  #: below all float32 scores
HIGHEST = float(np.finfo(np.float32).max)  #: above all float32 losses


def quantile_among(values: Array, there: Array, q: float) -> Array:
    """The quantile of those of ``values`` [N] that are ``there``, linear between neighbours; 0 where none is.

    >>> float(quantile_among(jnp.array([1.0, 9.0, 2.0, 4.0]), jnp.array([True, False, True, True]), 0.5))
    2.0
    """
    ordered, last = jnp.sort(jnp.where(there, values, HIGHEST)), jnp.maximum(there.sum() - 1, 0)
    place = q * last
    below = jnp.floor(place).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, last)]
    share = place - below
    return jnp.where(there.any(), low * (1 - share) + high * share, 0)

"""Client-side terms against drift, with the private memory that some of them keep."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.types import Array, PyTree


class Drift(NamedTuple):
    """A correction of local training. ``memory`` is ``{}`` or ``{"params": tree}``, narrowed to the client's level."""

    init: Callable[[PyTree], PyTree]  #: full parameters -> one client's memory
    gradient: Callable[[PyTree, PyTree, PyTree, PyTree], PyTree]  #: (gradient, params, received, memory) -> gradient
    update: Callable[[PyTree, PyTree, PyTree, Array], PyTree]  #: (memory, params after, received, steps) -> memory


def none() -> Drift:
    """No correction."""
    return Drift(
        lambda params: {},
        lambda gradient, params, received, memory: gradient,
        lambda memory, params, received, steps: memory,
    )


def frozen(layers: Sequence[str]) -> Drift:
    """Layers that are not trained: their gradient is zero (weight decay still reaches them)."""

    def gradient(gradient: PyTree, params: PyTree, received: PyTree, memory: PyTree) -> PyTree:
        return {name: jax.tree.map(jnp.zeros_like, g) if name in layers else g for name, g in gradient.items()}

    return none()._replace(gradient=gradient)


def proximal(weight: float) -> Drift:
    """FedProx: the gradient of ``weight / 2 * ||params - received||^2``, inside the clipping.

    Raises:
      ValueError: a negative weight.
    """
    if weight < 0:
        raise ValueError(f"proximal weight {weight}, allowed >= 0 (method.args.proximal_weight)")

    def gradient(gradient: PyTree, params: PyTree, received: PyTree, memory: PyTree) -> PyTree:
        return jax.tree.map(lambda g, p, p0: g + weight * (p - p0), gradient, params, received)

    return none()._replace(gradient=gradient)

"""Client-side terms against drift, with the private memory that some of them keep."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Array, PyTree


class Around(NamedTuple):
    """What a client knows while it trains, besides its model; trees of parameters at the client's level."""

    received: PyTree  #: the parameters as they came
    memory: PyTree  #: the client's own ``{name: {"params": tree}}``
    context: PyTree  #: what the server sent besides the model, ``{}`` or ``{"params": tree}``
    examples: Array  #: int32, how many the client holds


class Drift(NamedTuple):
    """A correction of local training."""

    #: full parameters -> one client's memory, ``{name: {"params": tree}}``
    init: Callable[[PyTree], PyTree]
    #: (gradient, params, around) -> gradient, before clipping
    gradient: Callable[[PyTree, PyTree, Around], PyTree]
    #: (params after, around, steps) -> (memory, what is summed over clients besides the model: {} or {"params": tree})
    update: Callable[[PyTree, Around, Array], tuple[PyTree, PyTree]]
    #: around -> what is added to the weight decay, after clipping
    decay: Callable[[Around], Array | float] = lambda around: 0.0


def none() -> Drift:
    """No correction."""
    return Drift(
        lambda params: {},
        lambda gradient, params, around: gradient,
        lambda after, around, steps: (around.memory, {}),
    )


def frozen(layers: Sequence[str]) -> Drift:
    """Layers that are not trained: their gradient is zero (weight decay still reaches them)."""

    def gradient(gradient: PyTree, params: PyTree, around: Around) -> PyTree:
        return {name: jax.tree.map(jnp.zeros_like, g) if name in layers else g for name, g in gradient.items()}

    return none()._replace(gradient=gradient)


def proximal(weight: float) -> Drift:
    """FedProx: the gradient of ``weight / 2 * ||params - received||^2``, inside the clipping.

    Raises:
      ValueError: a negative weight.
    """
    if weight < 0:
        raise ValueError(f"proximal weight {weight}, allowed >= 0 (method.args.proximal_weight)")

    def gradient(gradient: PyTree, params: PyTree, around: Around) -> PyTree:
        return jax.tree.map(lambda g, p, p0: g + weight * (p - p0), gradient, params, around.received)

    return none()._replace(gradient=gradient)


def feddyn(alpha: float, mean_examples: float = 0.0) -> Drift:
    """FedDyn (Acar et al., ICLR 2021): the client's running sum of its changes, s_k, pulls it.

    ``min_w  F_k(w) + alpha_k <s_k, w> + alpha_k / 2 ||w - received||^2``, then ``s_k += w - received``. s_k is in
    parameter units, as in the official code; the paper's dual is ``-alpha_k s_k``. The linear part
    ``alpha_k (s_k - received)`` is clipped with the gradient, the quadratic one is weight decay, after clipping.

    Args:
      alpha: of a client of mean size.
      mean_examples: if > 0, ``alpha_k = alpha * mean_examples / n_k``, else all have ``alpha``.

    Raises:
      ValueError: alpha <= 0.
    """
    if not alpha > 0:
        raise ValueError(f"FedDyn alpha {alpha}, allowed > 0; without FedDyn use fedavg (method.args.feddyn_alpha)")

    def strength(around: Around) -> Array | float:
        return alpha * mean_examples / around.examples if mean_examples else alpha

    def gradient(gradient: PyTree, params: PyTree, around: Around) -> PyTree:
        sums, weight = around.memory["sum"]["params"], strength(around)
        return jax.tree.map(lambda g, s, p0: g + weight * (s - p0), gradient, sums, around.received)

    def update(after: PyTree, around: Around, steps: Array) -> tuple[PyTree, PyTree]:
        sums = jax.tree.map(lambda s, p, p0: s + (p - p0), around.memory["sum"]["params"], after, around.received)
        return {**around.memory, "sum": {"params": sums}}, {}

    return Drift(_zeros("sum"), gradient, update, strength)


def scaffold(rate: float | Array, mean_examples: float = 0.0) -> Drift:
    """SCAFFOLD (Karimireddy et al., ICML 2020, option II): control variates c_k of clients against c of the server.

    The gradient gets ``c / v_k - c_k``, inside the clipping; then ``c_k' = c_k - c + (received - w) / (steps rate)``,
    and the server receives ``v_k (c_k' - c_k)``, where ``v_k = n_k / mean_examples`` (1 without it), as in the code of
    FedDyn's authors.

    Args:
      rate: the learning rate before any decay over rounds.
    """

    def weight(around: Around) -> Array | float:
        return around.examples / mean_examples if mean_examples else 1.0

    def gradient(gradient: PyTree, params: PyTree, around: Around) -> PyTree:
        own, common, v = around.memory["variate"]["params"], around.context["params"], weight(around)
        return jax.tree.map(lambda g, ck, c: g + c / v - ck, gradient, own, common)

    def update(after: PyTree, around: Around, steps: Array) -> tuple[PyTree, PyTree]:
        per_step, v = 1 / (jnp.maximum(steps, 1) * rate), weight(around)
        moved = jax.tree.map(lambda c, p, p0: (p0 - p) * per_step - c, around.context["params"], after, around.received)
        new = jax.tree.map(jnp.add, around.memory["variate"]["params"], moved)
        sent = {"params": jax.tree.map(lambda d: v * d, moved)}
        return {**around.memory, "variate": {"params": new}}, sent

    return Drift(_zeros("variate"), gradient, update)


def remembering(drift: Drift) -> Drift:
    """``drift`` whose clients also keep the last model they trained (``last``): what FedDyn calls the model "all"."""

    def init(params: PyTree) -> PyTree:
        return {**drift.init(params), "last": {"params": params}}

    def update(after: PyTree, around: Around, steps: Array) -> tuple[PyTree, PyTree]:
        memory, sent = drift.update(after, around, steps)
        return {**memory, "last": {"params": after}}, sent

    return drift._replace(init=init, update=update)


def _zeros(name: str) -> Callable[[PyTree], PyTree]:
    return lambda params: {name: {"params": jax.tree.map(jnp.zeros_like, params)}}

"""What the server does with the mean change."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hetfl_jax import tree
from hetfl_jax.types import Array, PyTree


class Server(NamedTuple):
    """A server rule with its own state."""

    init: Callable[[PyTree], PyTree]  #: variables -> slot
    #: (slot, variables, mean delta, coverage, any ok) -> (slot, variables)
    update: Callable[[PyTree, PyTree, PyTree, PyTree, Array], tuple[PyTree, PyTree]]


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate, momentum=0.9, **kw: optax.sgd(learning_rate, momentum, **kw),
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "yogi": optax.yogi,
}


def optimizer(name: str = "sgd", learning_rate: float = 1.0, **settings: Any) -> Server:
    """An optax optimizer on the pseudo-gradient ``-mean delta`` (FedOpt: FedAdam, FedYogi, FedAvgM ...).

    Entries without coverage keep their value and their moments bit for bit; statistics see no optimizer, they become
    the mean. ``sgd`` with learning rate 1 is plain averaging.

    Raises:
      ValueError: an unknown name, or a learning rate <= 0.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"server optimizer {name!r} is not one of {', '.join(OPTIMIZERS)} (method.args.server)")
    if learning_rate <= 0:
        raise ValueError(f"server learning rate {learning_rate}, allowed > 0 (method.args.server)")
    return from_optax(OPTIMIZERS[name](learning_rate, **settings))


def from_optax(transform: optax.GradientTransformation) -> Server:
    """Any optax transformation as a server rule; see ``optimizer``."""

    def keep(new: PyTree, old: PyTree, coverage: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o, c: jnp.where(c > 0, n, o), new, old, coverage)

    def update(slot: PyTree, variables: PyTree, mean: PyTree, coverage: PyTree, any_ok: Array) -> tuple[PyTree, PyTree]:
        params, covered = variables["params"], coverage["params"]
        gradient = jax.tree.map(jnp.negative, mean["params"])
        step, new_slot = transform.update(gradient, slot, params)
        moved = {name: jax.tree.map(jnp.add, variables[name], mean[name]) for name in variables}
        moved["params"] = optax.apply_updates(params, step)
        # Coverage in the shape of the optimizer's state: where a moment belongs to an entry that nobody held, keep it.
        held = optax.tree.map_params(transform, lambda _, c: c, slot, covered, transform_non_params=jnp.ones_like)
        moments = keep(new_slot, slot, held)
        # A round in which every client failed counts for nothing, not even for Adam's step count.
        return tree.select(any_ok, moments, slot), keep(moved, variables, coverage)

    return Server(lambda variables: transform.init(variables["params"]), update)

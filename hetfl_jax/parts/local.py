"""Local training: epochs of shuffled batches over one client's examples."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hetfl_jax.capacity import View
from hetfl_jax.parts.drift import Drift
from hetfl_jax.parts.objective import Objective, last_exit
from hetfl_jax.random import permute
from hetfl_jax.types import Array, PyTree, Shard

OPTIMIZERS = ("sgd", "adam")


class Local(NamedTuple):
    """How a client trains."""

    optimizer: Callable[[Array], optax.GradientTransformation]  #: of the round's learning rate
    learning_rate: Callable[[Array], Array]  #: of the round, counted from 0
    batch_size: int
    epochs: int  #: passes over the client's examples
    steps: int = 0  #: if > 0, this many steps instead, whatever the client's size
    shuffle: bool = True  #: without replacement, anew each epoch


class Tally(NamedTuple):
    """Sums over all examples seen."""

    loss: Array
    correct: Array
    examples: Array


def local(
    *,
    optimizer: str = "sgd",
    learning_rate: float,
    batch_size: int,
    epochs: int = 1,
    steps: int = 0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    milestones: Sequence[int] = (),
    decay_factor: float = 0.1,
    round_decay: float = 1.0,
    shuffle: bool = True,
) -> Local:
    """Local SGD or Adam; the optimizer starts anew at every client and round.

    One step is: gradient, clip to global norm ``clip_norm`` (0: none), add ``weight_decay * params`` (norms and biases
    too), momentum, minus learning rate. In round t (from 0) the learning rate is ``learning_rate * decay_factor ^
    (number of milestones <= t) * round_decay ^ t``.

    Raises:
      ValueError: a value out of range.

    >>> round(float(local(learning_rate=0.1, batch_size=10, milestones=(5,)).learning_rate(jnp.int32(5))), 4)
    0.01
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"local optimizer {optimizer!r} is not one of {', '.join(OPTIMIZERS)} (train.optimizer)")
    least = {"learning_rate": 1e-12, "batch_size": 1, "epochs": 0, "steps": 0, "momentum": 0, "weight_decay": 0}
    given = dict(learning_rate=learning_rate, batch_size=batch_size, epochs=epochs, steps=steps, momentum=momentum)
    for name, value in (given | dict(weight_decay=weight_decay, clip_norm=clip_norm)).items():
        if not value >= least.get(name, 0):
            raise ValueError(f"{name} {value}, allowed >= {least.get(name, 0)} (train.{name})")

    def schedule(round: Array) -> Array:
        passed = sum((round >= m for m in milestones), jnp.int32(0))
        return learning_rate * jnp.power(decay_factor, passed) * jnp.power(round_decay, round)

    def transform(rate: Array) -> optax.GradientTransformation:
        steps = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
        if weight_decay:
            steps.append(optax.add_decayed_weights(weight_decay))
        rule = optax.sgd(rate, momentum or None) if optimizer == "sgd" else optax.adam(rate)
        return optax.chain(*steps, rule)

    return Local(transform, schedule, batch_size, epochs, steps, shuffle)


def local_steps(settings: Local, size: Array) -> Array:
    """Steps that a client with ``size`` examples makes; the last partial batch of an epoch is kept."""
    by_epochs = settings.epochs * -(-size // settings.batch_size)
    return jnp.where(jnp.asarray(settings.steps) > 0, settings.steps, by_epochs).astype(jnp.int32)


def train(
    settings: Local,
    view: View,
    objective: Objective,
    drift: Drift,
    *,
    key: Array,
    shard: Shard,
    memory: PyTree,
    round: Array,
) -> tuple[PyTree, Tally]:
    """One client's local training from ``view.variables``; returns the variables after it and what was seen.

    Invalid rows of a partial batch are kept out of loss, batch statistics and tally. The step count is traced, so
    clients of any size share one program.
    """
    start = view.variables
    transform = settings.optimizer(settings.learning_rate(round))
    batch = settings.batch_size
    per_epoch = -(-shard.size // batch)

    def rows_of(step: Array) -> tuple[Array, Array]:
        position = step % per_epoch * batch + jnp.arange(batch)
        valid = position < shard.size
        position = jnp.minimum(position, shard.size - 1)
        if settings.shuffle:
            position = permute(jax.random.fold_in(key, step // per_epoch), position, shard.size)
        return shard.index[shard.offset + position], valid

    def step(i: Array, carry: tuple[PyTree, PyTree, Tally]) -> tuple[PyTree, PyTree, Tally]:
        variables, slot, seen = carry
        rows, valid = rows_of(i)
        x, y = shard.x[rows], shard.y[rows]
        step_key = jax.random.fold_in(key, (1 << 20) + i)  # apart from the epochs' keys

        def loss(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
            exits, stats = view.apply({**variables, "params": params}, x, train=True, valid=valid, key=step_key)
            value = objective.loss(exits, view.active, y, valid, shard, round)
            return value, (last_exit(objective.local(exits, shard), view.active), stats)

        params = variables["params"]
        (value, (logits, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        gradient = drift.gradient(gradient, params, start["params"], memory)
        gradient = view.cut({"params": gradient})["params"]
        update, slot = transform.update(gradient, slot, params)
        after = {**variables, "params": optax.apply_updates(params, update)}
        if "batch_stats" in variables:
            after["batch_stats"] = view.cut({"batch_stats": stats})["batch_stats"]
        count = valid.sum().astype(dtype)
        hits = (valid & (logits.argmax(-1) == y)).sum().astype(dtype)
        return after, slot, Tally(seen.loss + value * count, seen.correct + hits, seen.examples + count)

    dtype = jnp.result_type(*jax.tree.leaves(start["params"]))
    zero = Tally(*(jnp.zeros((), dtype) for _ in Tally._fields))
    carry = (start, transform.init(start["params"]), zero)
    variables, _, seen = jax.lax.fori_loop(0, local_steps(settings, shard.size), step, carry)
    return variables, seen

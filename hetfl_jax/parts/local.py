"""Local training: epochs of shuffled batches over one client's examples."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hetfl_jax.core.random import permute
from hetfl_jax.core.shards import examples
from hetfl_jax.core.types import Array, PyTree, Shard
from hetfl_jax.models.families import View
from hetfl_jax.models.windows import map_leaves
from hetfl_jax.parts.drift import Around, Drift
from hetfl_jax.parts.objective import Objective, by_label, last_exit

OPTIMIZERS = ("sgd", "adam")


class Local(NamedTuple):
    """How a client trains."""

    #: (the round's learning rate, what is added to the weight decay) -> transformation
    optimizer: Callable[[Array, Array | float], optax.GradientTransformation]
    learning_rate: Callable[[Array], Array]  #: of the round, counted from 0
    batch_size: int
    epochs: int  #: passes over the client's examples
    steps: int = 0  #: if > 0, this many steps instead, whatever the client's size
    shuffle: bool = True  #: without replacement, anew each epoch
    full_batch: bool = False  #: a client's examples are one batch, of at most ``batch_size``
    keep_momentum: bool = False  #: a client's momentum lives on between its rounds, in its memory


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
    decay_layers: Sequence[str] = (),
    clip_norm: float = 0.0,
    milestones: Sequence[int] = (),
    decay_factor: float = 0.1,
    round_decay: float = 1.0,
    shuffle: bool = True,
    full_batch: bool = False,
    keep_momentum: bool = False,
) -> Local:
    """Local SGD or Adam; the optimizer starts anew at every client and round, unless ``keep_momentum`` (of SGD).

    ``full_batch`` is gradient descent: every step sees all of a client's examples, which are read once; ``batch_size``
    must be at least the largest client's size.

    One step is: gradient, clip to global norm ``clip_norm`` (0: none), add ``weight_decay * params`` (norms and biases
    too, or only the kernels of ``decay_layers``), momentum, minus learning rate. In round t (from 0) the learning rate
    is ``learning_rate * decay_factor ^ (number of milestones <= t) * round_decay ^ t``.

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

    if keep_momentum and not (momentum > 0 and optimizer == "sgd"):
        raise ValueError(f"keep_momentum with momentum {momentum} of {optimizer}: need sgd, > 0 (train.keep_momentum)")

    def schedule(round: Array) -> Array:
        passed = sum((round >= m for m in milestones), jnp.int32(0))
        return learning_rate * jnp.power(decay_factor, passed) * jnp.power(round_decay, round)

    def transform(rate: Array, decay: Array | float) -> optax.GradientTransformation:
        steps = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
        if weight_decay and decay_layers:
            steps.append(optax.add_decayed_weights(weight_decay, partial(_kernels_of, decay_layers)))
        everywhere = decay if decay_layers else weight_decay + decay
        if not isinstance(everywhere, float) or everywhere:
            steps.append(optax.add_decayed_weights(everywhere))
        rule = optax.sgd(rate, momentum or None) if optimizer == "sgd" else optax.adam(rate)
        return optax.chain(*steps, rule)

    shuffle = shuffle and not full_batch
    return Local(transform, schedule, batch_size, epochs, steps, shuffle, full_batch, keep_momentum)


def _kernels_of(layers: Sequence[str], params: PyTree) -> PyTree:
    """Whether each leaf is the kernel of one of the layers."""
    return map_leaves(lambda path, _: path[-1] == "kernel" and not set(layers).isdisjoint(path), params)


def tally(logits: Callable[[Array], Array], each: Callable[[Array, Array], Array], batch: int, shard: Shard) -> Tally:
    """Loss and hits over all of a shard's examples, in batches.

    Args:
      logits: examples -> [B, C] ([B, S, C] where an example is a sequence of labels), or [R, ...] of several ways to
        read a model: then the sums have a leading R.
      each: (logits, labels) -> loss of each example, [B].
      batch: examples at a time.
    """

    def step(i: Array, seen: Tally) -> Tally:
        position = i * batch + jnp.arange(batch)
        valid = position < shard.size
        x, labels = examples(shard, shard.index[shard.offset + jnp.minimum(position, shard.size - 1)])
        found, labels, valid = by_label(logits(x), labels, valid)
        of = lambda found: _count(found, each(found, labels), labels, valid)  # noqa: E731
        return jax.tree.map(lambda a, b: a + b.astype(dtype), seen, jax.vmap(of)(found) if readings else of(found))

    dtype = jnp.result_type(float)
    first, of_first = examples(shard, shard.index[shard.offset + jnp.zeros(batch, int)])
    found = jax.eval_shape(logits, first)
    readings = found.shape[: found.ndim - of_first.ndim - 1]
    zero = Tally(*(jnp.zeros(readings, dtype) for _ in Tally._fields))
    return jax.lax.fori_loop(0, -(-shard.size // batch), step, zero)


def _count(logits: Array, loss: Array, labels: Array, valid: Array) -> Tally:
    hits = valid & (logits.argmax(-1) == labels)
    return Tally(jnp.where(valid, loss, 0).sum(), hits.sum(), valid.sum())


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
    context: PyTree = {},  # noqa: B006
) -> tuple[PyTree, Tally, PyTree, PyTree]:
    """One client's local training from ``view.variables``.

    Returns:
      (variables after it, what was seen, memory after it, what the drift sends besides the model).

    Invalid rows of a partial batch are kept out of loss, batch statistics and tally. The step count is traced, so
    clients of any size share one program.
    """
    start = view.variables
    around = Around(start["params"], memory, context, shard.size)
    transform = settings.optimizer(settings.learning_rate(round), drift.decay(around))
    batch = settings.batch_size
    per_epoch = -(-shard.size // batch)

    def rows_of(step: Array) -> tuple[Array, Array]:
        position = step % per_epoch * batch + jnp.arange(batch)
        valid = position < shard.size
        position = jnp.minimum(position, shard.size - 1)
        if settings.shuffle:
            position = permute(jax.random.fold_in(key, step // per_epoch), position, shard.size)
        return shard.index[shard.offset + position], valid

    first = rows_of(jnp.int32(0))
    whole = (*examples(shard, first[0]), first[1]) if settings.full_batch else None

    def step(i: Array, carry: tuple[PyTree, PyTree, Tally, PyTree]) -> tuple[PyTree, PyTree, Tally, PyTree]:
        variables, slot, seen, batch = carry
        x, labels, valid = whole or (*examples(shard, batch[0]), batch[1])
        step_key = jax.random.fold_in(key, (1 << 20) + i)  # apart from the epochs' keys

        def loss(params: PyTree) -> tuple[Array, tuple[Array, Array, PyTree]]:
            exits, stats = view.apply({**variables, "params": params}, x, train=True, valid=valid, key=step_key)
            exits, y, counts = by_label(exits, labels, valid)
            value = objective.loss(exits, view.active, y, counts, shard, round)
            hits = counts & (last_exit(objective.local(exits, shard), view.active).argmax(-1) == y)
            return value, (hits.sum().astype(dtype), counts.sum().astype(dtype), stats)

        params = variables["params"]
        (value, (hits, count, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        gradient = drift.gradient(gradient, params, around)
        gradient = view.cut({"params": gradient})["params"]
        update, slot = transform.update(gradient, slot, params)
        after = {**variables, "params": optax.apply_updates(params, update)}
        if "batch_stats" in variables:
            after["batch_stats"] = view.cut({"batch_stats": stats})["batch_stats"]
        tally = Tally(seen.loss + value * count, seen.correct + hits, seen.examples + count)
        # The next batch's rows are carried: XLA would repeat the shuffle in everything that reads from the batch.
        return after, slot, tally, batch if whole else rows_of(i + 1)

    dtype = jnp.result_type(*jax.tree.leaves(start["params"]))
    zero = Tally(*(jnp.zeros((), dtype) for _ in Tally._fields))
    slot = transform.init(start["params"])
    if settings.keep_momentum:
        slot = optax.tree.set(slot, trace=memory["momentum"]["params"])
    steps = local_steps(settings, shard.size)
    variables, slot, seen, _ = jax.lax.fori_loop(0, steps, step, (start, slot, zero, first))
    kept, sent = drift.update(variables["params"], around, steps)
    if settings.keep_momentum:
        kept = {**kept, "momentum": {"params": optax.tree.get(slot, "trace")}}
    return variables, seen, kept, sent

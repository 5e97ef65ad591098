"""Local training: epochs of shuffled batches over one client's examples."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hetfl_jax.core.random import permute
from hetfl_jax.core.shards import examples as examples_of
from hetfl_jax.core.types import Arguments, Array, Batch, ClientContext, PyTree, Shard, Tally
from hetfl_jax.models.families import Forward, View
from hetfl_jax.models.windows import Path, Prepare, map_leaves
from hetfl_jax.parts.drift import Drift
from hetfl_jax.parts.objective import Objective, by_label, hits

#: optimisers of clients, by their name in optax
OPTIMIZERS = (
    "sgd", "adam", "adamw", "adagrad", "adadelta", "adamax", "lamb", "lion", "nadam", "nadamw", "radam", "rmsprop",
    "yogi",
)  # fmt: skip
SCHEDULES = ("steps", "constant", "cosine")


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
    plain: bool = True  #: a step is the gradient times the rate: SGD without momentum


class Trained(NamedTuple):
    """A client after its local training."""

    variables: PyTree
    tally: Tally
    work: Array | None  #: [2, L] int32, see ``objective.Aux``
    memory: PyTree
    extra: PyTree  #: what the drift sends besides the model


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
    schedule: str | Callable[[Array], Array] = "steps",
    milestones: Sequence[int] = (),
    decay_factor: float = 0.1,
    round_decay: float = 1.0,
    warmup_rounds: int = 0,
    rounds: int = 0,
    shuffle: bool = True,
    full_batch: bool = False,
    keep_momentum: bool = False,
    optimizer_args: Arguments | None = None,
) -> Local:
    """Local training by an optax optimizer, which starts anew at every client and round.

    One step is: gradient, clip to global norm ``clip_norm`` (0: none), add ``weight_decay * params`` (norms and biases
    too, or only the kernels of ``decay_layers``), the optimizer's rule, minus learning rate. An optimizer with a decay
    of its own (adamw, lamb, lion, nadamw) takes ``weight_decay`` there, decoupled from the gradient.

    Args:
      optimizer: one of ``OPTIMIZERS``; ``momentum`` is of sgd, ``optimizer_args`` are further arguments of any.
      steps: if > 0, this many steps a round in place of ``epochs``.
      schedule: of the learning rate over rounds t from 0. ``steps``: times ``decay_factor ^ (number of milestones <=
        t) * round_decay ^ t``; ``constant``; ``cosine``: to 0 over ``rounds``; or a function (t) -> rate.
      warmup_rounds: the rate grows linearly over so many first rounds, whatever the schedule.
      full_batch: gradient descent: every step sees all of a client's examples, which are read once; ``batch_size`` must
        be at least the largest client's size.
      keep_momentum: the momentum of sgd lives on between a client's rounds.

    Raises:
      ValueError: a value out of range.

    >>> round(float(local(learning_rate=0.1, batch_size=10, milestones=(5,)).learning_rate(jnp.int32(5))), 4)
    0.01
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"local optimizer {optimizer!r} is not one of {', '.join(OPTIMIZERS)} (train.optimizer)")
    given = dict(learning_rate=learning_rate, batch_size=batch_size, epochs=epochs, steps=steps, momentum=momentum)
    given |= dict(weight_decay=weight_decay, clip_norm=clip_norm, warmup_rounds=warmup_rounds)
    _in_range(given | dict(decay_factor=decay_factor, round_decay=round_decay))
    if keep_momentum and not (momentum > 0 and optimizer == "sgd"):
        raise ValueError(f"keep_momentum with momentum {momentum} of {optimizer}: need sgd, > 0 (train.keep_momentum)")
    make = getattr(optax, optimizer)
    known = inspect.signature(make).parameters
    args = dict(optimizer_args or {})
    if wrong := sorted(set(args) - set(known)):
        raise ValueError(
            f"argument {wrong[0]!r} is not one of {', '.join(known)} of {optimizer} (train.optimizer_args)"
        )
    if optimizer == "sgd":
        args = {"momentum": momentum or None, **args}
    decoupled = "weight_decay" in known
    if decoupled:
        args = {"weight_decay": weight_decay, **args}
        if decay_layers:
            args = {"mask": partial(_kernels_of, decay_layers), **args}

    def transform(rate: Array, decay: Array | float) -> optax.GradientTransformation:
        parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
        if weight_decay and decay_layers and not decoupled:
            parts.append(optax.add_decayed_weights(weight_decay, partial(_kernels_of, decay_layers)))
        everywhere = decay if decay_layers or decoupled else weight_decay + decay
        if not isinstance(everywhere, float) or everywhere:
            parts.append(optax.add_decayed_weights(everywhere))
        return optax.chain(*parts, make(rate, **args))

    if optimizer_args:
        _check_arguments(optimizer, transform)
    rate = _schedule(schedule, learning_rate, milestones, decay_factor, round_decay, warmup_rounds, rounds)
    plain = optimizer == "sgd" and not args["momentum"]
    return Local(
        transform, rate, batch_size, epochs, steps, shuffle and not full_batch, full_batch, keep_momentum, plain
    )  # fmt: skip


def _in_range(given: Mapping[str, float]) -> None:
    """Refuse a number that is out of range, with its key.

    >>> _in_range({"momentum": 1.5})
    Traceback (most recent call last):
    ValueError: momentum 1.5, allowed 0 <= m < 1 (train.momentum)
    """
    least = {"learning_rate": 1e-12, "batch_size": 1, "decay_factor": 1e-12, "round_decay": 1e-12}
    for name, value in given.items():
        if not least.get(name, 0) <= value < float("inf"):
            raise ValueError(f"{name} {value}, allowed >= {least.get(name, 0)} and finite (train.{name})")
    if not given["momentum"] < 1:
        raise ValueError(f"momentum {given['momentum']}, allowed 0 <= m < 1 (train.momentum)")


def _check_arguments(name: str, transform: Callable[..., optax.GradientTransformation]) -> None:
    """An optimizer's own arguments are tried on one number, so that a wrong one is an error here."""

    def once(value: Array) -> PyTree:
        rule = transform(jnp.float32(0.1), 0.0)
        return rule.update({"p": value}, rule.init({"p": value}), {"p": value})

    try:
        jax.eval_shape(once, jnp.zeros(1))
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"local optimizer {name!r}: {why} (train.optimizer_args)") from None


def _schedule(
    schedule: str | Callable[[Array], Array], learning_rate: float, milestones: Sequence[int], decay_factor: float,
    round_decay: float, warmup_rounds: int, rounds: int,
) -> Callable[[Array], Array]:  # fmt: skip
    """Round, from 0 -> learning rate; see ``local``."""
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)} (train.schedule)")
    if schedule == "cosine" and rounds < 1:
        raise ValueError(f"schedule 'cosine' over {rounds} rounds, allowed >= 1 (train.rounds)")

    def steps(round: Array) -> Array:
        passed = sum((round >= m for m in milestones), jnp.int32(0))
        return learning_rate * jnp.power(decay_factor, passed) * jnp.power(round_decay, round)

    makers: dict[str, Callable[[], Callable[[Array], Array]]] = {
        "steps": lambda: steps,
        "constant": lambda: lambda round: jnp.asarray(learning_rate) + 0 * round,
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rounds),
    }
    rule = makers[schedule]() if isinstance(schedule, str) else schedule
    if not warmup_rounds:
        return rule
    return lambda round: rule(round) * jnp.minimum(1.0, (round + 1) / warmup_rounds)


def _kernels_of(layers: Sequence[str], params: PyTree) -> PyTree:
    """Whether each leaf is the kernel of one of the layers."""
    return map_leaves(lambda path, _: path[-1] == "kernel" and not set(layers).isdisjoint(path), params)


def tally(
    logits: Callable[[Batch], Array], each: Callable[..., Array], batch: int, shard: Shard,
    *, key: Array | None = None, examples: int = 0,
) -> Tally:  # fmt: skip
    """Loss and hits over a shard's examples, in batches.

    Args:
      logits: a batch of examples as stored -> [B, C] ([B, S, C] where an example is a sequence of labels), or [R, ...]
        of several ways to read a model: then the sums have a leading R.
      each: (logits, labels) -> loss of each example, [B]; or [M, B], the loss and further values: then the sum of
        losses has a trailing M.
      batch: examples at a time.
      key, examples: if ``examples`` > 0, only so many, drawn by the key without replacement.

    >>> shard = Shard(jnp.arange(3.0)[:, None], jnp.array([0, 1, 0]), jnp.arange(3), jnp.int32(0), jnp.int32(3), ())
    >>> logits = lambda batch: jnp.concatenate([0 * batch.x, batch.x - 0.5], 1)  # label 1 where x > 0.5
    >>> [float(v) for v in tally(logits, optax.softmax_cross_entropy_with_integer_labels, 2, shard)][1:]
    [2.0, 3.0]
    """
    count = jnp.minimum(shard.size, examples) if examples else shard.size

    def step(i: Array, seen: Tally) -> Tally:
        position = i * batch + jnp.arange(batch)
        valid = position < count
        position = jnp.minimum(position, count - 1)
        if examples and key is not None:
            position = permute(key, position, shard.size)
        x, labels = examples_of(shard, shard.rows[shard.offset + position])
        return jax.tree.map(lambda a, b: a + b.astype(dtype), seen, sums(Batch(x, labels, valid)))

    def sums(batch: Batch) -> Tally:
        found, labels, valid = by_label(logits(batch), batch.labels, batch.valid)
        of = lambda found: _count(found, each(found, labels), labels, valid)  # noqa: E731
        return jax.vmap(of)(found) if found.ndim > labels.ndim + 1 else of(found)

    dtype = jnp.result_type(float)
    first = examples_of(shard, shard.rows[shard.offset + jnp.zeros(batch, int)])
    shapes = jax.eval_shape(sums, Batch(*first, jnp.zeros(batch, bool)))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, dtype), shapes)
    return jax.lax.fori_loop(0, -(-count // batch), step, zero)


def _count(logits: Array, loss: Array, labels: Array, valid: Array) -> Tally:
    """Sums over the valid examples of [B, C] logits: loss, hits, how many."""
    return Tally(jnp.where(valid, loss, 0).sum(-1), (valid & hits(logits, labels)).sum(), valid.sum())


def client_statistics(collect: Callable[[Array, Array], PyTree], shard: Shard, batch: int, passes: int) -> PyTree:
    """Batch statistics of one client's data: plain means over the batches of several passes in different orders.

    Args:
      collect: (x [B, ...] as stored, valid [B]) -> statistics of one batch.

    >>> shard = Shard(jnp.array([1.0, 3.0, 5.0, 7.0]), jnp.zeros(4), jnp.arange(4), jnp.int32(0), jnp.int32(4), ())
    >>> float(client_statistics(lambda x, valid: x.mean(), shard, batch=2, passes=3))
    4.0
    """
    reader = _reader(jax.random.key(0), shard, batch, True)
    steps = -(-shard.size // batch) * passes

    def of(step: Array) -> PyTree:
        rows, valid = reader(step)
        return collect(examples_of(shard, rows)[0], valid)

    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of, jnp.int32(0)))
    total = jax.lax.fori_loop(0, steps, lambda i, t: jax.tree.map(jnp.add, t, of(i)), zero)
    return jax.tree.map(lambda t: t / steps, total)


def local_steps(settings: Local, size: Array) -> Array:
    """Steps that a client with ``size`` examples makes; the last partial batch of an epoch is kept.

    Args:
      settings: of local training.
      size: int32 examples, any shape.

    >>> int(local_steps(local(learning_rate=0.1, batch_size=4, epochs=2), jnp.int32(6)))
    4
    """
    by_epochs = settings.epochs * -(-size // settings.batch_size)
    return jnp.where(jnp.asarray(settings.steps) > 0, settings.steps, by_epochs).astype(jnp.int32)


def memory_of(settings: Local, params: PyTree) -> PyTree:
    """What local training itself keeps of a client between its rounds: ``{name: {"params": tree}}``.

    >>> memory_of(local(learning_rate=0.1, batch_size=4), {"w": jnp.zeros(2)})
    {}
    >>> list(memory_of(local(learning_rate=0.1, batch_size=4, momentum=0.9, keep_momentum=True), {"w": jnp.zeros(2)}))
    ['momentum']
    """
    return {"momentum": {"params": jax.tree.map(jnp.zeros_like, params)}} if settings.keep_momentum else {}


def examples_trained(settings: Local, size: Array) -> Array:
    """int32 examples that a client with ``size`` of them goes through in a round, real ones alone.

    >>> int(examples_trained(local(learning_rate=0.1, batch_size=4, steps=3), jnp.int32(6)))
    10
    """
    steps, per_epoch = local_steps(settings, size), -(-size // settings.batch_size)
    rest = jnp.minimum(steps % per_epoch * settings.batch_size, size)
    return (steps // per_epoch * size + rest).astype(jnp.int32)


def _reader(key: Array, shard: Shard, batch: int, shuffle: bool) -> Callable[[Array], tuple[Array, Array]]:
    """``rows(step)``: pool rows [B] of a step's batch, and which of them are real."""
    per_epoch = -(-shard.size // batch)

    def rows(step: Array) -> tuple[Array, Array]:
        position = step % per_epoch * batch + jnp.arange(batch)
        valid = position < shard.size
        position = jnp.minimum(position, shard.size - 1)
        if shuffle:
            position = permute(jax.random.fold_in(key, step // per_epoch), position, shard.size)
        return shard.rows[shard.offset + position], valid

    return rows


def _where_trained(trains: Callable[[Path], bool | Array], new: PyTree, old: PyTree) -> PyTree:
    """``new``, but leaves of ``{"params": ...}`` that are not trained as they were, bit for bit."""

    def leaf(path: Path, after: Array, before: Array) -> Array:
        yes = trains(("params", *path))
        return (after if yes else before) if isinstance(yes, bool) else jnp.where(yes, after, before)

    before = iter(jax.tree.leaves(old))
    return map_leaves(lambda path, after: leaf(path, after, next(before)), new)


def train(
    settings: Local,
    view: View,
    prepare: Prepare,
    objective: Objective,
    drift: Drift,
    context: ClientContext,
    trains: Callable[[Path], bool | Array] = lambda path: True,
) -> Trained:
    """One client's local training from ``view.variables``.

    Invalid rows of a partial batch are kept out of loss, batch statistics and tally. The step count is traced, so
    clients of any size share one program.

    Args:
      prepare: stored examples -> the net's input, see ``windows.Family.prepare``.
      context: the client's, with memory and what was sent at the client's level.
      trains: whether a leaf, by its path, is trained; any other comes back bit for bit, and so does its momentum.

    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts import drift, objective
    >>> fam, key, zero = families.family(MLP(hidden=()), [{}], jnp.zeros((1, 3))), jax.random.key(0), jnp.int32(0)
    >>> view, rule = families.view(fam, families.init(fam, key), 0), local(learning_rate=0.1, batch_size=2, epochs=2)
    >>> shard = Shard(jnp.ones((3, 3)), jnp.zeros(3, int), jnp.arange(3), zero, jnp.int32(3), ())
    >>> context = ClientContext(key, zero, 0, shard, (), (), {})
    >>> int(train(rule, view, fam.prepare, objective.cross_entropy(), drift.none(), context).tally.examples)
    6
    """
    start, shard = view.variables, context.shard
    transform = settings.optimizer(settings.learning_rate(context.round), drift.decay(context))
    rows_of = _reader(context.key, shard, settings.batch_size, settings.shuffle)
    first = rows_of(jnp.int32(0))
    whole = (*examples_of(shard, first[0]), first[1]) if settings.full_batch else None

    def step(i: Array, carry: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        variables, slot, seen, work, rows = carry
        x, labels, valid = whole or (*examples_of(shard, rows[0]), rows[1])
        step_key = jax.random.fold_in(context.key, (1 << 20) + i)  # apart from the epochs' keys
        augment, dropout = jax.random.split(step_key)
        batch = Batch(prepare(x, augment), labels, valid)

        def loss(params: PyTree) -> tuple[Array, PyTree]:
            options = {"train": True, "valid": valid, "key": dropout}
            forward = Forward(view, {**variables, "params": params}, options)
            return objective.loss(forward, batch, context._replace(key=jax.random.fold_in(step_key, 2)))

        params = variables["params"]
        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        gradient = drift.gradient(gradient, params, context)
        gradient = _where_trained(trains, gradient, jax.tree.map(jnp.zeros_like, gradient))
        gradient = view.cut({"params": gradient})["params"]
        update, slot = transform.update(gradient, slot, params)
        after = {**variables, "params": _where_trained(trains, optax.apply_updates(params, update), params)}
        if "batch_stats" in variables:
            after["batch_stats"] = view.cut({"batch_stats": aux.stats})["batch_stats"]
        right, count = (n.astype(dtype) for n in (aux.correct, aux.examples))
        seen = Tally(seen.loss + value.astype(dtype) * count, seen.correct + right, seen.examples + count)
        work = work + aux.work if objective.work_levels else work
        # The next batch's rows are carried: XLA would repeat the shuffle in everything that reads from the batch.
        return after, slot, seen, work, rows if whole else rows_of(i + 1)

    dtype = jnp.promote_types(jnp.float32, jnp.result_type(*jax.tree.leaves(start["params"])))
    slot = transform.init(start["params"])
    if settings.keep_momentum:
        slot = optax.tree.set(slot, trace=context.memory["momentum"]["params"])
    zero = Tally(*(jnp.zeros((), dtype) for _ in Tally._fields))
    none = jnp.zeros((2, objective.work_levels), jnp.int32) if objective.work_levels else None
    steps = local_steps(settings, shard.size)
    variables, slot, seen, work, _ = jax.lax.fori_loop(0, steps, step, (start, slot, zero, none, first))
    kept, extra = drift.update(variables["params"], context, steps)
    if settings.keep_momentum:
        trace = _where_trained(trains, optax.tree.get(slot, "trace"), context.memory["momentum"]["params"])
        kept = {**kept, "momentum": {"params": trace}}
    return Trained(variables, seen, work, kept, extra)

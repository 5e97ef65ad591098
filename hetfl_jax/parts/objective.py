"""What a client minimises, and how its own test data is judged."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from hetfl_jax.types import Array, Shard


class Objective(NamedTuple):
    """A local loss."""

    #: (exits [E, B, C], active [E], labels [B], valid [B], shard, round) -> scalar, a mean over valid examples
    loss: Callable[[Array, Array, Array, Array, Shard, Array], Array]
    #: (exits, shard) -> exits as the client's own evaluation sees them
    local: Callable[[Array, Shard], Array]
    #: (logits [B, C], labels [B]) -> [B], the loss by which a model is judged
    each: Callable[[Array, Array], Array] = optax.softmax_cross_entropy_with_integer_labels


def last_exit(exits: Array, active: Array) -> Array:
    """Logits of the deepest active exit, [B, C]."""
    return exits[jnp.maximum(active.sum() - 1, 0)]


def mean_cross_entropy(logits: Array, labels: Array, valid: Array) -> Array:
    """Cross-entropy averaged over the valid rows.

    >>> mean_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 1]), jnp.array([True, False])).round(4)
    Array(1.3863, dtype=float32)
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(valid, loss, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def cross_entropy() -> Objective:
    """Mean cross-entropy of the deepest exit."""

    def loss(exits: Array, active: Array, labels: Array, valid: Array, shard: Shard, round: Array) -> Array:
        return mean_cross_entropy(last_exit(exits, active), labels, valid)

    return Objective(loss, lambda exits, shard: exits)


def squared_error() -> Objective:
    """Mean of ``(f(x) - y)^2`` (no 1/2) of a net with one output; the labels are numbers."""

    def each(logits: Array, labels: Array) -> Array:
        return jnp.square(logits[:, 0] - labels)

    def loss(exits: Array, active: Array, labels: Array, valid: Array, shard: Shard, round: Array) -> Array:
        errors = each(last_exit(exits, active), labels)
        return jnp.where(valid, errors, 0.0).sum() / jnp.maximum(valid.sum(), 1)

    return Objective(loss, lambda exits, shard: exits, each)


def masked_cross_entropy() -> Objective:
    """HeteroFL's masked loss: logits of classes that the client does not hold are set to ZERO before the softmax.

    Not to minus infinity: absent classes still add ``exp(0)`` each to the denominator and may win the argmax; they get
    no gradient. The same holds in the client's own evaluation.
    """

    def held(exits: Array, shard: Shard) -> Array:
        return jnp.where(shard.classes, exits, 0.0)

    def loss(exits: Array, active: Array, labels: Array, valid: Array, shard: Shard, round: Array) -> Array:
        return mean_cross_entropy(last_exit(held(exits, shard), active), labels, valid)

    return Objective(loss, held)

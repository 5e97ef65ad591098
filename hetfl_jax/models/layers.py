"""Layers that can run narrower than they are: initialisation as in PyTorch, the Scaler, and the norms.

A net runs in one of two ways. *Dense*: its own fields (``width``) give the true shapes. *Masked*: it is built at full
shape and ``capacity`` carries the traced fields of the level; parameters outside the level's window are zero, and
every layer keeps inactive channels exactly zero.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Array
from hetfl_jax.models.conv import lowered

NORMS = ("bn", "bn_tracked", "in", "ln", "gn", "none")
EPSILON = 1e-5
GROUPS = 4  # of gn, as in HeteroFL
MOMENTUM = 0.9  # of tracked statistics, PyTorch's 0.1
_SLACK = 1e-3  # keeps 0.6 * 10 at 6 in float32 and in float64

uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # bound 1 / sqrt(fan_in)


def active_channels(full: int, width: float) -> int:
    """Channels of a layer at a width rate: the ceiling of ``full * width``.

    >>> active_channels(10, 0.6), active_channels(5, 0.5)
    (6, 3)
    """
    return max(1, math.ceil(full * width - _SLACK))


def traced_channels(full: int, width: Array | None) -> Array | None:
    """``active_channels`` for a traced rate; ``None`` (all channels) stays ``None``."""
    return None if width is None else jnp.maximum(1, jnp.ceil(full * width - _SLACK)).astype(jnp.int32)


def _bias_init(fan_in: int) -> nn.initializers.Initializer:
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def conv_layer(
    x: Array, features: int, kernel: int, *, stride: int = 1, bias: bool = True, lowering: str = "auto",
    padded: bool = True, name: str,
) -> Array:  # fmt: skip
    """A square convolution padded by ``kernel // 2`` or not at all, with PyTorch's default initialisation."""
    pad = kernel // 2 if padded else 0
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=bias,
        kernel_init=uniform_fan_in,
        bias_init=_bias_init(kernel * kernel * x.shape[-1]),
        conv_general_dilated=lowered(lowering),
        name=name,
    )(x)


def dense_layer(x: Array, features: int, *, zero_bias: bool = False, name: str) -> Array:
    """A linear layer with PyTorch's default initialisation; HeteroFL's classifiers start with a zero bias."""
    bias_init = nn.initializers.zeros if zero_bias else _bias_init(x.shape[-1])
    return nn.Dense(features, kernel_init=uniform_fan_in, bias_init=bias_init, name=name)(x)


def scale(x: Array, width: float | Array, *, train: bool) -> Array:
    """HeteroFL's Scaler: divide by the width rate while training, identity in evaluation (section 3 of the paper)."""
    return x / width if train else x


def check_norm(kind: str, smallest: int, groups: int = GROUPS) -> None:
    """Reject an unknown norm, and gn groups that do not divide the narrowest layer."""
    if kind not in NORMS:
        raise ValueError(f"norm {kind!r} is not one of {', '.join(NORMS)} (models)")
    if kind == "gn" and smallest % groups:
        raise ValueError(f"norm 'gn' has {groups} groups, which do not divide a layer of {smallest} channels (models)")


class Norm(nn.Module):
    """Normalisation with affine parameters that stays correct when only the first ``active`` channels are in use.

    ``bn`` is HeteroFL's static batch norm: the biased statistics of the batch while training, nothing tracked. If the
    collection ``batch_stats`` is mutable, it receives the batch mean and the *unbiased* batch variance; evaluation
    uses that collection where it is given and the batch otherwise (which is how statistics are collected).
    ``bn_tracked`` keeps running statistics. ``in``, ``ln`` and ``gn`` are group norms of one channel a group, one
    group, and ``groups`` groups of the *active* channels.
    """

    kind: str
    groups: int = GROUPS

    @nn.compact
    def __call__(self, x: Array, *, train: bool, valid: Array | None = None, active: Array | None = None) -> Array:
        """Normalise [B, H, W, C] or [B, C]; rows that are not ``valid`` do not count in batch statistics."""
        check_norm(self.kind, self.groups, self.groups)
        if self.kind == "none":
            return x
        features = x.shape[-1]
        if self.kind.startswith("bn"):
            mean, var = self._batch_statistics(x, train, valid)
        else:
            mean, var = _group_statistics(x, self.kind, active, self.groups)
        weight = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        y = (x - mean) * (jax.lax.rsqrt(var + EPSILON) * weight) + bias
        return y if active is None else jnp.where(jnp.arange(features) < active, y, 0.0)

    def _batch_statistics(self, x: Array, train: bool, valid: Array | None) -> tuple[Array, Array]:
        tracked = self.kind == "bn_tracked"
        stored = self.has_variable("batch_stats", "mean")
        if tracked and not stored:
            self.put_variable("batch_stats", "mean", jnp.zeros(x.shape[-1]))
            self.put_variable("batch_stats", "var", jnp.ones(x.shape[-1]))
        if stored and not train:
            return self.get_variable("batch_stats", "mean"), self.get_variable("batch_stats", "var")
        axes = tuple(range(x.ndim - 1))
        weight = jnp.ones(x.shape[:1], x.dtype) if valid is None else valid.astype(x.dtype)
        count = weight.sum() * math.prod(x.shape[1:-1])
        weight = weight.reshape(-1, *(1 for _ in x.shape[1:]))
        mean = (x * weight).sum(axes) / count
        var = (jnp.square(x - mean) * weight).sum(axes) / count
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            unbiased = var * (count / jnp.maximum(count - 1, 1))
            for name, value in (("mean", mean), ("var", unbiased)):
                if tracked:
                    value = MOMENTUM * self.get_variable("batch_stats", name) + (1 - MOMENTUM) * value
                self.put_variable("batch_stats", name, value)
        return mean, var


def _group_statistics(x: Array, kind: str, active: Array | None, groups: int) -> tuple[Array, Array]:
    """Mean and biased variance per example and group, broadcast back to channels: [B, 1, 1, C]."""
    spatial = tuple(range(1, x.ndim - 1))
    if kind == "in":
        mean = x.mean(spatial, keepdims=True)
        return mean, jnp.square(x - mean).mean(spatial, keepdims=True)
    features, groups = x.shape[-1], groups if kind == "gn" else 1
    per_group = (features if active is None else active) // groups
    # [C, G]; channels that are not active belong to no group
    member = jax.nn.one_hot(jnp.arange(features) // per_group, groups, dtype=x.dtype)
    spread = (member @ member.T) / per_group

    def group_mean(v: Array) -> Array:
        return v.mean(spatial, keepdims=True) @ spread

    mean = group_mean(x)
    return mean, group_mean(jnp.square(x - mean))

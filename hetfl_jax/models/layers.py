"""Layers that can run narrower than they are: initialisation as in PyTorch, the Scaler, and the norms.

A net runs in one of two ways. *Dense*: its own fields (``width``) give the true shapes. *Masked*: it is built at full
shape and ``capacity`` carries the traced fields of the level; parameters outside the level's window are zero, and
every layer keeps inactive channels exactly zero.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from hetfl_jax.core import tree
from hetfl_jax.core.types import Array
from hetfl_jax.models.conv import conv, lowered, max_pool

NORMS = ("bn", "bn_batch", "bn_tracked", "bn_tiers", "bn_dual", "bn_dual_shared", "in", "ln", "gn", "none")
RUNNING = ("bn_tracked", "bn_tiers", "bn_dual", "bn_dual_shared")  #: norms that keep running statistics
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
    """``active_channels`` for a traced rate; ``None`` (all channels) stays ``None``.

    >>> int(traced_channels(10, jnp.float32(0.6))), traced_channels(10, None)
    (6, None)
    """
    return None if width is None else channels_at(full, width)


def channels_at(full: int, width: float | Array) -> Array:
    """``active_channels`` of a rate that may be traced, int32.

    >>> int(channels_at(5, 0.5))
    3
    """
    return jnp.maximum(1, jnp.ceil(full * width - _SLACK)).astype(jnp.int32)


def random_units(key: Array, full: int, active: int | Array, kept: int | Array) -> Array:
    """[full] bool: ``kept`` of the first ``active`` units at random, drawn alike at every ``active`` (random dropout).

    >>> random_units(jax.random.key(0), 8, 6, 4).sum(), random_units(jax.random.key(0), 8, 6, 4)[6:].tolist()
    (Array(4, dtype=int32), [False, False])
    """
    place = jnp.where(jnp.arange(full) < active, jax.random.uniform(key, (full,)), 2.0)
    return (place.argsort().argsort() < kept) & (place < 2.0)


def _kernel_init(rate: float) -> nn.initializers.Initializer:
    """PyTorch's default, of a layer whose inputs are the share ``rate`` of those of the layer that it is a part of."""
    return nn.initializers.variance_scaling(rate / 3, "fan_in", "uniform")


def _bias_init(fan_in: float) -> nn.initializers.Initializer:
    """Uniform within ``1 / sqrt(fan_in)``, PyTorch's default."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def conv_layer(
    x: Array, features: int, kernel: int, *, stride: int = 1, bias: bool = True, lowering: str = "auto",
    padded: bool = True, pad: int | None = None, rate: float = 1.0, name: str,
) -> Array:  # fmt: skip
    """A square convolution padded by ``kernel // 2``, by ``pad`` or not at all, with PyTorch's default initialisation.

    Args:
      x: [B, H, W, I].
      features: output channels.
      kernel: height and width.
      stride: of both axes.
      lowering: see ``models.conv``.
      padded: whether zeros are put around.
      pad: how many at each side.
      rate: start values as in a layer with ``1 / rate`` times as many inputs.

    Returns:
      [B, H', W', features], with H' = (H + 2 pad - kernel) // stride + 1.

    >>> class Halved(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return conv_layer(x, 4, 3, stride=2, name="conv")
    >>> Halved().init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 3)))[0].shape
    (1, 4, 4, 4)
    """
    pad = (kernel // 2 if padded else 0) if pad is None else pad
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=bias,
        kernel_init=_kernel_init(rate),
        bias_init=_bias_init(kernel * kernel * x.shape[-1] / rate),
        conv_general_dilated=lowered(lowering),
        name=name,
    )(x)


class PooledConv(nn.Module):
    """``conv_layer`` and a max-pool 2 x 2, which comes before the bias: ``max(x) + b`` is ``max(x + b)``, rounded too.

    >>> PooledConv(3, 5).init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 2)))[0].shape
    (1, 4, 4, 3)
    """

    features: int
    kernel: int
    lowering: str = "auto"
    rate: float = 1.0  #: see ``conv_layer``

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, I] -> [B, H / 2, W / 2, C]."""
        k, pad = self.kernel, self.kernel // 2
        w = self.param("kernel", _kernel_init(self.rate), (k, k, x.shape[-1], self.features))
        b = self.param("bias", _bias_init(k * k * x.shape[-1] / self.rate), (self.features,))
        x, w, b = promote_dtype(x, w, b)
        return max_pool(conv(x, w, 1, ((pad, pad), (pad, pad)), self.lowering)) + b


def dense_layer(x: Array, features: int, *, zero_bias: bool = False, rate: float = 1.0, name: str) -> Array:
    """A linear layer with PyTorch's default initialisation; HeteroFL's classifiers start with a zero bias.

    Args:
      x: [..., I].
      features: outputs.
      rate: start values as in a layer with ``1 / rate`` times as many inputs.

    Returns:
      [..., features].

    >>> class Classifier(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return dense_layer(x, 3, zero_bias=True, name="head")
    >>> Classifier().init(jax.random.key(0), jnp.ones((1, 4)))["params"]["head"]["bias"].tolist()
    [0.0, 0.0, 0.0]
    """
    bias_init = nn.initializers.zeros if zero_bias else _bias_init(x.shape[-1] / rate)
    return nn.Dense(features, kernel_init=_kernel_init(rate), bias_init=bias_init, name=name)(x)


def scale(x: Array, width: float | Array, *, train: bool) -> Array:
    """HeteroFL's Scaler: divide by the width rate while training, identity in evaluation (section 3 of the paper).

    Args:
      x: activations, any shape.
      width: rate of the level, 0 < w <= 1.
      train: whether the net trains.

    >>> float(scale(jnp.float32(2), 0.5, train=True)), float(scale(jnp.float32(2), 0.5, train=False))
    (4.0, 2.0)
    """
    return (x / width).astype(x.dtype) if train else x


def check_norm(kind: str, smallest: int, groups: int = GROUPS) -> None:
    """Reject an unknown norm, and gn groups that do not divide the narrowest layer.

    Args:
      kind: one of ``NORMS``.
      smallest: channels of the narrowest layer.
      groups: of gn.

    Raises:
      ValueError: either.

    >>> check_norm("gn", 6)
    Traceback (most recent call last):
    ValueError: norm 'gn' has 4 groups, which do not divide a layer of 6 channels (models)
    """
    if kind not in NORMS:
        raise ValueError(f"norm {kind!r} is not one of {', '.join(NORMS)} (models)")
    if kind == "gn" and smallest % groups:
        raise ValueError(f"norm 'gn' has {groups} groups, which do not divide a layer of {smallest} channels (models)")


class Norm(nn.Module):
    """Normalisation with affine parameters that stays correct when only the first ``active`` channels are in use.

    ``bn`` is HeteroFL's static batch norm: the biased statistics of the batch while training, nothing tracked. If the
    collection ``batch_stats`` is mutable, it receives the batch mean and the *unbiased* batch variance; evaluation
    uses that collection where it is given and the batch otherwise (which is how statistics are collected).
    ``bn_batch`` does so in evaluation too, and nothing is collected. ``bn_tracked`` keeps running statistics; so do the
    norms of two branches, ``models.dual``. ``bn_tiers`` keeps a set of them for each of ``tiers`` nested nets, the
    smallest first, [tiers, C], and one affine pair for all; the net that runs is the last of them, or number ``tier``
    counted from 1. ``in``, ``ln`` and ``gn`` are group norms of one channel a group, one group, and ``groups`` groups
    of the *active* channels.
    """

    kind: str
    groups: int = GROUPS
    tiers: int = 1

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool, valid: Array | None = None, active: Array | None = None,
        tier: Array | None = None,
    ) -> Array:  # fmt: skip
        """Normalise [B, H, W, C] or [B, C]; rows that are not ``valid`` do not count in batch statistics."""
        check_norm(self.kind, self.groups, self.groups)
        if self.kind == "none":
            return x
        features, dtype = x.shape[-1], x.dtype
        x = x.astype(tree.wide(dtype))  # moments of bfloat16 numbers too
        if self.kind.startswith("bn"):
            mean, var = self._batch_statistics(x, train, valid, self.tiers if tier is None else tier)
        else:
            mean, var = _group_statistics(x, self.kind, active, self.groups)
        weight = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        y = ((x - mean) * (jax.lax.rsqrt(var + EPSILON) * weight) + bias).astype(dtype)
        return y if active is None else jnp.where(jnp.arange(features) < active, y, 0.0)

    def _batch_statistics(self, x: Array, train: bool, valid: Array | None, tier: int | Array) -> tuple[Array, Array]:
        """Mean and variance [C] that the norm divides by; in training it moves the running ones, where there are any.

        Args:
          valid: [B] bool, rows that count.
          tier: which set of ``bn_tiers``, from 1.
        """
        tracked, by_tier = self.kind in RUNNING, self.kind == "bn_tiers"
        stored = self.has_variable("batch_stats", "mean")
        if tracked and not stored:
            shape = (self.tiers,) * by_tier + x.shape[-1:]
            self.put_variable("batch_stats", "mean", jnp.zeros(shape))
            self.put_variable("batch_stats", "var", jnp.ones(shape))

        def read(name: str) -> Array:
            value: Array = self.get_variable("batch_stats", name)
            return value[tier - 1] if by_tier else value

        if stored and not train:
            return read("mean"), read("var")
        mean, var, count = batch_moments(x, valid)
        gives = self.kind != "bn_batch" and self.is_mutable_collection("batch_stats")
        if gives and not self.is_initializing():
            unbiased = var * (count / jnp.maximum(count - 1, 1))
            for name, value in (("mean", mean), ("var", unbiased)):
                if tracked:
                    value = MOMENTUM * read(name) + (1 - MOMENTUM) * value
                if by_tier:
                    here = jnp.arange(self.tiers)[:, None] == tier - 1
                    value = jnp.where(here, value, self.get_variable("batch_stats", name))
                self.put_variable("batch_stats", name, value)
        return mean, var


def batch_moments(x: Array, valid: Array | None) -> tuple[Array, Array, Array]:
    """Mean and biased variance of every channel of [B, ..., C] over the valid rows, and how many entries that were.

    >>> [v.tolist() for v in batch_moments(jnp.array([[1.0], [3.0], [9.0]]), jnp.array([True, True, False]))]
    [[2.0], [1.0], 2.0]
    """
    axes = tuple(range(x.ndim - 1))
    weight = jnp.ones(x.shape[:1], x.dtype) if valid is None else valid.astype(x.dtype)
    count = weight.sum() * math.prod(x.shape[1:-1])
    weight = weight.reshape(-1, *(1 for _ in x.shape[1:]))
    mean = (x * weight).sum(axes) / count
    return mean, (jnp.square(x - mean) * weight).sum(axes) / count, count


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

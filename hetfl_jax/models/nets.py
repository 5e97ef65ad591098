"""The nets, each one linen module whose ``width`` field is the rate relative to the full model of the family.

Call contract: ``module(x, *, train, valid, capacity) -> logits [B, C]`` (or ``[E, B, C]`` with several exits), where
``valid`` [B] marks real examples and ``capacity`` holds the traced level fields in masked execution.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from hetfl_jax.core.types import Array
from hetfl_jax.models.conv import lowered, max_pool
from hetfl_jax.models.dual import DualNorm
from hetfl_jax.models.layers import (
    GROUPS,
    RUNNING,
    Norm,
    PooledConv,
    active_channels,
    channels_at,
    check_norm,
    conv_layer,
    dense_layer,
    random_units,
    scale,
    traced_channels,
)

Capacity = Mapping[str, Array]


class BaseNet(nn.Module):
    """Fields and helpers shared by the nets."""

    hidden: Sequence[int]
    width: float = 1.0
    classes: int = 10
    norm: str = "none"
    scaler: bool = False
    lowering: str = "auto"
    tiers: int = 1  #: nested nets that this one holds, itself included: of norm ``bn_tiers``
    init_rate: float = 1.0  #: start values, but for the first layer's, as in a net ``1 / init_rate`` as wide
    layer_rate: float = 1.0  #: the Scaler divides by it too, with or without ``scaler``
    rescales: ClassVar[bool] = False  #: whether the two rates do anything
    drops_units: ClassVar[bool] = True  #: whether units of every layer can be dropped at random

    def __post_init__(self) -> None:
        narrowest = min((active_channels(full, self.width) for full in self.hidden), default=0)
        check_norm(self.norm, narrowest, getattr(self, "groups", GROUPS))
        if not 0 <= getattr(self, "depth", 0) <= len(self.hidden):
            raise ValueError(f"depth {self.depth}, allowed 1..{len(self.hidden)}, or 0 for all layers (family.mix)")
        self._check_rates()
        super().__post_init__()

    def _check_rates(self) -> None:
        if self.init_rate == self.layer_rate == 1:
            return
        if not self.rescales:
            raise ValueError(f"rescaling in net {type(self).__name__}, which has none: need none (family.rescale)")
        if self.norm in RUNNING:
            raise ValueError(
                f"rescaling with norm {self.norm!r}: running statistics are of rescaled layers and would be used in "
                "evaluation, where layers are not rescaled: need none (family.rescale)"
            )

    def _channels(self, full: int) -> int:
        return active_channels(full, self.width)

    def _kept(self, full: int, capacity: Capacity | None) -> Array | None:
        """[C] bool, the units of a layer that are not dropped, where ``capacity`` says how many to ``keep``."""
        if capacity is None or "keep" not in capacity:
            return None
        active, kept = (channels_at(full, w) for w in (capacity.get("width", self.width), capacity["keep"]))
        return random_units(self.make_rng("dropout"), full, active, kept)[: self._channels(full)]

    def _rate(self, layer: int) -> float:
        """The rate of a layer's start values; the first one, number 0, has all its inputs at every width."""
        return self.init_rate if layer else 1.0

    def _scaled(self, x: Array, train: bool, capacity: Capacity | None) -> Array:
        """The Scaler."""
        width = (capacity or {}).get("width", self.width) if self.scaler else 1.0
        return scale(x, width * self.layer_rate, train=train) if self.scaler or self.layer_rate != 1 else x

    def _scale_norm(
        self, x: Array, full: int, name: str, train: bool, valid: Array | None, capacity: Capacity | None,
        kept: Array | None = None,
    ) -> Array:  # fmt: skip
        """Scaler, then norm, of a layer with ``full`` channels at width 1; without the units that are dropped.

        ``capacity`` has what is traced: ``width`` and ``tiers`` of a masked level, under random dropout ``keep``, the
        width whose number of units stays, and ``noise``, see ``DualNorm``; ``kept`` says which units, where layers
        share them.
        """
        return self._norm(self._scaled(x, train, capacity), full, name, train, valid, capacity, kept)

    def _norm(
        self, x: Array, full: int, name: str, train: bool, valid: Array | None, capacity: Capacity | None,
        kept: Array | None = None,
    ) -> Array:  # fmt: skip
        """``_scale_norm`` without the Scaler."""
        traced = capacity or {}
        active = traced_channels(full, traced.get("width"))
        if self.norm.startswith("bn_dual"):
            dual = DualNorm(self.norm == "bn_dual_shared", name=name)
            x = dual(x, train=train, valid=valid, active=active, noise=traced.get("noise", 0.0))
        else:
            norm = Norm(self.norm, getattr(self, "groups", GROUPS), self.tiers, name=name)
            x = norm(x, train=train, valid=valid, active=active, tier=traced.get("tiers"))
        kept = self._kept(full, capacity) if kept is None else kept
        return x if kept is None else jnp.where(kept, x, 0.0)


class MLP(BaseNet):
    """Linear layers with ReLU; the default 784-200-10 is the "2NN" baseline with one hidden layer.

    With ``depth`` d > 0 only the first d hidden layers are there, and each has an exit: [d, B, C]; without ``exits``
    there is one head behind the last of them, as in a net of that depth.

    Fields: ``hidden`` sizes at width 1, ``width`` the level's rate, ``classes`` outputs, ``norm`` one of ``NORMS``.

    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.models.families import family
    >>> fam = family(MLP(), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 28, 28, 1)))
    >>> costs(fam).parameters.tolist()
    [159010, 79510]
    """

    hidden: Sequence[int] = (200,)
    depth: int = 0
    exits: bool = True
    rescales: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array | tuple[Array, ...]:
        """[B, ...] -> [B, C]."""
        x, exits = x.reshape(x.shape[0], -1), []
        for i, full in enumerate(self.hidden[: self.depth or None]):
            x = dense_layer(x, self._channels(full), rate=self._rate(i), name=f"dense_{i}")
            x = nn.relu(self._scale_norm(x, full, f"norm_{i}", train, valid, capacity))
            if self.depth and self.exits:
                exits.append(dense_layer(x, self.classes, rate=self.init_rate, name=f"head_{i}"))
        return tuple(exits) if exits else dense_layer(x, self.classes, rate=self._rate(len(self.hidden)), name="head")


class Logistic(BaseNet):
    """Logistic regression: the first class has logit 0, the others are linear: (D + 1) (C - 1) parameters, from 0.

    Without ``bias`` D (C - 1).

    Fields: ``hidden`` sizes at width 1, ``width`` the level's rate, ``classes`` outputs, ``norm`` one of ``NORMS``.

    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.models.families import family
    >>> fam = family(Logistic(classes=3), [{}], jnp.zeros((1, 4)))
    >>> costs(fam).parameters.tolist()
    [10]
    """

    hidden: Sequence[int] = ()
    classes: int = 2
    bias: bool = True

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array:
        """[B, ...] -> [B, C]."""
        x, zeros = x.reshape(x.shape[0], -1), nn.initializers.zeros
        rest = nn.Dense(self.classes - 1, use_bias=self.bias, kernel_init=zeros, name="head")(x)
        return jnp.concatenate([jnp.zeros_like(rest[:, :1]), rest], -1)


class CNN(BaseNet):
    """The FedAvg CNN (McMahan et al. 2017): conv 5x5, pool, conv 5x5, pool, dense; 1,663,370 parameters at 28x28x1.

    Fields: ``hidden`` sizes at width 1, ``width`` the level's rate, ``classes`` outputs, ``norm`` one of ``NORMS``.

    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.models.families import family
    >>> fam = family(CNN(), [dict(width=1.0)], jnp.zeros((1, 28, 28, 1)))
    >>> costs(fam).parameters.tolist()
    [1663370]
    """

    hidden: Sequence[int] = (32, 64, 512)
    rescales: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array:
        """[B, H, W, I] -> [B, C]."""
        plain = self.norm == "none" and not self.scaler and self.layer_rate == 1
        for i, full in enumerate(self.hidden[:-1]):
            # The pool comes before what it commutes with, which then has a quarter of the entries.
            if plain:
                x = PooledConv(self._channels(full), 5, self.lowering, self._rate(i), name=f"conv_{i}")(x)
                x = self._norm(x, full, f"norm_{i}", train, valid, capacity)
            else:
                x = conv_layer(x, self._channels(full), 5, lowering=self.lowering, rate=self._rate(i), name=f"conv_{i}")
                x = max_pool(self._scale_norm(x, full, f"norm_{i}", train, valid, capacity))
            x = nn.relu(x)
        # Channel-major, so that a prefix of channels is a prefix of the flat axis.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        last = len(self.hidden) - 1
        x = dense_layer(x, self._channels(self.hidden[-1]), rate=self.init_rate, name=f"dense_{last}")
        x = nn.relu(self._scale_norm(x, self.hidden[-1], f"norm_{last}", train, valid, capacity))
        return dense_layer(x, self.classes, rate=self.init_rate, name="head")


class LeNet(BaseNet):
    """The net of CFL's published code: unpadded conv 5x5, pool, twice, then linear; 18,506 parameters at 62 classes.

    Fields: ``hidden`` sizes at width 1, ``width`` the level's rate, ``classes`` outputs, ``norm`` one of ``NORMS``.

    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.models.families import family
    >>> fam = family(LeNet(classes=62), [{}], jnp.zeros((1, 28, 28, 1)))
    >>> costs(fam).parameters.tolist()
    [18506]
    """

    hidden: Sequence[int] = (6, 16)
    rescales: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array:
        """[B, H, W, I] -> [B, C]."""
        for i, full in enumerate(self.hidden):
            x = conv_layer(
                x, self._channels(full), 5, lowering=self.lowering, padded=False, rate=self._rate(i), name=f"conv_{i}"
            )
            x = max_pool(nn.relu(self._scale_norm(x, full, f"norm_{i}", train, valid, capacity)))
        # Channel-major, so that a prefix of channels is a prefix of the flat axis.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return dense_layer(x, self.classes, rate=self.init_rate, name="head")


class TutorialCNN(BaseNet):
    """The net of TensorFlow's CIFAR-10 tutorial, which IFCA takes: 1,068,298 parameters at 24x24x3.

    Twice conv 5x5 and ReLU with pool 3x3/2 and local response norm (radius 4, alpha 0.001/9, beta 0.75; after the pool
    of the first, before that of the second), then two linear layers with ReLU.

    Fields: ``hidden`` sizes at width 1, ``width`` the level's rate, ``classes`` outputs, ``norm`` one of ``NORMS``.

    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.models.families import family
    >>> fam = family(TutorialCNN(), [{}], jnp.zeros((1, 24, 24, 3)))
    >>> costs(fam).parameters.tolist()
    [1068298]
    """

    hidden: Sequence[int] = (64, 64, 384, 192)

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array:
        """[B, H, W, I] -> [B, C]."""

        normal, constant = nn.initializers.truncated_normal, nn.initializers.constant

        def dense(x: Array, features: int, deviation: float, bias: float, name: str) -> Array:
            return nn.Dense(features, kernel_init=normal(deviation), bias_init=constant(bias), name=name)(x)

        for i, full in enumerate(self.hidden[:2]):
            conv = nn.Conv(
                self._channels(full), (5, 5), kernel_init=normal(0.05), bias_init=constant(0.1 * i),
                conv_general_dilated=lowered(self.lowering), name=f"conv_{i}",
            )  # fmt: skip
            x = nn.relu(self._scale_norm(conv(x), full, f"norm_{i}", train, valid, capacity))
            x = response_norm(x) if i else x
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            x = x if i else response_norm(x)
        # Channel-major, so that a prefix of channels is a prefix of the flat axis.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for i, full in enumerate(self.hidden[2:], 2):
            x = dense(x, self._channels(full), 0.04, 0.1, f"dense_{i}")
            x = nn.relu(self._scale_norm(x, full, f"norm_{i}", train, valid, capacity))
        return dense(x, self.classes, 1 / 192, 0.0, "head")


def response_norm(x: Array, radius: int = 4, alpha: float = 0.001 / 9, beta: float = 0.75) -> Array:
    """``x_c / (1 + alpha sum_{|d| <= radius} x_{c+d}^2)^beta`` over the channels of [B, H, W, C].

    >>> response_norm(jnp.ones((1, 1, 1, 1)), alpha=1.0, beta=1.0)[0, 0, 0]
    Array([0.5], dtype=float32)
    """
    squares = jnp.pad(jnp.square(x), [(0, 0)] * (x.ndim - 1) + [(radius, radius)])
    near = sum(squares[..., d : d + x.shape[-1]] for d in range(2 * radius + 1))
    return x / (1 + alpha * near) ** beta


class Conv(BaseNet):
    """HeteroFL's Conv: 3x3 convolutions with bias, Scaler, norm, ReLU, pool (none after the last), mean, linear.

    With ``depth`` d > 0 only the first d convolutions are there, and each has an exit: [d, B, C]; without ``exits``
    there is one head behind the last of them.

    Fields: ``hidden`` sizes at width 1, ``width`` the level's rate, ``classes`` outputs, ``norm`` one of ``NORMS``.

    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.models.families import family
    >>> fam = family(Conv(hidden=(4, 8), norm="none"), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 8, 8, 1)))
    >>> costs(fam).parameters.tolist()
    [426, 146]
    """

    hidden: Sequence[int] = (64, 128, 256, 512)
    norm: str = "bn"
    scaler: bool = True
    depth: int = 0
    exits: bool = True
    rescales: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array | tuple[Array, ...]:
        """[B, H, W, I] -> [B, C]."""
        exits = []
        for i, full in enumerate(self.hidden[: self.depth or None]):
            x, rate = max_pool(x) if i else x, self._rate(i)
            x = conv_layer(x, self._channels(full), 3, lowering=self.lowering, rate=rate, name=f"conv_{i}")
            x = nn.relu(self._scale_norm(x, full, f"norm_{i}", train, valid, capacity))
            if self.depth and self.exits:
                exits.append(self._head(x, f"head_{i}"))
        return tuple(exits) if exits else self._head(x, "head")

    def _head(self, x: Array, name: str) -> Array:
        return dense_layer(x.mean((1, 2)), self.classes, zero_bias=True, rate=self.init_rate, name=name)


class PreResNet(BaseNet):
    """HeteroFL's pre-activation ResNet with basic blocks; stages of strides 1, 2, 2, 2 and no norm after the stem.

    The published CIFAR-10 figures come from blocks 1-1-1-2 (9.6 M parameters); the later code has 2-2-2-2 (11.2 M).

    Fields: ``hidden`` sizes at width 1, ``width`` the level's rate, ``classes`` outputs, ``norm`` one of ``NORMS``.

    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.models.families import family
    >>> fam = family(PreResNet(hidden=(4, 4), blocks=(1, 1), norm="none"), [{}], jnp.zeros((1, 8, 8, 3)))
    >>> costs(fam).parameters.tolist()
    [750]
    """

    hidden: Sequence[int] = (64, 128, 256, 512)
    blocks: Sequence[int] = (1, 1, 1, 2)
    norm: str = "bn"
    scaler: bool = True
    scales_convolutions: bool = False  #: the Scaler is behind every convolution, not before every norm (Split-Mix)
    rescales: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array:
        """[B, H, W, I] -> [B, C]."""

        def conv(x: Array, full: int, kernel: int, stride: int, name: str) -> Array:
            width, rate = self._channels(full), self._rate(name != "stem")
            x = conv_layer(x, width, kernel, stride=stride, bias=False, lowering=self.lowering, rate=rate, name=name)
            return self._scaled(x, train, capacity) if self.scales_convolutions else x

        def activate(x: Array, full: int, name: str) -> Array:
            norm = self._norm if self.scales_convolutions else self._scale_norm
            return nn.relu(norm(x, full, name, train, valid, capacity))

        x = conv(x, self.hidden[0], 3, 1, "stem")
        before = self.hidden[0]
        for stage, (full, count) in enumerate(zip(self.hidden, self.blocks, strict=True)):
            for block in range(count):
                name = f"stage{stage}_block{block}"
                stride = 2 if stage and not block else 1
                a = activate(x, before, f"{name}_norm1")
                changes = stride > 1 or before != full
                shortcut = conv(a, full, 1, stride, f"{name}_shortcut") if changes else x
                y = conv(a, full, 3, stride, f"{name}_conv1")
                y = conv(activate(y, full, f"{name}_norm2"), full, 3, 1, f"{name}_conv2")
                x, before = y + shortcut, full
        x = activate(x, before, "norm")
        return dense_layer(x.mean((1, 2)), self.classes, zero_bias=True, rate=self.init_rate, name="head")

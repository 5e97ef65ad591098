"""The nets, each one linen module whose ``width`` field is the rate relative to the full model of the family.

Call contract: ``module(x, *, train, valid, capacity) -> logits [B, C]`` (or ``[E, B, C]`` with several exits), where
``valid`` [B] marks real examples and ``capacity`` holds the traced level fields in masked execution.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp

from hetfl_jax.core.types import Array
from hetfl_jax.models.conv import lowered, max_pool
from hetfl_jax.models.layers import (
    GROUPS,
    Norm,
    active_channels,
    check_norm,
    conv_layer,
    dense_layer,
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

    def __post_init__(self) -> None:
        narrowest = min((active_channels(full, self.width) for full in self.hidden), default=0)
        check_norm(self.norm, narrowest, getattr(self, "groups", GROUPS))
        if not 0 <= getattr(self, "depth", 0) <= len(self.hidden):
            raise ValueError(f"depth {self.depth}, allowed 1..{len(self.hidden)}, or 0 for all layers (family.mix)")
        super().__post_init__()

    def _channels(self, full: int) -> int:
        return active_channels(full, self.width)

    def _scale_norm(
        self, x: Array, full: int, name: str, train: bool, valid: Array | None, capacity: Capacity | None
    ) -> Array:
        """Scaler, then norm, of a layer with ``full`` channels at width 1."""
        width = None if capacity is None else capacity.get("width")
        if self.scaler:
            x = scale(x, self.width if width is None else width, train=train)
        return Norm(self.norm, name=name)(x, train=train, valid=valid, active=traced_channels(full, width))


class MLP(BaseNet):
    """Linear layers with ReLU; the default 784-200-10 is the "2NN" baseline with one hidden layer.

    With ``depth`` d > 0 only the first d hidden layers are there, and each has an exit: [d, B, C]; without ``exits``
    there is one head behind the last of them, as in a net of that depth.
    """

    hidden: Sequence[int] = (200,)
    depth: int = 0
    exits: bool = True

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array | tuple[Array, ...]:
        """[B, ...] -> [B, C]."""
        x, exits = x.reshape(x.shape[0], -1), []
        for i, full in enumerate(self.hidden[: self.depth or None]):
            x = dense_layer(x, self._channels(full), name=f"dense_{i}")
            x = nn.relu(self._scale_norm(x, full, f"norm_{i}", train, valid, capacity))
            if self.depth and self.exits:
                exits.append(dense_layer(x, self.classes, name=f"head_{i}"))
        return tuple(exits) if exits else dense_layer(x, self.classes, name="head")


class CNN(BaseNet):
    """The FedAvg CNN (McMahan et al. 2017): conv 5x5, pool, conv 5x5, pool, dense; 1,663,370 parameters at 28x28x1."""

    hidden: Sequence[int] = (32, 64, 512)

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array:
        """[B, H, W, I] -> [B, C]."""
        for i, full in enumerate(self.hidden[:-1]):
            x = conv_layer(x, self._channels(full), 5, lowering=self.lowering, name=f"conv_{i}")
            x = max_pool(nn.relu(self._scale_norm(x, full, f"norm_{i}", train, valid, capacity)))
        # Channel-major, so that a prefix of channels is a prefix of the flat axis.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        last = len(self.hidden) - 1
        x = dense_layer(x, self._channels(self.hidden[-1]), name=f"dense_{last}")
        x = nn.relu(self._scale_norm(x, self.hidden[-1], f"norm_{last}", train, valid, capacity))
        return dense_layer(x, self.classes, name="head")


class LeNet(BaseNet):
    """The net of CFL's published code: unpadded conv 5x5, pool, twice, then linear; 18,506 parameters at 62 classes."""

    hidden: Sequence[int] = (6, 16)

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array:
        """[B, H, W, I] -> [B, C]."""
        for i, full in enumerate(self.hidden):
            x = conv_layer(x, self._channels(full), 5, lowering=self.lowering, padded=False, name=f"conv_{i}")
            x = max_pool(nn.relu(self._scale_norm(x, full, f"norm_{i}", train, valid, capacity)))
        # Channel-major, so that a prefix of channels is a prefix of the flat axis.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return dense_layer(x, self.classes, name="head")


class TutorialCNN(BaseNet):
    """The net of TensorFlow's CIFAR-10 tutorial, which IFCA takes: 1,068,298 parameters at 24x24x3.

    Twice conv 5x5 and ReLU with pool 3x3/2 and local response norm (radius 4, alpha 0.001/9, beta 0.75; after the pool
    of the first, before that of the second), then two linear layers with ReLU.
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
    """

    hidden: Sequence[int] = (64, 128, 256, 512)
    norm: str = "bn"
    scaler: bool = True
    depth: int = 0
    exits: bool = True

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array | tuple[Array, ...]:
        """[B, H, W, I] -> [B, C]."""
        exits = []
        for i, full in enumerate(self.hidden[: self.depth or None]):
            x = conv_layer(max_pool(x) if i else x, self._channels(full), 3, lowering=self.lowering, name=f"conv_{i}")
            x = nn.relu(self._scale_norm(x, full, f"norm_{i}", train, valid, capacity))
            if self.depth and self.exits:
                exits.append(dense_layer(x.mean((1, 2)), self.classes, zero_bias=True, name=f"head_{i}"))
        return tuple(exits) if exits else dense_layer(x.mean((1, 2)), self.classes, zero_bias=True, name="head")


class PreResNet(BaseNet):
    """HeteroFL's pre-activation ResNet with basic blocks; stages of strides 1, 2, 2, 2 and no norm after the stem.

    The published CIFAR-10 figures come from blocks 1-1-1-2 (9.6 M parameters); the later code has 2-2-2-2 (11.2 M).
    """

    hidden: Sequence[int] = (64, 128, 256, 512)
    blocks: Sequence[int] = (1, 1, 1, 2)
    norm: str = "bn"
    scaler: bool = True

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array:
        """[B, H, W, I] -> [B, C]."""

        def conv(x: Array, full: int, kernel: int, stride: int, name: str) -> Array:
            width = self._channels(full)
            return conv_layer(x, width, kernel, stride=stride, bias=False, lowering=self.lowering, name=name)

        def activate(x: Array, full: int, name: str) -> Array:
            return nn.relu(self._scale_norm(x, full, name, train, valid, capacity))

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
        return dense_layer(x.mean((1, 2)), self.classes, zero_bias=True, name="head")

"""Split-Mix's nets for digits and for DomainNet: convolutions and linear layers with bias, Scaler and norm."""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from hetfl_jax.core.types import Array
from hetfl_jax.models.conv import max_pool
from hetfl_jax.models.layers import conv_layer, dense_layer
from hetfl_jax.models.nets import BaseNet, Capacity


class DigitsCNN(BaseNet):
    """conv 5x5, pool, conv 5x5, pool, conv 5x5, then three linear layers; 14,219,210 parameters at 28x28x3.

    Scaler, norm and ReLU are behind every layer but the last. ``hidden``: three convolutions, two linear layers.

    Fields: ``hidden`` sizes at width 1, ``width`` the level's rate, ``classes`` outputs, ``norm`` one of ``NORMS``.

    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.models.families import family
    >>> fam = family(DigitsCNN(), [{}], jnp.zeros((1, 28, 28, 3)))
    >>> costs(fam).parameters.tolist()
    [14219210]
    """

    hidden: Sequence[int] = (64, 64, 128, 2048, 512)
    norm: str = "bn_batch"
    rescales: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array:
        """[B, H, W, I] -> [B, C]."""

        def activate(x: Array, number: int) -> Array:
            return nn.relu(self._scale_norm(x, self.hidden[number], f"norm_{number}", train, valid, capacity))

        for i, full in enumerate(self.hidden[:3]):
            rate = self._rate(i)
            x = conv_layer(x, self._channels(full), 5, lowering=self.lowering, rate=rate, name=f"conv_{i}")
            x = max_pool(activate(x, i)) if i < 2 else activate(x, i)
        x = flattened(x)
        for i, full in enumerate(self.hidden[3:], 3):
            x = activate(dense_layer(x, self._channels(full), rate=self.init_rate, name=f"dense_{i}"), i)
        return dense_layer(x, self.classes, rate=self.init_rate, name="head")


class AlexNet(BaseNet):
    """Five convolutions and three linear layers, no dropout; 57,063,498 parameters at 256x256x3.

    Scaler, norm and ReLU are behind every layer but the last. ``hidden``: five convolutions, two linear layers.

    Fields: ``hidden`` sizes at width 1, ``width`` the level's rate, ``classes`` outputs, ``norm`` one of ``NORMS``.

    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.models.families import family
    >>> fam = family(AlexNet(), [{}], jnp.zeros((1, 256, 256, 3)))
    >>> costs(fam).parameters.tolist()
    [57063498]
    """

    hidden: Sequence[int] = (64, 192, 384, 256, 256, 4096, 4096)
    norm: str = "bn_batch"
    rescales: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array:
        """[B, H, W, I] -> [B, C]."""

        def activate(x: Array, number: int) -> Array:
            return nn.relu(self._scale_norm(x, self.hidden[number], f"norm_{number}", train, valid, capacity))

        for i, (kernel, stride, pad) in enumerate(((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))):
            x = activate(conv_layer(
                x, self._channels(self.hidden[i]), kernel, stride=stride, pad=pad, lowering=self.lowering,
                rate=self._rate(i), name=f"conv_{i}",
            ), i)  # fmt: skip
            x = nn.max_pool(x, (3, 3), (2, 2)) if i in (0, 1, 4) else x
        x = flattened(mean_pool(x, 6))
        for i, full in enumerate(self.hidden[5:], 5):
            x = activate(dense_layer(x, self._channels(full), rate=self.init_rate, name=f"dense_{i}"), i)
        return dense_layer(x, self.classes, rate=self.init_rate, name="head")


def flattened(x: Array) -> Array:
    """[B, H, W, C] -> [B, C H W], channel-major, so that a prefix of channels is a prefix of the flat axis.

    >>> flattened(jnp.arange(4.0).reshape(1, 1, 2, 2)).tolist()
    [[0.0, 2.0, 1.0, 3.0]]
    """
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


def mean_pool(x: Array, side: int) -> Array:
    """Means over ``side`` x ``side`` windows that cover [B, H, W, C], alike in size and overlapping where they must.

    Window i of n entries is ``floor(i n / side) .. ceil((i + 1) n / side) - 1``, as in PyTorch's adaptive pooling.

    >>> mean_pool(jnp.arange(3.0).reshape(1, 3, 1, 1).repeat(3, 2), 2)[0, :, 0, 0].tolist()
    [0.5, 1.5]
    """
    for axis in (1, 2):
        n = x.shape[axis]
        cuts = [(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
        x = jnp.stack([x.take(jnp.arange(a, b), axis).mean(axis) for a, b in cuts], axis)
    return x

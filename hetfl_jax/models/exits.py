"""DepthFL's network: a ResNet18 with an exit after each of its levels (Kim et al., ICLR 2023)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from hetfl_jax.core.random import draw
from hetfl_jax.core.types import Array
from hetfl_jax.models.conv import lowered
from hetfl_jax.models.layers import dense_layer
from hetfl_jax.models.nets import BaseNet, Capacity


class ExitResNet(BaseNet):
    """ResNet18 whose levels 1..L-1 each carry an attention-gated exit; a depth-d net is a prefix of the full one.

    Exit l reads ``sigmoid(attention_l(x)) * x`` of its level's output x, brings it to the last level's width and
    resolution by separable convolutions (the bottleneck), then mean and a linear layer; the last level has only those
    two. The trunk goes on from x itself. Returns [depth, B, C].

    Fields: ``hidden`` channels of each level at width 1, ``depth`` levels that are there, ``norm``, ``groups`` of gn.

    >>> from hetfl_jax.models.families import family
    >>> net = ExitResNet(hidden=(4, 8, 8), norm="none")
    >>> family(net, [dict(depth=3), dict(depth=1)], jnp.zeros((1, 8, 8, 3))).exits.tolist()
    [3, 1]
    """

    hidden: Sequence[int] = (64, 128, 256, 512)
    norm: str = "bn_tracked"
    groups: int = 16
    depth: int = 0  #: levels of this net, 0 for all

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> tuple[Array, ...]:
        """[B, H, W, I] -> depth times [B, C]."""
        last = len(self.hidden)

        def conv(x: Array, full: int, kernel: int, stride: int, name: str, depthwise: bool = False) -> Array:
            features, pad = self._channels(full), kernel // 2
            return nn.Conv(
                features, (kernel, kernel), (stride, stride), padding=((pad, pad), (pad, pad)), use_bias=False,
                feature_group_count=features if depthwise else 1, kernel_init=_fan_out_normal,
                conv_general_dilated=lowered(self.lowering), name=name,
            )(x)  # fmt: skip

        def norm(x: Array, full: int, name: str) -> Array:
            return self._scale_norm(x, full, name, train, valid, capacity)

        def block(x: Array, before: int, full: int, stride: int, name: str) -> Array:
            y = nn.relu(norm(conv(x, full, 3, stride, f"{name}_conv1"), full, f"{name}_norm1"))
            y = norm(conv(y, full, 3, 1, f"{name}_conv2"), full, f"{name}_norm2")
            if stride > 1 or before != full:
                x = norm(conv(x, full, 1, stride, f"{name}_shortcut"), full, f"{name}_shortcut_norm")
            return nn.relu(x + y)

        def separable(x: Array, before: int, full: int, name: str) -> Array:
            for part, (out, stride) in enumerate(((before, 2), (full, 1)), 1):
                x = conv(x, before, 3, stride, f"{name}_depthwise{part}", depthwise=True)
                x = nn.relu(norm(conv(x, out, 1, 1, f"{name}_pointwise{part}"), out, f"{name}_norm{part}"))
            return x

        def exit_of(x: Array, level: int) -> Array:
            full = self.hidden[level - 1]
            if level < last:
                gate = norm(separable(x, full, full, f"attention{level}"), full, f"attention{level}_norm")
                x = nn.sigmoid(upsample(nn.relu(gate), x.shape[1:3])) * x
                for step in range(level, last):
                    x = separable(x, self.hidden[step - 1], self.hidden[step], f"bottleneck{level}_{step - level}")
            return dense_layer(x.mean((1, 2)), self.classes, name=f"head{level}")

        x = nn.relu(norm(conv(x, self.hidden[0], 3, 1, "stem"), self.hidden[0], "stem_norm"))
        before, exits = self.hidden[0], []
        for level, full in enumerate(self.hidden[: self.depth or last], 1):
            for number, stride in enumerate((1 if level == 1 else 2, 1)):
                x = block(x, before, full, stride, f"layer{level}_block{number}")
                before = full
            exits.append(exit_of(x, level))
        return tuple(exits)


def _fan_out_normal(key: Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
    """Kaiming's normal start by fan-out, deviation ``sqrt(2 / (kh kw O))``; as in PyTorch, groups do not count.

    Args:
      shape: (kh, kw, I, O).
    """
    return draw(jax.random.normal, key, shape, dtype) * (2 / (shape[0] * shape[1] * shape[3])) ** 0.5


def upsample(x: Array, size: Sequence[int]) -> Array:
    """Bilinear interpolation of [B, H, W, C] to a spatial size, half-pixel centres (PyTorch's align-corners off).

    Doubling, the usual case, is two weighted neighbours an axis, without the matrix products of a general resize.

    Args:
      x: [B, H, W, C].
      size: (H', W').

    >>> upsample(jnp.arange(2.0).reshape(1, 1, 2, 1), (2, 4))[0, 0, :, 0].tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    if tuple(size) != (2 * x.shape[1], 2 * x.shape[2]):
        return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear")
    for axis in (1, 2):
        first, final = (jax.lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (0, x.shape[axis] - 1))
        n = x.shape[axis]
        before = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, n - 1, axis=axis)], axis)
        after = jnp.concatenate([jax.lax.slice_in_dim(x, 1, n, axis=axis), final], axis)
        pair = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        x = pair.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x

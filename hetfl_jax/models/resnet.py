"""The post-activation ResNet of CIFAR-10, with widths that can be cut."""

from collections.abc import Sequence

import flax.linen as nn

from hetfl_jax.core.types import Array
from hetfl_jax.models.layers import conv_layer, dense_layer
from hetfl_jax.models.nets import BaseNet, Capacity


class ResNet(BaseNet):
    """ResNet18 for CIFAR-10 (He et al. 2016): stem 3x3, stages of basic blocks with strides 1, 2, 2, 2, mean, linear.

    A block is ``relu(norm(conv(relu(norm(conv(x))))) + s(x))``, where s is a 1x1 convolution with norm if the block
    changes shape; 11,173,962 parameters at 32x32x3. Under random dropout a stage's blocks drop the same units of what
    they add to.

    Fields: ``hidden`` sizes at width 1, ``width`` the level's rate, ``classes`` outputs, ``norm`` one of ``NORMS``.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models.families import family
    >>> fam = family(ResNet(hidden=(4, 8), blocks=(1, 1), norm="none"), [dict(width=1.0)], jnp.zeros((1, 8, 8, 3)))
    >>> fam.windows["params", "head", "kernel"].extents.tolist()
    [[8, 10]]
    """

    hidden: Sequence[int] = (64, 128, 256, 512)
    blocks: Sequence[int] = (2, 2, 2, 2)
    norm: str = "bn_tracked"
    stem_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, valid: Array | None = None, capacity: Capacity | None = None
    ) -> Array:
        """[B, H, W, I] -> [B, C]."""

        def conv_norm(
            x: Array, full: int, kernel: int, stride: int, name: str, kept: Array | None = None, bias: bool = False
        ) -> Array:
            width = self._channels(full)
            x = conv_layer(
                x, width, kernel, stride=stride, bias=bias, lowering=self.lowering, name=f"{name}_conv"
            )  # fmt: skip
            return self._scale_norm(x, full, f"{name}_norm", train, valid, capacity, kept)

        before = self.hidden[0]
        stream = self._kept(before, capacity)
        x = nn.relu(conv_norm(x, before, 3, 1, "stem", stream, self.stem_bias))
        for stage, (full, count) in enumerate(zip(self.hidden, self.blocks, strict=True)):
            stream = self._kept(full, capacity) if stage else stream
            for block in range(count):
                name, stride = f"stage{stage}_block{block}", 2 if stage and not block else 1
                y = nn.relu(conv_norm(x, full, 3, stride, f"{name}_1"))
                y = conv_norm(y, full, 3, 1, f"{name}_2", stream)
                if stride > 1 or before != full:
                    x = conv_norm(x, full, 1, stride, f"{name}_shortcut", stream)
                x, before = nn.relu(x + y), full
        return dense_layer(x.mean((1, 2)), self.classes, name="head")

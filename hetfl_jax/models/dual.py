"""Batch norm with a clean and a noise branch, and the knob between them (Split-Mix; Xie et al., CVPR 2020)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hetfl_jax.core import tree
from hetfl_jax.core.types import Array
from hetfl_jax.models.layers import EPSILON, MOMENTUM, batch_moments

CLEAN, NOISE = 0, 1  #: rows of every leaf


class DualNorm(nn.Module):
    """Two batch norms with running statistics, of which the clean one is row 0 of every leaf and the noise one row 1.

    ``noise`` is the share of the noise branch: 0 or 1 while training, where it names the branch whose statistics are
    those of the batch and move; in evaluation anything from 0 to 1, and the output is ``(1 - noise) y_clean + noise
    y_noise``, each branch after its own affine map.

    ``shared``: both branches have one affine map, and nothing may lie between them.

    Source: Xie et al., CVPR 2020; Hong et al., ICLR 2022.

    >>> net, x = DualNorm(), jnp.array([[1.0], [3.0]])
    >>> variables = net.init(jax.random.key(0), x, train=False)
    >>> variables["batch_stats"]["mean"].shape, net.apply(variables, x, train=False, noise=0.5).shape
    ((2, 1), (2, 1))
    """

    shared: bool = False

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool, valid: Array | None = None, active: Array | None = None,
        noise: float | Array = 0.0,
    ) -> Array:  # fmt: skip
        """Normalise [B, H, W, C] or [B, C]; ``valid`` and ``active`` as in ``Norm``.

        Raises:
          ValueError: a share between the branches, where one may not lie there.
        """
        features, number, dtype = x.shape[-1], _branch(noise), x.dtype
        x = x.astype(tree.wide(dtype))  # moments of bfloat16 numbers too
        rows = (features,) if self.shared else (2, features)
        weight = self.param("scale", nn.initializers.ones, rows)
        bias = self.param("bias", nn.initializers.zeros, rows)
        stored = {name: self.variable("batch_stats", name, start, (2, features)).value
                  for name, start in (("mean", jnp.zeros), ("var", jnp.ones))}  # fmt: skip
        if number is None and (train or (self.shared and not isinstance(noise, jax.Array))):
            raise ValueError(
                f"share {noise} of the noise branch {'in training' if train else 'with one affine map'}: need 0 or 1 "
                "(family.norm)"
            )

        def branch(row: int) -> Array:
            mean, var = stored["mean"][row], stored["var"][row]
            if train:
                mean, var = self._moved(x, valid, row, stored)
            own = (weight, bias) if self.shared else (weight[row], bias[row])
            return (x - mean) * (jax.lax.rsqrt(var + EPSILON) * own[0]) + own[1]

        y = branch(number) if number is not None else (1 - noise) * branch(CLEAN) + noise * branch(NOISE)
        y = y.astype(dtype)
        return y if active is None else jnp.where(jnp.arange(features) < active, y, 0.0)

    def _moved(self, x: Array, valid: Array | None, row: int, stored: dict[str, Array]) -> tuple[Array, Array]:
        """Statistics of the batch, towards which the branch's own move."""
        mean, var, count = batch_moments(x, valid)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            unbiased = var * (count / jnp.maximum(count - 1, 1))
            for name, value in (("mean", mean), ("var", unbiased)):
                moved = MOMENTUM * stored[name][row] + (1 - MOMENTUM) * value
                self.put_variable("batch_stats", name, stored[name].at[row].set(moved))
        return mean, var


def _branch(noise: float | Array) -> int | None:
    """The one branch that runs; ``None`` for both.

    >>> _branch(1.0), _branch(0.5)
    (1, None)
    """
    return int(noise) if isinstance(noise, int | float) and noise in (CLEAN, NOISE) else None

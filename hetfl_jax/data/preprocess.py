"""Normalisation and augmentation inside jit: images stay uint8 on the device."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.types import Array

AUGMENTATIONS = ("none", "flip", "crop_flip")


def images(
    mean: Sequence[float], std: Sequence[float], augment: str = "none", pad: int = 4
) -> Callable[[Array, Array | None], Array]:
    """A ``prepare`` function for uint8 images: scale to [0, 1], augment while training, normalise per channel.

    Args:
      mean, std: per channel, of pixels scaled to [0, 1].
      augment: ``none``, ``flip``, or ``crop_flip`` (pad with black by ``pad``, crop at random, flip).

    Returns:
      ``prepare(x [B, H, W, C], key or None) -> float32``; example ``i`` of the batch draws from ``fold_in(key, i)``.

    Raises:
      ValueError: an unknown augmentation.

    >>> images([0.5], [0.5])(jnp.full((1, 2, 2, 1), 255, jnp.uint8), None)[0, 0, 0]
    Array([1.], dtype=float32)
    """
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augmentation {augment!r} is not one of {', '.join(AUGMENTATIONS)} (data.augment)")
    shift, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def one(key: Array, x: Array) -> Array:
        place, side = jax.random.split(key)
        if augment == "crop_flip":
            start = jax.random.randint(place, (2,), 0, 2 * pad + 1)
            padded = jnp.pad(x, ((pad, pad), (pad, pad), (0, 0)))
            x = jax.lax.dynamic_slice(padded, (start[0], start[1], 0), x.shape)
        return jnp.where(jax.random.bernoulli(side), x[:, ::-1], x)

    def prepare(x: Array, key: Array | None) -> Array:
        if augment != "none" and key is not None:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[0]))
            x = jax.vmap(one)(keys, x)
        return (x.astype(jnp.float32) / 255.0 - shift) / scale

    return prepare


def features(x: Array, key: Array | None) -> Array:
    """A ``prepare`` function for feature vectors: float32 as they are."""
    return x.astype(jnp.float32)

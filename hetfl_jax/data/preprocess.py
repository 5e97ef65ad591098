"""What happens to stored examples inside jit: images are normalised and augmented, tokens hidden."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Array

AUGMENTATIONS = ("none", "flip", "crop_flip", "window:<n>")


def images(
    mean: Sequence[float], std: Sequence[float], augment: str = "none", pad: int = 4
) -> Callable[[Array, Array | None], Array]:
    """A ``prepare`` function for images: scale to [0, 1], augment while training, normalise per channel.

    Integers are taken to be 0 .. 255, floats to be scaled already.

    Args:
      mean, std: per channel, of pixels scaled to [0, 1].
      augment: ``none``, ``flip``, ``crop_flip`` (pad with black by ``pad``, crop at random, flip), or ``window:<n>``: a
        window of n x n at random and flipped, the central one in evaluation, then standardised by itself (as in
        TensorFlow's CIFAR-10 tutorial, whose changes of brightness and contrast that undoes) in place of mean and std.

    Returns:
      ``prepare(x [B, H, W, C], key or None) -> float32``; example ``i`` of the batch draws from ``fold_in(key, i)``.

    Raises:
      ValueError: an unknown augmentation.

    >>> images([0.5], [0.5])(jnp.full((1, 2, 2, 1), 255, jnp.uint8), None)[0, 0, 0]
    Array([1.], dtype=float32)
    """
    if augment.startswith("window:"):
        return _windows(augment)
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
        return (_scaled(x) - shift) / scale

    return prepare


def _scaled(x: Array) -> Array:
    """float32 in [0, 1]: integers divided by 255, floats as they are."""
    return x.astype(jnp.float32) / (255.0 if jnp.issubdtype(x.dtype, jnp.integer) else 1.0)


def _windows(augment: str) -> Callable[[Array, Array | None], Array]:
    """``prepare`` of ``window:<n>``, see ``images``; example i of a batch draws from ``fold_in(key, i)``.

    >>> _windows("window:2")(jnp.arange(16, dtype=jnp.float32).reshape(1, 4, 4, 1), None).shape
    (1, 2, 2, 1)
    """
    text = augment.partition(":")[2]
    side = int(text) if text.isdigit() else 0

    def one(key: Array, x: Array) -> Array:
        place, mirror = jax.random.split(key)
        start = jax.random.randint(place, (2,), 0, jnp.asarray(x.shape[:2]) - side + 1)
        x = jax.lax.dynamic_slice(x, (start[0], start[1], 0), (side, side, x.shape[2]))
        return jnp.where(jax.random.bernoulli(mirror), x[:, ::-1], x)

    def prepare(x: Array, key: Array | None) -> Array:
        if not 1 <= side <= min(x.shape[1:3]):
            raise ValueError(
                f"augmentation {augment!r} of images of {x.shape[1:3]}: allowed windows inside (data.augment)"
            )
        if key is None:
            top, left = ((extent - side) // 2 for extent in x.shape[1:3])
            x = x[:, top : top + side, left : left + side]
        else:
            x = jax.vmap(one)(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[0])), x)
        x = _scaled(x)
        deviation = jnp.maximum(x.std((1, 2, 3), keepdims=True), 1 / (x[0].size) ** 0.5)
        return (x - x.mean((1, 2, 3), keepdims=True)) / deviation

    return prepare


def tokens(augment: str, hidden: int) -> Callable[[Array, Array | None], Array]:
    """A ``prepare`` function for windows of tokens (masked language modelling as in HeteroFL).

    With ``corrupt:<p>`` every token becomes ``hidden`` with probability p, in evaluation too: there by a fixed key and
    the window's own tokens. -1 (no token) stays.

    Args:
      augment: ``none`` or ``corrupt:<p>`` with 0 < p < 1.
      hidden: the id that stands for a hidden token.

    Raises:
      ValueError: anything else.

    >>> x = jnp.arange(1000)[None]
    >>> bool((tokens("corrupt:0.15", 1000)(x, None) == 1000).any())
    True
    """
    kind, _, text = augment.partition(":")
    try:
        rate = float(text or "nan") if kind == "corrupt" else 0.0
    except ValueError:
        rate = float("nan")
    if not (augment == "none" or (kind == "corrupt" and 0 < rate < 1)):
        raise ValueError(f"augmentation {augment!r} of tokens, allowed none or corrupt:<p>, 0 < p < 1 (data.augment)")

    def prepare(x: Array, key: Array | None) -> Array:
        if not rate:
            return x
        places = jnp.arange(x.shape[1], dtype=jnp.uint32) * 2 + 1
        own = jnp.arange(x.shape[0]) if key is not None else (x.astype(jnp.uint32) * places).sum(1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0) if key is None else key, own)
        hide = jax.vmap(lambda k: jax.random.bernoulli(k, rate, x.shape[1:]))(keys)
        return jnp.where(hide & (x >= 0), hidden, x)

    return prepare


def features(x: Array, key: Array | None) -> Array:
    """A ``prepare`` function for feature vectors: float32 as they are.

    >>> features(jnp.array([[1, 2]]), None).dtype
    dtype('float32')
    """
    return x.astype(jnp.float32)

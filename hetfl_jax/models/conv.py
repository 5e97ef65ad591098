"""One convolution with a selectable lowering, because the fast one differs by backend and by what surrounds it.

``canonical``
    A custom VJP whose forward, input-gradient and kernel-gradient are all NHWC x HWIO -> NHWC convolutions. XLA:CPU
    runs any other layout on a naive path inside loops (3-5 GFLOP/s instead of 100-200), and jax's own gradients have
    other layouts. Under ``vmap`` it runs one item at a time, since per-item kernels would become a grouped
    convolution. The default on CPU.
``rows``
    im2col by rows: the shifted views along the width are joined and each kernel row is one matrix product. Plain
    batched matrix products under ``vmap``. The default on a GPU.
``lax``
    ``jax.lax.conv_general_dilated`` as it is, which ``vmap`` makes a grouped one; of a depthwise convolution too, which
    is otherwise a sum of slices. The default on a TPU.

All three plug into Flax through ``nn.Conv(conv_general_dilated=lowered(name))``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from hetfl_jax.core import platform, tree
from hetfl_jax.core.types import Array

LOWERINGS = ("auto", "canonical", "rows", "lax")
#: what ``auto`` is by platform; ``python -m experiments.throughput.lowering`` measures them, with ``--target=v5e:2x2``
#: by what a TPU's compiler plans
AUTO = {"cpu": "canonical", "gpu": "rows", "tpu": "lax"}
#: likewise of max-pools: ``winners`` remembers where each maximum was, ``window`` is ``reduce_window``
POOLS = {"cpu": "winners", "gpu": "winners", "tpu": "window"}
_NHWC = ("NHWC", "HWIO", "NHWC")
# XLA:CPU convolves an image of few channels several times slower into fewer than 32 channels than into 32.
_FEW_CHANNELS, _FAST_CHANNELS = 4, 32
# It gathers all patches of a kernel gradient before it multiplies them: beyond a cache's size, up to ten times slower.
_PATCH_BYTES = 3 << 20
# It computes what is sliced anew for every slice, however long its history, unless the slices are in a loop.
_SLICED_BYTES = 1 << 18

Pads = tuple[tuple[int, int], ...]


def _geometry(
    x: Array, w: Array, strides: int | Sequence[int], padding: str | Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], Pads]:
    """Strides and explicit (low, high) zeros per spatial axis.

    >>> _geometry(jnp.ones((1, 5, 5, 1)), jnp.ones((3, 3, 1, 1)), 2, "SAME")
    ((2, 2), ((1, 1), (1, 1)))
    """
    step = (strides, strides) if isinstance(strides, int) else tuple(int(s) for s in strides)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], w.shape[:2], step, padding)
    return step, tuple((int(low), int(high)) for low, high in padding)


def _conv(x: Array, w: Array, strides: Sequence[int], pads: Sequence[tuple[int, int]], **dilation: Any) -> Array:
    """XLA's convolution of NHWC by HWIO to NHWC."""
    return jax.lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=_NHWC, **dilation)


def _fast(
    x: Array, w: Array, strides: Sequence[int], pads: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> Array:
    """``_conv`` on an image that is dilated first."""
    smaller = x.shape[1] * x.shape[2] < w.shape[0] * w.shape[1]
    if smaller and max(dilation) == 1 and min(min(pad) for pad in pads) >= 0:
        # XLA takes the smaller of the two for the kernel, and then not its fast path.
        return _rows(x, w, strides, pads)
    return _conv(x, w, strides, pads, lhs_dilation=dilation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _canonical(x: Array, w: Array, strides: tuple[int, ...], pads: Pads, precision: str | None) -> Array:
    """``precision`` of products as it was set where the convolution stands: the gradients are made elsewhere."""
    return sequential_vmap(lambda x, w: _fast(x, w, strides, pads, (1, 1)))(x, w)


def _canonical_fwd(
    x: Array, w: Array, strides: tuple[int, ...], pads: Pads, precision: str | None
) -> tuple[Array, tuple[Array, Array]]:
    return _canonical(x, w, strides, pads, precision), (x, w)


def _canonical_bwd(
    strides: tuple[int, ...], pads: Pads, precision: str | None, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    with jax.default_matmul_precision(precision):
        return _canonical_gradients(strides, pads, saved, g)


def _canonical_gradients(
    strides: tuple[int, ...], pads: Pads, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, w = saved
    dilated = [(g.shape[1 + i] - 1) * strides[i] + 1 for i in range(2)]
    input_pads = [
        (k - 1 - low, h - d - (k - 1 - low) + k - 1) for k, h, d, (low, _) in zip(w.shape, x.shape[1:3], dilated, pads)
    ]
    kernel_pads = [(low, k - 1 + d - h - low) for k, h, d, (low, _) in zip(w.shape, x.shape[1:3], dilated, pads)]

    @sequential_vmap
    def input_gradient(g: Array, w: Array) -> Array:
        flipped = w[::-1, ::-1].transpose(0, 1, 3, 2)
        return _fast(g, flipped, (1, 1), input_pads, strides)

    @sequential_vmap
    def kernel_gradient(x: Array, g: Array) -> Array:
        # A negative high pad means that trailing rows of x met no kernel position.
        crop = [min(high, 0) for _, high in kernel_pads]
        x = x[:, : x.shape[1] + crop[0], : x.shape[2] + crop[1]]
        kept = [(low, max(high, 0)) for low, high in kernel_pads]

        def of(x: Array, g: Array) -> Array:
            moved = _conv(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), kept, rhs_dilation=strides)
            return moved.transpose(1, 2, 0, 3)

        part = examples_at_once(g.shape, w.shape, g.dtype.itemsize)
        if part == g.shape[0]:
            return of(x, g)
        parts = [v.reshape(-1, part, *v.shape[1:]) for v in (x, g)]
        zero = jnp.zeros(w.shape, tree.wide(w.dtype))
        total, _ = jax.lax.scan(lambda total, xg: (total + of(*xg), None), zero, parts)
        return total.astype(w.dtype)

    return input_gradient(g, w), kernel_gradient(x, g)


def examples_at_once(out: Sequence[int], kernel: Sequence[int], itemsize: int) -> int:
    """The largest equal part of a batch whose patches and output gradients stay in cache; few channels gain nothing.

    Args:
      out: [B, H, W, C] of the output.
      kernel: [h, w, I, C].
      itemsize: bytes of a number.

    Returns:
      A divisor of B.

    >>> examples_at_once((20, 28, 28, 8), (5, 5, 1, 8), 4), 20 % examples_at_once((20, 28, 28, 64), (5, 5, 32, 64), 4)
    (20, 0)
    """
    if kernel[3] < _FAST_CHANNELS:
        return out[0]
    each = itemsize * out[1] * out[2] * (kernel[0] * kernel[1] * kernel[2] + kernel[3])
    fits = max(1, _PATCH_BYTES // each)
    return max(n for n in range(1, out[0] + 1) if out[0] % n == 0 and n <= fits)


_canonical.defvjp(_canonical_fwd, _canonical_bwd)


def _views(
    x: Array, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[tuple[int, int]]
) -> Callable[[int, int], Array]:
    """``view(i, j)`` is x shifted by kernel position (i, j) and strided, [B, H', W', C]."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    out = [(x.shape[1 + a] - kernel[a]) // strides[a] + 1 for a in range(2)]

    def view(i: int, j: int) -> Array:
        stop = [start + (out[a] - 1) * strides[a] + 1 for a, start in enumerate((i, j))]
        return x[:, i : stop[0] : strides[0], j : stop[1] : strides[1]]

    return view


def _rows(x: Array, w: Array, strides: Sequence[int], pads: Sequence[tuple[int, int]]) -> Array:
    """The lowering ``rows``: for each row of the kernel one matrix product with the shifted views along the width."""
    view = _views(x, w.shape[:2], strides, pads)

    def row(i: int) -> Array:
        columns = jnp.concatenate([view(i, j) for j in range(w.shape[1])], axis=-1)
        return (columns @ w[i].reshape(-1, w.shape[-1])).astype(tree.wide(x.dtype))

    return sum((row(i) for i in range(1, w.shape[0])), row(0)).astype(jnp.result_type(x, w))


def _met(x: Array, w: Array, strides: Sequence[int], pads: Pads) -> tuple[Array, Pads]:
    """The kernel without the rows and columns that only ever meet padding, and what remains to pad."""
    kept, left = [], []
    for size, k, s, (low, high) in zip(x.shape[1:3], w.shape, strides, pads):
        last = (low + size + high - k) // s * s  # where the last window starts, in the padded image
        first, end = max(0, low - last), min(k, low + size)
        if end - first in range(1, k):
            kept.append(slice(first, end))
            left.append((low - first, max(0, last + end - low - size)))
        else:
            kept.append(slice(0, k))
            left.append((low, high))
    return w[tuple(kept)], tuple(left)


def _no_window_in_padding(x: Array, w: Array, pads: Pads) -> tuple[Array, Pads]:
    """``x`` with the padding beyond a kernel's reach put on: as a negative pad of the gradient, XLA:CPU errs on it."""
    beyond = [tuple(max(0, pad - k + 1) for pad in pair) for k, pair in zip(w.shape, pads)]
    if not any(map(sum, beyond)):
        return x, pads
    left = tuple((low - first, high - last) for (low, high), (first, last) in zip(pads, beyond))
    return jnp.pad(x, ((0, 0), *beyond, (0, 0))), left


def _resolve(lowering: str) -> str:
    """A lowering by name; ``auto`` by the platform that programs are made for.

    Raises:
      ValueError: an unknown name.
    """
    if lowering not in LOWERINGS:
        raise ValueError(f"conv lowering {lowering!r} is not one of {', '.join(LOWERINGS)} (models.conv)")
    return AUTO[platform.current().name] if lowering == "auto" else lowering


def conv(
    x: Array,
    w: Array,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    lowering: str = "auto",
) -> Array:
    """2-D convolution (cross-correlation) with gradients that are fast inside loops.

    Args:
      x: [B, H, W, I].
      w: [kh, kw, I, O].
      strides: one int or one per spatial axis.
      padding: ``SAME``, ``VALID`` or explicit (low, high) pairs.
      lowering: ``auto``, ``canonical``, ``rows`` or ``lax``; all agree to rounding.

    Returns:
      [B, H', W', O] as ``jax.lax.conv_general_dilated``.

    Raises:
      ValueError: an unknown lowering.

    >>> conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), strides=2).shape
    (1, 2, 2, 5)
    """
    step, pads = _geometry(x, w, strides, padding)
    kind = _resolve(lowering)
    if kind == "lax":
        return _conv(x, w, step, pads)
    w, pads = _met(x, w, step, pads)
    if kind == "rows":
        return _rows(x, w, step, pads)
    x, pads = _no_window_in_padding(x, w, pads)
    out = w.shape[-1]
    missing = max(_FAST_CHANNELS - out, 0) if w.shape[2] < _FEW_CHANNELS else 0
    wide = jnp.pad(w, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else w
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return _canonical(x, wide, step, pads, precision)[..., :out]


def depthwise_conv(
    x: Array, w: Array, strides: int | Sequence[int] = 1, padding: str | Sequence[tuple[int, int]] = "SAME"
) -> Array:
    """Depthwise 2-D convolution as a sum of shifted slices times per-channel weights, never a grouped convolution.

    On a CPU the batch goes through it in parts that stay in cache.

    Args:
      x: [B, H, W, C].
      w: [kh, kw, 1, C], Flax's layout for ``feature_group_count = C``.
      strides, padding: as ``conv``.

    Returns:
      [B, H', W', C].

    >>> depthwise_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2)), padding="VALID")[0, 0, 0]
    Array([9., 9.], dtype=float32)
    """
    step, pads = _geometry(x, w, strides, padding)
    return (_in_parts if platform.current().name == "cpu" else _slices)(x, w, step, pads)


def _slices(x: Array, w: Array, strides: tuple[int, ...], pads: Pads) -> Array:
    """Depthwise convolution as a sum over kernel positions, ``sum_ij shifted_ij(x) w_ij``."""
    view = _views(x, w.shape[:2], strides, pads)
    places = [(i, j) for i in range(w.shape[0]) for j in range(w.shape[1])]

    def at(i: int, j: int) -> Array:
        return (view(i, j) * w[i, j, 0]).astype(tree.wide(x.dtype))

    return sum((at(i, j) for i, j in places[1:]), at(*places[0])).astype(jnp.result_type(x, w))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _in_parts(x: Array, w: Array, strides: tuple[int, ...], pads: Pads) -> Array:
    """``_slices`` over parts of the batch, one after the other; so is its gradient."""
    out = jax.lax.map(lambda part: _slices(part, w, strides, pads), _parts(x, x.shape))
    return out.reshape(-1, *out.shape[2:])


def _in_parts_fwd(x: Array, w: Array, strides: tuple[int, ...], pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return _in_parts(x, w, strides, pads), (x, w)


def _in_parts_bwd(strides: tuple[int, ...], pads: Pads, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved

    def step(total: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
        _, pull = jax.vjp(lambda x, w: _slices(x, w, strides, pads), part[0], w)
        input_gradient, kernel_gradient = pull(part[1])
        return total + kernel_gradient, input_gradient

    zero = jnp.zeros(w.shape, tree.wide(w.dtype))
    total, moved = jax.lax.scan(step, zero, (_parts(x, x.shape), _parts(g, x.shape)))
    return moved.reshape(x.shape), total.astype(w.dtype)


_in_parts.defvjp(_in_parts_fwd, _in_parts_bwd)


def _parts(x: Array, shape: Sequence[int]) -> Array:
    """[B, ...] as [parts, B / parts, ...]: parts that stay in cache, and more than one, for XLA drops a loop of one."""
    each = x.dtype.itemsize * shape[1] * shape[2] * shape[3]
    fits = max(1, _SLICED_BYTES // each)
    n = max(n for n in range(1, max(2, shape[0])) if shape[0] % n == 0 and n <= fits)
    return x.reshape(-1, n, *x.shape[1:])


def lowered(lowering: str) -> Callable[..., Array]:
    """``conv`` (or ``depthwise_conv``) in the call shape of ``nn.Conv(conv_general_dilated=...)``.

    Args:
      lowering: one of ``LOWERINGS``; ``auto`` is what ``AUTO`` says of the platform.

    Returns:
      A function of (x [B, H, W, I], kernel [h, w, I, C], strides, padding, ...), as flax calls it.

    >>> import flax.linen as nn
    >>> layer = nn.Conv(3, (3, 3), conv_general_dilated=lowered("rows"))
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 4, 4, 2)))[0].shape
    (1, 4, 4, 3)
    """

    def run(
        x: Array,
        w: Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        **_: Any,
    ) -> Array:
        if any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ()))):
            raise ValueError(f"dilation {lhs_dilation}, {rhs_dilation} is not supported, only 1 (models.conv)")
        if feature_group_count == 1:
            return conv(x, w, window_strides, padding, lowering)
        if feature_group_count == x.shape[-1] == w.shape[-1]:
            if lowering == "lax":
                return _conv(x, w, *_geometry(x, w, window_strides, padding), feature_group_count=x.shape[-1])
            return depthwise_conv(x, w, window_strides, padding)
        raise ValueError(f"feature_group_count {feature_group_count} is not 1 or {x.shape[-1]} (models.conv)")

    return run


def max_pool(x: Array, window: int = 2) -> Array:
    """Non-overlapping max-pool, VALID; the gradient goes to the first largest entry of a window, as in PyTorch.

    The winner is remembered rather than found again in the gradient by comparing with the maximum: XLA may compute the
    input anew there, rounded otherwise, so that no entry equals the maximum and the gradient is lost without a trace.
    ``reduce_window``'s gradient, which does remember, is eight times slower on a CPU, and half as slow on a TPU.

    Args:
      x: [B, H, W, C].
      window: w; the result is [B, H // w, W // w, C].

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    return pooled(x, window, POOLS[platform.current().name])


def pooled(x: Array, window: int, how: str) -> Array:
    """``max_pool`` in one of the ways that ``POOLS`` names.

    >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> bool((pooled(x, 2, "window") == pooled(x, 2, "winners")).all())
    True
    """
    if how == "window":
        return nn.max_pool(x, (window, window), (window, window))
    return _max_pool(x, window, x.shape[1:3])


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: Array, window: int, size: tuple[int, ...]) -> Array:
    return _winners(x, window, size)[0]


def _winners(x: Array, window: int, size: tuple[int, ...]) -> tuple[Array, Array]:
    """The largest entry of each window, and its number in the window, row by row."""
    h, w = (extent // window for extent in size)
    views = [x[:, i : h * window : window, j : w * window : window] for i in range(window) for j in range(window)]
    best, winner = views[0], jnp.zeros(views[0].shape, jnp.int8)
    for number, view in enumerate(views[1:], 1):
        winner = jnp.where(view > best, jnp.int8(number), winner)
        best = jnp.maximum(best, view)
    return best, winner


def _max_pool_bwd(window: int, size: tuple[int, ...], winner: Array, g: Array) -> tuple[Array]:
    b, h, w, c = g.shape
    number = jnp.arange(window * window, dtype=jnp.int8).reshape(window, 1, window, 1)
    spread = jnp.where(winner[:, :, None, :, None] == number, g[:, :, None, :, None], 0)
    rest = [(0, extent - kept * window) for extent, kept in zip(size, (h, w))]
    return (jnp.pad(spread.reshape(b, h * window, w * window, c), ((0, 0), *rest, (0, 0))),)


_max_pool.defvjp(_winners, _max_pool_bwd)

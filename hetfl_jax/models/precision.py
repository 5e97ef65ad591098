"""In which precision a net computes; its parameters, their gradients, statistics and all sums stay float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hetfl_jax.core import tree
from hetfl_jax.core.types import Array, PyTree
from hetfl_jax.models.adapter import Net

PRECISIONS = ("auto", "float32", "tf32", "bfloat16")
_PRODUCTS = {"float32": "float32", "tf32": "tensorfloat32"}


def in_precision(net: Net, precision: str) -> Net:
    """``net`` that computes in ``precision``, training and evaluated; what it returns is float32.

    ``auto`` leaves products to the device: float32 on a CPU, TF32 on a GPU, single bfloat16 passes on a TPU.
    ``float32`` and ``tf32`` say what a product of float32 numbers may be rounded to; TF32, where a device has it, is 10
    bits, on a TPU three bfloat16 passes, on a CPU the same as float32. ``bfloat16`` gives the module its parameters and
    input rounded to bfloat16, so that layers which take their type from what they get keep products and activations in
    it; a layer told another type (``nn.Dense(dtype=jnp.float32)``) computes in that. Gradients reach the float32
    parameters through the rounding. Norms compute moments in float32 (flax's do too).

    Raises:
      ValueError: an unknown precision.

    >>> import flax.linen as nn
    >>> from hetfl_jax.models.adapter import adapt
    >>> net, x = adapt(nn.Dense(1, use_bias=False)), jnp.array([[1.0]])
    >>> variables = {"params": {"kernel": jnp.array([[1 + 2.0**-9]])}}
    >>> out, _ = in_precision(net, "bfloat16").apply(variables, x)
    >>> float(net.apply(variables, x)[0][0, 0, 0]), float(out[0, 0, 0]), out.dtype
    (1.001953125, 1.0, dtype('float32'))
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)} (train.precision)")
    if precision == "auto":
        return net
    return net._replace(apply=_rounded(net.apply) if precision == "bfloat16" else _with_products(net.apply, precision))


def _with_products(apply: Callable[..., Any], precision: str) -> Callable[..., Any]:
    def run(*args: PyTree, **options: PyTree) -> tuple[Array, PyTree]:
        with jax.default_matmul_precision(_PRODUCTS[precision]):
            return apply(*args, **options)

    return run


def _rounded(apply: Callable[..., Any]) -> Callable[..., Any]:
    def run(variables: PyTree, x: Array, **options: PyTree) -> tuple[Array, PyTree]:
        small = {**variables, "params": _cast(variables["params"], jnp.bfloat16)}
        exits, stats = apply(small, _cast(x, jnp.bfloat16), **options)
        return jax.tree.map(lambda v: v.astype(tree.wide(v.dtype)), (exits, stats))

    return run


def _cast(values: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda v: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v, values)

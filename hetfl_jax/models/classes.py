"""Which parameters of a net belong to one class each, found from its program where its fields do not say so."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.random import draw
from hetfl_jax.core.settings import at_once
from hetfl_jax.core.types import Array, PyTree
from hetfl_jax.models.windows import Family, Path, flat


def with_class_axes(family: Family) -> Family:
    """The family with the class axis of every leaf that has one.

    A net with a field ``classes`` has told them already. Of others an axis is a class axis if it is as long as the
    net's output and each of its slices reaches one output alone, its own: ``d out_c / d leaf`` is 0 outside slice c.

    Raises:
      ValueError: no leaf has such an axis.

    >>> import flax.linen as nn
    >>> from hetfl_jax.models import families
    >>> net = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(3)])
    >>> found = with_class_axes(families.family(net, [{}], jnp.zeros((1, 3)))).windows
    >>> found["params", "layers_2", "kernel"].class_axis, found["params", "layers_0", "kernel"].class_axis
    (1, -1)
    """
    if any(window.class_axis >= 0 for window in family.windows.values()):
        return family
    found = class_axes(family)
    if not found:
        raise ValueError(
            f"net {type(family.nets[0].module).__name__} has no parameter that belongs to one class alone, so its "
            "entries cannot be counted by class: give it a field classes, or another method (family.net, method.name)"
        )
    windows = {path: window._replace(class_axis=found.get(path, -1)) for path, window in family.windows.items()}
    return family._replace(windows=windows)


@at_once
def class_axes(family: Family) -> dict[Path, int]:
    """The class axis of every parameter of level 0 that has one.

    The classes are split in two by each bit of their number; the gradient of the outputs of one half must vanish in the
    slices of the other half, for both halves of every bit. That takes ``2 ceil(log2 C)`` gradients on three random
    rows.

    Args:
      family: with examples [B, ...] of floats, or of tokens.

    Returns:
      ``{path: axis}``; a parameter that belongs to no class alone is left out.

    >>> import flax.linen as nn
    >>> from hetfl_jax.models import families
    >>> sorted(class_axes(families.family(nn.Dense(3), [{}], jnp.zeros((1, 3)))).items())
    [(('params', 'bias'), 0), (('params', 'kernel'), 1)]
    """
    net, shapes = family.nets[0], family.shapes[0]
    ready = jax.eval_shape(lambda v: family.prepare(v, None), family.example)
    classes = jax.eval_shape(net.each_exit, shapes, ready)[-1].shape[-1]
    names = {path: leaf.shape for path, leaf in flat({"params": shapes["params"]}).items() if classes in leaf.shape}
    halves = _halves(classes)
    keys = iter(jax.random.split(jax.random.key(0), 1 + len(jax.tree.leaves(shapes))))
    x = _input(next(keys), ready)
    variables = jax.tree.map(lambda s: 0.5 * draw(jax.random.normal, next(keys), s.shape, s.dtype), shapes)
    variables = {k: v if k == "params" else jax.tree.map(jnp.ones_like, v) for k, v in variables.items()}

    def reached(half: Array) -> dict[str, Array]:
        """For each axis as long as the output, which of its slices have a gradient."""

        def of_half(params: PyTree) -> Array:
            return jnp.stack([exit @ half for exit in net.each_exit({**variables, "params": params}, x)]).sum()

        gradient = flat({"params": jax.grad(of_half)(variables["params"])})
        return {
            f"{number} {axis}": (gradient[path] != 0).any(tuple(a for a in range(len(shape)) if a != axis))
            for number, (path, shape) in enumerate(names.items())
            for axis in range(len(shape))
            if shape[axis] == classes
        }

    found = jax.jit(lambda halves: jax.lax.map(reached, halves))(jnp.asarray(halves, jnp.float32))
    paths, out = list(names), dict[Path, int]()
    for name, slices in found.items():
        number, axis = map(int, name.split())
        inside = not (np.asarray(slices) & (halves == 0)).any()
        if inside and np.asarray(slices).any():
            out[paths[number]] = axis
    return out


def _halves(classes: int) -> np.ndarray:
    """[2 bits, C] 1 for the classes whose number has a bit, then for those whose number has it not.

    >>> _halves(3).tolist()
    [[0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 0]]
    """
    bits = max(1, math.ceil(math.log2(max(classes, 2))))
    have = (np.arange(classes) >> np.arange(bits)[:, None]) & 1
    return np.concatenate([have, 1 - have])


def _input(key: Array, ready: PyTree) -> Array:
    """Three random rows of the net's input; of tokens, zeros."""
    shape = (3, *ready.shape[1:])
    floats = jnp.issubdtype(ready.dtype, jnp.floating)
    return draw(jax.random.normal, key, shape, ready.dtype) if floats else jnp.zeros(shape, ready.dtype)

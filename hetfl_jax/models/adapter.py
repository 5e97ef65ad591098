"""The one place where a linen module becomes plain functions.

A module may take any of ``train``, ``valid``, ``capacity`` in its call; the adapter passes those it names. ``training``
and ``is_training`` are read as ``train``, ``deterministic`` as its opposite, ``mask`` as ``valid``. It returns logits
[B, C], or those of several exits as a tuple, or as [E, B, C]; of sequences, whose every position has a label, a tuple
of [B, S, C].
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Arguments, Array, PyTree


class Net(NamedTuple):
    """A net as pure functions."""

    init: Callable[[Array, Array], PyTree]  #: (key, x) -> variables: params and, if tracked, batch_stats
    apply: Callable[..., tuple[Array, PyTree]]  #: (variables, x, ...) -> (exits [E, B, C], new batch_stats or {})
    counted: Callable[[PyTree, Array], Array]  #: evaluation in plain lax operations, for counting
    outline: Callable[[Array, Array], tuple[Array, PyTree]]  #: (key, x) -> (exits, variables), likewise, for shapes
    each_exit: Callable[[PyTree, Array], Sequence[Array]]  #: likewise, the exits apart where the module says them so
    module: nn.Module

    def knows_padding(self) -> bool:
        """Whether the module is told which rows of a batch are real."""
        return not {"valid", "mask"}.isdisjoint(inspect.signature(type(self.module).__call__).parameters)

    def outputs(self, variables: PyTree, x: PyTree) -> int:
        """Classes that the net tells apart, from the shapes of its variables and input."""
        return jax.eval_shape(self.each_exit, variables, x)[-1].shape[-1]


def adapt(module: nn.Module) -> Net:
    """Wrap a linen module; see the module docstring for its call.

    ``apply(variables, x, train=False, collect=False, valid=None, key=None, capacity=None)`` returns the exits and,
    while training or collecting, the collection ``batch_stats`` as the module left it (empty if it has none).

    >>> import jax, jax.numpy as jnp
    >>> net = adapt(nn.Dense(3))
    >>> net.apply(net.init(jax.random.key(0), jnp.ones((2, 4))), jnp.ones((2, 4)))[0].shape
    (1, 2, 3)
    """
    accepted = inspect.signature(type(module).__call__).parameters

    def call(
        net: nn.Module,
        variables: PyTree,
        x: Array,
        rngs: dict[str, Array],
        mutable: bool | list[str],
        **options: PyTree,
    ) -> PyTree:
        given = {name: value for name, value in _spelled(options).items() if name in accepted}
        return net.apply(variables, x, rngs=rngs, mutable=mutable, **given)

    def init(key: Array, x: Array) -> PyTree:
        return module.init({"params": key, "dropout": key}, x)

    def apply(
        variables: PyTree,
        x: Array,
        *,
        train: bool = False,
        collect: bool = False,
        valid: Array | None = None,
        key: Array | None = None,
        capacity: Mapping[str, Array] | None = None,
    ) -> tuple[Array, PyTree]:
        rngs = {} if key is None else {"dropout": key}
        mutable = ["batch_stats"] if train or collect else False
        out = call(module, variables, x, rngs, mutable, train=train, valid=valid, capacity=capacity)
        logits, stats = (out[0], out[1].get("batch_stats", {})) if mutable else (out, {})
        return _as_exits(logits), stats

    plain = module.clone(lowering="lax") if hasattr(module, "lowering") else module

    def counted(variables: PyTree, x: Array) -> Array:
        return call(plain, variables, x, {}, False, train=False)

    def outline(key: Array, x: Array) -> tuple[Array, PyTree]:
        logits, variables = plain.init_with_output({"params": key, "dropout": key}, x)
        return _as_exits(logits), variables

    def each_exit(variables: PyTree, x: Array) -> Sequence[Array]:
        out = counted(variables, x)
        return out if isinstance(out, tuple | list) else [out]

    return Net(init, apply, counted, outline, each_exit, module)


def _spelled(options: Arguments) -> Arguments:
    """The options of a call under every spelling that is known."""
    train = options.get("train", False)
    spelled = {"training": train, "is_training": train, "deterministic": not train, "mask": options.get("valid")}
    return {**options, **spelled}


def _as_exits(logits: Array | Sequence[Array]) -> Array:
    if isinstance(logits, Sequence):
        return jnp.stack(logits)
    exits: Array = logits
    return exits if exits.ndim > 2 else exits[None]

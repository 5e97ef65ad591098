"""The one place where a linen module becomes plain functions.

A module may take any of ``train``, ``valid``, ``capacity`` in its call; the adapter passes those it names.
``training``, ``is_training`` and ``is_train`` are read as ``train``, ``deterministic``, ``inference`` and
``use_running_average`` as its opposite, ``mask`` as ``valid``. It returns outputs [B, C], of sequences, whose every
position has a label, [B, S, C]; those of several exits as a tuple.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
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
    statistics: Callable[[PyTree, Array], PyTree]  #: (variables, x) -> batch statistics of x, {} where there are none
    module: nn.Module

    def knows_padding(self) -> bool:
        """Whether the module is told which rows of a batch are real, by an argument ``valid`` or ``mask``."""
        return not {"valid", "mask"}.isdisjoint(_parameters(self.module))

    def outputs(self, variables: PyTree, x: PyTree) -> int:
        """Classes that the net tells apart, from the shapes of its variables and input.

        >>> net, x = adapt(nn.Dense(3)), jax.ShapeDtypeStruct((1, 4), jnp.float32)
        >>> net.outputs(jax.eval_shape(net.init, jax.random.key(0), x), x)
        3
        """
        return jax.eval_shape(self.each_exit, variables, x)[-1].shape[-1]


def adapt(module: nn.Module) -> Net:
    """Wrap a linen module; see the module docstring for its call.

    ``apply(variables, x, train=False, collect=False, valid=None, key=None, capacity=None)`` returns the exits and,
    while training or collecting, the collection ``batch_stats`` as the module left it (empty if it has none).

    Args of ``apply``:
      x: [B, ...] prepared.
      train: whether batch statistics are those of the batch, and units drop.
      collect: whether statistics are handed out in evaluation.
      valid: [B] bool, which rows are real.
      key: of dropout.
      capacity: traced fields of a level that runs masked, e.g. ``{"width": 0.5}``.

    Equal modules share one net, and with it what jax has traced of it.

    >>> import jax, jax.numpy as jnp
    >>> net = adapt(nn.Dense(3))
    >>> net.apply(net.init(jax.random.key(0), jnp.ones((2, 4))), jnp.ones((2, 4)))[0].shape
    (1, 2, 3)
    """
    try:
        hash(module)
    except TypeError:  # a field is a list or an array
        return _adapted(module)
    return _shared(module)


def _adapted(module: nn.Module) -> Net:
    accepted = _parameters(module)

    def call(
        net: nn.Module,
        variables: PyTree,
        x: Array,
        rngs: dict[str, Array],
        mutable: bool | list[str],
        **options: PyTree,
    ) -> PyTree:
        return net.apply(variables, x, rngs=rngs, mutable=mutable, **given(options))

    def given(options: Arguments) -> Arguments:
        return {name: value for name, value in _spelled(options).items() if name in accepted}

    def init(key: Array, x: Array) -> PyTree:
        return module.init({"params": key, "dropout": key}, x, **given({}))

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
        logits, variables = plain.init_with_output({"params": key, "dropout": key}, x, **given({}))
        return _as_exits(logits), variables

    def each_exit(variables: PyTree, x: Array) -> Sequence[Array]:
        out = counted(variables, x)
        return out if isinstance(out, tuple | list) else [out]

    def statistics(variables: PyTree, x: Array) -> PyTree:
        return apply(variables, x, collect=True)[1]

    return Net(init, apply, counted, outline, each_exit, statistics, module)


_shared = lru_cache(maxsize=64)(_adapted)


def _spelled(options: Arguments) -> Arguments:
    """The options of a call under every spelling that is known.

    >>> options = _spelled({"train": True})
    >>> options["training"], options["deterministic"], options["mask"]
    (True, False, None)
    """
    options = {"train": False, "valid": None, "capacity": None, **options}
    train = options["train"]
    while_training = dict.fromkeys(("training", "is_training", "is_train"), train)
    otherwise = dict.fromkeys(("deterministic", "inference", "use_running_average"), not train)
    return {**options, **while_training, **otherwise, "mask": options["valid"]}


def not_understood(module: nn.Module) -> list[str]:
    """Arguments of a module's call that nobody passes: they keep their defaults.

    >>> class Mode(nn.Module):
    ...     def __call__(self, x, train=False, mode="fast"):
    ...         return x
    >>> not_understood(Mode())
    ['mode']
    """
    named = [p for p in _parameters(module).values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in named[1:] if p.name not in _spelled({})]


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Parameters of a module's call, of an nnx module behind flax's bridge those of its own; the input is the first."""
    call = getattr(module, "nnx_class", type(module)).__call__
    return dict(list(inspect.signature(call).parameters.items())[1:])


def _as_exits(outputs: Array | Sequence[Array]) -> Array:
    """Outputs as [E, B, C]; a single one as one exit."""
    if isinstance(outputs, tuple | list):
        return jnp.stack(outputs)
    single: Array = outputs  # type: ignore[assignment]
    return single[None]

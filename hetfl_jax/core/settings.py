"""Numbers of a config that a program takes as arguments, so that runs which differ in them share one program.

Inside a traced function a method is built from ``Setting``s in place of floats. Arithmetic with one is traced. What
Python decides by its value (a range check, a switch that is off at 0) is written down as a ``Guard``: a point for which
some guard comes out otherwise needs a program of its own. So no method has to say which of its numbers may be traced,
and none can be traced wrongly.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from hetfl_jax.core.types import Array, PyTree

F = TypeVar("F", bound=Callable[..., Any])
Values = Mapping[str, float]  #: settings by dotted key


class Guard(NamedTuple):
    """What Python saw of a setting: ``rule(value, other)`` was ``found``."""

    name: str
    rule: Callable[[Any, Any], bool]
    other: float
    found: bool


class Setting:
    """A number by name: ``concrete`` for what Python decides, ``traced`` for what is computed.

    >>> seen = []
    >>> rate = Setting("train.learning_rate", 0.5, jax.numpy.float32(0.5), seen)
    >>> bool(rate > 0), float(1 - rate * 0.5), [(guard.name, guard.other, guard.found) for guard in seen]
    (True, 0.75, [('train.learning_rate', 0, True)])
    """

    __array_ufunc__ = None  # NumPy's numbers leave arithmetic to the methods below

    def __init__(self, name: str, concrete: float, traced: Any, seen: list[Guard]):
        """``seen`` takes down the guards."""
        self.name, self.concrete, self.traced, self._seen = name, concrete, traced, seen

    def __jax_array__(self) -> Array:
        """The traced number, where jax wants an array."""
        return self.traced

    def _decide(self, rule: Callable[[Any, Any], bool], other: Any) -> Any:
        if isinstance(other, Setting):
            other = other._fixed()
        if isinstance(other, jax.Array):
            return rule(self.traced, other)
        found = bool(rule(self.concrete, other))
        guard = Guard(self.name, rule, other, found)
        if guard not in self._seen:
            self._seen.append(guard)
        return found

    def _fixed(self) -> float:
        """The number itself; programs are then shared by points of this very number."""
        self._decide(operator.eq, self.concrete)
        return self.concrete

    def __bool__(self) -> bool:
        """Whether it is on."""
        return not self._decide(operator.eq, 0)

    __hash__ = None  # type: ignore[assignment]

    def __float__(self) -> float:
        """The number itself."""
        return float(self._fixed())

    def __int__(self) -> int:
        """Its whole part."""
        return int(self._fixed())

    def __repr__(self) -> str:
        """The number as text."""
        return repr(self._fixed())

    def __format__(self, how: str) -> str:
        """The number as text."""
        return format(self._fixed(), how)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """The number itself, where NumPy wants an array."""
        return np.asarray(self._fixed(), dtype)

    def __neg__(self) -> Array:
        """Traced."""
        return -self.traced


def _compared(name: str) -> None:
    """Give ``Setting`` a comparison, which decides by the concrete number and is written down."""
    rule = getattr(operator, name)
    setattr(Setting, f"__{name}__", lambda self, other: self._decide(rule, other))


def _both_sides(name: str) -> None:
    """Give ``Setting`` an operation, which is traced, with the number on either side."""
    of = getattr(operator, name)

    def forward(self: Setting, other: Any) -> Any:
        return of(self.traced, other.traced if isinstance(other, Setting) else other)

    def backward(self: Setting, other: Any) -> Any:
        return of(other, self.traced)

    setattr(Setting, f"__{name}__", forward)
    setattr(Setting, f"__r{name}__", backward)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _both_sides(_name)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _compared(_name)
Real.register(Setting)


def at_once(of: F) -> F:
    """A function of concrete arrays that is computed when it is called, also while a program is traced around it.

    >>> ones = jax.numpy.ones(3)
    >>> jax.jit(lambda x: x * float(at_once(jax.numpy.sum)(ones)))(2.0).item()
    6.0
    """

    @wraps(of)
    def now(*args: Any, **kwargs: Any) -> Any:
        with jax.ensure_compile_time_eval():
            return of(*args, **kwargs)

    return now  # type: ignore[return-value]


def settings(values: Values, traced: Mapping[str, Array | float], seen: list[Guard]) -> dict[str, Setting]:
    """A ``Setting`` for each value by name.

    Args:
      values: concrete numbers, by which code around it decides.
      traced: the same as the program's arguments.
      seen: gets every decision, see ``agree``.

    >>> seen = []
    >>> rate = settings({"rate": 0.5}, {"rate": 0.5}, seen)["rate"]
    >>> bool(rate > 0), 2 * rate, len(seen)
    (True, 1.0, 1)
    """
    return {name: Setting(name, value, traced[name], seen) for name, value in values.items()}


def agree(guards: Sequence[Guard], values: Values) -> bool:
    """Whether a program with these guards is right for other values.

    >>> agree([Guard("q", operator.gt, 0.0, True)], {"q": 2.0}), agree([Guard("q", operator.gt, 0.0, True)], {"q": 0.0})
    (True, False)
    """
    return all(bool(guard.rule(values[guard.name], guard.other)) == guard.found for guard in guards)


def numbers_of(blocks: PyTree, prefix: str = "") -> dict[str, float]:
    """Every float of nested dicts by its dotted key.

    >>> numbers_of({"train": {"learning_rate": 0.1, "rounds": 3}, "method": {"args": {"q": 1.0}}})
    {'train.learning_rate': 0.1, 'method.args.q': 1.0}
    """
    if isinstance(blocks, Mapping):
        return {k: v for name, value in blocks.items() for k, v in numbers_of(value, f"{prefix}{name}.").items()}
    return {prefix[:-1]: blocks} if isinstance(blocks, float) else {}


def replaced(blocks: PyTree, values: Mapping[str, Any], prefix: str = "") -> PyTree:
    """Nested dicts with the values of dotted keys replaced.

    >>> replaced({"train": {"learning_rate": 0.1, "rounds": 3}}, {"train.learning_rate": 0.5})
    {'train': {'learning_rate': 0.5, 'rounds': 3}}
    """
    if isinstance(blocks, Mapping):
        return {name: replaced(value, values, f"{prefix}{name}.") for name, value in blocks.items()}
    return values.get(prefix[:-1], blocks)

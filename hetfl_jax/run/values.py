"""The values of a config: each of the kind of its default, and finite; whatever else is refused in one line."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NoReturn

import numpy as np

SEVERAL = {int: "whole numbers", float: "finite numbers", str: "text"}
KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    tuple: "several values, as in (1, 2)",
    dict: "values by name",
}


def fitted(value: Any, default: Any, place: str, of: type | None = None) -> Any:
    """``value`` as a config keeps it, of the kind of ``default``; a default of ``None`` allows anything.

    Numbers may be NumPy's, whole ones may be written 2.0, and one value stands for a tuple of one.

    Args:
      place: the dotted key, for the message.
      of: the kind of a tuple's values.

    Raises:
      ValueError: with the value, what is allowed and ``place``, the key.

    >>> fitted(3, 1.0, "train.momentum"), fitted([0.5], (), "data.mean"), fitted(2.0, 10, "train.rounds")
    (3.0, (0.5,), 2)
    >>> fitted(float("nan"), 0.0, "train.momentum")
    Traceback (most recent call last):
    ValueError: momentum nan, allowed a finite number (train.momentum)
    """
    if isinstance(default, bool):
        return bool(value) if isinstance(value, bool | np.bool_) else _fail(value, bool, place)
    if isinstance(default, int):
        whole = isinstance(value, Integral) or (isinstance(value, Real) and float(value).is_integer())
        return int(value) if whole and not isinstance(value, bool | np.bool_) else _fail(value, int, place)
    if isinstance(default, float):
        switch = place.startswith("method.args.")  # some numbers of methods may be switched on, as mean_examples
        number = isinstance(value, Real) and (switch or not isinstance(value, bool | np.bool_))
        infinite = number and math.isinf(value) and not math.isinf(default)
        return float(value) if number and not (infinite or math.isnan(value)) else _fail(value, float, place)
    if isinstance(default, str):
        return value if isinstance(value, str) else _fail(value, str, place)
    if isinstance(default, Mapping):
        fine = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
        return {name: _no_nan(v, f"{place}.{name}") for name, v in value.items()} if fine else _fail(value, dict, place)
    if isinstance(default, tuple | list):
        return _several(value, place, of)
    return _no_nan(value, place)


def _several(value: Any, place: str, of: type | None) -> tuple[Any, ...]:
    """A tuple of values, of the kind ``of`` where it is given; one number or text stands for a tuple of one.

    >>> _several([1, 2.0], "train.milestones", int), _several(0.5, "data.mean", float)
    ((1, 2), (0.5,))
    """
    several = isinstance(value, tuple | list | range) or (isinstance(value, np.ndarray) and value.ndim == 1)
    values = tuple(value) if several else (value,)
    if not several and not isinstance(value, Real | str):
        _fail(value, tuple, place)
    if of is not None:
        try:
            return tuple(fitted(each, of(), place) for each in values)
        except ValueError:
            _fail(value, tuple, place, SEVERAL[of])
    return tuple(_no_nan(each.item() if isinstance(each, np.generic) else each, place) for each in values)


def _no_nan(value: Any, place: str) -> Any:
    """Anything but NaN, which no comparison would find."""
    if isinstance(value, Real) and math.isnan(value):
        _fail(value, float, place, "a number")
    return value


def _fail(value: Any, kind: type, place: str, allowed: str = "") -> NoReturn:
    """Refuse a value, with what is allowed and the key.

    >>> _fail("three", int, "train.rounds")
    Traceback (most recent call last):
    ValueError: rounds 'three', allowed a whole number (train.rounds)
    """
    text = " ".join(repr(value).split())
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    raise ValueError(f"{place.rpartition('.')[2]} {shown}, allowed {allowed or KINDS[kind]} ({place})")

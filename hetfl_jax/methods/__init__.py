"""Methods by name: one file a paper here, or any module of the user's with a ``make``."""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

from hetfl_jax.core.types import Algorithm, Arguments
from hetfl_jax.models.windows import Family
from hetfl_jax.parts.local import Local

Make = Callable[..., Algorithm]
SLOTS = "slots"  #: the argument of every ``make`` for what is chosen apart from the method


def names() -> tuple[str, ...]:
    """Names of the methods that come with the package.

    >>> "fedavg" in names(), len(names()) == len(set(names()))
    (True, True)
    """
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Make:
    """The ``make`` of a method: a name of ``names()``, or ``package.module`` or ``module:function`` of the user's.

    Modules are looked for as Python does, and in the working folder.

    Raises:
      ValueError: a name that is neither.

    >>> find("fedavg").__name__
    'make'
    """
    if name in names():
        return importlib.import_module(f"{__name__}.{name}").make
    module, _, function = name.partition(":")
    made = load(module, function or "make")
    if made is None:
        raise ValueError(
            f"method {name!r} is not one of {', '.join(names())}, nor a module of yours with a make (method.name)"
        )
    return made


def load(module: str, name: str) -> Any:
    """``name`` of a module that Python finds, or that lies in the working folder; ``None`` where there is none.

    Args:
      module: its dotted name.
      name: of what is wanted, e.g. ``make``.

    Raises:
      ValueError: a module that is there and cannot be imported.

    >>> load("math", "pi"), load("math", "make"), load("no_such_module", "make")
    (3.141592653589793, None, None)
    """
    if "" not in sys.path:
        sys.path.append("")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return None
        raise ValueError(f"module {module} cannot be read: {error} (method.name, family.net)") from error
    except Exception as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"module {module!r} cannot be read: {type(error).__name__}: {why} (method.name, family.net)"
        ) from error


def arguments(make: Make) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a method, without the slots.

    >>> list(arguments(find("fedavg")))
    ['cohort', 'server_optimizer']
    """
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != SLOTS}


def build(name: str, make: Make, family: Family, local: Local, args: Arguments, slots: Any = None) -> Algorithm:
    """``make(family, local, **args)``, with ``slots`` where it takes them.

    Args:
      name: of the method, for messages.
      make: of the method, see ``find``.
      family: the net at its levels.
      local: local training.
      args: its other arguments, by name.
      slots: what is chosen apart from the method, ``parts.compose.Slots`` or ``None``.

    Raises:
      ValueError: arguments that do not fit, or slots for a method without.

    >>> build("fedavg", find("fedavg"), None, None, {"cohorts": 2})
    Traceback (most recent call last):
    ValueError: argument 'cohorts' is not one of cohort, server_optimizer of fedavg (method.args)
    """
    known = arguments(make)
    if wrong := set(args) - set(known):
        raise ValueError(f"argument {min(wrong)!r} is not one of {', '.join(known)} of {name} (method.args)")
    if missing := {k for k, p in known.items() if p.default is p.empty} - set(args):
        raise ValueError(f"argument {min(missing)!r} of {name} is missing (method.args)")
    given = {SLOTS: slots} if SLOTS in inspect.signature(make).parameters else {}
    if slots is not None and not given and any(getattr(slots, part) for part in ("select", "uplink", "downlink")):
        raise ValueError(f"method {name} takes no slots: select, uplink and downlink must be none (method.name)")
    made = make(family, local, **args, **given)
    if getattr(slots, "adversary", None) and "robust" not in [question.name for question in made.questions]:
        raise ValueError(f"method {name} does not judge models on attacked images: need none (adversary.name)")
    if (wanted := getattr(slots, "objective", None)) and made.score.name != wanted.score.name:
        raise ValueError(
            f"method {name} has an objective of its own, judged by {made.score.name}: leave objective.name as it is by "
            "default (objective.name)"
        )
    return made

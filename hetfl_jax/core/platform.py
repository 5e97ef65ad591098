"""For which kind of device a program is made: a value that the executor sets while it is traced.

What differs by backend (lowerings, loops, chunks) asks ``current()``, so that a program for a TPU can be compiled on a
machine that has none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import NamedTuple

import jax

from hetfl_jax.core.types import PyTree

KINDS = ("cpu", "gpu", "tpu")


class Platform(NamedTuple):
    """A kind of device."""

    name: str  #: one of ``KINDS``
    memory: int = 0  #: bytes of one device; 0: those of the devices of this machine


_tracing: ContextVar[Platform | None] = ContextVar("platform", default=None)


def current() -> Platform:
    """The platform of the program that is being traced; outside of one, that of this machine's devices.

    >>> with during(Platform("tpu")):
    ...     current().name
    'tpu'
    """
    return _tracing.get() or Platform(jax.default_backend())


@contextmanager
def during(platform: Platform) -> Iterator[None]:
    """Everything inside is traced for ``platform``; threads do not see each other's.

    Args:
      platform: of ``current()`` inside.

    >>> before = current()
    >>> with during(Platform("gpu", memory=80)):
    ...     current()
    Platform(name='gpu', memory=80)
    >>> current() == before
    True
    """
    before = _tracing.set(platform)
    try:
        yield
    finally:
        _tracing.reset(before)


def made_for(platform: Platform, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """``fn``, traced for ``platform`` whenever it is traced.

    >>> made_for(Platform("gpu"), lambda: current().name)()
    'gpu'
    """

    @wraps(fn)
    def run(*args: PyTree, **options: PyTree) -> PyTree:
        with during(platform):
            return fn(*args, **options)

    return run

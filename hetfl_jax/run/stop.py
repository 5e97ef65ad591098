"""Ending a run early without losing anything: SIGTERM asks for it, the round in progress ends first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

STOPPED = 143  #: exit code, as of a process that SIGTERM ended


class Stopped(Exception):
    """A run or a sweep that ended early; what is needed to go on is on disk. The command then ends with code 143."""


@contextmanager
def on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets.

    Outside the main thread, and where several processes must agree on every round, SIGTERM keeps its usual meaning.

    >>> with on_sigterm() as asked:
    ...     asked.is_set()  # True from a SIGTERM on; the loop over rounds looks at it
    False
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)

"""Where a round's time goes: one round and one evaluation under jax's profiler, summed by named scope."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData, ProfilePlane

from hetfl_jax.core.types import PyTree

SCOPES = ("plan", "local_training", "merge", "collective", "server", "evaluation")
_CONTROL = ("while", "conditional", "call", "tuple", "async")  #: their time is that of the operations inside


class Event(NamedTuple):
    """One operation that ran."""

    module: str
    operation: str
    seconds: float


def profiled(run: Callable[[], PyTree], folder: Path) -> PyTree:
    """``run()`` under JAX's profiler; returns what ``run`` returns, once it is computed.

    Args:
      run: should be compiled before, or the trace is one of compiling.
      folder: gets the trace, which TensorBoard opens, and a ``perfetto_trace.json.gz`` for ui.perfetto.dev.

    >>> import tempfile
    >>> import numpy as np
    >>> folder, double, x = Path(tempfile.mkdtemp()), jax.jit(lambda x: 2 * x), np.ones(3)
    >>> _ = double(x)
    >>> profiled(lambda: double(x), folder).tolist(), len(list(folder.rglob("perfetto_trace.json.gz")))
    ([2.0, 2.0, 2.0], 1)
    """
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        return jax.block_until_ready(run())


def scopes_of(program: str) -> dict[str, str]:
    """Scope of every operation of a compiled program's text: the first of ``SCOPES`` on its path, else ``other``.

    Args:
      program: as ``rounds.program`` gives it; a path is the ``op_name`` that XLA keeps of named scopes.

    >>> scopes_of('  %add.1 = f32[] add(x, y), metadata={op_name="jit(step)/plan/server/add"}')
    {'add.1': 'plan'}
    """
    found = {}
    for name, path in re.findall(r'%?([\w.\-]+) = [^\n]*?op_name="([^"]*)"', program):
        found[name] = next((part for part in path.split("/") if part in SCOPES), "other")
    return found


def events(folder: Path) -> list[Event]:
    """Operations in the newest trace of ``folder``: those of accelerators if any ran there, else the host's.

    Loops, branches and calls are left out, since their time is that of the operations inside. An operation that ran on
    four cores at once is four events.

    Raises:
      ValueError: there is no trace below ``folder``.

    >>> import tempfile
    >>> import numpy as np
    >>> folder, square, x = Path(tempfile.mkdtemp()), jax.jit(lambda x: x @ x), np.ones((64, 64))
    >>> _ = square(x), profiled(lambda: square(x), folder)
    >>> {event.module for event in events(folder)}
    {'jit__lambda'}
    >>> events(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: nowhere: no trace is below it (--profile)
    """
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise ValueError(f"{folder}: no trace is below it (--profile)")
    data = ProfileData.from_file(str(traces[-1]))
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]  # also of a compiler without a device
    return _operations(devices) or _operations(planes)


def _operations(planes: Sequence[ProfilePlane]) -> list[Event]:
    """Events of the planes that name an operation of XLA (``hlo_op``)."""
    found = []
    for event in (event for plane in planes for line in plane.lines for event in line.events):
        stats = dict(event.stats)
        operation = stats.get("hlo_op")
        if operation and not str(operation).startswith(_CONTROL):
            found.append(Event(str(stats.get("hlo_module", "")), str(operation), event.duration_ns / 1e9))
    return found


def breakdown(folder: Path, program: str) -> dict[str, float]:
    """Busy seconds of each scope, summed over all cores and devices, so they may exceed the wall time.

    Args:
      folder: of ``profiled``.
      program: the round's compiled text; operations of other programs count as ``evaluation``.

    Returns:
      Seconds by scope, in the order of ``SCOPES``; those in which nothing ran are left out.

    >>> import tempfile
    >>> import numpy as np
    >>> square, x = jax.jit(jax.named_scope("server")(lambda x: x @ x)), np.ones((64, 64))
    >>> folder, _ = Path(tempfile.mkdtemp()), square(x)
    >>> _ = profiled(lambda: square(x), folder)
    >>> list(breakdown(folder, square.lower(x).compile().as_text()))
    ['server']
    """
    of_round = re.search(r"HloModule ([\w.\-]+)", program)
    scopes = scopes_of(program)
    seconds: dict[str, float] = defaultdict(float)
    for event in events(folder):
        inside = of_round is not None and event.module == of_round[1]
        seconds[scopes.get(event.operation, "other") if inside else "evaluation"] += event.seconds
    return {scope: seconds[scope] for scope in (*SCOPES, "other") if seconds[scope]}


def render(seconds: dict[str, float], folder: Path) -> str:
    """The breakdown as text, one line a scope with its milliseconds and its share.

    >>> print(render({"local_training": 0.03, "server": 0.01}, Path("trace")))
    busy time of one round and one evaluation, all cores (trace in trace/):
      local training         30.00 ms   75.0%
      server                 10.00 ms   25.0%
    """
    whole = sum(seconds.values()) or 1.0
    rows = [f"  {scope.replace('_', ' '):16s}{1e3 * s:12.2f} ms {s / whole:7.1%}" for scope, s in seconds.items()]
    head = f"busy time of one round and one evaluation, all cores (trace in {folder}/):"
    return "\n".join([head, *rows])

"""Devices that are not here: TPU topologies that ``libtpu`` compiles for on any machine."""

import os
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import AxisType, Mesh

from hetfl_jax.core.platform import Platform
from hetfl_jax.engine.executors import AXIS


class Generation(NamedTuple):
    """A generation of TPUs, of one device as jax counts them; figures from Google's Cloud TPU pages."""

    memory: float  #: GB
    flops: float  #: TFLOP/s of bfloat16 products
    clock: float  #: GHz, of the cycles that the compiler counts
    accelerator: str  #: what libtpu wants to be told


GENERATIONS = {
    "v4": Generation(32, 275, 1.05, "v4-8"),
    "v5e": Generation(16, 197, 1.5, "v5litepod-4"),
    "v5p": Generation(95, 459, 1.75, "v5p-8"),
    "v6e": Generation(32, 918, 1.75, "v6e-4"),
}
_SHAPE = re.compile(r"(\w+):(\d+(?:x\d+){1,2})")


class Target(NamedTuple):
    """What a program is compiled for: devices that are only described."""

    name: str
    generation: Generation
    mesh: Mesh

    def platform(self) -> Platform:
        """As an executor takes it: its kind and a device's memory in bytes."""
        return Platform("tpu", int(self.generation.memory * 1e9))


def target(name: str) -> Target:
    """The topology called ``name``: a generation and its shape, e.g. ``v5e:2x2``, ``v5e:8x8`` or ``v4:2x2x1``.

    ``libtpu`` describes and compiles for it on any machine; nothing can run there. Its environment variables are set
    for this process where they are not.

    Raises:
      ValueError: a name that is none, or no ``libtpu`` to compile with.

    >>> target("v9:2x2")
    Traceback (most recent call last):
    ValueError: target 'v9:2x2': need one of v4, v5e, v5p, v6e and a shape, e.g. v5e:2x2 or v4:2x2x1 (--target)
    """
    match = _SHAPE.fullmatch(name)
    if not match or match[1] not in GENERATIONS:
        known = ", ".join(GENERATIONS)
        raise ValueError(f"target {name!r}: need one of {known} and a shape, e.g. v5e:2x2 or v4:2x2x1 (--target)")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError(f"target {name!r} needs libtpu: pip install 'hetfl_jax[tpu-plan]' (--target)") from None
    generation = GENERATIONS[match[1]]
    _environment(generation.accelerator)
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"target {name!r}: {why} (--target)") from None
    return Target(name, generation, Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,)))


def _environment(accelerator: str) -> None:
    """What libtpu would else ask a machine with TPUs for."""
    told = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": accelerator,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a second process would stop at a lock file
    }
    for name, value in told.items():
        os.environ.setdefault(name, value)

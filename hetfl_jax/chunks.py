"""How many clients run under one vmap: as many as asked for, or as many as a device holds, in equal chunks."""

from collections.abc import Callable
from math import ceil, sqrt
from typing import Any

import jax

MOST = 256  #: clients at once; 1,024 were no faster on a GPU, even of a net of 159,010 parameters


def computed_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Bytes of all that ``fn(*args)`` computes, each loop's body once: more than it holds at any one time.

    >>> computed_bytes(lambda x: (2 * x).sum(), jax.ShapeDtypeStruct((3, 5), "float32"))
    64
    """
    return _bytes(jax.make_jaxpr(fn)(*args).jaxpr)


def _bytes(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        total += sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars if hasattr(v.aval, "dtype"))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += _bytes(inner) if hasattr(inner, "eqns") else 0
    return total


def clients_at_once(asked: int, slots: int, buckets: int, each: int, memory: int) -> int:
    """The size of a chunk.

    Args:
      asked: by the user; 0 lets the other arguments decide.
      slots: items of the round on this device, in ``buckets`` of unknown sizes; a bucket is taken to have an equal
        share and one deviation of a random draw, for what a chunk has too much is computed for nothing.
      each: bytes that one client computes; it was seen to hold a sixth (CNN) to a tenth (ResNet) of them at one time.
      memory: bytes of the device, which hold all that the chunk computes.

    >>> clients_at_once(0, slots=300, buckets=1, each=10**8, memory=10**10)
    100
    >>> clients_at_once(0, slots=100, buckets=5, each=10**6, memory=10**10), clients_at_once(16, 10, 1, 1, 1)
    (25, 10)
    """
    if asked:
        return min(asked, slots)
    share = slots / buckets
    likely = min(slots, ceil(share + (sqrt(share) if buckets > 1 else 0)))
    fits = max(1, min(MOST, memory // max(1, each)))
    return ceil(likely / ceil(likely / fits))

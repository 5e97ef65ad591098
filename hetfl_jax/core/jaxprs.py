"""Walks over a traced program: what it computes and multiplies."""

import math
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.interpreters import partial_eval as pe

from hetfl_jax.core.types import PyTree


def computed_bytes(fn: Callable[..., PyTree], *args: PyTree) -> int:
    """Bytes of all that ``fn(*args)`` computes, each loop's body once: more than it holds at any one time.

    Args:
      fn: is traced, nothing is computed.
      args: arrays, or their shapes.

    >>> computed_bytes(lambda x: (2 * x).sum(), jax.ShapeDtypeStruct((3, 5), "float32"))
    64
    """
    return _bytes(jax.make_jaxpr(fn)(*args).jaxpr)


def _bytes(jaxpr: PyTree) -> int:
    """Bytes of the results of every equation, those of inner programs too."""
    total = 0
    for equation in jaxpr.eqns:
        total += sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars if hasattr(v.aval, "dtype"))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += _bytes(inner) if hasattr(inner, "eqns") else 0
    return total


def products(jaxpr: PyTree) -> Iterator[int]:
    """Multiply-adds of each convolution and matrix product, in the order of the program; in a scan those of all turns.

    >>> turn = lambda x, _: (x @ x, None)
    >>> list(products(jax.make_jaxpr(lambda x: jax.lax.scan(turn, x, None, 5))(jax.numpy.ones((2, 2))).jaxpr))
    [40]
    """
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval
        if equation.primitive.name == "dot_general":
            contract = equation.params["dimension_numbers"][0][0]
            yield out.size * math.prod(equation.invars[0].aval.shape[a] for a in contract)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            yield out.size * math.prod(kernel) // out_channels
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    turns = equation.params["length"] if equation.primitive.name == "scan" else 1
                    yield from (turns * n for n in products(inner))


def used_inputs(fn: Callable[..., Sequence[PyTree]], *args: PyTree) -> list[PyTree]:
    """For every output of ``fn(*args)``, a list, the arguments as trees of bools: whether the output reads the leaf.

    >>> used_inputs(lambda a, b: [a["x"] + a["y"], b], {"x": 1.0, "y": 2.0}, 3.0)
    [({'x': True, 'y': True}, False), ({'x': False, 'y': False}, True)]
    """
    closed = jax.make_jaxpr(fn)(*args)
    structure, count = jax.tree.structure(args), len(closed.jaxpr.outvars)

    def of(output: int) -> PyTree:
        _, used = pe.dce_jaxpr(closed.jaxpr, [i == output for i in range(count)])
        return jax.tree.unflatten(structure, used)

    return [of(output) for output in range(count)]

"""Convolutions, max-pools and batch moments, each alone, as a TPU's compiler plans them: which lowering is for which.

    python -m experiments.throughput.lowering --target=v5e:2x2 --net cnn conv preresnet_1112

25 clients with weights of their own and batches of 20, forward and all gradients, on one chip; estimated cycles.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from experiments.throughput import common
from hetfl_jax.core import platform
from hetfl_jax.engine import schedule
from hetfl_jax.engine.topology import Target
from hetfl_jax.models.conv import conv, pooled

CLIENTS, BATCH = 25, 20
Shape = tuple[int, ...]
CONVOLUTIONS, POOLS, MOMENTS = ("lax", "rows"), ("window", "winners"), ("sums", "products")


def layers(net: str) -> dict[tuple[str, Any], Callable[[str], Callable[..., Any]]]:
    """What a net is made of: (kind, shapes of its arguments) -> (lowering -> the layer)."""
    fam = common.family(net, "a1", lowering="lax")
    x = jax.ShapeDtypeStruct((BATCH, *fam.example.shape[1:]), jnp.float32)
    program = jax.make_jaxpr(lambda v, x: fam.nets[0].apply(v, x, train=True))(fam.shapes[0], x).jaxpr
    found: dict[tuple[str, Any], Callable[[str], Callable[..., Any]]] = {}
    for equation in equations(program):
        shapes = tuple(v.aval.shape for v in equation.invars)
        p = equation.params
        if equation.primitive.name == "conv_general_dilated":
            steps, pads = tuple(p["window_strides"]), tuple(p["padding"])
            of = lambda how, s=steps, d=pads: lambda x, w: conv(x, w, s, d, how)  # noqa: E731
            found["conv", (*shapes, steps)] = of
        elif equation.primitive.name == "custom_vjp_call" and len(shapes) == 1 and len(shapes[0]) == 4:
            found["max_pool", shapes] = lambda how: lambda x: pooled(x, 2, how)
            found["moments", shapes] = lambda how: lambda x: moments(x, how)
    return found


def equations(jaxpr: Any) -> Iterator[Any]:
    """All of a program, those of its parts too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns") and equation.primitive.name != "custom_vjp_call":
                yield from equations(inner)


def moments(x: jax.Array, how: str) -> jax.Array:
    """Mean and variance of each channel, by reductions or as products with ones."""
    if how == "sums":
        mean = x.mean((0, 1, 2))
        return mean + jnp.square(x - mean).mean((0, 1, 2))
    rows = x.reshape(-1, x.shape[-1])
    ones = jnp.full(len(rows), 1 / len(rows))
    mean = jnp.matmul(ones, rows, precision="highest")
    return mean + jnp.matmul(ones, jnp.square(rows - mean), precision="highest")


def cycles(where: Target, layer: Callable[..., Any], shapes: Sequence[Shape], dtype: Any) -> float:
    """Of forward and all gradients under a vmap over clients."""
    device = SingleDeviceSharding(where.mesh.devices.flat[0])

    def both(*args: Any) -> Any:
        out, pull = jax.vjp(layer, *args)
        return pull(out)

    args = [jax.ShapeDtypeStruct((CLIENTS, *shape), dtype, sharding=device) for shape in shapes]
    with platform.during(where.platform()):
        compiled = jax.jit(jax.vmap(both)).lower(*args).compile()
    return schedule.read(compiled.as_text(), lambda path: None).cycles


def table(where: Target, nets: Sequence[str], kinds: Sequence[Any] = (jnp.float32, jnp.bfloat16)) -> list[common.Row]:
    """A row a layer and type: million cycles of each lowering, and the best."""
    rows, seen = list[common.Row](), set[Any]()
    names = {"conv": CONVOLUTIONS, "max_pool": POOLS, "moments": MOMENTS}
    for net in nets:
        for (kind, known), of in layers(net).items():
            shapes = known[:2] if kind == "conv" else known
            for dtype in kinds if kind == "conv" else kinds[:1]:
                if (kind, known, dtype) in seen:
                    continue
                seen.add((kind, known, dtype))
                found = {how: cycles(where, of(how), shapes, dtype) / 1e6 for how in names[kind]}
                best = min(found, key=lambda how: found[how])
                listed = {f"{place} Mcycles": value for place, value in zip(("first", "second"), found.values())}
                rows.append({"net": net, "layer": kind, "shapes": str(known), "type": jnp.dtype(dtype).name,
                             "lowerings": " / ".join(found), **listed, "best": best})  # fmt: skip
                print(rows[-1], flush=True)
    return rows

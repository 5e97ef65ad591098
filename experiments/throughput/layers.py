"""What stands between the FedAvg CNN's step and a matrix product: each layer's forward and gradients alone.

    taskset -c 0 python -m experiments.throughput.layers

Every part runs inside a loop, as in local training, with the weights of one client changing at every step.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from experiments.throughput import common
from hetfl_jax.engine.executors import executor
from hetfl_jax.models.conv import conv, max_pool

BATCH, STEPS = 20, 20


def looped(layer: Callable[[Any, Any], Any], w: Any, x: Any, input_gradient: bool) -> Callable[[], Any]:
    """``STEPS`` times forward, gradient of the weights (and of the input), and the update."""

    @jax.jit
    def run(w: Any, x: Any) -> Any:
        def step(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            w, x = carry
            out, pull = jax.vjp(layer, w, x)
            dw, dx = pull(out)
            return jax.tree.map(lambda a, g: a - 1e-6 * g, w, dw), x - 1e-6 * dx if input_gradient else x

        return jax.lax.fori_loop(0, STEPS, step, (w, x))

    return lambda: run(w, x)


def parts() -> dict[str, tuple[Callable[[], Any], float]]:
    """Each part and its floating-point operations a step."""

    def values(*shape: int) -> jax.Array:
        return 0.1 * jax.random.normal(jax.random.key(len(shape)), shape)

    def pooled(w: Any, x: Any) -> Any:
        return max_pool(nn.relu(x + w))

    convolve = lambda w, x: conv(x, w)  # noqa: E731
    dense = lambda w, x: x @ w  # noqa: E731
    flops = 2 * BATCH
    return {
        "conv 5x5, 1 -> 32": (
            looped(convolve, values(5, 5, 1, 32), values(BATCH, 28, 28, 1), False),
            flops * 2 * 784 * 25 * 32,
        ),
        "bias, ReLU, pool, 28x28x32": (looped(pooled, values(32), values(BATCH, 28, 28, 32), True), 0),
        "conv 5x5, 32 -> 64": (
            looped(convolve, values(5, 5, 32, 64), values(BATCH, 14, 14, 32), True),
            flops * 3 * 196 * 25 * 32 * 64,
        ),
        "bias, ReLU, pool, 14x14x64": (looped(pooled, values(64), values(BATCH, 14, 14, 64), True), 0),
        "dense 3136 -> 512": (
            looped(dense, values(3136, 512), values(BATCH, 3136), True),
            flops * 3 * 3136 * 512,
        ),
        "dense 512 -> 10": (looped(dense, values(512, 10), values(BATCH, 512), True), flops * 3 * 5120),
    }


def main() -> None:
    """Time every part, the whole step, and a matrix product, in turns."""
    given = common.begin(common.flags(__doc__))
    each = parts()
    algorithm = common.fedavg.make(common.family("cnn"), common.settings(steps=STEPS), cohort=1)
    whole = common.bench(algorithm, common.data(common.SHAPES["cnn"], 10, 60), executor("bucketed"))
    product, product_flops = common.matmul()
    sides = {name: run for name, (run, _) in each.items()} | {"whole step": whole.round, "matmul": product}
    s = common.medians(sides, 5 * given.repeats)
    roof = product_flops / s["matmul"]
    work = {name: float(flops) for name, (_, flops) in each.items()}
    work["whole step"] = float(common.training_flops(common.family("cnn"), 0) * BATCH)
    rows = [
        {
            "part": name,
            "ms a step": 1e3 * s[name] / STEPS,
            "share of the step": s[name] / s["whole step"],
            "GFLOP/s": flops * STEPS / s[name] / 1e9,
            "of the roof": flops * STEPS / s[name] / roof,
        }
        for name, flops in work.items()
    ]

    def draw(axes: Any) -> None:
        common.bars(axes, [row["part"] for row in rows], [row["ms a step"] for row in rows], "ms a step")

    common.keep(given.name or "layers", "A step of the FedAvg CNN by layer", rows, {"batch": BATCH}, draw)


if __name__ == "__main__":
    main()

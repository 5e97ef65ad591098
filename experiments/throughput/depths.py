"""Depth levels of the multi-exit ResNet18: a mix of depths against its multiply-adds, and what depthwise ones cost.

    taskset -c 0 python -m experiments.throughput.depths --width 64
    taskset -c 0 python -m experiments.throughput.depths --width 64 --mix apart    each depth on its own

Every client makes ``--steps`` steps of ``--batch`` images of 32 x 32, all exits trained with distillation. The share of
the depthwise convolutions is what a step loses when each of them is replaced by a strided slice of the same shape.
"""

import importlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from experiments.throughput import common
from hetfl_jax.data import preprocess
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import depthfl
from hetfl_jax.models import build, families, windows
from hetfl_jax.models.costs import costs

convolutions = importlib.import_module("hetfl_jax.models.conv")  # the package's name ``conv`` is the function


def family(width: int, depths: tuple[int, ...]) -> windows.Family:
    """The net at base width ``width``, a level a depth."""
    module = build("resnet18_exits", hidden=tuple(width * 2**i for i in range(4)))
    prepare = preprocess.images([0.5] * 3, [0.25] * 3)
    example = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
    return families.family(module, [{"depth": depth} for depth in depths], example, prepare)


def federation(fam: windows.Family, clients: int, batch: int, steps: int) -> common.Bench:
    """All clients in every round, in rotating levels."""
    each = [clients // fam.levels] * fam.levels
    settings = common.settings(batch_size=batch, steps=steps)
    algorithm = depthfl.make(fam, settings, cohort=clients, clients_per_level=each, feddyn=False)
    pop = common.data((32, 32, 3), clients, batch * steps, fam.levels, pool=batch * steps * clients)
    return common.bench(algorithm, pop, executor("bucketed"))


def sliced(x: jax.Array, w: jax.Array, strides: Any = 1, padding: Any = "SAME") -> jax.Array:
    """In place of a depthwise convolution: no products, the same output shape."""
    step = strides if isinstance(strides, int) else strides[0]
    return x[:, ::step, ::step] + w[0, 0, 0]


def mixed(width: int, size: tuple[int, int], repeats: int) -> common.Row:
    """A client of each depth against as many of the deepest."""
    mix, deepest = family(width, (4, 3, 2, 1)), family(width, (4,))
    sides = {"mix": federation(mix, 4, *size).round, "all": federation(deepest, 4, *size).round}
    s = common.medians(sides, repeats)
    macs = costs(mix).macs
    ratio, taken = float(macs.mean() / macs[0]), s["mix"] / s["all"]
    return {
        "what": "depths 4, 3, 2, 1 against 4, 4, 4, 4", "s": s["mix"], "against s": s["all"],
        "ratio": taken, "of multiply-adds": ratio, "over it": taken / ratio,
    }  # fmt: skip


def apart(width: int, size: tuple[int, int], repeats: int) -> common.Row:
    """``mixed`` as the sum of its clients' rounds, each timed in a federation of its own depth."""
    depths = (4, 3, 2, 1)
    sides = {str(depth): federation(family(width, (depth,)), 1, *size).round for depth in depths}
    s = common.medians(sides, repeats)
    macs = costs(family(width, depths)).macs
    ratio, taken = float(macs.mean() / macs[0]), sum(s.values()) / (4 * s["4"])
    return {
        "what": "depths 4, 3, 2, 1 one by one", "s": sum(s.values()), "against s": 4 * s["4"],
        "ratio": taken, "of multiply-adds": ratio, "over it": taken / ratio,
    }  # fmt: skip


def main() -> None:
    """Time a mix of depths against the deepest alone, and steps with and without depthwise convolutions."""
    parser = common.flags(__doc__)
    parser.add_argument("--width", type=int, default=64, help="base width")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--depths", type=int, nargs="*", default=[1, 4], help="depths whose share is measured")
    parser.add_argument("--mix", choices=("together", "apart", "none"), default="together", help="in one round or not")
    given = common.begin(parser)
    size = (given.batch, given.steps)
    how = {"together": [mixed], "apart": [apart], "none": []}[given.mix]
    rows: list[common.Row] = [of(given.width, size, given.repeats) for of in how]
    for depth in given.depths:
        fam = family(given.width, (depth,))
        usual = federation(fam, 1, *size).round
        with mock.patch.object(convolutions, "depthwise_conv", sliced):
            without = federation(fam, 1, *size).round
        seconds = common.medians({"usual": usual, "without": without}, given.repeats)
        rows.append(
            {"what": f"depth {depth}, depthwise share", "s": seconds["usual"], "against s": seconds["without"],
             "ratio": 1 - seconds["without"] / seconds["usual"], "of multiply-adds": None, "over it": None}
        )  # fmt: skip

    def draw(axes: Any) -> None:
        common.bars(axes, [row["what"] for row in rows], [row["ratio"] for row in rows], "ratio of times, or share")

    about = {"width": given.width, "batch": given.batch, "steps": given.steps}
    name = given.name or f"depths_{given.width}"
    common.keep(name, f"Depth levels, base width {given.width}", rows, about, draw)


if __name__ == "__main__":
    main()

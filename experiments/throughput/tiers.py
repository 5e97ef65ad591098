"""FjORD's round without distillation over its executed multiply-adds, against FedAvg's rate at full width.

    taskset -c 0 python -m experiments.throughput.tiers --width 64
    taskset -c 0 python -m experiments.throughput.tiers --width 16 --distill

A client of each of five tiers makes ``--steps`` steps of ``--batch`` images of 32 x 32 with the ResNet18, each at a
rate drawn anew; FedAvg's two clients are at full width. The sides take turns; a round's time is divided by what it
executed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.throughput import common
from hetfl_jax.data import preprocess
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg, fjord
from hetfl_jax.models import build, families, windows
from hetfl_jax.run.mix import level_fields, parse_buckets, parse_mix, uniform_tiers


def family(width: int, mix: str) -> windows.Family:
    """The net at base width ``width``."""
    prepare = preprocess.images([0.5] * 3, [0.25] * 3)
    levels = [level_fields(parse_mix(mix), i, "bn_tiers") for i in range(len(parse_mix(mix).names))]
    module = build("resnet18", hidden=tuple(width * 2**i for i in range(4)), norm="bn_tiers")
    return families.family(module, levels, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8), prepare)


def federation(fam: windows.Family, given: Any, buckets: Any) -> common.Bench:
    """All clients in every round: one of each tier, or two of the only one."""
    clients = 2 if fam.levels == 1 else fam.levels
    settings = common.settings(batch_size=given.batch, steps=given.steps, weight_decay=1e-4)
    each = [clients // fam.levels] * fam.levels
    if fam.levels == 1:
        algorithm = fedavg.make(fam, settings, cohort=clients)
    else:
        algorithm = fjord.make(fam, settings, cohort=clients, clients_per_level=each, distill=given.distill)
    size = given.batch * given.steps
    pop = common.data((32, 32, 3), clients, size, fam.levels, pool=size * clients)
    return common.bench(algorithm, pop, executor("bucketed", buckets=buckets))


def per_operation(fam: windows.Family, bench: common.Bench, clock: Callable[[], float]) -> tuple[float, float]:
    """(seconds, floating-point operations) of one more round."""
    began = clock()
    info = jax.block_until_ready(bench.round())
    seconds = clock() - began
    flops = np.asarray([common.training_flops(fam, level) for level in range(fam.levels)])
    return seconds, float(np.asarray(info.items.seen.work)[:, 1].sum(0) @ flops)


def main() -> None:
    """Time both, by turns."""
    parser = common.flags(__doc__)
    parser.add_argument("--cpu-time", action="store_true", help="not the wall clock, if others run on the core too")
    parser.add_argument("--width", type=int, default=64, help="base width")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--distill", action="store_true")
    parser.add_argument("--buckets", default="each", help="each, or one: fewer programs")
    given = common.begin(parser)
    mix = uniform_tiers(5)
    sides = {"fjord": family(given.width, mix), "fedavg": family(given.width, "w1x1")}
    buckets = {"fjord": parse_buckets(given.buckets, parse_mix(mix)), "fedavg": ()}
    benches = {name: federation(fam, given, buckets[name]) for name, fam in sides.items()}
    clock = common.clock(given)
    turns = [{n: per_operation(sides[n], benches[n], clock) for n in sides} for _ in range(given.repeats)]
    rows = []
    for name, bench in benches.items():
        rate = float(np.median([turn[name][1] / turn[name][0] for turn in turns])) / 1e9
        cost = [turn[name][0] / turn[name][1] for turn in turns]
        against = float(np.median([c * turn["fedavg"][1] / turn["fedavg"][0] for c, turn in zip(cost, turns)]))
        seconds = float(np.median([turn[name][0] for turn in turns]))
        rows.append(
            {"method": name, "round s": seconds, "compile s": bench.compile_seconds, "GFLOP/s": rate,
             "over FedAvg's": against}
        )  # fmt: skip

    def draw(axes: Any) -> None:
        common.bars(
            axes, [r["method"] for r in rows], [r["over FedAvg's"] for r in rows], "time per operation, FedAvg 1"
        )

    about = {"width": given.width, "batch": given.batch, "steps": given.steps, "distill": given.distill}
    name = given.name or f"tiers_{given.width}" + "_distill" * given.distill
    common.keep(name, f"FjORD over its multiply-adds, base width {given.width}", rows, about, draw)


if __name__ == "__main__":
    main()

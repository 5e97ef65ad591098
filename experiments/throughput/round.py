"""Time of a round: nets x methods x mixes, against a matrix product on the same cores.

python -m experiments.throughput.round --preset mlp cnn
taskset -c 0 python -m experiments.throughput.round --preset all
"""

from typing import NamedTuple

import jax
import numpy as np

from experiments.throughput import common
from hetfl_jax.engine.executors import executor


class Preset(NamedTuple):
    """A row of the benchmark: 1,000 clients x 60 examples, one epoch of batches of 20."""

    net: str
    method: str
    mix: str
    cohort: int


FIVE = "a1-b1-c1-d1-e1"
PRESETS = {
    "mlp": [Preset("mlp", "fedavg", "a1", 100), Preset("mlp", "heterofl", FIVE, 100)],
    "cnn": [Preset("cnn", "fedavg", "a1", 100), Preset("cnn", "heterofl", FIVE, 100)],
    "conv": [Preset("conv", "heterofl", "a1", 10), Preset("conv", "heterofl", FIVE, 10)],
    "preresnet_1112": [Preset("preresnet_1112", "heterofl", mix, 10) for mix in ("a1", FIVE)],
}
CLIENTS, EXAMPLES, BATCH = 1_000, 60, 20


def measure(preset: Preset, repeats: int, clients_per_chunk: int, lowering: str) -> common.Row:
    """One row; the roof is timed between the rounds."""
    fam = common.family(preset.net, preset.mix, **({} if preset.net == "mlp" else {"lowering": lowering}))
    algorithm = common.method(preset.method, fam, common.settings(batch_size=BATCH), preset.cohort, preset.mix)
    run = executor("bucketed", clients_per_chunk, jax.device_count())
    product, product_flops = common.matmul()
    common.reset_peak()
    bench = common.bench(algorithm, common.data(common.SHAPES[preset.net], CLIENTS, EXAMPLES), run)
    work = []

    def one_round() -> object:
        info = bench.round()
        work.append(info.items)
        return info

    seconds = common.medians({"round": one_round, "matmul": product}, repeats)
    flops = [common.training_flops(fam, level) for level in range(fam.levels)]
    # Levels are drawn, so rounds differ.
    forward = [np.asarray(w.seen.work)[np.asarray(w.valid), 0].sum(0) for w in jax.device_get(work)]
    done = float(sum(examples @ np.asarray(flops) for examples in forward) / len(work))
    roof = product_flops / seconds["matmul"] / 1e9
    rate = done / seconds["round"] / 1e9
    return {
        "net": preset.net,
        "method": preset.method,
        "mix": preset.mix,
        "cohort": preset.cohort,
        "round s": seconds["round"],
        "compile s": bench.compile_seconds,
        "peak MB": common.peak_bytes() / 1e6,
        "clients/s": preset.cohort / seconds["round"],
        "steps/s": preset.cohort * EXAMPLES / BATCH / seconds["round"],
        "GFLOP/s": rate,
        "matmul GFLOP/s": roof,
        "ratio": rate / roof,
    }


def main() -> None:
    """Run the presets that are asked for."""
    parser = common.flags(__doc__)
    parser.add_argument("--preset", nargs="+", default=["mlp", "cnn"], choices=[*PRESETS, "all"])
    parser.add_argument("--clients-per-chunk", type=int, default=0)
    parser.add_argument("--lowering", default="auto", help="of convolutions: auto, canonical, rows, lax")
    given = common.begin(parser)
    names = list(PRESETS) if "all" in given.preset else given.preset
    presets = [preset for name in names for preset in PRESETS[name]]
    rows = [measure(preset, given.repeats, given.clients_per_chunk, given.lowering) for preset in presets]
    about = {"executor": "bucketed", "clients": CLIENTS, "examples": EXAMPLES, "batch": BATCH}
    labels = [f"{row['net']} {row['method']} {row['mix']}" for row in rows]

    def draw(axes: object) -> None:
        common.bars(axes, labels, [row["ratio"] for row in rows], "share of a matrix product's rate")

    common.keep(given.name or "round", "Time of a round", rows, about, draw)


if __name__ == "__main__":
    main()

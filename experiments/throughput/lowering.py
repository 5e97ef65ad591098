"""Which convolution lowering and how many clients a chunk are fastest for each net on this backend.

    python -m experiments.throughput.lowering --net cnn conv preresnet_1112 --chunks 1 8 32 128 256
    python -m experiments.throughput.lowering --precision highest default bfloat16
    python -m experiments.throughput.lowering --target=v5e:2x2     a TPU that is not here, by what its compiler plans

Milliseconds a client step, the ratio to a matrix product at the same precision, and the winner of each net. The
default of ``lowering: auto`` is in ``models.conv.AUTO``: measured on a CPU and a GPU, planned for a TPU.
"""

from collections.abc import Sequence
from typing import Any

import jax

from experiments.throughput import common, layers_planned
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.topology import target
from hetfl_jax.methods import fedavg
from hetfl_jax.models.conv import AUTO, POOLS

CLIENTS, EXAMPLES = 256, 20


def measure(net: str, lowering: str, chunk: int, cohort: int, repeats: int) -> common.Row:
    """One cell: FedAvg, one step of 20 examples a client."""
    fam = common.family(net, lowering=lowering)
    algorithm = fedavg.make(fam, common.settings(), cohort=cohort)
    bench = common.bench(algorithm, common.data(common.SHAPES[net], CLIENTS, EXAMPLES), executor("chunked", chunk))
    product, flops = common.matmul()
    s = common.medians({"round": bench.round, "matmul": product}, repeats)
    rate = common.training_flops(fam, 0) * EXAMPLES * cohort / s["round"]
    return {
        "net": net,
        "lowering": lowering,
        "chunk": chunk,
        "precision": str(jax.config.jax_default_matmul_precision),
        "ms a step": 1e3 * s["round"] / cohort,
        "GFLOP/s": rate / 1e9,
        "ratio": rate / (flops / s["matmul"]),
        "compile s": bench.compile_seconds,
    }


def planned(name: str, nets: Sequence[str], file: str | None) -> None:
    """Layers of the nets as a TPU's compiler plans them, and what the tables in use say."""
    rows = layers_planned.table(target(name), nets)
    labels = [f"{row['layer']} {row['shapes']} {row['type']}" for row in rows]
    worse = [max(row["first Mcycles"], row["second Mcycles"]) / min(row["first Mcycles"], row["second Mcycles"])
             for row in rows]  # fmt: skip
    in_use = {"target": name, "in use": f"conv {AUTO['tpu']}, max_pool {POOLS['tpu']}"}
    common.keep(file or f"lowering_{name.replace(':', '_')}", f"Lowerings of layers as compiled for {name}, not run",
                rows, in_use, lambda axes: common.bars(axes, labels, worse, "worse over better lowering"))  # fmt: skip


def main() -> None:
    """Measure every combination and name the winners."""
    parser = common.flags(__doc__)
    parser.add_argument("--net", nargs="+", default=["cnn", "conv"], choices=["cnn", "conv", "preresnet_1112"])
    parser.add_argument("--lowering", nargs="+", default=["canonical", "rows", "lax"])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--cohort", type=int, default=0, help="clients a round (default: the largest chunk)")
    parser.add_argument("--precision", nargs="+", default=["default"], help="of products: highest is f32 without TF32")
    parser.add_argument("--target", default="", help="a TPU topology, e.g. v5e:2x2: layers alone, compiled for it")
    given = common.begin(parser)
    if given.target:
        planned(given.target, given.net, given.name)
        return
    rows: list[common.Row] = []
    for precision in given.precision:
        jax.config.update("jax_default_matmul_precision", None if precision == "default" else precision)
        for net in given.net:
            for lowering in given.lowering:
                for chunk in given.chunks:
                    rows.append(measure(net, lowering, chunk, given.cohort or max(given.chunks), given.repeats))
    for net in given.net:
        best = min((row for row in rows if row["net"] == net), key=lambda row: row["ms a step"])
        print(f"{net}: {best['lowering']}, {best['chunk']} a chunk, {best['precision']}: {best['ms a step']:.2f} ms")

    def draw(axes: Any) -> None:
        labels = [f"{row['net']} {row['lowering']} x{row['chunk']} {row['precision']}" for row in rows]
        common.bars(axes, labels, [row["ms a step"] for row in rows], "ms a client step")

    common.keep(given.name or "lowering", "Convolution lowerings", rows, {"executor": "chunked"}, draw)


if __name__ == "__main__":
    main()

"""Points of a sweep that run as one on each chip, as a TPU's compiler plans them, on any machine; no TPU runs anything.

    python -m experiments.throughput.planned_points --target v5e:2x2 --points 1 8 64

Rounds of the digits MLP of ``experiments.throughput.sweep``, under ``vmap`` over states and keys, points dealt to the
chips. Milliseconds are the compiler's estimate of its own schedule.
"""

import re
import time

import jax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.throughput import common
from experiments.throughput.sweep import MLP
from hetfl_jax.core import platform
from hetfl_jax.core.types import PyTree
from hetfl_jax.engine import buckets, executors, schedule
from hetfl_jax.engine.rounds import round_programs, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.engine.topology import Target, target
from hetfl_jax.run.config import load_config
from hetfl_jax.run.federation import build
from hetfl_jax.run.ledger import mean_steps


def planned(where: Target, points: int) -> dict[str, float]:
    """Estimated milliseconds of a round of ``points`` points on every chip, temporary MB of a chip, compile seconds."""
    with platform.during(where.platform()):
        fed = build(load_config("heterofl_digits:mix=a1", *MLP, tell=lambda text: None))
        run = executors.executor("bucketed", 0, 1)._replace(platform=where.platform())
        step = round_programs(fed.algorithm, run, device_store()).usual
    assert step is not None
    clients, cohort = fed.partition.size.size, 10
    all_points = points * where.mesh.size
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), all_points))
    state = jax.eval_shape(jax.vmap(lambda k: start(fed.algorithm, device_store(), clients, k)), key)

    def placed(values: PyTree, spec: PartitionSpec) -> PyTree:
        sharding = NamedSharding(where.mesh, spec)
        return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), values)

    over = jax.jit(jax.vmap(step, (0, None, 0, None)))
    split, everywhere = PartitionSpec(executors.AXIS), PartitionSpec()
    args = placed(state, split), placed(fed.train, everywhere), placed(key, split), {}
    began = time.perf_counter()
    compiled = over.lower(*args).compile()
    seconds = time.perf_counter() - began

    def trips(path: str) -> float | None:
        last = path.rsplit("/while", 1)[0]
        if last.endswith("local_training"):
            return mean_steps(fed.local, fed.partition.size)
        match = re.search(r"bucket_0_of_(\d+)$", last)
        return None if match is None else buckets.chunks(cohort, 1.0, int(match[1]))

    found = schedule.read(compiled.as_text(), trips)
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return {"estimated ms": found.cycles / (where.generation.clock * 1e6), "MB": megabytes, "compile s": seconds}


def main() -> None:
    """Compile and print a table."""
    parser = common.flags(__doc__)
    parser.add_argument("--target", default="v5e:2x2")
    parser.add_argument("--points", type=int, nargs="+", default=[1, 8, 64], help="of a chip")
    given = common.begin(parser)
    where, rows = target(given.target), list[common.Row]()
    for points in given.points:
        rows.append({"points of a chip": points, **planned(where, points)})
        print(rows[-1], flush=True)
    common.keep(
        given.name or "planned_points", f"Points at once as compiled for {given.target}, not run", rows,
        {"target": given.target},
        lambda axes: common.bars(
            axes, [str(row["points of a chip"]) for row in rows], [row["estimated ms"] for row in rows], "estimated ms"
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()

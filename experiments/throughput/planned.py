"""Rounds of the benchmark as a TPU's compiler plans them, on any machine: no TPU runs anything here.

    python -m experiments.throughput.planned --target v5e:2x2 --net mlp cnn preresnet_1112
    python -m experiments.throughput.planned --net cnn --lowering lax rows --mix a1

1,000 clients of 60 examples, 100 of them a round, batches of 20, one epoch, as in ``experiments.throughput.round``.
Milliseconds are the compiler's estimate of its own schedule: compare programs for the same topology only.
"""

import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from experiments.throughput import common
from hetfl_jax.core import platform
from hetfl_jax.engine import buckets, executors, schedule
from hetfl_jax.engine.chunks import MOST
from hetfl_jax.engine.constants import CONSTANTS
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.engine.topology import Target, target
from hetfl_jax.models import families
from hetfl_jax.models.costs import costs
from hetfl_jax.run.buckets import holds
from hetfl_jax.run.ledger import BACKWARD
from hetfl_jax.run.mix import parse_buckets, parse_mix

FIVE, COHORT, CLIENTS, EXAMPLES, BATCH = "a1-b1-c1-d1-e1", 100, 1_000, 60, 20


class Planned(NamedTuple):
    """A round as it was compiled."""

    milliseconds: float
    megabytes: float  #: temporary, a chip
    compile_seconds: float
    groups: tuple[tuple[int, ...], ...]
    schedule: schedule.Schedule


def round_of(
    where: Target, net: str, mix: str, lowering: str = "auto", together: str = "auto", cohort: int = COHORT,
    precision: str = "auto", **fields: Any,
) -> Planned:  # fmt: skip
    """Compile one round for a topology; nothing is put there."""
    with platform.during(where.platform()):
        fam = common.family(net, mix, **fields, **({} if net == "mlp" else {"lowering": lowering}))
        fam = families.computing_in(precision, fam)
        algorithm = common.method("fedavg" if mix == "a1" else "heterofl", fam, common.settings(batch_size=BATCH),
                                  cohort, mix)  # fmt: skip
        groups, wanted = _buckets(fam, mix, together, -(-cohort // where.mesh.size))
        run = executors.executor("bucketed", 0, 1, groups, wanted, where.mesh, where.platform())
        step: Any = make_round(algorithm, run, device_store())
    people = jax.eval_shape(lambda: common.data(common.SHAPES[net], CLIENTS, EXAMPLES, fam.levels))
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda k: start(algorithm, device_store(), CLIENTS, k), key)
    everywhere = NamedSharding(where.mesh, executors.EVERYWHERE)
    args = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=everywhere), (state, people, key))
    began = time.perf_counter()
    compiled = step.jitted.lower(*args).compile()
    seconds = time.perf_counter() - began
    share = np.asarray(parse_mix(mix).proportions, float)

    def trips(path: str) -> float | None:
        last = path.rsplit("/while", 1)[0]
        if last.endswith("local_training"):
            return EXAMPLES / BATCH
        match = re.search(r"bucket_(\d+)_of_(\d+)$", last)
        if match is None:
            return None
        part = sum(share[level] for level in groups[int(match[1])]) / share.sum()
        return buckets.chunks(-(-cohort // where.mesh.size), part, int(match[2]))

    found = schedule.read(compiled.as_text(), trips)
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return Planned(found.cycles / (where.generation.clock * 1e6), megabytes, seconds, groups, found)


def _buckets(fam: Any, mix: str, together: str, items: int) -> tuple[Any, tuple[int, ...]]:
    parts = parse_mix(mix)
    if together != "auto" or fam.levels == 1:
        chosen = parse_buckets(together, parts) if together != "auto" else ()
        return chosen or tuple((level,) for level in range(fam.levels)), ()
    price, share = costs(fam), np.asarray(parts.proportions, float)
    work = buckets.Work(
        (price.macs * float((1 + BACKWARD) * BATCH)).tolist(), (share / share.sum()).tolist(), int(price.layers.max()),
        items, EXAMPLES / BATCH, 1_000,
    )  # fmt: skip
    found = buckets.best(work, holds(parts), CONSTANTS["tpu"], MOST)
    return tuple(b.levels for b in found), tuple(b.clients for b in found)


def main() -> None:
    """Compile what is asked for and print a table, with the dearest operations of each round."""
    parser = common.flags(__doc__)
    parser.add_argument("--target", default="v5e:2x2")
    parser.add_argument("--net", nargs="+", default=["mlp", "cnn"], choices=[*common.SHAPES])
    parser.add_argument("--mix", nargs="+", default=["a1", FIVE])
    parser.add_argument("--lowering", nargs="+", default=["auto"])
    parser.add_argument("--buckets", nargs="+", default=["auto"])
    parser.add_argument("--precision", nargs="+", default=["auto"])
    parser.add_argument("--cohort", type=int, default=COHORT)
    parser.add_argument("--dearest", type=int, default=0, help="operations to print of each round")
    given = common.begin(parser)
    where, rows = target(given.target), list[common.Row]()
    for net in given.net:
        for precision in given.precision:
            for lowering in given.lowering:
                for mix in given.mix:
                    for together in given.buckets if mix != "a1" else ["auto"]:
                        found = round_of(where, net, mix, lowering, together, given.cohort, precision)
                        moved = ", ".join(f"{kind} {size:,} B" for kind, size in found.schedule.collectives)
                        rows.append({
                            "net": net, "mix": mix, "lowering": lowering, "precision": precision,
                            "buckets": str([list(g) for g in found.groups]), "estimated ms": found.milliseconds,
                            "MB": found.megabytes, "compile s": found.compile_seconds, "collectives": moved,
                        })  # fmt: skip
                        print(rows[-1], flush=True)
                        for op in found.schedule.dearest[: given.dearest]:
                            print(f"{op.cycles:>14,.0f}  {op.shape:50s}  {op.path}", flush=True)
    labels = [f"{row['net']} {row['mix']} {row['lowering']} {row['precision']}" for row in rows]
    common.keep(
        given.name or "planned", f"Rounds as compiled for {given.target}, not run", rows, {"target": given.target},
        lambda axes: common.bars(axes, labels, [row["estimated ms"] for row in rows], "estimated ms a round"),
    )  # fmt: skip


if __name__ == "__main__":
    main()

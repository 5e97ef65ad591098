"""Every method of the contract table, compiled for a TPU that is not here: its collectives, memory and compile time.

    python -m experiments.throughput.planned_contract --target v5e:2x2
    python -m experiments.throughput.planned_contract --target v5e:8x8 v5e:8x16 --only fedavg    pods of 64 and 128

The rows are those of ``tests/contract.py``: small nets, 12 clients, 5 of them a round.
"""

from collections import Counter

import jax

from experiments.throughput import common, planned
from hetfl_jax.core import platform
from hetfl_jax.engine import executors, schedule
from hetfl_jax.engine.topology import Target, target
from tests.contract import BY_NAME, COHORT, Row
from tests.helpers import toy_population


def compiled(where: Target, row: Row) -> common.Row:
    """One row for one topology."""
    with platform.during(where.platform()):
        fam = row.family()
        algorithm = row.make(fam, row.settings(), cohort=COHORT, **row.kwargs)
        run = executors.executor("bucketed", 0, 1, (), (), where.mesh, where.platform())
        people = toy_population(image=row.image, levels=fam.levels)
    shapes = jax.eval_shape(lambda: people)
    program, seconds = planned.compile_round(where, algorithm, run, shapes, people.size.shape[0])
    kinds = Counter(kind for kind, _ in schedule.read(program.as_text(), lambda path: None).collectives)
    return {
        "method": row.name, "target": where.name, "chips": where.mesh.size,
        "memory": "yes" if jax.tree.leaves(jax.eval_shape(algorithm.init, jax.random.key(0))[1]) else "no",
        "collectives": ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none", "number": sum(kinds.values()),
        "allowed": 4 if jax.tree.leaves(jax.eval_shape(algorithm.init, jax.random.key(0))[1]) else 2,
        "MB": program.memory_analysis().temp_size_in_bytes / 1e6, "compile s": seconds,
    }  # fmt: skip


def main() -> None:
    """All rows, or those that are named."""
    parser = common.flags(__doc__)
    parser.add_argument("--target", nargs="+", default=["v5e:2x2"])
    parser.add_argument("--only", nargs="+", default=list(BY_NAME), choices=list(BY_NAME))
    given = common.begin(parser)
    rows = list[common.Row]()
    for name in given.target:
        where = target(name)
        for row in given.only:
            try:
                rows.append(compiled(where, BY_NAME[row]))
            except Exception as error:
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                rows.append({**dict.fromkeys(rows[0] if rows else {}, 0), "method": row, "collectives": said})
            print(rows[-1], flush=True)
    labels = [f"{row['method']} {row['target']}" for row in rows]
    common.keep(given.name or "planned_contract", "Methods as compiled for a TPU, not run", rows, {},
                lambda axes: common.bars(axes, labels, [row["number"] for row in rows], "collectives"))  # fmt: skip


if __name__ == "__main__":
    main()

"""How a round's time and memory grow: with cohort, population, levels, devices, and uneven client sizes.

    taskset -c 0 python -m experiments.throughput.scaling --only cohort population levels ragged
    python -m experiments.throughput.scaling --only devices
    python -m experiments.throughput.scaling --only cores

``devices`` spreads one round over 1, 2, 4 and 8 virtual CPU devices of this machine (each in a process of its own);
``cores`` compares one core with one device to all cores with a device each, which is what ``hetfl`` does.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.throughput import common
from hetfl_jax.core.shards import shards
from hetfl_jax.engine import rounds
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.runners import executed_steps
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import fedavg
from hetfl_jax.models.costs import costs
from hetfl_jax.run import ledger

FIVE = "a1-b1-c1-d1-e1"
CHUNKS = (1, 8, 16)


def fedavg_bench(net: str, pop: Any, cohort: int, run: Any, **local: Any) -> common.Bench:
    """FedAvg at full size."""
    return common.bench(fedavg.make(common.family(net), common.settings(**local), cohort=cohort), pop, run)


def cohort(repeats: int) -> list[common.Row]:
    """Time and peak memory of chunked rounds of the CNN, one step a client; a process each, for its own peak."""
    rows: list[common.Row] = []
    for size in (10, 100, 1_000):
        seconds, peak = child("cohort", size, repeats=repeats)
        rows.append(_row("cohort", f"{size} clients", seconds, rows) | _peak(peak, rows))
    return rows


def measure_cohort(size: int, repeats: int) -> list[float]:
    """Seconds and peak bytes of one cohort."""
    pop = common.data(common.SHAPES["cnn"], 1_000, 20)
    common.reset_peak()
    bench = fedavg_bench("cnn", pop, size, executor("chunked", 1))
    return [common.medians({"round": bench.round}, repeats)["round"], common.peak_bytes()]


def _peak(peak: float, before: list[common.Row]) -> common.Row:
    return {"peak MB": peak / 1e6, "peak over the first": peak / 1e6 / (before[0]["peak MB"] if before else peak / 1e6)}


def population(repeats: int) -> list[common.Row]:
    """The same cohort of 100 out of more and more clients; the sides take turns."""
    counts = (1_000, 10_000, 100_000, 1_000_000)
    benches = {n: fedavg_bench("mlp", common.data((784,), n, 60), 100, executor("bucketed")) for n in counts}
    s = common.medians({str(n): bench.round for n, bench in benches.items()}, 5 * repeats)
    rows: list[common.Row] = []
    for n in counts:
        rows.append(_row("population", f"{n:,} clients", s[str(n)], rows))
    return rows


def levels(repeats: int) -> list[common.Row]:
    """HeteroFL with one to five width levels, drawn anew each round."""
    rows: list[common.Row] = []
    for count in range(1, 6):
        mix = "-".join(FIVE.split("-")[:count])
        fam = common.family("mlp", mix)
        algorithm = common.method("heterofl", fam, common.settings(), 100, mix)
        bench = common.bench(algorithm, common.data((784,), 1_000, 60), executor("bucketed"))
        s = common.medians({"round": bench.round}, 5 * repeats)
        rows.append(_row("levels", mix, s["round"], rows))
    return rows


def sizes(kind: str, clients: int) -> np.ndarray:
    """Examples of each client, about 100 on average."""
    rng = np.random.default_rng(0)
    draw = {
        "equal": lambda: np.full(clients, 100.0),
        "log-normal(1)": lambda: 60 * rng.lognormal(0, 1, clients),
        "Pareto(1.2)": lambda: 17 * (1 + rng.pareto(1.2, clients)),
    }[kind]()
    return np.clip(draw, 1, 20_000).astype(int)


def ragged(repeats: int) -> list[common.Row]:
    """Uneven clients: steps executed over steps needed for chunks of clients under one vmap, and time a needed step."""
    rows: list[common.Row] = []
    for kind in ("equal", "log-normal(1)", "Pareto(1.2)"):
        pop = common.data((784,), 1_000, sizes(kind, 1_000))
        bench = fedavg_bench("mlp", pop, 100, executor("bucketed", 1))
        s = common.medians({"round": bench.round}, 5 * repeats)
        algorithm = fedavg.make(common.family("mlp"), common.settings(), cohort=100)
        server = bench.state().server
        needed, done = 0, dict.fromkeys(CHUNKS, 0)
        for number in range(50):
            plan = algorithm.plan(jax.random.key(number), np.int32(0), server, pop, None)
            steps = -(-np.asarray(shards(pop, plan.ids).size) // 20)
            needed += int(steps.sum())
            for chunk in CHUNKS:
                done[chunk] += executed_steps(steps, chunk)
        row = _row("ragged", kind, s["round"], rows)
        rows.append(row | {f"steps over needed, chunk {c}": done[c] / needed for c in CHUNKS})
    return rows


def _row(what: str, at: str, seconds: float, before: list[common.Row]) -> common.Row:
    first = before[0]["round s"] if before else seconds
    return {"what": what, "at": at, "round s": seconds, "over the first": seconds / first}


# ------------------------------------------------------------------------------ several devices, a process each


def child(kind: str, *numbers: int, repeats: int) -> Any:
    """One cell, measured in a process of its own."""
    command = [sys.executable, "-m", "experiments.throughput.scaling", "--repeats", str(repeats), "--child", kind]
    out = subprocess.run([*command, *map(str, numbers)], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def measure_devices(kind: str, count: int, cores: int, repeats: int) -> common.Row:
    """One cell of ``devices`` or ``cores``: a net, or ``mixed`` for the MLP at five widths; before jax has started."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    jax.config.update("jax_num_cpu_devices", count)
    net, mix = ("mlp", FIVE) if kind == "mixed" else (kind, "a1")
    fam, run = common.family(net, mix), executor("bucketed", 1, count)
    algorithm = common.method("heterofl", fam, common.settings(), 100, mix)
    pop = common.data(common.SHAPES[net], 1_000, 60)
    bench = common.bench(algorithm, pop, run)
    infos = []

    def one_round() -> Any:
        infos.append(bench.round())
        return infos[-1]

    s = common.medians({"round": one_round}, repeats * (5 if net == "mlp" else 1))
    spread = [ledger.imbalance(info, costs(fam), count) for info in jax.device_get(infos)]
    moved = rounds.moved_bytes(run, algorithm, bench.state(), *run.place((pop, jax.random.key(0))))
    text = rounds.program(
        rounds.make_round(algorithm, run, device_store()), bench.state(), *run.place((pop, jax.random.key(0)))
    )
    return {
        "net": f"{net} {mix}",
        "devices": count,
        "cores": cores,
        "round s": s["round"],
        "imbalance": float(np.mean(spread)),
        "all-reduces": len(re.findall(r" all-reduce(?:-start)?\(", text)),
        "all-reduce MB": moved.get("totals", 0) / 1e6,
        "peak MB": common.peak_bytes() / 1e6,
    }


def devices(repeats: int) -> list[common.Row]:
    """The MLP with five levels over 1 to 8 virtual devices on all cores."""
    cores = common.machine.cores()
    return [child("mixed", count, cores, repeats=repeats) for count in (1, 2, 4, 8)]


def cores(repeats: int) -> list[common.Row]:
    """One core against all of them, a device each; the sides take turns."""
    count = common.machine.cores()
    rows = []
    for net, pairs in (("mlp", 3), ("mixed", 3), ("cnn", 1)):
        runs = [(child(net, 1, 1, repeats=repeats), child(net, count, count, repeats=repeats)) for _ in range(pairs)]
        for side in range(2):
            row = dict(runs[0][side])
            row["round s"] = float(np.median([pair[side]["round s"] for pair in runs]))
            row["faster"] = rows[-1]["round s"] / row["round s"] if side else 1.0
            rows.append(row)
    return rows


PARTS: dict[str, Callable[[int], list[common.Row]]] = {
    "cohort": cohort,
    "population": population,
    "levels": levels,
    "ragged": ragged,
    "devices": devices,
    "cores": cores,
}


def main() -> None:
    """Measure the parts that are asked for; each keeps a table of its own."""
    parser = common.flags(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--child", nargs="+", help="internal: one cell")
    given = common.begin(parser)
    if given.child:
        kind, *texts = given.child
        numbers = [*map(int, texts), given.repeats]
        print(json.dumps(measure_cohort(*numbers) if kind == "cohort" else measure_devices(kind, *numbers)))
        return
    for part in given.only:
        rows = PARTS[part](given.repeats)
        labels = [str(row.get("at", f"{row.get('net')}, {row.get('devices')} devices")) for row in rows]
        values = [row["round s"] for row in rows]

        def draw(axes: Any, labels: list[str] = labels, values: list[float] = values) -> None:
            common.bars(axes, labels, values, "seconds a round")

        common.keep(given.name or f"scaling_{part}", f"Scaling: {part}", rows, {}, draw)


if __name__ == "__main__":
    main()

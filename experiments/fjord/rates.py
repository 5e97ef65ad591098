"""Accuracy at every rate p of FjORD with and without distillation, beside eFD: the table and plot of this folder.

    HETFL_DATA=DATA taskset -c 0 python -m experiments.fjord.rates --source npz:cifar10.npz
    python -m experiments.fjord.rates --seeds 0 --rounds 2 --examples 2000      a try

One process runs all: each row's programs are compiled once and serve every seed; the split is the same for all. Runs
that are done are kept in runs/experiments.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.kept import once
from hetfl_jax.core import machine
from hetfl_jax.engine import rounds
from hetfl_jax.results.folder import write_json
from hetfl_jax.run.config import load_config
from hetfl_jax.run.lab import Lab, evaluate_tiers, prepare

HERE = Path(__file__).parent
RATES = ("0.2", "0.4", "0.6", "0.8", "1")
WHOLE = "whole"  #: the one tier of eFD
#: arguments of the config for each row; eFD is one run a rate, and at the smallest it is FedAvg
ROWS = {
    "FjORD": "distill=true",
    "FjORD without distillation": "distill=false",
    **{f"eFD at {p}": f"distill=false,dropout=random,target={p}" for p in RATES[1:]},
}


def lab_of(arguments: str, given: argparse.Namespace) -> Lab:
    """The row's federation: a small net on a part of CIFAR-10, the other settings as in the paper's code."""
    hidden = ",".join(str(given.width * 2**i) for i in range(3))
    changes = [
        "family.net=conv", f"family.hidden=({hidden})", f"data.examples={given.examples}", "data.seed=0",
        f"train.rounds={given.rounds}", "train.buckets=one", "run.eval_masked=true", "run.eval_batch_size=200",
    ]  # fmt: skip
    return prepare(load_config(f"fjord_cifar10:source={given.source},{arguments}", *changes))


def accuracies(lab: Lab, seed: int, count: int) -> dict[str, float]:
    """Test accuracy in percent of every tier after ``count`` rounds."""
    key = lab.place(jax.random.key(seed))
    clients = lab.federation.partition.size.size
    state = lab.place(rounds.start(lab.federation.algorithm, lab.store, clients, key))
    for _ in range(count):
        state, _ = lab.step(state, lab.population, key)
    found = evaluate_tiers(lab, state)["accuracy"]
    return {name if name == WHOLE else name.removeprefix("w"): 100 * value for name, value in found.items()}


def measure(given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every row's accuracies, one a seed; of eFD the one of its rate."""
    found: dict[str, list[dict[str, float]]] = {}
    for row, arguments in ROWS.items():
        began = time.perf_counter()
        made: list[Lab] = []  # only if a run is missing

        def scores(seed: int, arguments: str = arguments, made: list[Lab] = made) -> dict[str, float]:
            made[:] = made or [lab_of(arguments, given)]
            return accuracies(made[0], seed, given.rounds)

        about = {n: getattr(given, n) for n in ("rounds", "examples", "width", "source")} | {"row": arguments}
        each = [once("fjord_rates", {**about, "seed": seed}, partial(scores, seed)) for seed in given.seeds]
        if row.startswith("eFD"):
            rate = row.rpartition(" ")[2]
            each = [{rate: scores[WHOLE]} for scores in each]
        found[row] = each
        print(f"{row}: {time.perf_counter() - began:.0f} s", flush=True)
        jax.clear_caches()
    return found


def cell(rows: dict[str, list[dict[str, float]]], row: str, rate: str) -> str:
    """Mean and sample deviation over seeds."""
    values = [scores[rate] for scores in rows.get(row, []) if rate in scores]
    if not values:
        return "-"
    return f"{np.mean(values):.2f}" + (f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def markdown(rows: dict[str, list[dict[str, float]]]) -> str:
    """A row a method, a column a rate; the runs of eFD are one row."""
    lines = [f"| | {' | '.join(f'p = {p}' for p in RATES)} |", "|---|" + "---|" * len(RATES)]
    for row in ("FjORD", "FjORD without distillation"):
        lines.append(f"| {row} | " + " | ".join(cell(rows, row, p) for p in RATES) + " |")
    lines.append("| eFD, a run a rate | " + " | ".join(cell(rows, f"eFD at {p}", p) for p in RATES) + " |")
    return "\n".join(lines)


def gains(rows: dict[str, list[dict[str, float]]]) -> str:
    """What distillation adds at every rate, seed by seed."""
    pairs = list(zip(rows["FjORD"], rows["FjORD without distillation"], strict=True))
    added = {p: [a[p] - b[p] for a, b in pairs] for p in RATES}
    return "\n".join(
        f"distillation at p = {p}: {np.mean(v):+.2f} points, above 0 in {sum(x > 0 for x in v)} of {len(v)} seeds"
        for p, v in added.items()
    )


def draw(rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Mean accuracy over rates, with the deviation over seeds as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[list[float]]] = {
        row: [[s[p] for s in rows[row]] for p in RATES] for row in ("FjORD", "FjORD without distillation")
    }
    lines["eFD, a run a rate"] = [[s[p] for s in rows[f"eFD at {p}"]] for p in RATES[1:]]
    for name, points in lines.items():
        x = [float(p) for p in RATES[-len(points) :]]
        spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in points]
        axes.errorbar(x, [np.mean(v) for v in points], spread, marker="o", capsize=3, label=name)
    axes.set(xlabel="rate p of the evaluated net", ylabel="test accuracy (%)", xticks=[float(p) for p in RATES])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all rows, print the table, keep figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--examples", type=int, default=20_000, help="of CIFAR-10, a random sample")
    parser.add_argument("--width", type=int, default=16, help="base width: channels of the first convolution")
    parser.add_argument("--source", default="npz:cifar10.npz")
    parser.add_argument("--folder", type=Path, default=HERE, help="where results.json and the plot go")
    given = parser.parse_args(arguments)
    machine.use_cache()
    began = time.perf_counter()
    rows = measure(given)
    about: dict[str, Any] = {k: v for k, v in vars(given).items() if k not in ("folder", "source")}
    write_json(given.folder / "results.json", {**about, "seconds": round(time.perf_counter() - began), "rows": rows})
    draw(rows, given.folder / "rates.png")
    print(markdown(json.loads((given.folder / "results.json").read_text())["rows"]))
    print(gains(rows))


if __name__ == "__main__":
    main()

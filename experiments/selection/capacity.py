"""What capacity does to a choice by loss: HeteroFL with five widths, uniform selection against pow-d.

    taskset -c 0 python -m experiments.selection.capacity

MNIST, 100 clients IID of 100 images, 10 a round, an MLP of 64 hidden units at widths 1 to 1/16, a fifth of the clients
each and for good; candidates are asked at their own width, or all with the full model. The mean of log2 of the width
over who took part is -2 by chance. Writes results/capacity.json and .png.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.federated import Line, cell, markdown, play
from experiments.selection import curves
from hetfl_jax.core import machine
from hetfl_jax.results.folder import write_json

RESULTS = Path(__file__).parent / "results"
TARGET = "heterofl_mnist:mix=a1-b1-c1-d1-e1"
SETTINGS = (
    "family.net=mlp", "family.hidden=(64,)", "family.norm=none", "method.args.assignment=fixed", "data.clients=100",
    "data.examples=10000", "method.args.cohort=10", "train.epochs=1", "train.batch_size=10", "train.learning_rate=0.05",
    "train.momentum=0.0", "train.weight_decay=0.0", "train.milestones=()", "capacity.order=shuffled",
)  # fmt: skip
POW = ("select.name=power_of_choice", "select.args.candidates=30")
ROWS = {
    "uniform": (),
    "pow, d = 30, own width": POW,
    "pow, d = 30, full model": (*POW, "select.args.level=0"),
}


def widths(lines: list[Line]) -> np.ndarray:
    """[evaluations] mean of log2 of the width over those who took part since the evaluation before."""
    taken = np.array([list(line["taken"].values()) for line in lines])
    since = np.diff(taken, axis=0, prepend=0)
    return since @ -np.arange(since.shape[1]) / since.sum(1)


def table(found: dict[str, list[list[Line]]]) -> str:
    """A row a selection."""
    rows = []
    for name, seeds in found.items():
        last = [lines[-1] for lines in seeds]
        chosen = [float(np.mean(widths(lines))) for lines in seeds]
        scores = [cell([100 * line["accuracy"][level] for line in last]) for level in ("a", "c", "e")]
        rows.append([name, cell(chosen, 2), *scores])
    return markdown(("selection", "mean log2 width", "width 1 %", "1/4 %", "1/16 %"), rows)


def draw(found: dict[str, list[list[Line]]], path: Path) -> None:
    """Mean log2 width over rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, seeds in found.items():
        axes.plot([line["round"] for line in seeds[0]], np.mean([widths(s) for s in seeds], 0), marker=".", label=name)
    axes.axhline(-2, color="0.6", linestyle=":")
    axes.set(xlabel="round", ylabel="mean log2 width of the chosen")
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=130)


def run(given: argparse.Namespace) -> dict[str, list[list[Line]]]:
    """All rows over all seeds."""
    found = {}
    for name, changes in ROWS.items():
        rounds = f"train.rounds={given.rounds}"
        seeds = [(f"run.seed={seed}", rounds, *SETTINGS, *changes) for seed in range(given.seeds)]
        found[name] = [play(TARGET, *one, every=10) for one in seeds]
        print(table({name: found[name]}).splitlines()[-1], flush=True)
    return found


def main() -> None:
    """Run, print, keep and draw."""
    given = curves.flags(__doc__, rounds=100).parse_args()
    machine.use_cache()
    began = time.perf_counter()
    found = run(given)
    kept: dict[str, Any] = {
        name: [{"widths": widths(lines).tolist(), "accuracy": lines[-1]["accuracy"]} for lines in seeds]
        for name, seeds in found.items()
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "capacity.json", {"seconds": round(time.perf_counter() - began), "runs": kept})
    draw(found, RESULTS / "capacity.png")
    print(f"{table(found)}\n\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()

"""How evenly q-FFL, TERM and AFL serve the devices of Synthetic(1, 1), against the plain mean.

    taskset -c 0 python -m experiments.fairness.synthetic

100 devices, 10 a round, batches of 10, rate 0.1, one epoch, one data set in five splits of 8:1:1. Writes
results/synthetic.json and .png.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.federated import cell, markdown, play
from hetfl_jax.core import machine
from hetfl_jax.results.folder import write_json

RESULTS = Path(__file__).parent / "results"
#: rows: what is changed in the config
METHODS = {
    "q = 0": ("method.args.q=0.0",),
    "q = 1": ("method.args.q=1.0",),
    "q = 5": ("method.args.q=5.0",),
    "TERM, t = 1": ("method.name=term", "method.args.tilt=1.0", "method.args.by_examples=False"),
    "TERM, t = -1": ("method.name=term", "method.args.tilt=-1.0", "method.args.by_examples=False"),
    "AFL": ("method.name=afl", "method.args.weight_rate=0.01"),
}
FIGURES = ("mean_over_examples", "mean_over_clients", "worst_tenth", "best_tenth", "variance", "angle")


def figures(line: dict[str, Any]) -> dict[str, Any]:
    """Fairness figures of one evaluated round, shares in percent."""
    own = line["client_accuracy"]
    shares = {name: 100 * own[name] for name in FIGURES[:4]}
    return {**shares, **{name: own[name] for name in FIGURES[4:]}, "quantiles": own["quantiles"]}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A row a method: mean and deviation over splits after the last round."""
    rows = [
        [name, str(len(splits)), *(cell([s[f] for s in splits]) for f in FIGURES)] for name, splits in found.items()
    ]
    titles = ("average %", "mean over devices %", "worst tenth %", "best tenth %", "variance %^2", "angle")
    return markdown(("method", "splits", *titles), rows)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The devices' accuracies in rising order, mean over splits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, splits in found.items():
        values = 100 * np.mean([s["quantiles"] for s in splits], 0)
        axes.plot(np.linspace(0, 100, values.size), values, label=name)
    axes.axvspan(0, 10, color="0.5", alpha=0.15, linewidth=0)
    axes.set(xlabel="devices, from the worst to the best (%)", ylabel="test accuracy (%)", xlim=(0, 100), ylim=(0, 101))
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run all methods over all splits, print, keep and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4_000)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    given = parser.parse_args()
    machine.use_cache()
    found: dict[str, list[dict[str, Any]]] = {}
    began = time.perf_counter()
    for name in given.methods:
        target = f"qffl_synthetic:rounds={given.rounds}"
        seeds = [(f"run.seed={seed}", *METHODS[name]) for seed in range(1, given.splits + 1)]
        found[name] = [figures(play(target, *changes, every=given.rounds)[-1]) for changes in seeds]
        print(table({name: found[name]}).splitlines()[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    seconds = round(time.perf_counter() - began)
    write_json(RESULTS / "synthetic.json", {"rounds": given.rounds, "seconds": seconds, "methods": found})
    draw(found, RESULTS / "synthetic.png")
    print(f"{table(found)}\n\n{seconds} s")


if __name__ == "__main__":
    main()

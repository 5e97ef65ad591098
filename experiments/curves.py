"""Test accuracy over rounds of several runs, side by side: a table, a plot, and the numbers.

    python -m experiments.curves experiments/ifca_rotated_mnist/results/curves runs/ifca_rotated_mnist_m*

Writes ``<first argument>.json`` and ``.png``. The largest level's global model is shown; a run that is not finished is
shown as far as it came, a folder without an evaluated round is left out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hetfl_jax.results.folder import read_metrics, write_json

Curve = dict[str, Any]
COLUMNS = (10, 20, 50, 100, 200, 300)


def curve(folder: Path) -> Curve | None:
    """Rounds and accuracies (%) of one run, and its device; nothing where there is no evaluated round."""
    there = (folder / "metrics.jsonl").exists()
    lines = [line for line in read_metrics(folder) if "accuracy" in line] if there else []
    if not lines:
        return None
    level = next(iter(lines[0]["accuracy"]))
    device = json.loads((folder / "environment.json").read_text())["device"]
    return {
        "run": folder.name,
        "device": device,
        "rounds": [line["round"] for line in lines],
        "accuracy": [100 * line["accuracy"][level] for line in lines],
    }


def markdown(curves: list[Curve]) -> str:
    """A row a run, a column a round."""
    last = max(c["rounds"][-1] for c in curves)
    columns = sorted({r for r in COLUMNS if r <= last} | {c["rounds"][-1] for c in curves})
    lines = ["| run | device | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 2) + "|"]
    for c in curves:
        found = dict(zip(c["rounds"], c["accuracy"]))
        cells = [f"{found[r]:.2f}" if r in found else "" for r in columns]
        lines.append(f"| {c['run']} | {c['device']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(curves: list[Curve], path: Path) -> None:
    """Accuracy over rounds, a line a run."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for c in curves:
        axes.plot(c["rounds"], c["accuracy"], marker="o", markersize=2.5, linewidth=1.2, label=c["run"])
    axes.set(xlabel="round", ylabel="test accuracy (%)")
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Print, keep and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="path of the files, without an ending")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    given = parser.parse_args()
    found = {folder: curve(folder) for folder in given.runs}
    curves = [c for c in found.values() if c is not None]
    for folder in (folder for folder, c in found.items() if c is None):
        print(f"left out: {folder} has no evaluated round")
    if not curves:
        parser.error("no run has an evaluated round")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    numbers, picture = (given.output.with_name(f"{given.output.name}{end}") for end in (".json", ".png"))
    write_json(numbers, curves)
    draw(curves, picture)
    print(f"{markdown(curves)}\n\nwritten to {numbers}, {picture}")


if __name__ == "__main__":
    main()

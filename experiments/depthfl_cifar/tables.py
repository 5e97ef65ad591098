"""The tables and the plot of this folder from finished runs: ``python -m experiments.depthfl_cifar.tables RUNS``.

RUNS holds run folders named ``<row>_s<seed>``, e.g. ``kd_s0``; a row is read over all its seeds. Rows that RUNS lacks
stay as results.json has them. Widths stand in the columns of the depths of the same rank.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from hetfl_jax.results.folder import read_metrics, write_json

HERE = Path(__file__).parent
EXITS = ("1", "2", "3", "4")


def last_scores(folder: Path) -> dict[str, float]:
    """Accuracy of every exit and of the ensemble at the last evaluated round, in percent."""
    line = [line for line in read_metrics(folder) if "accuracy" in line][-1]
    found = {name: 100 * value for name, value in line["accuracy"].items()}
    if not set(found) <= set(EXITS):  # width letters, the largest first
        found = dict(zip(reversed(EXITS), found.values(), strict=True))
    together = next(iter(line.get("ensemble_accuracy", {}).values()), None)
    ensemble = {} if together is None else {"ensemble": 100 * together}
    return {**found, **ensemble, "round": line["round"]}


def collect(runs: Path) -> dict[str, list[dict[str, float]]]:
    """Scores of each row, one a seed, over those that are kept here."""
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for folder in sorted(runs.glob("*_s*")):
        row = re.sub(r"_s\d+$", "", folder.name)
        if (folder / "table.json").exists():
            rows[row].append(last_scores(folder))
    kept = json.loads((HERE / "results.json").read_text()) if (HERE / "results.json").exists() else {}
    return dict(sorted((kept | rows).items()))


def cell(values: list[float]) -> str:
    spread = f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def markdown(rows: dict[str, list[dict[str, float]]]) -> str:
    """Table 4's shape: a row a method, a column an exit."""
    lines = ["| row | seeds | 1/4 | 2/4 | 3/4 | 4/4 | ensemble |", "|---|---|---|---|---|---|---|"]
    for row, seeds in rows.items():
        cells = [cell([s[e] for s in seeds]) if e in seeds[0] else "-" for e in (*EXITS, "ensemble")]
        lines.append(f"| {row} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    places = (*EXITS, "ensemble")
    for number, (row, seeds) in enumerate(rows.items()):
        there = [p for p in places if p in seeds[0]]
        mean = [np.mean([s[p] for s in seeds]) for p in there]
        spread = [np.std([s[p] for s in seeds], ddof=1) if len(seeds) > 1 else 0 for p in there]
        x = np.array([places.index(p) for p in there]) + 0.06 * (number - (len(rows) - 1) / 2)
        axes.errorbar(x, mean, spread, marker="o", linestyle="none", capsize=3, label=row)
    axes.set(xticks=range(5), xticklabels=[f"exit {e}" for e in EXITS] + ["ensemble"], ylabel="test accuracy (%)")
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=150)


def main(runs: str) -> None:
    rows = collect(Path(runs))
    write_json(HERE / "results.json", rows)
    plot(rows, HERE / "exits.png")
    print(markdown(json.loads((HERE / "results.json").read_text())))


if __name__ == "__main__":
    main(sys.argv[1])

"""The study's tables, tests and figure, from its sweeps or from the numbers kept of them.

    python -m experiments.loss_and_data.analysis --from runs/loss_and_data     keeps numbers in results/, then as below
    python -m experiments.loss_and_data.analysis                               from results/ alone

Everything here was fixed in the plan of the README before the runs.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from configs.loss_and_data import ORDERS, SCORES
from experiments.federated import cell, compact, markdown
from hetfl_jax.core.types import Line
from hetfl_jax.results.compare import sign_flip
from hetfl_jax.results.folder import read_metrics

RESULTS = Path(__file__).parent / "results"
CONTRASTS = {"C1": ("loss_n", "loss"), "C2": ("loss_n", "n"), "C3": ("relloss", "loss")}
MARGIN, LEVEL = 0.5, 0.05
EXPONENTS = {"loss": 0.0, "loss_root_n": 0.5, "loss_n": 1.0}
MEASURES = {
    "area": "accuracy, mean over rounds",
    "last": "accuracy, last",
    "own": "own level, mean of clients",
    "worst": "own level, worst tenth",
    "log2": "mean log2 capacity of the chosen",
    "largest": "largest share of one client",
    "correlation": "loss with level, correlation",
}

Cells = dict[str, dict[str, dict[int, Line]]]  #: rho -> score -> seed -> measures


def measures(lines: Sequence[Line]) -> Line:
    """What the plan asks of one run; accuracies in percent."""
    scored = [line for line in lines if line["round"] and "accuracy" in line]
    full = next(iter(scored[-1]["accuracy"]))
    items = [line["items"] for line in lines if "items" in line]
    names = list(scored[-1]["accuracy"])
    taken = np.array([[item[name] for name in names] for item in items], float).sum(0)
    capacity = np.array([_capacity(name) for name in names])
    told = [line["correlation_of_loss_and_level"] for line in lines if "correlation_of_loss_and_level" in line]
    return {
        "area": 100 * float(np.mean([line["accuracy"][full] for line in scored])),
        "last": 100 * scored[-1]["accuracy"][full],
        "own": 100 * scored[-1]["own_level"]["mean"],
        "worst": 100 * scored[-1]["own_level"]["worst_tenth"],
        "log2": float(taken @ np.log2(capacity) / taken.sum()),
        "largest": [line["largest_share"] for line in lines if "largest_share" in line][-1],
        "correlation": float(np.mean(told)) if told else None,
        "macs": scored[-1].get("client_macs"),
        "down": scored[-1].get("down_bytes"),
    }


def _capacity(name: str) -> float:
    """Of a level: its width, or its depth over the largest."""
    return int(name) / 4 if name.isdigit() else 0.5 ** "abcde".index(name)


def gathered(folder: Path) -> Cells:
    """Measures of every finished point of a sweep."""
    rho_of = {order: rho for rho, order in ORDERS.items()}
    score_of = {tuple(args.values()): name for name, args in SCORES.items()}
    found: Cells = {rho: {score: {} for score in SCORES} for rho in ORDERS}
    for place in sorted(folder.iterdir()):
        if not (place / "table.json").exists():
            continue
        config = json.loads((place / "config.json").read_text())
        args = config["select"]["args"]
        score = score_of[tuple(args[name] for name in ("loss", "data", "relative"))]
        cell = found[rho_of[config["capacity"]["order"]]][score]
        found_one = measures(read_metrics(place))
        cell[config["run"]["seed"]] = found_one if args["loss"] else found_one | {"correlation": None}
    return found


def row(cell: dict[int, Line], measure: str, seeds: Sequence[int]) -> np.ndarray:
    """[seeds] a measure of a cell."""
    return np.array([cell[seed][measure] for seed in seeds])


def whole(cells: dict[str, dict[int, Line]]) -> list[int]:
    """Seeds that every score of one rho has."""
    return sorted(set.intersection(*(set(cell) for cell in cells.values())))


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted by Holm's step-down rule.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order, adjusted, worst = np.argsort(values), [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = worst
    return adjusted


def equivalent(difference: np.ndarray) -> float:
    """p of the two one-sided tests that the mean difference lies within the margin."""
    error = difference.std(ddof=1) / np.sqrt(difference.size)
    if not error:
        return float(abs(difference.mean()) >= MARGIN)
    low = stats.t.sf((difference.mean() + MARGIN) / error, difference.size - 1)
    high = stats.t.cdf((difference.mean() - MARGIN) / error, difference.size - 1)
    return float(max(low, high))


def contrasts(cells: dict[str, dict[int, Line]]) -> list[Line]:
    """The three planned tests within one rho."""
    seeds, found = whole(cells), []
    for name, (one, other) in CONTRASTS.items():
        difference = row(cells[one], "area", seeds) - row(cells[other], "area", seeds)
        half = stats.t.ppf(0.975, difference.size - 1) * difference.std(ddof=1) / np.sqrt(difference.size)
        found.append({
            "contrast": name, "seeds": len(seeds), "difference": difference.mean(), "half": half,
            "p": float(stats.ttest_1samp(difference, 0).pvalue), "flips": sign_flip(difference),
            "equivalent": equivalent(difference),
        })  # fmt: skip
    for one, adjusted in zip(found, holm([each["p"] for each in found])):
        one["holm"] = adjusted
    return found


def verdict(one: Line) -> str:
    """What a test says."""
    if one["holm"] < LEVEL:
        return "more" if one["difference"] > 0 else "less"
    return "no difference" if one["equivalent"] < LEVEL else "undecided"


def interaction(cells: Cells) -> tuple[float, float, float]:
    """(mean, p, seeds) of the slope over the exponent of n at rho = +1 minus that at rho = -1."""
    seeds = sorted(set(whole(cells["+1"])) & set(whole(cells["-1"])))
    exponent = np.array(list(EXPONENTS.values()))

    def slope(rho: str) -> np.ndarray:
        area = np.stack([row(cells[rho][score], "area", seeds) for score in EXPONENTS])
        return (exponent - exponent.mean()) @ area / ((exponent - exponent.mean()) ** 2).sum()

    difference = slope("+1") - slope("-1")
    return float(difference.mean()), float(stats.ttest_1samp(difference, 0).pvalue), len(seeds)


def table(cells: Cells, measure: str) -> str:
    """Mean and deviation of a measure, a row a rho and a column a score; "-" for what nobody was asked."""
    rows = []
    for rho, by_score in cells.items():
        seeds = whole(by_score)
        digits = 1 if measure in ("area", "last", "own", "worst") else 2
        asked = [all(one[seed][measure] is not None for seed in seeds) for one in by_score.values()]
        cells_of = zip(asked, by_score.values())
        rows.append(
            [rho, str(len(seeds)), *(cell(row(c, measure, seeds), digits) if there else "-" for there, c in cells_of)]
        )
    return markdown(["rho", "seeds", *SCORES], rows)


def of_plan(cells: Cells) -> str:
    """The planned tests, a row each."""
    rows = []
    for rho, by_score in cells.items():
        for one in contrasts(by_score):
            numbers = [f"{one[name]:.3g}" for name in ("p", "holm", "flips", "equivalent")]
            size = f"{one['difference']:+.2f} +- {one['half']:.2f}"
            rows.append([rho, one["contrast"], str(one["seeds"]), size, *numbers, verdict(one)])
    head = ["rho", "contrast", "seeds", "points (95 %)", "p", "Holm", "sign flips", "within 0.5", "the first is worth"]
    return markdown(head, rows)


def draw(found: dict[str, Cells], path: Path) -> None:
    """The main measure against score `loss`, and the worst tenth, one panel a study."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(found), 6.4), layout="constrained")
    grid = figure.subplots(2, len(found), squeeze=False)
    shown = [score for score in SCORES if score != "loss"]
    for column, (name, cells) in enumerate(found.items()):
        for axes, measure in zip(grid[:, column], ("area", "worst")):
            for place, (rho, by_score) in enumerate(cells.items()):
                seeds, where = whole(by_score), np.arange(len(shown)) + 0.25 * (place - 1)
                base = row(by_score["loss"], measure, seeds)
                pairs = [row(by_score[score], measure, seeds) - base for score in shown]
                half = [stats.t.ppf(0.975, p.size - 1) * p.std(ddof=1) / np.sqrt(p.size) for p in pairs]
                axes.errorbar(where, [p.mean() for p in pairs], half, fmt="os^"[place], capsize=3, label=f"rho {rho}")
            axes.axhline(0, color="0.5", linewidth=0.8)
            axes.set_xticks(np.arange(len(shown)), [score.replace("_", " ") for score in shown], rotation=20)
            axes.set_ylabel(f"{MEASURES[measure]}\nagainst the score loss, points")
            axes.grid(alpha=0.25)
        grid[0, column].set_title(name)
    grid[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def report(name: str, cells: Cells) -> str:
    """All tables of one study."""
    parts = [f"## {name}", of_plan(cells)]
    mean, p, seeds = interaction(cells)
    parts.append(
        f"Slope over the exponent of n, rho = +1 minus rho = -1: {mean:+.2f} points, p {p:.3g}, {seeds} seeds."
    )
    parts += [f"{text}:\n\n{table(cells, measure)}" for measure, text in MEASURES.items()]
    return "\n\n".join(parts)


def kept() -> dict[str, Cells]:
    """The studies whose numbers are in results/."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        by_rho = json.loads(path.read_text())
        found[path.stem.replace("_", " on ")] = {
            rho: {score: _lines(columns) for score, columns in by_score.items()} for rho, by_score in by_rho.items()
        }
    return found


def _lines(columns: Line) -> dict[int, Line]:
    """The measures of each seed, from a list of each measure."""
    names, seeds = [name for name in columns if name != "seed"], columns["seed"]
    return {seed: {name: columns[name][place] for name in names} for place, seed in enumerate(seeds)}


def written(cells: Cells) -> str:
    """JSON of lists: of every cell the seeds, and each measure of them to five digits."""
    short: Callable[[float | None], float | None] = lambda v: None if v is None else float(f"{v:.5g}")  # noqa: E731

    def columns(one: dict[int, Line]) -> Line:
        seeds = sorted(one)
        names = one[seeds[0]]
        return {"seed": seeds, **{name: [short(one[seed][name]) for seed in seeds] for name in names}}

    return compact({rho: {score: columns(one) for score, one in by.items()} for rho, by in cells.items()})


def main() -> None:
    """Gather if asked to, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, help="folder of the sweeps")
    given = parser.parse_args()
    if given.folder:
        RESULTS.mkdir(exist_ok=True)
        for folder in sorted(given.folder.glob("*_study")):
            cells = gathered(folder)
            if all(len(whole(by_score)) > 1 for by_score in cells.values()):
                (RESULTS / f"{folder.name.removesuffix('_study')}.json").write_text(written(cells))
    found = kept()
    if not found:
        raise SystemExit("nothing in results/: give --from the folder of the sweeps")
    print("\n\n".join(report(name, cells) for name, cells in found.items()))
    draw(found, RESULTS / "contrasts.png")


if __name__ == "__main__":
    main()

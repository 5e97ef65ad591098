"""The runs of the study: seven scores, three correlations of data and capacity, on one task with one method.

    python -m experiments.loss_and_data.study --task teacher --method heterofl

First the rate, on seeds of its own, then all points, seed after seed, so that what is done at any moment is whole for
the first seeds. Started again, it runs only what is missing. --seeds and --more-seeds change how many seeds there are.
"""

import argparse
import csv
import itertools
import warnings
from pathlib import Path

import jax
import numpy as np

from configs.loss_and_data import METHODS, ORDERS, SCORES, TASKS
from hetfl_jax import load_config, sweep
from hetfl_jax.core.types import Config, Line

RATES = (0.03, 0.1, 0.3)
RATE_SEEDS = range(1000, 1005)
FOLDER = Path("runs/loss_and_data")


def point(score: str, order: str, seed: int) -> Line:
    """What one run changes in the config."""
    args = {f"select.args.{name}": value for name, value in SCORES[score].items()}
    return {"run.seed": seed, "capacity.order": order, **args}


def all_points(seeds: int, more: int) -> list[Line]:
    """Every point, seed after seed; rho = -1 has ``more`` seeds."""
    found = []
    for seed in range(max(seeds, more)):
        orders = [order for rho, order in ORDERS.items() if seed < (more if rho == "-1" else seeds)]
        found += [point(score, order, seed) for order, score in itertools.product(orders, SCORES)]
    return found


def ready(task: str, method: str, name: str, **train: float) -> Config:
    """The config of one task and method, whose sweep is called ``name``."""
    config = load_config(f"loss_and_data:task={task},method={method}")
    config.train.update(train)
    config.run.update(name=f"{method}_{task}_{name}", folder=str(FOLDER))
    return config


def run(config: Config, points: list[Line]) -> Path:
    """The folder of a sweep, all points of which were run."""
    folder = Path(config.run.folder) / config.run.name
    found = sweep(config, points, resume=(folder / "sweep.json").exists())
    failed = [ended.point.name for ended in found.points if ended.error]
    if failed:
        print(f"{len(failed)} points failed, the first: {failed[0]}")
    return folder


def areas(folder: Path, key: str) -> dict[str, list[float]]:
    """The main measure of every point of a sweep, by the text of a swept key."""
    rows = csv.DictReader((folder / "sweep.csv").open())
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["metric"] == "accuracy" and int(row["round"]) > 0 and row["level"] in ("a", "4"):
            values.setdefault((row["point"], row[key]), []).append(float(row["value"]))
    found: dict[str, list[float]] = {}
    for (_, value), each in values.items():
        found.setdefault(value, []).append(float(np.mean(each)))
    return found


def best_rate(task: str, method: str) -> float:
    """The rate with the largest mean of the main measure, with the uniform choice where data and capacity are apart."""
    points = [
        {**point("random", ORDERS["0"], seed), "train.learning_rate": rate} for seed in RATE_SEEDS for rate in RATES
    ]
    found = areas(run(ready(task, method, "rate"), points), "train.learning_rate")
    for rate, each in sorted(found.items()):
        print(f"{method} on {task}, rate {rate}: {100 * np.mean(each):.2f} (sd {100 * np.std(each, ddof=1):.2f})")
    return float(max(found, key=lambda rate: float(np.mean(found[rate]))))


def main() -> None:
    """Run all of one task and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="teacher")
    parser.add_argument("--method", choices=tuple(METHODS), default="heterofl")
    parser.add_argument("--seeds", type=int, default=20, help="at rho = +1 and 0")
    parser.add_argument("--more-seeds", type=int, default=40, help="at rho = -1")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="one CPU device")
    jax.config.update("jax_platforms", jax.config.jax_platforms or "cpu")
    rate = best_rate(given.task, given.method)
    print(f"rate {rate}", flush=True)
    run(ready(given.task, given.method, "study", learning_rate=rate), all_points(given.seeds, given.more_seeds))


if __name__ == "__main__":
    main()

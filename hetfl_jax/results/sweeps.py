"""The files of a sweep: what it is, one long table, and a table over seeds."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hetfl_jax.core.types import Line
from hetfl_jax.results.folder import read_metrics

SEED = "run.seed"  #: the key over which ``summary.csv`` is a mean


def rows_of(lines: Sequence[Line], levels: Sequence[str]) -> list[tuple[int, str, str, float]]:
    """(round, level, metric, value) of every number of a run's lines; the level is empty where a metric has none.

    >>> rows_of([{"round": 1, "accuracy": {"a": 0.5}, "client_accuracy": {"mean": 0.4}, "bytes": 8}], ["a"])
    [(1, 'a', 'accuracy', 0.5), (1, '', 'client_accuracy/mean', 0.4), (1, '', 'bytes', 8)]
    """
    found = []
    for line in lines:
        for name, value in line.items():
            if name != "round":
                found += [(line["round"], *row) for row in _rows(name, value, levels)]
    return found


def _rows(name: str, value: Any, levels: Sequence[str]) -> list[tuple[str, str, float]]:
    if isinstance(value, Mapping):
        if value and set(value) <= set(levels):
            return [(level, name, v) for level, v in value.items() if isinstance(v, int | float)]
        return [row for key, v in value.items() for row in _rows(f"{name}/{key}", v, levels)]
    return [("", name, value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def write_tables(folder: Path, points: Mapping[str, Mapping[str, Any]], levels: Mapping[str, Sequence[str]]) -> None:
    """``sweep.csv`` and ``summary.csv`` of the runs that are there, each whole or not at all.

    Args:
      points: the swept values by point, in order; a point's run is in ``folder/point``.
      levels: the levels of each point.
    """
    keys = list(dict.fromkeys(key for values in points.values() for key in values))
    last: dict[tuple[Any, ...], list[float]] = {}
    fixed = [key for key in keys if key != SEED]
    with (folder / "sweep.csv.partial").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["point", *keys, "round", "level", "metric", "value"])
        for point, values in points.items():
            rows = rows_of(read_metrics(folder / point), levels.get(point, ()))
            table.writerows([point, *(values.get(key, "") for key in keys), *row] for row in rows)
            final = {(level, metric): value for _, level, metric, value in rows}
            for place, value in final.items():
                last.setdefault((*(values.get(key, "") for key in fixed), *place), []).append(value)
    with (folder / "summary.csv.partial").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*fixed, "level", "metric", "mean", "deviation", "seeds"])
        for cell, found in last.items():
            apart = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
            table.writerow([*cell, float(np.mean(found)), apart, len(found)])
    for name in ("sweep.csv", "summary.csv"):
        os.replace(folder / f"{name}.partial", folder / name)

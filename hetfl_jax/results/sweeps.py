"""The tables of a sweep: every number of every round, and means over seeds."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hetfl_jax.results.folder import read_metrics
from hetfl_jax.results.reading import SEED, SUMMARY, TABLE, long


def write_tables(folder: Path, points: Mapping[str, Mapping[str, Any]]) -> None:
    """``sweep.csv`` and ``summary.csv`` of the runs that are there, each whole or not at all.

    Args:
      points: the swept values by point, in order; a point's run is in ``folder/point``.
    """
    keys = list(dict.fromkeys(key for values in points.values() for key in values))
    last: dict[tuple[Any, ...], list[float]] = {}
    fixed = [key for key in keys if key != SEED]
    with (folder / f"{TABLE}.partial").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["point", *keys, "round", "level", "metric", "value"])
        for point, values in points.items():
            rows = long(read_metrics(folder / point))
            table.writerows([point, *(values.get(key, "") for key in keys), *row] for row in rows)
            final = {(level, metric): value for _, level, metric, value in rows}
            for place, value in final.items():
                last.setdefault((*(values.get(key, "") for key in fixed), *place), []).append(value)
    with (folder / f"{SUMMARY}.partial").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*fixed, "level", "metric", "mean", "deviation", "seeds"])
        for cell, found in last.items():
            apart = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
            table.writerow([*cell, float(np.mean(found)), apart, len(found)])
    for name in (TABLE, SUMMARY):
        os.replace(folder / f"{name}.partial", folder / name)

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

    ``sweep.csv``: point, the swept keys, round, level, metric, value; a row for each number of each metrics line.
    ``summary.csv``: the swept keys but the seed, level, metric, mean, deviation (with n - 1) and number of seeds, of
    each metric's last value.

    Args:
      folder: of the sweep; a point's run is in ``folder/point``.
      points: the swept values by point, in order.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for seed in (0, 1):
    ...     (folder / f"seed={seed}").mkdir()
    ...     _ = (folder / f"seed={seed}" / "metrics.jsonl").write_text('{"round": 1, "train_loss": %d}' % (2 + seed))
    >>> write_tables(folder, {f"seed={seed}": {"run.seed": seed} for seed in (0, 1)})
    >>> print((folder / "summary.csv").read_text().splitlines()[1])
    ,train_loss,2.5,0.7071067811865476,2
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

"""Where a sweep stands, in memory and on disk."""

import json
import shlex
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hetfl_jax.core.types import Config, Line
from hetfl_jax.results import tables
from hetfl_jax.results.folder import write_json
from hetfl_jax.results.sweeps import write_tables
from hetfl_jax.run.points import Point
from hetfl_jax.run.report import report
from hetfl_jax.run.train import Result

DONE, FAILED, WAITING = "done", "failed", "waiting"


class Ended(NamedTuple):
    """One point of a sweep, as it ended."""

    point: Point
    status: str  #: done, failed or waiting
    result: Result | None = None  #: of a point that ran now
    error: str | None = None
    seconds: float | None = None


class Standing:
    """Where a sweep stands; what is written of it."""

    def __init__(self, folder: Path, base: Config, ended: dict[str, Ended], full: bool):
        """Nothing has run yet."""
        self.folder, self.base, self.ended, self.full = folder, base, ended, full
        self.lock, self.began = threading.Lock(), time.perf_counter()
        self.programs = 0

    def end(self, ended: Ended) -> None:
        """Take down how a point ended, on disk too; threads may call it at once."""
        with self.lock:
            self.ended[ended.point.name] = ended
            self.write()

    def write(self) -> None:
        """``sweep.json``."""
        write_json(self.folder / "sweep.json", _described(self))

    def write_tables(self) -> None:
        """``sweep.csv`` and ``summary.csv`` of what is done, and the page of all."""
        done = {name: e for name, e in self.ended.items() if e.status == DONE}
        write_tables(self.folder, {name: e.point.values for name, e in done.items()})
        if done:
            report(self.folder, self.folder / "report.html")

    def table(self) -> list[Line]:
        """One row a point and level."""
        done = [e for e in self.ended.values() if e.status == DONE]
        return [{**e.point.values, **row} for e in done for row in _table(self.folder / e.point.name)]


def _table(folder: Path) -> list[Line]:
    """The rows of a run's ``table.json``."""
    rows: list[Line] = json.loads((folder / "table.json").read_text())["levels"]
    return rows


def _described(plan: Standing) -> Line:
    """What ``sweep.json`` says: command, version, config, swept values, how each point ended, programs, seconds."""
    keys = dict.fromkeys(key for e in plan.ended.values() for key in e.point.values)
    over = {key: [e.point.values[key] for e in plan.ended.values() if key in e.point.values] for key in keys}
    return {
        "command": shlex.join(["hetfl", *sys.argv[1:]]),
        "version": version("hetfl_jax"),
        "config": plan.base.to_dict(),
        "over": {key: list(dict.fromkeys(map(_hashable, values))) for key, values in over.items()},
        "points": [
            {"name": name, "values": e.point.values, "status": e.status, "error": e.error, "seconds": e.seconds}
            for name, e in plan.ended.items()
        ],
        "programs": plan.programs,
        "seconds": round(time.perf_counter() - plan.began, 3),
        "environment": tables.environment(jax.local_device_count()),
    }


def _hashable(value: Any) -> Any:
    """Lists as tuples, also inside of others.

    >>> _hashable([1, [2]])
    (1, (2,))
    """
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value

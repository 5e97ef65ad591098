"""Where a sweep stands, in memory and on disk."""

import json
import shlex
import sys
import threading
import time
from collections.abc import Container
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hetfl_jax.core.types import Config, Line
from hetfl_jax.results import tables
from hetfl_jax.results.folder import write_json
from hetfl_jax.results.reading import SWEEP
from hetfl_jax.results.sweeps import write_tables
from hetfl_jax.run.points import Point
from hetfl_jax.run.report import report
from hetfl_jax.run.train import Result

DONE, FAILED, WAITING = "done", "failed", "waiting"
_ORDER = {DONE: 0, FAILED: 1, WAITING: 2}
POLL = 1.0  #: seconds between looks at what other hosts have done


class Ended(NamedTuple):
    """One point of a sweep, as it ended."""

    point: Point
    status: str  #: done, failed or waiting
    result: Result | None = None  #: of a point that ran now
    error: str | None = None
    seconds: float | None = None


class Host(NamedTuple):
    """One of several hosts that share a sweep and its folder: it runs every ``hosts``-th point."""

    number: int = 0
    hosts: int = 1

    def file(self) -> str:
        """What the host writes of the sweep.

        >>> Host(0, 2).file(), Host(1, 2).file()
        ('sweep.json', 'sweep_1.json')
        """
        return f"sweep_{self.number}.json" if self.number else SWEEP


ALONE = Host()


def told_of(folder: Path, names: Container[str]) -> dict[str, Line]:
    """Points of these names as any host of a sweep tells of them: done before failed, failed before waiting.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, status in (("sweep.json", WAITING), ("sweep_1.json", DONE), ("sweep_2.json", FAILED)):
    ...     write_json(folder / name, {"points": [{"name": "run.seed=0", "status": status}]})
    >>> told_of(folder, ["run.seed=0"])
    {'run.seed=0': {'name': 'run.seed=0', 'status': 'done'}}
    """
    found: dict[str, Line] = {}
    for path in sorted(folder.glob("sweep*.json")):
        for point in json.loads(path.read_text())["points"]:
            name = point["name"]
            if name in names and (name not in found or _ORDER[point["status"]] < _ORDER[found[name]["status"]]):
                found[name] = point
    return found


class Standing:
    """Where a sweep stands; what is written of it."""

    def __init__(self, folder: Path, base: Config, ended: dict[str, Ended], full: bool, host: Host = ALONE):
        """Nothing has run yet."""
        self.folder, self.base, self.ended, self.full, self.host = folder, base, ended, full, host
        self.lock, self.began = threading.Lock(), time.perf_counter()
        self.programs = 0

    def end(self, ended: Ended) -> None:
        """Take down how a point ended, on disk too; threads may call it at once."""
        with self.lock:
            self.ended[ended.point.name] = ended
            self.write()

    def waiting(self) -> list[Point]:
        """Points that this host has to run yet."""
        mine = list(self.ended.values())[self.host.number :: self.host.hosts]
        return [e.point for e in mine if e.status == WAITING]

    def write(self) -> None:
        """``sweep.json``, or the like of another host."""
        write_json(self.folder / self.host.file(), _described(self))

    def gather(self, stop: threading.Event, quiet: bool) -> None:
        """Take over what the other hosts have run; the first one waits until nothing is left, or ``stop`` is set."""
        told = False
        while self.host.hosts > 1:
            for name, point in told_of(self.folder, self.ended).items():
                if self.ended[name].status == WAITING and point["status"] != WAITING:
                    known = self.ended[name]._replace(status=point["status"], error=point["error"])
                    self.ended[name] = known._replace(seconds=point["seconds"])
            left = [name for name, e in self.ended.items() if e.status == WAITING]
            if not left or self.host.number or stop.is_set():
                return
            if not told:
                tables.say(f"waiting for other hosts, {len(left)} points are left: {self.folder}", quiet)
            told = True
            stop.wait(POLL)

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

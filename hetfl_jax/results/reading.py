"""Reading back what ``hetfl train`` and ``hetfl sweep`` wrote: folders to points, metrics lines to rows and arrays."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hetfl_jax.core.types import Arguments, Line
from hetfl_jax.results.folder import leaves, read_metrics
from hetfl_jax.results.scores import evaluated, score_of
from hetfl_jax.results.tables import as_arrays

SWEEP, TABLE, SUMMARY = "sweep.json", "sweep.csv", "summary.csv"  #: files of a sweep's folder
SEED = "run.seed"  #: the key over which means and deviations are taken
#: keys that say where a run lies and how it was run, not what it is
OF_THE_FOLDER = ("run.name", "run.folder", "run.keep", "run.checkpoint_every", "train.devices")
_NEEDED = ("over", "points")


class Point(NamedTuple):
    """One run: of a sweep, or on its own."""

    name: str
    folder: Path
    values: Line  #: of the swept keys; empty for a run on its own
    status: str  #: done, failed, waiting, or running (a run without a table)
    error: str | None
    seconds: float | None  #: wall time
    config: Line  #: by dotted key, empty where nothing was written yet
    lines: list[Line]  #: of ``metrics.jsonl``
    table: list[Line]  #: one row a tier, empty until the end
    summary: Line  #: the rest of ``table.json``
    environment: Line
    partition: Line


class Source(NamedTuple):
    """A folder that somebody named: a sweep, a run, or a folder of runs."""

    folder: Path
    keys: tuple[str, ...]  #: swept, in the order in which they were given; empty unless it is a sweep
    points: list[Point]
    about: Line  #: command, version, programs, seconds, environment, as far as they are known


class Results(NamedTuple):
    """What a sweep or a run measured, as arrays."""

    folder: Path
    points: tuple[str, ...]  #: [P] names
    values: dict[str, np.ndarray]  #: [P] by swept key
    status: tuple[str, ...]  #: [P]
    rounds: np.ndarray  #: [R] int, every round that some point has
    metrics: dict[str, np.ndarray]  #: [P, R] float64 by name, e.g. ``accuracy/a``; NaN where a point has none


def read_json(path: Path) -> Line:
    """A JSON object; an empty one where there is no file.

    Raises:
      ValueError: the file is no JSON object.

    >>> read_json(Path("nowhere.json"))
    {}
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, it is no JSON: {error} (FOLDER)") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}: need an object (FOLDER)")
    return found


def read_sweep(folder: Path) -> Line:
    """``sweep.json`` of a sweep: ``over`` (swept keys), ``points`` (name, values, status, seconds, error), and how it
    ran: command, version, programs, environment.

    Raises:
      ValueError: there is none, or it is damaged.

    >>> read_sweep(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: nowhere/sweep.json has no 'over' nor 'points': it is no sweep's (FOLDER)
    """
    found = read_json(folder / SWEEP)
    if missing := [name for name in _NEEDED if name not in found]:
        raise ValueError(f"{folder / SWEEP} has no {' nor '.join(map(repr, missing))}: it is no sweep's (FOLDER)")
    return found


def read(folder: str | Path) -> Source:
    """What a folder holds: a sweep (``sweep.json``), a run (``config.json``), or runs in its sub-folders.

    Points of a sweep come in its order, runs of a folder sorted by name, numbers in names by value.

    Raises:
      ValueError: it holds none of them, or a file in it is damaged.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "config.json").write_text('{"run": {"seed": 0}}')
    >>> [(point.config, point.status) for point in read(folder).points]
    [({'run.seed': 0}, 'running')]
    """
    folder = Path(folder)
    if (folder / SWEEP).exists():
        found = read_sweep(folder)
        points = [_point(folder / str(p["name"]), p) for p in found["points"]]
        return Source(folder, tuple(found["over"]), points, found)
    if (folder / "config.json").exists():
        point = _point(folder, {"name": folder.resolve().name})
        return Source(folder, (), [point], _about(point))
    below = [path.parent for path in folder.glob("*/config.json")]
    if not below:
        raise ValueError(
            f"{folder} holds no run and no sweep: need a folder with config.json or {SWEEP}, or with runs below it "
            "(RUN_OR_SWEEP)"
        )
    points = [_point(path, {"name": path.name}) for path in sorted(below, key=lambda path: _natural(path.name))]
    seconds = [p.seconds for p in points if p.seconds is not None]
    return Source(folder, (), points, {**_about(points[0]), "seconds": sum(seconds)})


def _natural(name: str) -> list[str | float]:
    """Sorts by the numbers in names.

    >>> sorted(["seed10", "seed9", "rate=0.1", "rate=0.05"], key=_natural)
    ['rate=0.05', 'rate=0.1', 'seed9', 'seed10']
    """
    return [float(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", name))]


def _point(folder: Path, told: Arguments) -> Point:
    """A run's folder, with what ``sweep.json`` says of it: name, values, status, error and seconds.

    Seconds that nobody told are the sum of those of its rounds.
    """
    saved, table = read_json(folder / "config.json"), read_json(folder / "table.json")
    lines = read_metrics(folder)
    spent = [line["seconds"] for line in lines if isinstance(line.get("seconds"), int | float)]
    seconds = told.get("seconds")
    return Point(
        str(told["name"]),
        folder,
        dict(told.get("values", {})),
        str(told.get("status", "done" if table else "running")),
        told.get("error"),
        seconds if seconds is not None else (round(sum(spent), 3) if spent else None),
        leaves(saved),
        lines,
        list(table.pop("levels", [])),
        table,
        read_json(folder / "environment.json"),
        read_json(folder / "partition.json"),
    )


def _about(point: Point) -> Line:
    """What a run says of how it was run, in the words of ``sweep.json``."""
    seen = point.environment
    told = {"command": seen.get("command"), "version": seen.get("hetfl_jax"), "seconds": point.seconds}
    return {**told, "environment": seen}


def differing(points: Sequence[Point]) -> tuple[str, ...]:
    """Dotted keys of the configs in which points differ, those of the block ``run`` last.

    What says where they lie is left out, and so is what only some configs have: arguments of one method among others.

    >>> empty = Point("", Path(), {}, "done", None, None, {}, [], [], {}, {}, {})
    >>> one = {"run.seed": 0, "run.name": "a", "train.rounds": 5}
    >>> differing([empty._replace(config=one), empty._replace(config=one | {"run.seed": 1, "train.rounds": 9})])
    ('train.rounds', 'run.seed')
    """
    configs = [p.config for p in points if p.config]
    names = [name for name in (configs[0] if configs else ()) if all(name in config for config in configs)]
    unlike = [n for n in names if n not in OF_THE_FOLDER and any(c[n] != configs[0][n] for c in configs)]
    return tuple(n for n in unlike if not n.startswith("run.")) + tuple(n for n in unlike if n.startswith("run."))


def gather(folders: Sequence[str | Path]) -> tuple[list[Source], tuple[str, ...], list[Line]]:
    """Several folders as one table: sources, the keys in which their points differ, and each point's values of them.

    Args:
      folders: of runs, of sweeps, or with runs below them. The keys of a single sweep are those that it swept.

    Returns:
      (sources, K dotted keys, one dict of K values for each point, point after point).

    Raises:
      ValueError: a folder is named twice, or cannot be read.

    >>> import tempfile
    >>> folders = [Path(tempfile.mkdtemp()) for _ in range(2)]
    >>> for seed, folder in enumerate(folders):
    ...     _ = (folder / "config.json").write_text(json.dumps({"run": {"seed": seed}, "train": {"rounds": 5}}))
    >>> gather(folders)[1:]
    (('run.seed',), [{'run.seed': 0}, {'run.seed': 1}])
    """
    if not folders:
        raise ValueError("no folder: need at least one run or sweep (RUN_OR_SWEEP)")
    names = [Path(folder).resolve() for folder in folders]
    if twice := [folder for n, folder in enumerate(folders) if names.index(names[n]) != n]:
        raise ValueError(f"{twice[0]} is named twice: need every folder once (RUN_OR_SWEEP)")
    sources = [read(folder) for folder in folders]
    points = [point for source in sources for point in source.points]
    keys = sources[0].keys if len(sources) == 1 and sources[0].keys else ()
    if not keys:
        swept = dict.fromkeys(key for source in sources for key in source.keys)
        keys = tuple(dict.fromkeys((*swept, *differing(points))))
    return sources, keys, [{key: p.values.get(key, p.config.get(key)) for key in keys} for p in points]


def long(lines: Sequence[Arguments]) -> list[tuple[int, str, str, float]]:
    """Metrics lines as rows (round, level, metric, value): what ``sweep.csv`` has of a point.

    A metric that every level has keeps its name, one that belongs to none has the level ""; names of nested ones are
    joined by a slash. What is no number, and lists, are left out.

    >>> line = {"round": 2, "accuracy": {"a": 0.5, "b": None}, "seconds": 0.25, "client_accuracy": {"mean": 0.75}}
    >>> long([line])
    [(2, 'a', 'accuracy', 0.5), (2, '', 'seconds', 0.25), (2, '', 'client_accuracy/mean', 0.75)]
    """
    known = set(levels_of(lines)) | {name for line in lines for name in line.get("items", {})}
    rows: list[tuple[int, str, str, float]] = []
    for line in lines:
        for metric, value in line.items():
            if isinstance(value, dict) and set(value) <= known:
                rows += [(line["round"], level, metric, v) for level, v in value.items() if is_number(v)]
            elif metric != "round":
                rows += [
                    (line["round"], "", name, v) for name, v in leaves({metric: value}, "/").items() if is_number(v)
                ]
    return rows


def is_number(value: object) -> bool:
    """Whether a value of a line is a number.

    >>> is_number(1.5), is_number(True), is_number(None)
    (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)


def levels_of(lines: Sequence[Arguments]) -> list[str]:
    """Names of the levels (or other models offered) that were scored.

    >>> levels_of([{"round": 1}, {"round": 2, "accuracy": {"a": 0.5, "b": 0.4}}])
    ['a', 'b']
    """
    score = score_of(lines)
    return list(dict.fromkeys(level for line in evaluated(lines) for level in line[score]))


def results(folder: str | Path) -> Results:
    r"""A sweep's or a run's folder as arrays: metrics [points, rounds] by name.

    Args:
      folder: what ``hetfl sweep`` or ``hetfl train`` wrote; a run is one point.

    Raises:
      ValueError: it holds neither.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "config.json").write_text('{"run": {"seed": 0}}')
    >>> _ = (folder / "metrics.jsonl").write_text('{"round": 1, "accuracy": {"a": 0.5}}\n{"round": 2}\n')
    >>> found = results(folder)
    >>> found.rounds.tolist(), found.metrics["accuracy/a"].tolist(), found.status
    ([1, 2], [[0.5, nan]], ('running',))
    >>> results("nowhere")
    Traceback (most recent call last):
      ...
    ValueError: nowhere holds no run and no sweep: need a folder with config.json or sweep.json, ...
    """
    sources, keys, values = gather([folder])
    points = sources[0].points
    rounds = np.array(sorted({line["round"] for p in points for line in p.lines}), np.int64)
    metrics: dict[str, np.ndarray] = {}
    for number, point in enumerate(points):
        at = np.searchsorted(rounds, [line["round"] for line in point.lines])
        for name, column in as_arrays(point.lines).items():
            if name != "round":
                metrics.setdefault(name, np.full((len(points), rounds.size), np.nan))[number, at] = column
    return Results(
        Path(folder),
        tuple(p.name for p in points),
        {key: _column([v[key] for v in values]) for key in keys},
        tuple(p.status for p in points),
        rounds,
        metrics,
    )


def _column(values: Sequence[object]) -> np.ndarray:
    """Values of a key as an array: of numbers or texts, of objects where they are lists or of several kinds.

    >>> _column([1, 2.5]).dtype.name, _column(["a", "b"]).dtype.kind, _column([1, "auto"]).dtype.name
    ('float64', 'U', 'object')
    """
    kinds = {type(v) for v in values}
    if kinds <= {int, float} or kinds in ({str}, {bool}):
        return np.array(values)
    column = np.empty(len(values), object)
    column[:] = values
    return column

"""The page: runs and sweeps as one HTML file with its data, its figures and its program inside."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from hetfl_jax.core.types import Line
from hetfl_jax.results.folder import leaves
from hetfl_jax.results.of_time import BY_LEVEL
from hetfl_jax.results.plots import COLORS
from hetfl_jax.results.reading import SEED, TABLE, Point, Source, is_number, levels_of
from hetfl_jax.results.scores import evaluated, is_share, score_of
from hetfl_jax.results.tables import describe

LARGEST = 1_900_000  #: bytes of a page; with more, fewer of the evaluated rounds are drawn
_DIGITS = 9  #: significant ones of a number on the page: those of a float32 and no more
_BYTES = 11  #: of a number in the page, with its comma
_CLIENTS, _CLASSES = 100, 64  #: most rows and columns of a partition that are drawn
_CURVES = 2  #: evaluated rounds whose distribution over clients is kept: an early one and the last
_APART = ("items", "failed_ids", "round", *BY_LEVEL)  #: of a line: nothing to draw


class Page(NamedTuple):
    """What a page shows: folders as they were named, and one row for each of their points."""

    sources: Sequence[Source]
    keys: Sequence[str]
    values: Sequence[Line]  #: of ``keys``, one a point
    counts: Sequence[np.ndarray | None]  #: [clients, classes] examples of each point


class Pool:
    """Arrays by number: points that share one keep it once.

    >>> pool = Pool()
    >>> pool([1, 2]), pool([3]), pool([1, 2]), pool.arrays
    (0, 1, 0, [[1, 2], [3]])
    """

    def __init__(self) -> None:
        """Start empty."""
        self.arrays: list[list[Any]] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def __call__(self, values: Sequence[Any]) -> int:
        """The number of an array, which is kept if it is new."""
        key = tuple(values)
        if key not in self._known:
            self._known[key] = len(self.arrays)
            self.arrays.append([_short(v) for v in values])
        return self._known[key]


def _short(value: Any) -> Any:
    """A number as the page has it: whole ones as they are, others to nine digits.

    >>> _short(0.9611111283302307), _short(12345678901), _short(float("nan"))
    (0.961111128, 12345678901, None)
    """
    if not isinstance(value, float):
        return value
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None


def render(page: Page, output: Path) -> str:
    """The page as HTML of at most 1.9 MB: with more, fewer of the evaluated rounds are drawn, never fewer than two.

    Args:
      page: what it shows.
      output: the file that it will be written to; links to the runs' folders are relative to where it lies.

    >>> lines = [{"round": 1, "accuracy": {"a": 0.5}}]
    >>> point = Point("one", Path("runs/one"), {}, "done", None, None, {}, lines, [], {}, {}, {})
    >>> page = Page([Source(Path("runs/one"), (), [point], {})], (), [{}], [None])
    >>> text = render(page, Path("page.html"))
    >>> text[:15], len(text) < LARGEST
    ('<!DOCTYPE html>', True)
    """
    drawn = _first_guess([p.lines for s in page.sources for p in s.points])
    while True:
        text = _html(page, output, drawn)
        if (size := len(text.encode())) <= LARGEST or drawn <= 2:
            return text
        drawn = max(2, min(drawn - 1, int(0.95 * drawn * LARGEST / size)))


def _first_guess(runs: Sequence[Sequence[Line]]) -> int:
    """How many evaluated rounds of a run may fit on the page: at first too many, for equal arrays are kept once."""
    last = [lines[-1] for lines in map(evaluated, runs) if lines]
    numbers = sum(is_number(v) for line in last for v in leaves(line).values())
    most = max((len(evaluated(lines)) for lines in runs), default=0)
    return min(most, max(2, 2 * LARGEST // max(1, _BYTES * numbers)))


def _html(page: Page, output: Path, drawn: int) -> str:
    """The page with at most ``drawn`` evaluated rounds of each point."""
    import jinja2

    files = resources.files(__package__) / "page_files"
    loader = jinja2.FunctionLoader(lambda name: (files / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    told = data(page, output.resolve().parent, drawn)
    return environment.get_template("page.html").render(
        title=told["title"],
        sources=[_how(s) for s in page.sources],
        colors=COLORS,
        data=json.dumps(told, separators=(",", ":"), ensure_ascii=True, allow_nan=False).replace("<", "\\u003c"),
        styles=(files / "page.css").read_text(encoding="utf-8"),
        programs=[(files / f"{name}.js").read_text(encoding="utf-8") for name in ("base", "table", "charts", "main")],
        csv=TABLE,
    )


def data(page: Page, beside: Path, drawn: int) -> Line:
    """What the page's program reads.

    Args:
      page: what it shows.
      beside: the folder of the page.
      drawn: most evaluated rounds of a point.

    Returns:
      ``points`` (see ``_point_data``), ``keys`` in which they differ, ``levels`` and ``metrics`` by name, ``score`` and
      whether ``least`` of it is best, ``partitions``, ``arrays`` (points name theirs by number), and ``fewer``: how
      many evaluated rounds are drawn where not all are, else 0.

    >>> lines = [{"round": n, "accuracy": {"a": 0.5}} for n in (1, 2, 3)]
    >>> point = Point("one", Path("runs/one"), {}, "done", None, None, {}, lines, [], {}, {}, {})
    >>> found = data(Page([Source(Path("runs/one"), (), [point], {})], (), [{}], [None]), Path(), drawn=2)
    >>> found["title"], found["score"], found["fewer"]
    ('one', 'accuracy', 2)
    """
    points = [p for s in page.sources for p in s.points]
    lines = [line for p in points for line in p.lines]
    score, pool = score_of(lines), Pool()
    held: dict[str, int] = {}
    told = [_point_data(p, v, c, beside, drawn, pool, held) for p, v, c in zip(points, page.values, page.counts)]
    folders = [s.folder.resolve().name for s in page.sources]
    rows = {row["level"]: row for p in points for row in p.table}
    levels = dict.fromkeys(level for p in points for level in levels_of(p.lines))
    fewer = max((len(evaluated(p.lines)) for p in points), default=0) > drawn
    return {
        "title": ", ".join(folders) if len(folders) <= 3 else f"{len(folders)} runs",
        "keys": list(page.keys),
        "seed": SEED,
        "score": score,
        "least": not is_share(score),
        "levels": {level: _size(rows.get(level, {})) for level in levels},
        "metrics": {name: is_share(name) for name in _metrics(told, score)},
        "points": told,
        "partitions": [json.loads(text) for text in held],
        "fewer": drawn if fewer else 0,
        "arrays": pool.arrays,
    }


def _size(row: Mapping[str, Any]) -> str:
    """What a level's label says of it.

    >>> _size({"width": 0.5, "depth": None}), _size({"width": 1.0, "depth": 2}), _size({})
    ('x0.5', 'depth 2', '')
    """
    if row.get("width") is None:
        return ""
    return f"depth {row['depth']}" if row.get("depth") and row["width"] == 1 else f"x{row['width']:g}"


def _metrics(points: Sequence[Line], score: str) -> list[str]:
    """Names of what can be drawn over rounds, the score first.

    >>> _metrics([{"series": {"loss": {}, "accuracy": {}}, "scalars": {"train_loss": 0}}], "accuracy")
    ['accuracy', 'loss', 'train_loss']
    """
    found = dict.fromkeys(name for p in points for part in ("series", "scalars") for name in p[part])
    return sorted(found, key=lambda name: (name != score, list(found).index(name)))


def _point_data(
    point: Point, values: Line, counts: np.ndarray | None, beside: Path, drawn: int, pool: Pool, held: dict[str, int]
) -> Line:
    """One point: where it stands, what it scored, what that cost.

    Args:
      values: of the keys in which points differ.
      counts: [clients, classes] examples, if they are known.
      beside: the folder of the page, for the link to the run's.
      drawn: most evaluated rounds.
      pool: gets the point's arrays.
      held: partitions so far as JSON, each with its number; an equal one is kept once.

    Returns:
      Among others ``rounds``, ``x`` (bytes, multiply-adds and simulated time over rounds), ``series`` (a curve a level)
      and ``scalars`` (one curve); each curve is the number of an array of ``pool``.
    """
    every, score = evaluated(point.lines), score_of(point.lines)
    lines = _thinned(every, drawn, point.summary.get("best_round"))
    last, final = (every[-1] if every else {}), (point.lines[-1] if point.lines else {})
    sent = [_sum(line, "down_bytes", "up_bytes") for line in lines]
    nested = {n: v for n, v in last.items() if isinstance(v, dict) and n not in _APART}
    levelled = [n for n, v in nested.items() if set(v) <= set(last[score])]
    plain = [n for n, v in last.items() if is_number(v) and n not in (*_APART, *_costs(last))]
    spread = last.get(f"client_{score}", {})
    partition = None if counts is None else held.setdefault(json.dumps(_partition(point, counts)), len(held))
    return {
        "name": point.name,
        "values": [_plain(v) for v in values.values()],
        "status": point.status,
        "error": point.error,
        "seconds": point.seconds,
        "link": quote(os.path.relpath(point.folder.resolve(), beside).replace(os.sep, "/")) + "/",
        "rounds": pool([line["round"] for line in lines]),
        "x": {
            "bytes": pool(sent),
            "macs": pool([line.get("client_macs", 0) for line in lines]),
            **{n: pool([line.get(n, 0) for line in lines]) for n in _times(last)},
        },
        "series": {n: {lv: pool([_of(x, n, lv) for x in lines]) for lv in nested[n]} for n in levelled},
        "scalars": {n: pool([line.get(n) for line in lines]) for n in plain},
        "rows": {r["level"]: {k: _short(r.get(k)) for k in ("best", "parameters", "macs")} for r in point.table},
        "best_round": point.summary.get("best_round"),
        "sent": _sum(final, "down_bytes", "up_bytes") if final else None,
        "work": final.get("client_macs"),
        "clients": _clients(every, score, pool),
        "spread": {n: _short(spread.get(n)) for n in ("mean", "deviation", "worst_tenth", "best_tenth")}
        if spread
        else {},
        "lists": _lists(lines, pool),
        "partition": partition,
    }


def _of(line: Line, name: str, level: str) -> Any:
    """A level's value in a line, ``None`` where it has none."""
    return line.get(name, {}).get(level)


def _sum(line: Line, *names: str) -> Any:
    """Sum of a line's fields; what it lacks counts 0."""
    return sum(line.get(name, 0) for name in names)


def _costs(line: Line) -> list[str]:
    """What is drawn along the horizontal axis, not upwards."""
    fixed = ("down_bytes", "up_bytes", "client_macs", "full_size_bytes", "seconds", "clients", "failed")
    return [*fixed, *_times(line)]


def _times(line: Line) -> list[str]:
    """Names of a line that hold time on the clients' devices since the start.

    >>> _times({"seconds": 1.0, "simulated_seconds": 20.0})
    ['simulated_seconds']
    """
    return [name for name in line if name.startswith("simulated_")]


def _thinned(lines: Sequence[Line], drawn: int, best: int | None) -> list[Line]:
    """At most about ``drawn`` lines, the first, the best and the last among them.

    >>> [line["round"] for line in _thinned([{"round": n} for n in range(10)], 3, best=7)]
    [0, 4, 7, 9]
    """
    if len(lines) <= drawn:
        return list(lines)
    chosen = set(np.unique(np.linspace(0, len(lines) - 1, drawn).round().astype(int)).tolist())
    return [line for n, line in enumerate(lines) if n in chosen or line["round"] == best]


def _plain(value: Any) -> Any:
    """A value of a key as text, unless it is a number or a switch.

    >>> _plain((32, 64)), _plain(0.1), _plain(None)
    ('[32, 64]', 0.1, None)
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value)


def _clients(lines: Sequence[Line], score: str, pool: Pool) -> list[Line]:
    """Quantiles over clients of a few evaluated rounds, the last one last.

    Of all rounds that have any, the second and the last are kept.
    """
    told = [line for line in lines if "quantiles" in line.get(f"client_{score}", {})]
    places = sorted({min(1, len(told) - 1), len(told) - 1})[-_CURVES:] if told else []
    return [{"round": told[n]["round"], "values": pool(told[n][f"client_{score}"]["quantiles"])} for n in places]


def _lists(lines: Sequence[Line], pool: Pool) -> Line:
    """Lists of numbers that rounds have, e.g. how many clients each of several models had.

    One curve for each place of a list; a round whose list is shorter counts 0 there.

    >>> pool = Pool()
    >>> _lists([{"round": 1, "members": [4]}, {"round": 2, "members": [2, 3]}], pool)
    {'members': {'rounds': 2, 'rows': [0, 1]}}
    >>> pool.arrays
    [[4, 2], [0, 3], [1, 2]]
    """
    names = dict.fromkeys(n for line in lines for n, v in line.items() if isinstance(v, list) and n not in _APART)
    out: Line = {}
    for name in names:
        told = [line for line in lines if line.get(name) and all(is_number(v) for v in line[name])]
        most = max((len(line[name]) for line in told), default=0)
        rows = [pool([line[name][k] if k < len(line[name]) else 0 for line in told]) for k in range(most)]
        out[name] = {"rounds": pool([line["round"] for line in told]), "rows": rows}
    return {name: kept for name, kept in out.items() if kept["rows"]}


def _partition(point: Point, counts: np.ndarray) -> Line:
    """A partition: a sentence, and examples by client and class, of as many as can be drawn.

    Of more than 100 clients evenly spaced ones are drawn, of more than 64 classes the most common ones.
    """
    clients, classes = counts.shape
    rows = np.unique(np.linspace(0, clients - 1, min(clients, _CLIENTS)).round().astype(int))
    common = np.sort(np.argsort(-counts.sum(0), kind="stable")[:_CLASSES])
    return {
        "text": describe(point.partition) if point.partition else f"{clients} clients",
        "all": [clients, classes],
        "clients": rows.tolist(),
        "classes": common.tolist(),
        "counts": counts[np.ix_(rows, common)].tolist(),
    }


def _how(source: Source) -> dict[str, str]:
    """How a folder came about, in words: command, versions, device, programs, wall time, as far as known."""
    told, seen = source.about, source.about.get("environment") or {}
    done = sum(p.status == "done" for p in source.points)
    packages = [f"{n} {seen[n]}" for n in ("jax", "jaxlib", "flax", "optax", "numpy", "python") if n in seen]
    device = f"{seen.get('devices', 1)} x {seen['device']} ({seen['backend']})" if "device" in seen else ""
    seconds, version = told.get("seconds"), told.get("version") or seen.get("hetfl_jax")
    rows = {
        "folder": str(source.folder),
        "command": told.get("command") or "",
        "points": f"{done} of {len(source.points)} done" if source.keys or len(source.points) > 1 else "",
        "version": f"hetfl_jax {version}" if version else "",
        "with": ", ".join(packages),
        "device": device,
        "precision of products": seen.get("matmul_precision", ""),
        "programs": str(told.get("programs") or ""),
        "wall time": "" if seconds is None else f"{seconds:,.1f} s",
        "started": seen.get("date", ""),
    }
    return {name: str(value) for name, value in rows.items() if value}

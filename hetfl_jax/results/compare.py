"""Paired differences between runs over the seeds that they share: a t interval, and a sign-flip test."""

import itertools
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hetfl_jax.results.reading import OF_THE_FOLDER, SEED, Point, Source, differing, gather, is_number
from hetfl_jax.results.scores import evaluated, is_share, score_of, written

EXACT = 16  #: pairs up to which every pattern of signs is tried
_KEYS = 3  #: most that a group's name says
DRAWS = 100_000  #: patterns that are drawn for more pairs


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    points: dict[int, Point]  #: by seed


class Difference(NamedTuple):
    """A group against the first one, at one level."""

    group: str
    level: str  #: "" for a metric that no level has
    mean: float  #: of the group, over the common seeds
    baseline: float  #: of the first group, over the same seeds
    difference: float  #: mean of the pairs' differences, group minus first
    low: float | None  #: of the confidence interval by Student's t; none with a single pair
    high: float | None
    t_test: float | None  #: two-sided p value of the paired t test
    sign_flip: float  #: two-sided p value, see ``sign_flip``
    seeds: tuple[int, ...]  #: common ones


class Comparison(NamedTuple):
    """All groups against the first one."""

    baseline: str
    metric: str
    confidence: float
    rows: list[Difference]
    left_out: list[str]  #: points that did not finish


def compare(folders: Sequence[str | Path], metric: str | None = None, confidence: float = 0.95) -> Comparison:
    """Compare runs after their last round, seed by seed.

    With d_s the difference at seed s and n common seeds: ``mean(d) +- t_{n-1} std(d) / sqrt(n)``, std with n - 1.

    Args:
      folders: of runs, of sweeps, or with runs below them. Runs whose configs differ in the seed alone are one group;
        where that would put two runs of one seed together, each folder is a group of its own. The first group is what
        the others are compared with.
      metric: by its name in ``metrics.jsonl``; by default the score.
      confidence: of the interval, between 0 and 1.

    Raises:
      ValueError: fewer than two groups, no common seed, or a metric or level that they do not share.

    >>> compare(["nowhere"], confidence=95)
    Traceback (most recent call last):
    ValueError: confidence 95, allowed 0 < c < 1 (--confidence)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}, allowed 0 < c < 1 (--confidence)")
    sources = gather(folders)[0]
    points = [p for source in sources for p in source.points]
    metric = metric or score_of([line for p in points for line in p.lines])
    finished = {id(p) for p in points if p.status == "done" and evaluated(p.lines)}
    first, *others = groups(sources, finished)
    rows = [row for other in others for row in _against(first, other, metric, confidence)]
    return Comparison(first.name, metric, confidence, rows, [p.name for p in points if id(p) not in finished])


def groups(sources: Sequence[Source], finished: set[int]) -> list[Group]:
    """The finished points, by what they share but the seed; the group of the first point comes first.

    Args:
      sources: folders that were named, in their order.
      finished: ``id`` of each point that counts.

    Raises:
      ValueError: there are fewer than two groups, or two runs of one config, folder and seed.

    >>> point = Point("", Path(), {}, "done", None, None, {}, [], [], {}, {}, {})
    >>> runs = [point._replace(config={SEED: seed, "train.rounds": n}) for n in (5, 9) for seed in (0, 1)]
    >>> found = groups([Source(Path("runs"), (), runs, {})], {id(run) for run in runs})
    >>> [(group.name, list(group.points)) for group in found]
    [('rounds 5', [0, 1]), ('rounds 9', [0, 1])]
    """
    kept = [(n, p) for n, source in enumerate(sources) for p in source.points if id(p) in finished]
    alike: dict[str, list[tuple[int, Point]]] = {}
    for number, point in kept:
        alike.setdefault(_without_seed(point), []).append((number, point))
    found: list[tuple[Source | None, list[Point]]] = []
    for members in alike.values():
        seeds = [_seed(p) for _, p in members]
        if len(set(seeds)) == len(seeds):
            found.append((None, [p for _, p in members]))
            continue
        for number, some in itertools.groupby(members, key=lambda member: member[0]):
            found.append((sources[number], [p for _, p in some]))
    named = [Group(_name(points, source, found), _by_seed(points)) for source, points in found]
    if len(named) < 2:
        what = f"{len(kept)} finished run(s) that differ in the seed alone" if named else "no finished run"
        raise ValueError(f"{what}: need two groups to compare (RUN_OR_SWEEP)")
    order = {id(p): n for n, (_, p) in enumerate(kept)}
    return sorted(named, key=lambda group: min(order[id(p)] for p in group.points.values()))


def _without_seed(point: Point) -> str:
    """A point's config as text, without its seed and what says where it lies: equal for runs of one group."""
    apart = (SEED, *OF_THE_FOLDER)
    return json.dumps({k: v for k, v in point.config.items() if k not in apart}, sort_keys=True)


def _seed(point: Point) -> int:
    return int(point.config.get(SEED, 0))


def _by_seed(points: Sequence[Point]) -> dict[int, Point]:
    """Points by seed.

    Raises:
      ValueError: two of them have one seed, with their folders.
    """
    seeds = [_seed(p) for p in points]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        same = ", ".join(str(p.folder) for p in points if _seed(p) == twice[0])
        raise ValueError(f"{same} have one config and one seed, {twice[0]}: name one of them (RUN_OR_SWEEP)")
    return dict(zip(seeds, points))


def _name(points: Sequence[Point], source: Source | None, every: Sequence[tuple[Source | None, list[Point]]]) -> str:
    """What a group is called: the keys in which groups differ, or its folder where more than three keys or none do."""
    unlike = [name for name in differing([other[0] for _, other in every]) if name != SEED]
    if source or not 1 <= len(unlike) <= _KEYS:
        return str(source.folder if source else points[0].folder)
    return ", ".join(f"{_short(name)} {points[0].config[name]}" for name in unlike)


def _short(key: str) -> str:
    """The last part of a key, of a name its block.

    >>> _short("train.learning_rate"), _short("method.name")
    ('learning_rate', 'method')
    """
    block, _, last = key.rpartition(".")
    return block if last == "name" else last


def values_of(point: Point, metric: str) -> dict[str, float]:
    """A metric after the last evaluated round by level, "" for one that no level has.

    Args:
      point: a run with at least one evaluated round.
      metric: a name in its metrics lines.

    Raises:
      ValueError: the run has no such metric, with those it has.

    >>> point = Point("", Path("runs/a"), {}, "done", None, None, {}, [], [], {}, {}, {})
    >>> point = point._replace(lines=[{"round": 1, "accuracy": {"a": 0.5, "b": 0.25}, "seconds": 2}])
    >>> values_of(point, "accuracy"), values_of(point, "seconds")
    ({'a': 0.5, 'b': 0.25}, {'': 2.0})
    """
    last = evaluated(point.lines)[-1]
    found = last.get(metric)
    if isinstance(found, int | float):
        return {"": float(found)}
    if isinstance(found, dict) and any(map(is_number, found.values())):
        return {level: float(v) for level, v in found.items() if is_number(v)}
    allowed = [n for n, v in last.items() if is_number(v) or isinstance(v, dict)]
    raise ValueError(f"metric {metric!r} of {point.folder} is not one of {', '.join(allowed)} (--metric)")


def _against(first: Group, other: Group, metric: str, confidence: float) -> list[Difference]:
    """Differences between two groups over their common seeds, one row for each common level.

    Raises:
      ValueError: no seed or no level is common.
    """
    seeds = tuple(sorted(set(first.points) & set(other.points)))
    if not seeds:
        sets = (", ".join(map(str, sorted(g.points))) for g in (first, other))
        raise ValueError(f"{first.name} has seeds {next(sets)}, {other.name} {next(sets)}: none is common ({SEED})")
    ours, theirs = ([values_of(g.points[s], metric) for s in seeds] for g in (first, other))
    levels = [level for level in ours[0] if all(level in values for values in (*ours, *theirs))]
    if not levels:
        raise ValueError(f"{first.name} and {other.name} have no level in common (family.mix)")
    return [
        _difference(other.name, lv, seeds, [v[lv] for v in ours], [v[lv] for v in theirs], confidence) for lv in levels
    ]


def _difference(
    name: str, level: str, seeds: tuple[int, ...], ours: list[float], theirs: list[float], confidence: float
) -> Difference:
    """One row from the values of both groups [seeds], which are in the same order of seeds."""
    pairs = np.subtract(theirs, ours)
    middle = float(pairs.mean())
    low, high, p = t_interval(pairs, confidence)
    return Difference(
        name, level, float(np.mean(theirs)), float(np.mean(ours)), middle, low, high, p, sign_flip(pairs), seeds
    )


def t_interval(pairs: np.ndarray, confidence: float) -> tuple[float | None, float | None, float | None]:
    """Interval of the mean and two-sided p value by Student's t; none of them with a single pair.

    Args:
      pairs: [n] differences.
      confidence: of the interval, e.g. 0.95.

    Returns:
      (low, high, p). Where all differences are equal, the interval is a point and p is 1 (they are 0) or 0.

    >>> [round(v, 4) for v in t_interval(np.array([1.0, 2.0, 3.0]), 0.95)]
    [-0.4841, 4.4841, 0.0742]
    """
    from scipy import stats

    if pairs.size < 2:
        return None, None, None
    middle, error = float(pairs.mean()), float(pairs.std(ddof=1) / np.sqrt(pairs.size))
    reach = float(stats.t.ppf((1 + confidence) / 2, pairs.size - 1)) * error
    if error == 0:
        return middle, middle, 1.0 if middle == 0 else 0.0
    return middle - reach, middle + reach, 2 * float(stats.t.sf(abs(middle) / error, pairs.size - 1))


def sign_flip(pairs: np.ndarray) -> float:
    """Share of the patterns of signs whose mean is as far from 0 as that of the pairs: two-sided, it assumes symmetry.

    All ``2^n`` patterns up to 16 pairs, 100,000 drawn ones and the observed one beyond. With n pairs the least value is
    ``2^(1 - n)``.

    >>> sign_flip(np.array([1.0, 2.0, 3.0])), sign_flip(np.array([1.0, -1.0])), sign_flip(np.array([0.5]))
    (0.25, 1.0, 1.0)
    """
    observed = abs(pairs.sum())
    edge = observed - 1e-9 * np.abs(pairs).sum()
    if pairs.size <= EXACT:
        bits = np.arange(2**pairs.size)[:, None] >> np.arange(pairs.size) & 1
        return float((np.abs((2 * bits - 1) @ pairs) >= edge).mean())
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (DRAWS, pairs.size))
    return float((1 + (np.abs(signs @ pairs) >= edge).sum()) / (1 + DRAWS))


def render(found: Comparison) -> str:
    """A comparison as a table of text, one row for each group and level; shares in percent, differences in points.

    >>> row = Difference("cohort 10", "a", 0.81, 0.8, 0.01, None, None, None, 1.0, (0,))
    >>> text = render(Comparison("cohort 5", "accuracy", 0.95, [row], []))
    >>> "+1.00" in text, "81.00%" in text
    (True, True)
    """
    from rich.console import Console
    from rich.table import Table

    share = is_share(found.metric)
    out = Table(title=f"{found.metric} after the last round, against {found.baseline}")
    for name in (
        "",
        "level",
        "mean",
        "first's",
        "difference",
        f"{100 * found.confidence:g}% interval",
        "t test",
        "sign flip",
        "seeds",
    ):
        out.add_column(name, justify="left" if name in ("", "level") else "right")
    for row in found.rows:
        interval = "-" if row.low is None else f"{_signed(row.low, share)} to {_signed(row.high, share)}"
        chances = ("-" if p is None else f"p = {p:.3g}" for p in (row.t_test, row.sign_flip))
        means = (written(v, share) for v in (row.mean, row.baseline))
        out.add_row(
            row.group, row.level, *means, _signed(row.difference, share), interval, *chances, str(len(row.seeds))
        )
    buffer = StringIO()
    Console(file=buffer, width=160).print(out)
    fewest = min(len(row.seeds) for row in found.rows)
    text = (
        f"differences are paired by seed; with {fewest} the sign flip cannot say less than {2.0 ** (1 - fewest):.3g};\n"
        "a p value is of its row alone, not corrected for the number of rows\n"
    )
    text += f"left out, not finished: {', '.join(found.left_out)}\n" if found.left_out else ""
    return buffer.getvalue() + text


def _signed(value: float | None, share: bool) -> str:
    """A difference with its sign; of shares in points of percent.

    >>> _signed(0.0123, True), _signed(-2.5, False)
    ('+1.23', '-2.5')
    """
    assert value is not None
    return f"{100 * value:+.2f}" if share else f"{value:+.4g}"

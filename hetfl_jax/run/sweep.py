"""Many runs as one: points of a sweep share programs, run one a device, and are written like single runs."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hetfl_jax.core import machine
from hetfl_jax.core.types import Config, Line
from hetfl_jax.results import tables
from hetfl_jax.results.folder import plain, same_config
from hetfl_jax.results.progress import Whole
from hetfl_jax.results.reading import read_sweep
from hetfl_jax.run.config import complete, load_config
from hetfl_jax.run.dryrun import describe as cost
from hetfl_jax.run.evaluate import Metric
from hetfl_jax.run.federation import Federation, Own, build
from hetfl_jax.run.lab import check_run, prepare
from hetfl_jax.run.points import Point, points, product, zipped
from hetfl_jax.run.programs import Shared, fixed
from hetfl_jax.run.standing import DONE, FAILED, POLL, WAITING, Ended, Host, Standing, told_of
from hetfl_jax.run.stop import Stopped, on_sigterm
from hetfl_jax.run.train import Result, check_data, completed_for, train
from hetfl_jax.run.workers import Worker, at_once, run_all


class Sweep(NamedTuple):
    """What ``sweep`` returns.

    ``table[0]["run.seed"]`` and ``table[0]["last"]`` are the seed and the score of the first point's largest model;
    ``hetfl_jax.results(folder)`` has every round as arrays.
    """

    table: list[Line]  #: one row a point and level: swept keys, then the columns of a run's table
    points: list[Ended]
    folder: Path
    programs: int  #: how many programs of a round were built


def sweep(
    config: Config = "heterofl_digits", over: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] = (), *,
    parallel: bool = False, net: Any = None, data: Config = None, split: Any = None, method: Any = None,
    metrics: Mapping[str, Metric] | None = None, resume: bool = False, overwrite: bool = False, quiet: bool = False,
    full: bool = False, names: Callable[[Mapping[str, Any]], str] | None = None, process: int = 0, processes: int = 1,
) -> Sweep:  # fmt: skip
    """Run a config at many points.

    Points that differ in numbers only (rates, decay, q, seeds) share one compiled program. Unless ``train.devices``
    says otherwise, each point has one device, and as many points run at once as there are devices; a point's result is
    that of ``train`` with ``train.devices=1``, bit for bit. With ``train.points_at_once`` (on an accelerator by default
    as many as fit) a device runs several points under one ``vmap``, with the same results but for rounding; the seconds
    of a round are then those of all of them.

    Args:
      over: lists of values by dotted key, whose product is run; or the points themselves, dicts of values.
      parallel: run the first values of all lists, then the second ones, in place of the product.
      net, data, split, method, metrics: as of ``train``, for all points.
      resume: run only what is missing.
      full: write checkpoints and plots of every point too, as ``train`` does; a point that was interrupted then goes on
        from its checkpoint, else it starts again.
      names: a point's name from its values, in place of ``key=value,...``.
      process, processes: of several hosts that share the folder, the number of this one, and how many there are. Host 1
        of 4 runs points 1, 5, 9, ...; host 0 waits for the others, and writes the tables and the page.

    Returns:
      A ``Sweep``. The folder ``run.folder/run.name`` holds ``report.html`` (a page of all points), ``sweep.json``,
      ``sweep.csv`` (point, swept keys, round, level, metric, value), ``summary.csv`` (mean and deviation over
      ``run.seed``), and a run's folder for each point.

    Raises:
      ValueError: before anything runs: an unknown key, a value of another kind, an empty list, two points of one name,
        a folder that holds something else.

    >>> import tempfile
    >>> short = ("family.net=mlp", "train.rounds=2", "train.devices=1", f"run.folder={tempfile.mkdtemp()}")
    >>> found = sweep(load_config("heterofl_digits:mix=a1,quick", *short), {"run.seed": [0, 1]}, quiet=True)
    >>> [point.status for point in found.points], found.programs
    (['done', 'done'], 1)
    """
    machine.use_cache_once()
    if jax.process_count() > 1:
        raise ValueError(
            f"a sweep of {jax.process_count()} connected processes: leave --coordinator away, give each --process"
        )
    host = _host(process, processes, overwrite)
    base = complete(load_config(str(config)) if isinstance(config, str | Path) else config, method=method)
    folder = Path(base.run.folder) / base.run.name
    if not isinstance(over, Mapping | Sequence):
        raise ValueError(f"over is a {type(over).__name__}: need lists of values by key, or a list of points (over)")
    listed = (zipped if parallel else product)(over) if isinstance(over, Mapping) else list(over)
    todo = [_on_one_device(point, names) for point in points(base, listed, folder, method)]
    own, shared = Own(net, data, split, method), Shared()
    _check(todo, own)
    if host.number:
        _wait_for_first(folder, quiet)
    resume = resume or host.number > 0
    before = _claim(folder, base, todo, resume=resume, overwrite=overwrite, full=full, method=method)
    _check_done(before, folder, own)
    plan = Standing(folder, base, before, full, host)
    plan.write()
    tables.say(f"{len(todo)} points, {sum(e.status == DONE for e in before.values())} done: {folder}", quiet)
    left = plan.waiting()
    whole = Whole(len(left), sum(point.config.train.rounds for point in left), quiet)
    with whole, on_sigterm() as stop:
        run_all(left, Worker(plan, own, metrics, shared, whole, stop).next, stop)
        plan.write()
        plan.gather(stop, quiet)
    if not host.number:
        plan.write()
        plan.write_tables()
    if stop.is_set():
        done = sum(e.status == DONE for e in plan.ended.values())
        raise Stopped(f"{folder}: stopped, {done} of {len(todo)} points are done")
    return Sweep(plan.table(), list(plan.ended.values()), folder, shared.count())


def _host(process: int, processes: int, overwrite: bool) -> Host:
    """This host among those that share a sweep.

    Raises:
      ValueError: a number that there is not; several hosts that would delete a folder under each other.

    >>> _host(2, 2, False)
    Traceback (most recent call last):
    ValueError: process 2 of 2, allowed 0..1 (--process, --processes)
    """
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(
            f"process {process} of {processes}, allowed 0..{max(processes, 1) - 1} (--process, --processes)"
        )
    if processes > 1 and overwrite:
        raise ValueError(f"--overwrite of a sweep of {processes} hosts: delete its folder first, or see --resume")
    return Host(process, processes)


def _wait_for_first(folder: Path, quiet: bool) -> None:
    """Wait until the first host has made the folder the sweep's own.

    Raises:
      Stopped: SIGTERM came first.
    """
    with on_sigterm() as stop:
        if not (folder / "sweep.json").exists():
            tables.say(f"waiting for the first host (--process=0): {folder}", quiet)
        while not (folder / "sweep.json").exists():
            if stop.wait(POLL):
                raise Stopped(f"{folder}: stopped, the first host has not begun")


def _on_one_device(point: Point, names: Callable[[Mapping[str, Any]], str] | None) -> Point:
    """A point whose run has one device, unless the config says otherwise; its name may be given."""
    config, name = point.config.copy_and_resolve_references(), names(point.values) if names else point.name
    with config.unlocked():
        config.train.devices = config.train.devices or 1
        config.run.name = name
    return point._replace(config=config, name=name)


def _check(todo: Sequence[Point], own: Own) -> None:
    """Build the method of every point, whose ranges are then checked; data is loaded once for points that differ in
    numbers and seeds only.

    Raises:
      ValueError: as ``train``, with the point's name.
    """
    built: dict[str, Federation] = {}
    for point in todo:
        kind = fixed(point.config)
        try:
            check_run(point.config)
            if kind not in built:
                built[kind] = build(point.config, own)
            elif (remake := built[kind].remake) is not None:
                remake(point.config.to_dict())
        except ValueError as error:
            raise ValueError(f"point {point.name}: {error}") from error


def _claim(
    folder: Path, base: Config, todo: Sequence[Point], *, resume: bool, overwrite: bool, full: bool,
    method: Any = None,
) -> dict[str, Ended]:  # fmt: skip
    """Make the folder this sweep's own; what of it is done already.

    Runs that lie where points will be, without a sweep, are of ``--seeds`` of an older version: with ``full`` they go
    on from their checkpoints.

    Raises:
      ValueError: it holds something else.
    """
    waiting = {point.name: Ended(point, WAITING) for point in todo}
    saved, there = folder / "sweep.json", [p.name for p in todo if (folder / p.name / "config.json").exists()]
    older = resume and full and bool(there) and not saved.exists()
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a run, not a sweep: choose another run.name")
    if resume and not saved.exists() and not older:
        raise ValueError(f"{folder} holds no sweep to go on with: leave --resume away, or see run.folder and run.name")
    if saved.exists() and not (resume or overwrite):
        raise ValueError(f"{folder} already holds a sweep: --resume runs what is missing, --overwrite starts over")
    if there and not (resume or overwrite):
        raise ValueError(f"{folder / there[0]} already holds a run: --overwrite deletes it, or choose another run.name")
    for old in [folder] if saved.exists() and overwrite else [folder / name for name in there if overwrite]:
        shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    if not saved.exists():
        return waiting
    before = read_sweep(folder)
    names = [point["name"] for point in before["points"]]
    if names != list(waiting):
        raise ValueError(f"{folder} holds another sweep, of {len(names)} points: {', '.join(names[:3])}, ... (over)")
    saved_config = plain(completed_for(method, before["config"]))
    may_change = ("run.folder", "run.name", "train.points_at_once")
    same_config(saved_config, plain(base.to_dict()), folder, may_change)
    for point in told_of(folder, waiting).values():
        if point["status"] == DONE and (folder / point["name"] / "table.json").exists():
            waiting[point["name"]] = waiting[point["name"]]._replace(status=DONE, seconds=point["seconds"])
    return waiting


def _check_done(before: Mapping[str, Ended], folder: Path, own: Own) -> None:
    """Refuse to put new points beside done ones that saw other data; of points alike but for numbers, one is looked at.

    Raises:
      ValueError: with what changed.
    """
    done = {fixed(e.point.config): e.point for e in before.values() if e.status == DONE}
    for point in done.values() if any(e.status == WAITING for e in before.values()) else ():
        check_data(folder / point.name, build(point.config, own).fingerprint)


def describe(config: Config, over: Sequence[Mapping[str, Any]], own: Own | None = None) -> str:
    """Points, programs and cost of a sweep as text; every point is built and traced, nothing is trained.

    Raises:
      ValueError: as ``sweep``.
    """
    own, shared = own or Own(), Shared()
    todo = [_on_one_device(p, None) for p in points(config, over, Path(config.run.folder) / config.run.name)]
    together = 1
    for number, point in enumerate(todo):
        lab = prepare(point.config, own, None, shared)
        together = at_once(lab, shared.said) if number == 0 else together
    programs, workers = shared.count(), min(jax.local_device_count() * together, len(todo))
    rounds = sum(point.config.train.rounds for point in todo)
    head = f"{len(todo)} points, {rounds} rounds, {programs} programs of a round, {workers} points at once"
    return "\n".join(
        [head, *(point.name for point in todo), f"one of them, {todo[0].name}:", cost(todo[0].config, own)]
    )


def summary(found: Sweep) -> str:
    """A sweep's end as text: a row a point and level, the points that failed, and the files."""
    keys = list(dict.fromkeys(key for e in found.points for key in e.point.values))
    text = tables.render_points(keys, found.table)
    failed = [f"{e.point.name} failed: {e.error}" for e in found.points if e.status == FAILED]
    files = ", ".join(("report.html", "sweep.json", "sweep.csv", "summary.csv"))
    return "\n".join([text + "\n".join(failed), f"written to {found.folder}/: {files}, a folder a point"]).lstrip()


def over_seeds(config: Config, seeds: Sequence[int], **options: Any) -> tuple[list[Result], list[Line]]:
    """A sweep over seeds: one run a seed under ``run.name/seed<k>``, and each level's mean and deviation over them.

    Args:
      config: as of ``sweep``.
      seeds: whole numbers >= 0, each once.
      options: as of ``sweep``.

    Returns:
      The runs' results in the order of the seeds, and the rows of ``results.tables.seed_table``.

    Raises:
      ValueError: no seeds, one twice, or one that is no whole number >= 0; a seed whose run failed; and as ``sweep``.

    >>> over_seeds("heterofl_digits", [0, 0])
    Traceback (most recent call last):
    ValueError: seeds [0, 0]: need some whole numbers >= 0, each once (seeds)
    """
    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds {seeds!r}: need some whole numbers >= 0, each once (seeds)")
    found = sweep(
        config, [{"run.seed": seed} for seed in seeds], full=True, names=lambda values: f"seed{values['run.seed']}",
        **options,
    )  # fmt: skip
    if failed := next((e for e in found.points if e.status != DONE), None):
        raise ValueError(f"{failed.point.name} failed: {failed.error}")
    kept = {name: value for name, value in options.items() if name in ("net", "data", "split", "method", "metrics")}
    results = [e.result or train(e.point.config, resume=True, quiet=True, **kept) for e in found.points]
    return results, tables.seed_table([result.table for result in results])

"""A run from config to result, readable from top to bottom like a lab protocol."""

import json
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hetfl_jax.core import machine, tree
from hetfl_jax.core.types import Arguments, Config, Info, Line, PyTree, Score, State
from hetfl_jax.data import partition
from hetfl_jax.data.door import same_fingerprint
from hetfl_jax.engine import profile, rounds
from hetfl_jax.results import plots, tables
from hetfl_jax.results.folder import Checkpoints, Metrics, Remembered, check_folder, claim, write_json
from hetfl_jax.results.progress import Bar, Progress
from hetfl_jax.results.scores import evaluated
from hetfl_jax.run import ledger
from hetfl_jax.run.config import complete, load_config
from hetfl_jax.run.evaluate import Metric
from hetfl_jax.run.federation import Own
from hetfl_jax.run.lab import Lab, draw_figures, evaluate_tiers, prepare, whole
from hetfl_jax.run.mix import sizes
from hetfl_jax.run.selections import check_memory, sentences
from hetfl_jax.run.stop import Stopped, on_sigterm

NEVER = -1e30  #: below all scores
#: (round, scores of every tier by name, state) -> anything; called after each evaluation
Callback = Callable[[int, Line, State], Any]


class Result(NamedTuple):
    """What ``train`` returns.

    ``table[0]["best"]`` is the largest model's score in the best round, ``metrics["accuracy/a"]`` [rounds] that of
    level a.
    """

    params: PyTree  #: the global model's parameters after the last round, of several models with a leading axis
    metrics: dict[str, np.ndarray]  #: one array a metric, over rounds; NaN where a round was not evaluated
    table: list[Line]  #: one row a tier
    summary: Line  #: totals and best round
    folder: Path
    files: list[Path]


def train(
    config: Config = "heterofl_digits",
    *,
    net: Any = None,
    data: Config = None,
    split: Any = None,
    method: Any = None,
    metrics: Mapping[str, Metric] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    trace: bool = False,
) -> Result:
    """Run the experiment that ``config`` describes.

    Args:
      config: a ConfigDict, a dict of blocks, or what ``load_config`` takes: a name or a file.
      net: a linen module in place of ``family.net``, an nnx module through ``flax.nnx.bridge.to_linen``. Its fields
        ``width`` or ``depth`` are set by the levels of ``family.mix``.
      data: in place of ``data.source``: arrays (x_train, y_train, x_test, y_test), a dict of them, or a ``Population``
        with the arrays of a test set: (population, (x_test, y_test)).
      split: in place of ``data.split``: a ``Partition``, a function (labels, clients, seed) -> ``Partition``, or a
        client id for each training example.
      method: in place of ``method.name``: a ``make(family, local, *, ...)``, or an ``Algorithm``.
      metrics: further scores by name: (logits [B, C], labels [B], valid [B]) -> [B]; their mean over the test set.
      callbacks: each is called with (round, scores, state) after every evaluation. The next round reuses the state's
        arrays: keep copies (``jax.device_get``).
      resume: go on from the last checkpoint of ``run.folder/run.name``, bit for bit, on the same device count.
      overwrite: delete what is there and start over.
      quiet: print nothing.
      trace: profile the second round (or the only one) and an evaluation, and print where the time went.

    With several processes (``machine.connect``) all of them call this; the first one writes and prints.

    Returns:
      A ``Result``; the folder holds config, metrics, TensorBoard events, checkpoints, plots and the final table.

    Raises:
      ValueError: before anything compiles, for a value that is out of range, or a folder that holds another run.

    >>> import tempfile
    >>> short = ("family.net=mlp", "train.rounds=2", "train.devices=1", f"run.folder={tempfile.mkdtemp()}")
    >>> train(load_config("heterofl_digits:mix=a1,quick", *short), quiet=True).summary["rounds"]
    2
    """
    machine.use_cache_once()
    config = complete(load_config(str(config)) if isinstance(config, str | Path) else config, method=method)
    folder, own = Path(config.run.folder) / config.run.name, Own(net, data, split, method)
    check_callbacks(callbacks)
    check_folder(folder, config.to_dict(), partial(completed_for, method), resume=resume, overwrite=overwrite)
    lab = prepare(config, own, metrics)
    with on_sigterm() as stop:
        return play(
            lab, folder, partial(completed_for, method), callbacks, resume=resume, overwrite=overwrite,
            quiet=quiet or not machine.is_first(), trace=trace, stop=stop,
        )  # fmt: skip


def play(
    lab: Lab, folder: Path, completed: Callable[[Arguments], Line], callbacks: Sequence[Callback] = (), *,
    resume: bool = False, overwrite: bool = False, quiet: bool = False, trace: bool = False,
    stop: threading.Event | None = None, bar: Bar | None = None, light: bool = False,
) -> Result:  # fmt: skip
    """All rounds of a lab, written to a folder.

    Args:
      completed: brings a saved config of an older version to today's keys.
      stop: once it is set, the run ends after the round in progress, with a checkpoint.
      bar: what is told of every round, in place of a progress bar.
      light: write neither checkpoints nor plots.

    Raises:
      Stopped: before the last round.
    """
    run = _begin(lab, folder, completed, resume=resume, overwrite=overwrite, quiet=quiet, light=light)
    try:
        with bar or Progress(lab.config.train.rounds, int(run.state.round), quiet) as bar:
            state = _rounds(lab, run, callbacks, bar, quiet=quiet, trace=trace, stop=stop or threading.Event())
        best = run.checkpoints.best()
    finally:
        run.checkpoints.close()
        run.metrics.close()
    return _finish(lab, state, run.metrics.lines, best, folder, quiet, light)


def check_callbacks(callbacks: Any) -> None:
    """Refuse callbacks that cannot be called, before anything runs.

    Raises:
      ValueError: with the first that is not a function.
    """
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        raise ValueError(f"callbacks is a {type(callbacks).__name__}: allowed a list of functions (callbacks)")
    for number, callback in enumerate(callbacks):
        if not callable(callback):
            raise ValueError(f"callback {number} is a {type(callback).__name__}: need a function (callbacks)")


class Run(NamedTuple):
    """What a run writes to, and where it stands."""

    folder: Path
    checkpoints: Checkpoints | Remembered
    metrics: Metrics
    state: State
    totals: ledger.Totals


def completed_for(method: Any, saved: Arguments) -> Line:
    """A config as it was saved, with the keys that did not exist then, for a method that may be the user's."""
    return complete(saved, tell=lambda text: None, method=method).to_dict()


def _begin(
    lab: Lab, folder: Path, completed: Callable[[Arguments], Line], *, resume: bool, overwrite: bool, quiet: bool,
    light: bool,
) -> Run:  # fmt: skip
    """Make the folder this run's own, and take up the last checkpoint of a run that goes on.

    Writes config, environment, partition and the data's fingerprint, and prints what is about to run.
    """
    config, fed, first = lab.config, lab.federation, machine.is_first()
    claim(folder, config.to_dict(), completed, resume=resume, overwrite=overwrite)
    about = partition.summary(fed.labels, fed.partition)
    bind(lab, folder, resume=resume)
    if first:
        write_json(folder / "environment.json", tables.environment(lab.executor.devices))
        write_json(folder / "partition.json", about)
        if fed.outfit and fed.outfit.about:
            write_json(folder / "capacity.json", fed.outfit.about)
        np.savez(folder / "partition.npz", index=fed.partition.rows, size=fed.partition.size, labels=fed.labels)
    state, totals = lab.start(), ledger.Totals()
    known = sentences(check_memory(fed.algorithm))
    of_data, of_devices = (f"data: {note}" for note in fed.notes), fed.outfit.notes if fed.outfit else ()
    for note in (*of_data, *of_devices, *(f"selection: {sentence}" for sentence in known)):
        tables.say(note, quiet)
    head = tables.headline(config, fed.named, fed.partition.size.size)
    tables.say(f"{head}\n{tables.describe(about)}{_per_level(lab)}", quiet)
    checkpoints = Remembered() if light else Checkpoints(folder, config.run.keep)
    if resume and (found := checkpoints.restore(state)):
        state, extra = lab.place(found[0]), found[1]
        lab.store.restore(int(state.round))
        totals = ledger.saved(extra["totals"])
    if resume:
        tables.say(f"{folder}: goes on after round {int(state.round)} of {config.train.rounds}", quiet)
    return Run(folder, checkpoints, Metrics(folder, int(state.round), write=first, light=light), state, totals)


def bind(lab: Lab, folder: Path, *, resume: bool) -> None:
    """Tie a run's folder to its data and split, or check that they are still the same.

    Raises:
      ValueError: they are not.
    """
    path, fed = folder / "data.json", lab.federation
    if resume and path.exists():
        check_data(folder, fed.fingerprint)
    elif machine.is_first():
        write_json(path, fed.fingerprint)
        if fed.labels_table is not None:
            write_json(folder / "labels.json", fed.labels_table)


def check_data(folder: Path, fingerprint: Line) -> None:
    """Refuse to go on with other data, or with another split, than a run's folder was made with.

    Raises:
      ValueError: with what changed.
    """
    if changed := same_fingerprint(json.loads((folder / "data.json").read_text()), fingerprint):
        what = "otherwise" if changed.startswith("run ") else "on other data"
        raise ValueError(f"{folder} was run {what}: {changed} (data.source)")


def _per_level(lab: Lab) -> str:
    """How many clients each level has, where clients keep theirs."""
    fed = lab.federation
    if fed.algorithm.drawn or len(fed.mix.names) == 1:
        return ""
    count = np.bincount(np.asarray(fed.train.level), minlength=len(fed.mix.names))
    return "; clients per level: " + ", ".join(f"{name} {n}" for name, n in zip(fed.mix.names, count))


def _rounds(
    lab: Lab, run: Run, callbacks: Sequence[Callback], bar: Bar, *, quiet: bool, trace: bool, stop: threading.Event
) -> State:
    """All rounds that are still to do, with their evaluations, metrics and checkpoints."""
    settings, total = lab.config.run, lab.config.train.rounds
    state, totals, done = run.state, run.totals, int(run.state.round)
    if done == 0 and (warning := lab.federation.algorithm.shown.warning(jax.device_get(state.server))):
        warnings.warn(warning, stacklevel=3)
    if done == 0 and not run.metrics.lines:
        run.metrics.append([{"round": 0, **_evaluated(lab, state, 0, callbacks)}])
    clock, pending = time.perf_counter(), list[Info]()
    for round in range(done, total):
        traced = trace and round == min(done + 1, total - 1)
        step = _traced_step(lab, run.folder, quiet) if traced else lab.step
        state, info = step(state, lab.population, lab.key)
        pending.append(info)
        # At most two rounds are under way, so that the bar tells the truth and the device never waits.
        jax.block_until_ready(pending[-2:][0])
        check_plan(lab, pending[-2:][0], round + 2 - len(pending[-2:]))
        last, early = round + 1 == total, stop.is_set()
        evaluates = last or (round + 1) % settings.eval_every == 0
        saves = last or (round + 1) % settings.checkpoint_every == 0 or early
        if not (evaluates or saves):
            bar.advance(round + 1)
            continue
        lines, totals = _lines(lab, tree.fetched(pending), round + 2 - len(pending), totals)
        pending = []
        if evaluates:
            lines[-1] |= _evaluated(lab, state, round + 1, callbacks)
        for line in lines:
            line["seconds"] = round_seconds(clock, len(lines))
        clock = time.perf_counter()
        run.metrics.append(lines)
        tables.warn_failures(lines)
        if saves:
            chosen_by = choosing(lines[-1], lab.federation.tiers[0].name, lab.federation.algorithm.score)
            lab.store.commit(round + 1, run.checkpoints.rounds())
            run.checkpoints.save(round + 1, whole(state), {"totals": totals._asdict()}, chosen_by)
        bar.advance(round + 1, lines[-1])
        _stop_if_lost(run.metrics.lines, run.folder)
        if early and not last:
            raise Stopped(f"{run.folder}: stopped after round {round + 1} of {total}")
    return whole(state)


def _evaluated(lab: Lab, state: State, round: int, callbacks: Sequence[Callback]) -> Line:
    """Scores of every tier after ``round``, which the callbacks see too."""
    scores = evaluate_tiers(lab, state)
    for callback in callbacks:
        callback(round, scores, state)
    return scores


def _stop_if_lost(lines: Sequence[Line], folder: Path, patience: int = 3) -> None:
    """A run whose every client fails is over.

    Raises:
      ValueError: no reply was finite in ``patience`` evaluated rounds in a row.
    """
    last = [line for line in evaluated(lines) if line["round"]][-patience:]
    if len(last) == patience and not any(line["clients"] for line in last):
        late = not any(line["failed"] for line in last) and any(line.get("late") for line in last)
        help = "need more (devices.deadline)" if late else "lower train.learning_rate, or set train.clip_norm"
        rounds, what = ", ".join(str(line["round"]) for line in last), "in time" if late else "finite"
        raise ValueError(f"no reply was {what} in rounds {rounds} of {folder}: {help}")


def _traced_step(lab: Lab, folder: Path, quiet: bool) -> rounds.Step:
    """A round that is profiled together with an evaluation after it."""

    def step(state: State, population: PyTree, key: jax.Array) -> tuple[State, PyTree]:
        program = rounds.program(lab.step, state, population, key)

        def run() -> tuple[State, PyTree]:
            after, info = lab.step(state, population, key)
            evaluate_tiers(lab, after)
            return after, info

        out = profile.profiled(run, folder / "profile")
        tables.say(profile.render(profile.breakdown(folder / "profile", program), folder / "profile"), quiet)
        return out

    return step


def choosing(line: Line, tier: str, score: Score) -> float:
    """By what the best checkpoint is chosen, more is better; a round that was not evaluated is never it.

    The validation score of ``tier``, else that of the ensemble, else the test score; negative where less is better.

    >>> from hetfl_jax.core.types import ACCURACY
    >>> line = {"accuracy": {"a": 0.9}, "validation_accuracy": {"a": 0.8}}
    >>> choosing(line, "a", ACCURACY), choosing({}, "a", ACCURACY) == NEVER
    (0.8, True)
    """
    by = next((k for k in (f"validation_{score.name}", f"ensemble_{score.name}", score.name) if k in line), None)
    value = line[by][tier] if by else None
    if value is None or not np.isfinite(value):
        return NEVER
    return -value if score.least else value


def round_seconds(clock: float, rounds: int) -> float:
    """Seconds a round since ``clock``, evaluation included."""
    return round((time.perf_counter() - clock) / rounds, 6)


def _lines(lab: Lab, infos: Sequence[Info], first: int, totals: ledger.Totals) -> tuple[list[Line], ledger.Totals]:
    """Metrics lines of a block of rounds, with the costs so far.

    Raises:
      ValueError: a selection chose clients that do not exist, or one twice whose memory has one row.
    """
    fed, lines = lab.federation, list[Line]()
    for number, info in enumerate(infos, first):
        check_plan(lab, info, number)
        totals = ledger.add(totals, ledger.spent(info, fed.costs, fed.tiers[0].bytes, lab.plain))
        line = ledger.line_of(
            info, number, totals, fed.costs, fed.mix.names, lab.executor.devices, fed.local, fed.partition.size
        )
        lines.append(line | fed.algorithm.shown.line(info, fed.groups))
    return lines, totals


def check_plan(lab: Lab, info: Info, number: int) -> None:
    """Stop at a plan that named clients that do not exist, or one twice.

    Raises:
      ValueError: with the round, and how many items were left out.
    """
    if refused := int(jax.device_get(info.refused)):
        raise ValueError(
            f"round {number}: the selection named {refused} clients outside 0..{lab.federation.partition.size.size - 1}"
            ", or twice (with memory, or without a stream for each time) (select.name)"
        )


def _finish(
    lab: Lab, state: State, lines: list[Line], best: int | None, folder: Path, quiet: bool, light: bool
) -> Result:
    """Final table, plots, and what is printed."""
    fed = lab.federation
    levels = sizes(fed.mix)
    table = tables.table(fed.tiers, levels, lines, best)
    summary = tables.totals(lines, best, fed.algorithm.shown.sentence(lines[-1]) if len(lines) > 1 else "")
    files = [folder / name for name in ("table.txt", "table.json", "metrics.jsonl", "config.json", "partition.json")]
    text = tables.render(table, summary)
    if machine.is_first():
        write_json(folder / "table.json", {"levels": table, **summary})
        (folder / "table.txt").write_text(text)
        if not light:
            held = partition.class_counts(fed.labels, fed.partition)
            files += plots.plot(folder, lines, held, levels, title=lab.config.run.name)
    files += [] if light else draw_figures(lab, state, lines, folder)
    tables.say(text + tables.list_files(folder, files), quiet)
    return Result(jax.device_get(_models(lab, state)["params"]), tables.as_arrays(lines), table, summary, folder, files)


def _models(lab: Lab, state: State) -> PyTree:
    """The global model's variables; with a leading axis where there are several."""
    algorithm = lab.federation.algorithm
    if algorithm.choice is None:
        return algorithm.model(state.server, 0)
    return jax.vmap(lambda member: algorithm.model(state.server, 0, member))(np.arange(algorithm.choice.models))

"""A run's folder: config, metrics, checkpoints. A kill loses nothing in it, and nothing is overwritten by accident."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from hetfl_jax.core import machine
from hetfl_jax.core.types import Arguments, Line, PyTree, State
from hetfl_jax.results.scores import evaluated, score_of

#: settings that a resumed run may set anew; other devices and chunks move results by rounding
MAY_CHANGE = (
    "train.rounds",
    "train.devices",
    "train.clients_per_chunk",
    "train.points_at_once",
    "run.keep",
    "run.folder",
    "run.name",
)


def write_json(path: Path, values: PyTree) -> None:
    """Write a JSON file whole or not at all; numbers that are not finite become null.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "table.json"
    >>> write_json(path, {"loss": float("nan")})
    >>> json.loads(path.read_text())
    {'loss': None}
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(plain(values), indent=2) + "\n")
    os.replace(partial, path)


def plain(value: PyTree) -> PyTree:
    """JSON types only: arrays to lists, NaN and infinities to null, keys to text.

    >>> import numpy as np
    >>> plain({"a": np.array([1.0, np.inf]), 2: np.int64(3)})
    {'a': [1.0, None], '2': 3}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Complete = Callable[[Arguments], Arguments]


def check_folder(folder: Path, config: Arguments, complete: Complete, *, resume: bool, overwrite: bool) -> None:
    """What ``claim`` checks, without touching anything: before data is loaded.

    Raises:
      ValueError: as ``claim``.

    >>> check_folder(Path("nowhere"), {}, dict, resume=True, overwrite=False)
    Traceback (most recent call last):
    ValueError: nowhere holds no run to go on with: leave --resume away, or see run.folder and run.name
    """
    saved = folder / "config.json"
    if resume and not saved.exists():
        raise ValueError(f"{folder} holds no run to go on with: leave --resume away, or see run.folder and run.name")
    if saved.exists() and not resume and not overwrite:
        raise ValueError(
            f"{folder} already holds a run: --resume goes on, --overwrite starts over, or choose another run.name"
        )
    if saved.exists() and not overwrite:
        same_config(plain(complete(json.loads(saved.read_text()))), plain(config), folder)


def claim(folder: Path, config: Arguments, complete: Complete, *, resume: bool, overwrite: bool) -> None:
    """Make the folder this run's own: check it, empty it if asked to, and write ``config.json``.

    Several processes check together, then the first one writes.

    Args:
      config: by block, what is saved.
      complete: brings a saved config of an older version to today's keys.
      resume: go on with the run that is there.
      overwrite: delete what is there.

    Raises:
      ValueError: it holds a run and neither ``resume`` nor ``overwrite`` was given, its config is another, or there is
        none to resume.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "run"
    >>> claim(folder, {"train": {"rounds": 3}}, dict, resume=False, overwrite=False)
    >>> json.loads((folder / "config.json").read_text())
    {'train': {'rounds': 3}}
    >>> claim(folder, {"train": {"rounds": 3}}, dict, resume=True, overwrite=False)
    """
    check_folder(folder, config, complete, resume=resume, overwrite=overwrite)
    saved = folder / "config.json"
    machine.wait_for_all("checked")
    if machine.is_first():
        if saved.exists() and overwrite:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(saved, config)
    machine.wait_for_all("claimed")


def same_config(old: PyTree, new: PyTree, folder: Path, may_change: Sequence[str] = MAY_CHANGE) -> None:
    """Refuse to go on with another config.

    Args:
      old, new: nested dicts, of the run that is there and of what was asked for.
      may_change: dotted keys that may differ.

    Raises:
      ValueError: with the first key that changed.

    >>> same_config({"run": {"seed": 0}}, {"run": {"seed": 1}}, Path("runs/a"), may_change=["train.rounds"])
    Traceback (most recent call last):
    ValueError: cannot resume runs/a: run.seed was 0, now 1 (only train.rounds may change)
    """
    before, after = leaves(old), leaves(new)
    for name in sorted(set(before) | set(after)):
        if name not in may_change and before.get(name) != after.get(name):
            raise ValueError(
                f"cannot resume {folder}: {name} was {before.get(name)!r}, now {after.get(name)!r} "
                f"(only {', '.join(may_change)} may change)"
            )


def leaves(values: PyTree, joint: str = ".", prefix: str = "") -> Line:
    """Values of nested dicts by their names, joined by ``joint``.

    >>> leaves({"train": {"rounds": 3}, "seed": 0})
    {'train.rounds': 3, 'seed': 0}
    >>> leaves({"accuracy": {"a": 0.5}}, "/")
    {'accuracy/a': 0.5}
    """
    if not isinstance(values, dict):
        return {prefix.removesuffix(joint): values}
    return {k: v for name, value in values.items() for k, v in leaves(value, joint, f"{prefix}{name}{joint}").items()}


class Metrics:
    """``metrics.jsonl``, one line a round, and the same as TensorBoard events.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> metrics = Metrics(folder, done=0)
    >>> metrics.append([{"round": 1, "train_loss": 2.3, "accuracy": {"a": 0.5}}])
    >>> metrics.close()
    >>> read_metrics(folder)
    [{'round': 1, 'train_loss': 2.3, 'accuracy': {'a': 0.5}}]
    """

    def __init__(self, folder: Path, done: int, write: bool = True, light: bool = False):
        """Keep the lines of the first ``done`` rounds; later ones belong to rounds that will be run again.

        Args:
          folder: the run's, which must exist.
          done: rounds of the checkpoint that the run goes on from, 0 at its start.
          write: a process that does not write keeps its lines to itself.
          light: only evaluated rounds become events.
        """
        from tensorboardX import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self.lines = [line for line in read_metrics(folder) if line["round"] <= done]
        machine.wait_for_all("metrics")
        self._write, self._light = write, light
        if not write:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(partial, self.path)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def append(self, lines: Iterable[Arguments]) -> None:
        """Add whole lines, one a round with its ``round``, and make sure that they are on disk.

        Every number of a line is a TensorBoard scalar; nested names are joined by a slash, e.g. ``accuracy/a``.
        """
        new = [plain(line) for line in lines]
        self.lines.extend(new)
        if not self._write:
            return
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in new))
            file.flush()
            os.fsync(file.fileno())
        for line in evaluated(new) if self._light else new:
            for name, value in leaves(line).items():
                if isinstance(value, int | float) and name != "round":
                    self._events.add_scalar(name.replace(".", "/"), value, line["round"])
        self._events.flush()

    def close(self) -> None:
        """Close the event file, with an entry of the HParams plugin: what the config says, and the scores by tag."""
        if not self._write:
            return
        for summary in _settings(self.path.parent, self.lines):
            self._events.file_writer.add_summary(summary)
        self._events.close()


def _settings(folder: Path, lines: Sequence[Line]) -> tuple[Any, ...]:
    """What TensorBoard's HParams plugin reads of a finished run; nothing without a config or a score."""
    from tensorboardX.summary import hparams

    saved, points = folder / "config.json", evaluated(lines)
    if not (saved.exists() and points):
        return ()
    values = leaves(json.loads(saved.read_text()))
    told = {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in values.items()
    }
    score = score_of(lines)
    return tuple(hparams(told, {f"{score}/{level}": value for level, value in points[-1][score].items()}))


def read_metrics(folder: Path) -> list[Line]:
    r"""The lines of ``metrics.jsonl``, none where there is no file; a last line that a kill cut short is passed over.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2, "acc')
    >>> read_metrics(folder)
    [{'round': 1}]
    """
    path = folder / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Checkpoints:
    """The last few checkpoints and the best one, through orbax; each appears whole or not at all."""

    def __init__(self, folder: Path, keep: int):
        """Open (or create) ``folder/checkpoints``; the last ``keep`` checkpoints stay, and the best one."""
        self._folder = folder
        policies, score = ocp.checkpoint_managers, lambda metrics: metrics["accuracy"]  # so called on disk
        options = ocp.CheckpointManagerOptions(
            best_fn=score,  # without it orbax calls the latest the best, and writes no metrics
            best_mode="max",
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), policies.BestN(get_metric_fn=score, reverse=False, n=1)]
            ),
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)

    def save(self, round: int, state: State, extra: Arguments, goodness: float) -> None:
        """Save a state after ``round`` rounds with JSON values beside it; returns when it is on disk.

        Args:
          round: larger than that of any checkpoint there is.
          extra: what is not part of the state, e.g. the ledger's sums.
          goodness: the largest one is the best checkpoint's; of a score where less is better, its negative.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(plain(extra)))
        self._manager.save(round, args=args, metrics={"accuracy": float(goodness)})
        self._manager.wait_until_finished()

    def restore(self, like: State, round: int | None = None) -> tuple[State, Line] | None:
        """The newest readable checkpoint (or that of ``round``); damaged ones are passed over with a warning.

        Once an older one is read they move to ``damaged/``, for orbax keeps and saves nothing below the latest round.

        Args:
          like: a state of the same shapes; fields that an older checkpoint lacks keep its values.

        Returns:
          The state and what was saved beside it; ``None`` where there is no checkpoint.

        Raises:
          ValueError: there are checkpoints, but none can be read into ``like``.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        steps = [round] if round is not None else sorted(self._manager.all_steps(), reverse=True)
        reason = ""
        for step in steps:
            try:
                path = (self._folder / "checkpoints" / str(step) / "state").absolute()
                wanted = _on_disk(abstract, ocp.StandardCheckpointHandler().metadata(path).tree)
                args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), extra=ocp.args.JsonRestore())
                found = self._manager.restore(step, args=args)
            except Exception as error:
                reason = str(error)
                if round is None:
                    warnings.warn(f"checkpoint {step} cannot be read and is passed over: {error}", stacklevel=2)
                continue
            self._set_aside([later for later in steps if later > step])
            return _like(like, found["state"]), found["extra"]
        if steps:
            rounds = ", ".join(map(str, sorted(steps)))
            raise ValueError(
                f"no checkpoint of rounds {rounds} can be read: {reason} (a run whose clients keep memory goes on with "
                "the number of devices that it was started with, train.devices)"
            )
        return None

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Move checkpoints of these rounds to ``damaged/``, where nothing reads them."""
        if not steps:
            return
        machine.wait_for_all("restored")
        if machine.is_first():
            aside = self._folder / "damaged"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for step in steps:
                (self._folder / "checkpoints" / str(step)).rename(aside / str(step))
        machine.wait_for_all("set aside")
        self._manager.reload()

    def rounds(self) -> list[int]:
        """Rounds of the checkpoints there are."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The round of the best checkpoint, of the last where none has a score."""
        best = self._manager.best_step()
        return best if best is not None else max(self.rounds(), default=None)

    def close(self) -> None:
        """Release the manager."""
        self._manager.close()


class Remembered:
    """In place of ``Checkpoints`` where none are kept: only the best round is known.

    >>> rounds = Remembered()
    >>> for number, goodness in ((1, 0.5), (2, 0.7), (3, 0.7)):
    ...     rounds.save(number, None, {}, goodness)
    >>> rounds.best(), rounds.rounds(), rounds.restore(None)
    (3, [], None)
    """

    def __init__(self) -> None:
        """No round yet."""
        self._goodness: dict[int, float] = {}

    def save(self, round: int, state: State, extra: Arguments, goodness: float) -> None:
        """Remember how good a round is."""
        self._goodness[round] = goodness

    def restore(self, like: State, round: int | None = None) -> None:
        """There is nothing."""

    def rounds(self) -> list[int]:
        """None can be restored."""
        return []

    def best(self) -> int | None:
        """The best round, of equal ones the last, as ``Checkpoints`` has it."""
        return max(self._goodness, key=lambda round: (self._goodness[round], round), default=None)

    def close(self) -> None:
        """Nothing is open."""


def _on_disk(like: PyTree, saved: PyTree) -> PyTree:
    """``like`` without the fields that a checkpoint lacks, named tuples as dicts: older ones have fewer fields."""
    if not (isinstance(like, tuple) and hasattr(like, "_fields") and isinstance(saved, Mapping)):
        return like
    return {name: _on_disk(getattr(like, name), saved[name]) for name in like._fields if name in saved}


def _like(like: PyTree, found: PyTree) -> PyTree:
    """What was found in the form of ``like``; fields that were not on disk keep their start values."""
    if not (isinstance(like, tuple) and hasattr(like, "_fields") and isinstance(found, Mapping)):
        return found
    fields = {name: _like(getattr(like, name), found.get(name, getattr(like, name))) for name in like._fields}
    return type(like)(**fields)

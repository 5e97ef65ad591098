"""What can be done with a finished run: evaluate a checkpoint, draw the plots again, write one sub-model."""

import json
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from hetfl_jax.core.types import PyTree, State
from hetfl_jax.data import partition
from hetfl_jax.data.partition import Partition
from hetfl_jax.engine.rounds import compiled
from hetfl_jax.models import windows
from hetfl_jax.results import report
from hetfl_jax.results.folder import Checkpoints, read_metrics
from hetfl_jax.run import train as run
from hetfl_jax.run.evaluate import with_statistics
from hetfl_jax.run.federation import level_fields, net_fields, parse_mix


def _opened(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run (no config.json)")
    return ml_collections.ConfigDict(json.loads(path.read_text())).lock()


def _restored(folder: Path, round: int | None) -> tuple[run.Lab, State, int]:
    lab = run.prepare(_opened(folder))
    checkpoints = Checkpoints(folder, keep=1_000_000)
    chosen = checkpoints.best() if round is None else round
    if chosen is None or chosen not in checkpoints.rounds():
        allowed = ", ".join(map(str, checkpoints.rounds())) or "none"
        raise ValueError(f"{folder} has no checkpoint of round {chosen}; it has {allowed}")
    found = checkpoints.restore(lab.start(), chosen)
    checkpoints.close()
    assert found is not None
    return lab, lab.place(found[0]), chosen


def evaluate_run(folder: Path, round: int | None = None) -> str:
    """Scores of every level at a checkpoint (default: the best), as text."""
    lab, state, chosen = _restored(folder, round)
    scores = run.evaluate_levels(lab, state)
    lines = [f"{folder}, round {chosen}"]
    for letter in lab.federation.mix.letters:
        parts = [f"{name.replace('_', ' ')} {value[letter]:.4f}" for name, value in scores.items() if letter in value]
        lines.append(f"level {letter}: " + ", ".join(parts))
    if "client_accuracy" in scores:
        lines.append(report.over_clients(scores["client_accuracy"]))
    return "\n".join(lines)


def plot_run(folder: Path) -> list[Path]:
    """Draw a run's plots again from its metrics, its partition and, of clusters, its last checkpoint."""
    config = _opened(folder)
    with np.load(folder / "partition.npz") as file:
        part = Partition(file["index"], file["size"])
        labels = file["labels"]
    lines = read_metrics(folder)
    if not any("accuracy" in line for line in lines):
        raise ValueError(f"{folder} ({config.run.name}) has no evaluated round yet")
    files = report.plot(folder, lines, partition.class_counts(labels, part))
    saved = Checkpoints(folder, keep=1_000_000)
    last = max(saved.rounds(), default=None)
    saved.close()
    if last is not None and any("clusters" in line for line in lines):
        lab, state, _ = _restored(folder, last)
        files += run.plot_clusters(config, lab, state, lines, folder)
    return files


def export_level(
    folder: Path, level: str, round: int | None = None, output: Path | None = None, cluster: int | None = None
) -> Path:
    """Write one level's variables as a .npz of plain arrays named ``params/layer/leaf``; returns the file.

    Statistics that the net collects before evaluation are collected and written too, and ``net`` holds the net's
    fields and the normalisation as JSON: the file evaluates without the training code, see ``load_exported``.

    Raises:
      ValueError: a level or a cluster that the run lacks, none of several clusters, or no such checkpoint.
    """
    config = _opened(folder)
    mix = parse_mix(config.family.mix)
    if level not in mix.letters:
        raise ValueError(f"level {level!r} is not one of {', '.join(mix.letters)} of {folder} (--level)")
    lab, state, chosen = _restored(folder, round)
    fed = lab.federation
    number, count = mix.letters.index(level), run.models_in_use(fed.algorithm, state.server)
    if cluster not in (range(count) if count > 1 else (None, 0)):
        allowed = f"name one of 0..{count - 1}" if count > 1 else "it is none of several"
        raise ValueError(f"cluster {cluster}: {folder} holds {count} model(s) at round {chosen}, {allowed} (--cluster)")

    def model(server: PyTree, data: PyTree) -> PyTree:
        variables = fed.algorithm.model(server, number, cluster or 0)
        batch = config.run.statistics_batch_size
        return with_statistics(fed.algorithm, lab.executor, variables, number, data, batch)

    variables = compiled(model, lab.executor)(state.server, lab.place(fed.train_batches))
    arrays = {"/".join(path): np.asarray(leaf) for path, leaf in windows.flat(variables).items()}
    net = net_fields(config, mix, fed.train.classes.shape[1]) | level_fields(mix, number)
    path = output or folder / (f"level_{level}.npz" if cluster is None else f"level_{level}_cluster_{cluster}.npz")
    arrays["net"] = np.asarray(json.dumps({**net, "mean": config.data.mean, "std": config.data.std}))
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def load_exported(path: Path) -> tuple[dict[str, Any], PyTree]:
    """An exported sub-model: the fields of its net and its variables, with NumPy alone."""
    with np.load(path, allow_pickle=False) as file:
        net = json.loads(str(file["net"]))
        variables: dict[str, Any] = {}
        for name in file.files:
            *parents, leaf = name.split("/")
            if parents:
                place = variables
                for parent in parents:
                    place = place.setdefault(parent, {})
                place[leaf] = file[name]
    return net, variables

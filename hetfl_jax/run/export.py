"""What can be done with a finished run: evaluate a checkpoint, draw the plots again, write one sub-model."""

import json
from pathlib import Path

import numpy as np

from hetfl_jax.core.types import Config, Line, PyTree, State
from hetfl_jax.data import partition
from hetfl_jax.data.partition import Partition
from hetfl_jax.engine.execute import compiled
from hetfl_jax.models import windows
from hetfl_jax.results import fairness, plots, tables
from hetfl_jax.results.folder import Checkpoints, read_metrics
from hetfl_jax.results.scores import evaluated
from hetfl_jax.run.config import complete
from hetfl_jax.run.evaluate import with_statistics
from hetfl_jax.run.lab import Lab, draw_figures, evaluate_tiers, models_in_use, prepare
from hetfl_jax.run.mix import level_fields, parse_mix, sizes
from hetfl_jax.run.nets import net_fields
from hetfl_jax.run.train import bind


def open_config(folder: Path) -> Config:
    """The config of a run, complete also where an older version wrote it.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: its config cannot be read.

    >>> open_config(Path("nowhere"))
    Traceback (most recent call last):
    FileNotFoundError: nowhere holds no run (no config.json)
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run (no config.json)")
    try:
        saved = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged, it is no JSON: {error} (FOLDER)") from None
    return complete(saved, tell=lambda text: None)


def _restored(folder: Path, round: int | None) -> tuple[Lab, State, int]:
    """A run's lab, its state at a checkpoint, and the round of it; by default the best one.

    Raises:
      ValueError: there is no such checkpoint, with those there are; or the data is not that of the run.
    """
    lab = prepare(open_config(folder))
    bind(lab, folder, resume=True)
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
    """Scores of every tier at a checkpoint, as text: a line a tier, then the distribution over clients.

    Args:
      folder: of the run; its data must still be there.
      round: of the checkpoint; by default the best.
    """
    lab, state, chosen = _restored(folder, round)
    scores = evaluate_tiers(lab, state)
    lines = [f"{folder}, round {chosen}"]
    for tier in lab.federation.tiers:
        named = {k: v[tier.name] for k, v in scores.items() if isinstance(v, dict) and tier.name in v}
        parts = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in named.items() if value is not None]
        lines.append(f"level {tier.name}: " + ", ".join(parts))
    score = lab.federation.algorithm.score.name
    if spread := scores.get(f"client_{score}"):
        lines += [tables.over_clients(spread, score), *filter(None, [fairness.sentence(spread)])]
    return "\n".join(lines)


def plot_run(folder: Path) -> list[Path]:
    """Draw a run's plots again from its metrics and its partition; what its method draws, from its last checkpoint.

    Returns:
      The files, all in ``folder``.

    Raises:
      ValueError: no round was evaluated yet.
    """
    config = open_config(folder)
    with np.load(folder / "partition.npz") as file:
        part = Partition(file["index"], file["size"])
        labels = file["labels"]
    lines = read_metrics(folder)
    if not evaluated(lines):
        raise ValueError(f"{folder} ({config.run.name}) has no evaluated round yet")
    levels, held = sizes(parse_mix(config.family.mix)), partition.class_counts(labels, part)
    files = plots.plot(folder, lines, held, levels, title=config.run.name)
    saved = Checkpoints(folder, keep=1_000_000)
    last = max(saved.rounds(), default=None)
    saved.close()
    if last is not None:
        lab, state, _ = _restored(folder, last)
        files += draw_figures(lab, state, lines, folder)
    return files


def export_level(
    folder: Path, tier: str, round: int | None = None, output: Path | None = None, model: int | None = None
) -> Path:
    """Write one tier's variables as a .npz of plain arrays named ``params/layer/leaf``; returns the file.

    Statistics that the net collects before evaluation are collected and written too, and ``net`` holds the net's
    fields and the normalisation as JSON: the file evaluates without the training code, see ``load_exported``. A tier
    that is a mean of several nets has them along a leading axis, and their number as ``models``.

    Args:
      tier: its name in the final table, e.g. ``c`` or ``x0.5``.
      round: of the checkpoint; by default the best.
      output: the file; by default ``folder/level_<tier>.npz``.
      model: which of several models, from 0, of methods that have some.

    Raises:
      ValueError: a tier or a model that the run lacks, none of several models, or no such checkpoint.
    """
    config = open_config(folder)
    mix = parse_mix(config.family.mix)
    lab, state, chosen = _restored(folder, round)
    fed = lab.federation
    names = [each.name for each in fed.tiers]
    if tier not in names:
        raise ValueError(f"tier {tier!r} is not one of {', '.join(names)} of {folder} (--tier)")
    number, count = names.index(tier), models_in_use(lab, state)
    if model not in (range(count) if count > 1 else (None, 0)):
        allowed = f"name one of 0..{count - 1}" if count > 1 else "it is none of several"
        raise ValueError(f"model {model}: {folder} holds {count} model(s) at round {chosen}, {allowed} (--model)")

    def with_its_statistics(server: PyTree, data: PyTree) -> PyTree:
        variables = fed.algorithm.model(server, number, model or 0)
        batch = config.run.statistics_batch_size
        return with_statistics(fed.algorithm, lab.executor, variables, number, data, batch)

    variables = compiled(with_its_statistics, lab.executor)(lab.ordered(state.server), lab.place(fed.train_batches))
    arrays = {"/".join(path): np.asarray(leaf) for path, leaf in windows.flat(variables).items()}
    level, models = (number if len(names) == len(mix.names) else 0), fed.tiers[number].models
    net = net_fields(config, mix, fed.train.classes.shape[1]) | level_fields(mix, level, config.family.norm)
    net |= {"models": models} if models else {}
    path = output or folder / (f"level_{tier}.npz" if model is None else f"level_{tier}_model_{model}.npz")
    arrays["net"] = np.asarray(json.dumps({**net, "mean": config.data.mean, "std": config.data.std}))
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def load_exported(path: Path) -> tuple[Line, PyTree]:
    """An exported sub-model: the fields of its net and its variables as nested dicts, with NumPy alone.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "level_a.npz"
    >>> np.savez(path, **{"params/dense/bias": np.zeros(2), "net": np.asarray('{"net": "mlp"}')})
    >>> load_exported(path)
    ({'net': 'mlp'}, {'params': {'dense': {'bias': array([0., 0.])}}})
    """
    with np.load(path, allow_pickle=False) as file:
        net = json.loads(str(file["net"]))
        variables: Line = {}
        for name in file.files:
            *parents, leaf = name.split("/")
            if parents:
                place = variables
                for parent in parents:
                    place = place.setdefault(parent, {})
                place[leaf] = file[name]
    return net, variables

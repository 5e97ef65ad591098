"""A run from config to result, readable from top to bottom like a lab protocol."""

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hetfl_jax.clusters import report as clusters
from hetfl_jax.core import machine
from hetfl_jax.core.types import Algorithm, PyTree, State
from hetfl_jax.data import partition
from hetfl_jax.engine import executors, profile, rounds
from hetfl_jax.engine.stores import Store
from hetfl_jax.parts.bank import alike
from hetfl_jax.results import report
from hetfl_jax.results.folder import Checkpoints, Metrics, check_folder, claim, write_json
from hetfl_jax.results.progress import Progress
from hetfl_jax.run.client_memory import store_for
from hetfl_jax.run.evaluate import Scores, evaluator, judged, over_clients
from hetfl_jax.run.federation import Federation, build, parse_buckets, parse_mix

NEVER = -1.0  #: an accuracy below all others
TRAINING_PASSES = 3  #: forward, gradient of activations, gradient of weights: multiply-adds of a step over a forward


class Result(NamedTuple):
    """What ``train`` returns."""

    params: PyTree  #: the global model's parameters after the last round, of several models with a leading axis
    metrics: dict[str, np.ndarray]  #: one array a metric, over rounds; NaN where a round was not evaluated
    table: list[dict[str, Any]]  #: one row a level
    summary: dict[str, Any]  #: totals and best round
    folder: Path
    files: list[Path]


class Totals(NamedTuple):
    """Costs so far."""

    down_bytes: int
    up_bytes: int
    client_macs: int
    full_size_bytes: int  #: one way, had every client taken the full model


class Lab(NamedTuple):
    """A federation with everything that runs it."""

    federation: Federation
    executor: executors.Executor
    step: rounds.Step
    evaluate: Callable[[int, PyTree], Scores]
    place: Callable[[PyTree], PyTree]
    start: Callable[[], State]
    population: PyTree
    key: jax.Array
    store: Store


def prepare(config: Any) -> Lab:
    """Build a config's federation and its compiled functions; nothing compiles yet.

    Raises:
      ValueError: a value that is out of range.
    """
    _check_run(config)
    if config.run.eval_masked and parse_mix(config.family.mix).depths:
        raise ValueError("eval_masked with levels of depth: need False, each depth has its own exits (run.eval_masked)")
    machine.warn_of_idle_cores()
    fed = build(config)
    train = config.train
    devices = train.devices or jax.device_count()
    executor = executors.executor(
        train.executor, train.clients_per_chunk, devices, parse_buckets(train.buckets, fed.mix)
    )
    store = store_for(config, fed, executor)
    key = executor.place(jax.random.key(config.run.seed))
    population, batches, test = executor.place((fed.train, fed.train_batches, fed.test))
    score = evaluator(
        fed.algorithm,
        executor,
        test_batches=fed.test_batches,
        validation_batches=fed.validation_batches,
        statistics_batch=config.run.statistics_batch_size,
        eval_batch=config.run.eval_batch_size,
        masked=config.run.eval_masked,
        owners=executor.place(np.flatnonzero(fed.partition.test_size)) if fed.partition.test_size is not None else None,
    )
    return Lab(
        fed,
        executor,
        rounds.make_round(fed.algorithm, executor, store),
        lambda level, server: score(level, server, population, batches, test),
        executor.place,
        lambda: executor.place(rounds.start(fed.algorithm, store, fed.partition.size.size, key)),
        population,
        key,
        store,
    )


def _check_run(config: Any) -> None:
    for name in ("rounds",):
        if config.train[name] < 1:
            raise ValueError(f"{name} {config.train[name]}, allowed >= 1 (train.{name})")
    for name in ("eval_every", "checkpoint_every", "keep", "eval_batch_size", "statistics_batch_size"):
        if config.run[name] < 1:
            raise ValueError(f"{name} {config.run[name]}, allowed >= 1 (run.{name})")


def train(
    config: Any, *, resume: bool = False, overwrite: bool = False, quiet: bool = False, trace: bool = False
) -> Result:
    """Run the experiment that ``config`` describes.

    Args:
      config: a ConfigDict with the blocks data, family, method, train, run; see ``configs/``.
      resume: go on from the last checkpoint of ``run.folder/run.name``, bit for bit, on the same device count.
      overwrite: delete what is there and start over.
      quiet: print nothing.
      trace: profile the second round (or the only one) and an evaluation, and print where the time went.

    With several processes (``machine.connect``) all of them call this; the first one writes and prints.

    Returns:
      A ``Result``; the folder holds config, metrics, TensorBoard events, checkpoints, plots and the final table.

    Raises:
      ValueError: before anything compiles, for a value that is out of range, or a folder that holds another run.
    """
    folder = Path(config.run.folder) / config.run.name
    check_folder(folder, config.to_dict(), resume=resume, overwrite=overwrite)
    lab = prepare(config)
    fed = lab.federation
    first = machine.is_first()
    quiet = quiet or not first
    claim(folder, config.to_dict(), resume=resume, overwrite=overwrite)
    about = partition.summary(fed.labels, fed.partition)
    if first:
        write_json(folder / "environment.json", report.environment(lab.executor.devices))
        write_json(folder / "partition.json", about)
        np.savez(folder / "partition.npz", index=fed.partition.index, size=fed.partition.size, labels=fed.labels)
    state, totals = lab.start(), Totals(0, 0, 0, 0)
    report.say(f"{report.headline(config, fed.partition.size.size)}\n{report.describe(about)}", quiet)

    checkpoints = Checkpoints(folder, config.run.keep)
    if resume and (found := checkpoints.restore(state)):
        state, extra = lab.place(found[0]), found[1]
        lab.store.restore(int(state.round))
        totals = Totals(**extra["totals"])
    done = int(state.round)
    if resume:
        report.say(f"{folder}: goes on after round {done} of {config.train.rounds}", quiet)
    metrics = Metrics(folder, done, write=first)
    if done == 0 and alike(jax.device_get(state.server)):
        warnings.warn("all models start equal: every client will prefer the first (method.args)", stacklevel=2)
    if done == 0 and not metrics.lines:
        metrics.append([{"round": 0, **evaluate_levels(lab, state)}])
    block = partial(_lines, fed=fed, devices=lab.executor.devices)
    clock = time.perf_counter()
    pending: list[PyTree] = []
    with Progress(config.train.rounds, done, quiet) as progress:
        for round in range(done, config.train.rounds):
            traced = trace and round == min(done + 1, config.train.rounds - 1)
            step = _traced_step(lab, folder, quiet) if traced else lab.step
            state, info = step(state, lab.population, lab.key)
            pending.append(info)
            # At most two rounds are under way, so that the bar tells the truth and the device never waits.
            jax.block_until_ready(pending[-2:][0])
            last = round + 1 == config.train.rounds
            if not (last or _due(round + 1, config.run.eval_every) or _due(round + 1, config.run.checkpoint_every)):
                progress.advance(round + 1)
                continue
            lines, totals = block(jax.device_get(pending), round + 2 - len(pending), totals)
            pending = []
            if last or _due(round + 1, config.run.eval_every):
                lines[-1] |= evaluate_levels(lab, state)
            for line in lines:
                line["seconds"] = round_seconds(clock, len(lines))
            clock = time.perf_counter()
            metrics.append(lines)
            report.warn_failures(lines)
            if last or _due(round + 1, config.run.checkpoint_every):
                chosen_by = choosing(lines[-1], fed.mix.letters[0])
                lab.store.commit(round + 1, checkpoints.rounds())
                checkpoints.save(round + 1, state, {"totals": totals._asdict()}, chosen_by)
            progress.advance(round + 1, lines[-1])
    best = checkpoints.best()
    checkpoints.close()
    metrics.close()
    return _finish(config, lab, state, metrics.lines, best, folder, quiet)


def _traced_step(lab: Lab, folder: Path, quiet: bool) -> rounds.Step:
    """A round that is profiled together with an evaluation after it."""

    def step(state: State, population: PyTree, key: jax.Array) -> tuple[State, PyTree]:
        program = rounds.program(lab.step, state, population, key)

        def run() -> tuple[State, PyTree]:
            after, info = lab.step(state, population, key)
            evaluate_levels(lab, after)
            return after, info

        out = profile.profiled(run, folder / "profile")
        report.say(profile.render(profile.breakdown(folder / "profile", program), folder / "profile"), quiet)
        return out

    return step


_SCORES = ("accuracy", "loss", "validation_accuracy", "local_accuracy", "ensemble_accuracy", "perplexity")


def choosing(line: dict[str, Any], level: str) -> float:
    """By what the best checkpoint is chosen; a round that was not evaluated is never it."""
    by = next((k for k in ("validation_accuracy", "ensemble_accuracy", "accuracy") if k in line), None)
    score = line[by][level] if by else NEVER
    return score if np.isfinite(score) else NEVER


def round_seconds(clock: float, rounds: int) -> float:
    """Seconds a round since ``clock``, evaluation included."""
    return round((time.perf_counter() - clock) / rounds, 6)


def _due(round: int, every: int) -> bool:
    return round % every == 0


def evaluate_levels(lab: Lab, state: State) -> dict[str, dict[str, float]]:
    """Scores of every level, and the distribution of the global model's over clients, if they have test data.

    Further models that the method wants to see evaluated (FedDyn's ``sel``) are scored by accuracy.
    """
    letters, server = lab.federation.mix.letters, state.server
    found = {letter: jax.device_get(lab.evaluate(level, server)) for level, letter in enumerate(letters)}
    scores = {name: {letter: float(getattr(s, name)) for letter, s in found.items()} for name in _SCORES}
    if lab.federation.algorithm.models > 1 and lab.federation.test_groups is not None:
        groups = lab.federation.test_groups
        scores["test_recovery"] = {letter: clusters.matched(s.placed, groups) for letter, s in found.items()}
    clients = lab.federation.partition.size.size
    kept = {name: rows for name, rows in dict(state.memory).items() if name == "last"}  # the others are not looked at
    memory = jax.tree.map(lambda rows: rows[:clients], kept)
    for name, other in lab.federation.algorithm.others(server, memory).items():
        other = lab.place(other)
        of_level = (float(lab.evaluate(level, other).accuracy) for level in range(len(letters)))
        scores[f"{name}_accuracy"] = dict(zip(letters, of_level))
    known = {name: values for name, values in scores.items() if not np.isnan(list(values.values())).all()}
    spread = found[letters[0]].client_accuracy
    return {**known, "client_accuracy": over_clients(spread)} if spread.size else known


def _imbalance(info: Any, macs: np.ndarray, devices: int) -> float:
    """Multiply-adds of the busiest device over the mean of all."""
    work = np.bincount(info["device"], macs[info["level"]] * np.asarray(info["seen"], np.float64), devices)
    return round(float(work.max() / max(work.mean(), 1.0)), 4)


def _lines(
    infos: list[Any], first: int, totals: Totals, fed: Federation, devices: int
) -> tuple[list[dict[str, Any]], Totals]:
    """Metrics lines of a block of rounds, with the costs so far."""
    lines = []
    for number, info in enumerate(infos, first):
        items = np.asarray(info["items"]).round().astype(np.int64)
        one_way = int(items @ fed.costs.bytes)
        macs = int(np.asarray(info["examples"], np.float64) @ fed.costs.macs) * TRAINING_PASSES
        macs += int(np.asarray(info["judged"], np.float64) @ fed.costs.macs) if "judged" in info else 0
        failed = [int(client) for client in info["failed_ids"] if client >= 0]
        totals = Totals(
            totals.down_bytes + one_way * fed.algorithm.broadcast,
            totals.up_bytes + one_way * fed.algorithm.messages,
            totals.client_macs + macs,
            totals.full_size_bytes + _of_one_start(info, items) * int(fed.costs.bytes[0]),
        )
        line: dict[str, Any] = {"round": number}
        line |= {name: float(info[name]) for name in ("train_loss", "train_accuracy")}
        line |= {"clients": int(info["clients"]), "failed": len(failed), **totals._asdict()}
        if devices > 1:
            line["imbalance"] = _imbalance(info, fed.costs.macs, devices)
        line["items"] = dict(zip(fed.mix.letters, items.tolist()))
        if failed:
            line["failed_ids"] = failed
        if "correction" in info:
            line["correction"] = float(info["correction"])
        if "cluster" in info:
            line |= clusters.of_round(info, fed.algorithm.models, fed.groups)
        lines.append(line)
    return lines, totals


def _of_one_start(info: Any, items: np.ndarray) -> int:
    """Items of the round, those of several starts side by side counted once."""
    return int((np.asarray(info["cluster_ids"]) >= 0).sum()) if "cluster_ids" in info else int(items.sum())


def _finish(
    config: Any, lab: Lab, state: State, lines: list[dict[str, Any]], best: int | None, folder: Path, quiet: bool
) -> Result:
    """Final table, plots, and what is printed."""
    fed = lab.federation
    table = report.table(fed.mix, fed.costs, lines, best)
    summary = report.totals(lines, best)
    files = [folder / name for name in ("table.txt", "table.json", "metrics.jsonl", "config.json", "partition.json")]
    if machine.is_first():
        write_json(folder / "table.json", {"levels": table, **summary})
        text = report.render(table, summary)
        (folder / "table.txt").write_text(text)
        files += report.plot(folder, lines, partition.class_counts(fed.labels, fed.partition))
    if fed.algorithm.models > 1:
        files += plot_clusters(config, lab, state, lines, folder)
    if machine.is_first():
        report.say(text + report.list_files(folder, files), quiet)
    return Result(
        jax.device_get(_models(fed.algorithm, state.server)["params"]),
        report.as_arrays(lines),
        table,
        summary,
        folder,
        files,
    )


def models_in_use(algorithm: Algorithm, server: PyTree) -> int:
    """How many models there are; CFL's bank has rows that are not in use yet."""
    route: Any = getattr(server, "route", None)
    return int(route.count) if hasattr(route, "parent") else algorithm.models


def plot_clusters(config: Any, lab: Lab, state: State, lines: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Clusters over rounds, who would lose what in which, and CFL's tree."""
    fed, server = lab.federation, state.server
    batch = config.run.eval_batch_size
    ask = rounds.compiled(
        lambda server, data: judged(fed.algorithm, lab.executor, server, 0, data, batch), lab.executor
    )
    seen = jax.device_get(ask(server, lab.population))
    if not machine.is_first():
        return []
    route = jax.device_get(server.route)
    splits = hasattr(route, "parent")
    count = models_in_use(fed.algorithm, server)
    files = clusters.plot(folder, lines)
    files += clusters.plot_losses(folder, (seen.loss / seen.examples)[:, :count], fed.groups)
    if splits:
        files += clusters.plot_tree(folder, route.parent[:count], route.born[:count], route.table, int(route.rounds))
    return files


def _models(algorithm: Algorithm, server: PyTree) -> PyTree:
    """The global model; with a leading axis where there are several."""
    if algorithm.models == 1:
        return algorithm.model(server, 0)
    return jax.vmap(lambda member: algorithm.model(server, 0, member))(np.arange(algorithm.models))


def over_seeds(config: Any, seeds: list[int], **options: Any) -> tuple[list[Result], list[dict[str, Any]]]:
    """One run a seed under ``run.name/seed<k>``, and the mean and deviation of each level's last and best accuracy."""
    results = []
    for seed in seeds:
        one = config.copy_and_resolve_references()
        with one.unlocked():
            one.run.seed, one.run.name = seed, f"{config.run.name}/seed{seed}"
        results.append(train(one, **options))
    return results, report.seed_table([r.table for r in results])

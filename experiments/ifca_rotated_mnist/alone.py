"""The tables' local rows: every client trains a model of its own on its own images, and nothing is shared.

    python -m experiments.ifca_rotated_mnist.alone --config=configs/ifca_rotated_mnist.py:m=1200

Models start anew for every client and make 100 full-batch steps, as the paper's script does by default (change them by
``--config.train.epochs``). Each is tested on all test images that look as its client's do; the figure is the mean over
models.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hetfl_jax.core import machine
from hetfl_jax.core.shards import shards
from hetfl_jax.core.types import Array, ClientContext, Level, Population, Shard, Tally
from hetfl_jax.data.population import population
from hetfl_jax.engine import execute
from hetfl_jax.engine.executors import executor
from hetfl_jax.models import families
from hetfl_jax.parts import drift, objective
from hetfl_jax.parts.compose import Sent
from hetfl_jax.parts.local import tally, train
from hetfl_jax.results.folder import write_json
from hetfl_jax.run.cli import config_of
from hetfl_jax.run.federation import Federation, build

STEPS = 100


def accuracies(fed: Federation, seed: int) -> np.ndarray:
    """[N] accuracy of every client's own model on the test images of its kind."""
    fam, run = fed.family, executor("bucketed", devices=jax.device_count())
    test = _by_kind(fed)

    def one(key: Array, test: Population, level: Level, shard: Shard) -> tuple[tuple[()], Tally]:
        view = families.view(fam, families.init(fam, key), 0)
        start = ClientContext(key, jnp.int32(0), 0, shard, (), Sent(view.variables), {})
        own, *_ = train(fed.local, view, fam.prepare, objective.cross_entropy(), drift.none(), start)
        seen = shards(test, shard.view)._replace(x=test.x, y=test.y, rows=test.rows, views=test.views)
        logits = lambda batch: view.apply(own, batch.x)[0][-1]  # noqa: E731
        return (), tally(logits, optax.softmax_cross_entropy_with_integer_labels, 1_000, seen)

    ids, key = jnp.arange(fed.train.size.shape[0]), jax.random.key(seed)
    test, everyone, key = run.place((test, fed.train, key))
    ask = execute.compiled(lambda test, pop, key: execute.query(run, one, test, pop, ids, key).report, run)
    seen = jax.device_get(ask(test, everyone, key))
    return seen.correct / seen.examples


def _by_kind(fed: Federation) -> Population:
    """The test set as one client for each way to see it."""
    kinds, batches = np.unique(np.asarray(fed.test_groups)), fed.test_batches
    rows = np.unique(np.asarray(fed.test.rows)[: int(np.asarray(fed.test.size)[:batches].sum())])
    return population(
        fed.train.x, fed.train.y, np.tile(rows, kinds.size), np.full(kinds.size, rows.size),
        classes=fed.train.classes.shape[1], view=kinds, views=fed.train.views,
    )  # fmt: skip


def main() -> None:
    """Train everyone alone, print and keep the mean."""
    given = [a for a in sys.argv[1:] if a.startswith("--config=")]
    rest = [a for a in sys.argv[1:] if not a.startswith("--config=")]
    machine.use_all_cores()
    machine.use_cache()
    config = config_of([*given, f"--config.train.epochs={STEPS}", *rest])
    began = time.perf_counter()
    found = accuracies(build(config), config.run.seed)
    row: dict[str, Any] = {
        "clients": config.data.clients, "steps": config.train.epochs, "seed": config.run.seed,
        "accuracy": float(found.mean()), "deviation over clients": float(found.std()),
        "seconds": time.perf_counter() - began, "cores": machine.cores(),
    }  # fmt: skip
    print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    write_json(results / f"alone_m{config.data.clients}.json", row)


if __name__ == "__main__":
    main()

"""Simulated time to a target with stragglers, in rounds and without: ``python -m experiments.devices.fedbuff``.

FedAvg with an MLP on digits, 100 clients with Dirichlet(0.5) labels, log-normal speeds (spread 1.5), FedPAQ's waits.
Every way has the same learning rate and takes up to 10 replies a step, but for the rounds of 50.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.federated import cell, markdown
from hetfl_jax.core import machine
from hetfl_jax.results.folder import write_json
from hetfl_jax.run.config import load_config
from hetfl_jax.run.lab import evaluate_tiers, prepare
from hetfl_jax.run.programs import Shared

TASK = (
    "family.net=mlp", "family.hidden=(32,)", "family.norm=none", "family.scaler=False", "family.mix=a1",
    "method.name=fedavg", "capacity.name=none", "capacity.max_seconds=0.0", "data.split=dirichlet_per_class",
    "data.concentration=0.5", "data.least=2", "train.epochs=5", "train.learning_rate=0.05", "train.momentum=0.0",
    "train.weight_decay=0.0", "train.milestones=()", "train.devices=1", "run.eval_batch_size=100",
    "devices.args.macs_per_s=1e6", "devices.args.speed_spread=1.5", "devices.args.bandwidth_spread=0.5",
)  # fmt: skip
#: clients that begin, and what ends a step
WAYS = {
    "rounds of 10": ("method.args.cohort=10",),
    "rounds of 50": ("method.args.cohort=50",),
    "first 10 of 13": ("method.args.cohort=13", "devices.first=10"),
    "FedBuff, 10 at work": ("method.args.cohort=10", "devices.concurrency=10"),
    "FedBuff, 50 at work": ("method.args.cohort=10", "devices.concurrency=50"),
}
EVERY = 5  #: steps between evaluations


def run(way: str, seed: int, steps: int, shared: Shared) -> dict[str, Any]:
    """Train for ``steps`` steps; the test accuracy and the simulated seconds of every ``EVERY``-th."""
    changes = (*TASK, *WAYS[way], f"run.seed={seed}", f"train.rounds={steps}")
    lab = prepare(load_config("heterofl_devices", *changes, tell=lambda text: None), shared=shared)
    state, curve, late, stale = lab.start(), [], 0, list[float]()
    for step in range(1, steps + 1):
        state, info = lab.step(state, lab.population, lab.key)
        numbers = jax.device_get(info.numbers)
        late += int(numbers["late"])
        stale.append(float(numbers.get("staleness", 0)))
        if step % EVERY == 0:
            accuracy = evaluate_tiers(lab, state)["accuracy"]["a"]
            curve.append((step, round(float(numbers["simulated_seconds"]), 3), round(accuracy, 6)))
    return {"way": way, "seed": seed, "late": late, "staleness": float(np.mean(stale)), "curve": curve}


def reached(row: dict[str, Any], target: float) -> tuple[int, float] | None:
    """(step, simulated seconds) of the first evaluation with at least the accuracy ``target``."""
    return next(((step, seconds) for step, seconds, accuracy in row["curve"] if accuracy >= target), None)


def table(rows: list[dict[str, Any]], target: float) -> str:
    """Means and deviations over seeds; a way that missed the target in a seed has no time."""
    out, base = list[list[str]](), 0.0
    for way in WAYS:
        own = [r for r in rows if r["way"] == way]
        times = [found for r in own if (found := reached(r, target))]
        last = cell([100 * r["curve"][-1][2] for r in own])
        if len(times) < len(own):
            out.append([way, f"{len(times)} of {len(own)} reached it", "", "", "", last])
            continue
        hours, steps = [seconds / 3600 for _, seconds in times], [step for step, _ in times]
        base = base or float(np.mean(hours))
        stale = cell([r["staleness"] for r in own], 2)
        out.append([way, cell(hours, 4), f"{np.mean(hours) / base:.2f}", cell(steps, 0), stale, last])
    return markdown(
        ["way", "simulated hours", "of rounds of 10", "steps", "mean staleness", "accuracy at the end"], out
    )


def main() -> None:
    """Run all ways and seeds, write ``results/fedbuff.json``, and print the table; or print it again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--target", type=float, default=0.85)
    parser.add_argument("--table", action="store_true", help="of the stored results")
    args = parser.parse_args()
    path = Path(__file__).parent / "results" / "fedbuff.json"
    if not args.table:
        machine.use_cache()
        rows, shared = list[dict[str, Any]](), Shared()
        command = f"python -m experiments.devices.fedbuff --seeds {args.seeds} --steps {args.steps}"
        for way in WAYS:
            rows += [run(way, seed, args.steps, shared) for seed in range(args.seeds)]
            write_json(path, {"command": command, "rows": rows})
            print(way, [row["curve"][-1] for row in rows[-args.seeds :]], flush=True)
    print(table(json.loads(path.read_text())["rows"], args.target))


if __name__ == "__main__":
    main()

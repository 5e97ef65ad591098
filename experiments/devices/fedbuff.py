"""Simulated time to a target with stragglers, in rounds and without: ``python -m experiments.devices.fedbuff``.

FedAvg with an MLP on digits, 100 clients with Dirichlet(0.5) labels, log-normal speeds (spread 1.5), FedPAQ's waits.
Every way has the same learning rate and takes up to 10 replies a step, but for the rounds of 50.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.federated import cell, markdown
from hetfl_jax.core import machine
from hetfl_jax.results.folder import write_json
from hetfl_jax.run.config import load_config
from hetfl_jax.run.lab import evaluate_tiers, prepare

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


def run(way: str, seed: int, target: float, most: int) -> dict[str, Any]:
    """Train until the test accuracy reaches ``target``, or for ``most`` steps."""
    lab = prepare(load_config("heterofl_devices", *TASK, *WAYS[way], f"run.seed={seed}", f"train.rounds={most}"))
    state, curve, reached, late, stale = lab.start(), [], None, 0, list[float]()
    for step in range(1, most + 1):
        state, info = lab.step(state, lab.population, lab.key)
        numbers = jax.device_get(info.numbers)
        late += int(numbers["late"])
        stale.append(float(numbers.get("staleness", 0)))
        if step % EVERY == 0:
            accuracy = evaluate_tiers(lab, state)["accuracy"]["a"]
            curve.append((step, float(numbers["simulated_seconds"]), accuracy))
            if accuracy >= target:
                reached = curve[-1]
                break
    seconds = None if reached is None else reached[1]
    steps = None if reached is None else reached[0]
    return {
        "way": way, "seed": seed, "seconds": seconds, "steps": steps, "late": late,
        "staleness": float(np.mean(stale)), "curve": curve,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Means and deviations over seeds; a way that missed the target in a seed has no time."""
    out = []
    first = np.mean([r["seconds"] for r in rows if r["way"] == next(iter(WAYS))])
    for way in WAYS:
        own = [r for r in rows if r["way"] == way]
        missed = sum(r["seconds"] is None for r in own)
        if missed:
            out.append([way, f"missed in {missed} of {len(own)}", "", "", ""])
            continue
        hours = [r["seconds"] / 3600 for r in own]
        ratio = float(np.mean(hours)) * 3600 / first
        steps, stale = [r["steps"] for r in own], [r["staleness"] for r in own]
        out.append([way, cell(hours, 3), f"{ratio:.2f}", cell(steps, 0), cell(stale, 2)])
    return markdown(["way", "simulated hours", "of rounds of 10", "steps", "mean staleness"], out)


def main() -> None:
    """Run all ways and seeds; write ``results/fedbuff.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--most", type=int, default=400)
    args = parser.parse_args()
    machine.use_cache()
    rows = [run(way, seed, args.target, args.most) for way in WAYS for seed in range(args.seeds)]
    command = f"python -m experiments.devices.fedbuff --seeds {args.seeds} --target {args.target} --most {args.most}"
    write_json(Path(__file__).parent / "results" / "fedbuff.json", {"command": command, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()

"""Folders of sweeps for tests: of invented numbers, or around runs that were really trained."""

import csv
import itertools
import json
import math

import numpy as np

from hetfl_jax.results.reading import SWEEP, TABLE, long, read_metrics

LEVELS = {"a": 1.0, "b": 0.5, "c": 0.25, "d": 0.125, "e": 0.0625}


def write_sweep(folder, over, points, seconds=12.5):
    """``sweep.json`` and ``sweep.csv`` around folders of runs; ``points`` are dicts of sweep.json."""
    told = {
        "command": "hetfl sweep --config=heterofl_digits " + " ".join(f"--over {k}={v}" for k, v in over.items()),
        "version": "0.1.0", "config": {}, "over": over, "points": points, "programs": 1, "seconds": seconds,
        "environment": {"backend": "cpu", "device": "cpu", "devices": 2, "jax": "0.10.2"},
    }  # fmt: skip
    (folder / SWEEP).write_text(json.dumps(told))
    with (folder / TABLE).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["point", *over, "round", "level", "metric", "value"])
        for point in points:
            head = [point["name"], *point["values"].values()]
            table.writerows([*head, *row] for row in long(read_metrics(folder / point["name"])))
    return folder


def grid(over):
    """Points of a product, by name."""
    for values in itertools.product(*over.values()):
        named = dict(zip(over, values))
        yield ",".join(f"{k}={v}" for k, v in named.items()), named


def invented(folder, over, rounds=20, every=1, levels=tuple(LEVELS), classes=10, clients=20, lists=False):
    """A sweep of numbers that look like training; the first point of an ``over`` of five or more has failed."""
    points = list(grid(over))
    rng = np.random.default_rng(0)
    told = []
    for number, (name, values) in enumerate(points):
        failed = number == 0 and len(points) > 4
        below = folder / name
        below.mkdir(parents=True)
        write_run(below, values, rng, 1 if failed else rounds, every, levels, classes, clients, lists)
        error = "no reply was finite in rounds 1, 2, 3" if failed else None
        told.append({"name": name, "values": values, "status": "failed" if failed else "done", "error": error,
                     "seconds": 1.5 + 0.01 * number})  # fmt: skip
        if failed:
            (below / "table.json").unlink()
    return write_sweep(folder, over, told)


def write_run(folder, values, rng, rounds, every, levels, classes, clients, lists):
    """A run's folder of invented numbers."""
    config = {}
    for key, value in values.items():
        block, _, name = key.partition(".")
        config.setdefault(block, {})[name] = value
    (folder / "config.json").write_text(json.dumps(config | {"run": config.get("run", {}) | {"name": folder.name}}))
    rate = float(values.get("train.learning_rate", 0.1))
    noise, lines = rng.normal(0, 0.02), []
    for round in range(rounds + 1):
        line = {"round": round}
        if round:
            line |= {"train_loss": 2 * math.exp(-round / 9), "clients": 10, "failed": 0, "seconds": 0.1}
            line |= {"down_bytes": 155_200 * round, "up_bytes": 155_200 * round, "client_macs": 227_655_072 * round}
            line |= {"full_size_bytes": 573_000 * round, "items": {level: 2 for level in levels}}
        if lists and round:
            line |= {
                "clusters": [4, 6 - round % 3, round % 3],
                "recovery": 0.5 + 0.5 * round / rounds,
                "simulated_time": 1.25 * round,
            }
        if round % every == 0:
            top = 0.95 - 0.6 * abs(math.log10(rate) + 1.3) / 3 + noise
            rise = [min(1, max(0, float(np.float32((top - 0.05 * k) * (1 - 0.9 * math.exp(-round / 5))
                    + rng.normal(0, 0.01))))) for k in range(len(levels))]  # fmt: skip
            each = np.clip(np.sort(rng.normal(rise[0], 0.08, 51)), 0, 1)
            line |= {"accuracy": dict(zip(levels, rise)), "loss": dict(zip(levels, [1 - v for v in rise]))}
            line |= {"validation_accuracy": dict(zip(levels, rise)), "local_accuracy": dict(zip(levels, rise))}
            line["client_accuracy"] = {
                "mean": rise[0], "deviation": float(each.std()), "worst_tenth": float(each[:5].mean()),
                "best_tenth": float(each[-5:].mean()), "quantiles": each.round(4).tolist(),
            }  # fmt: skip
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    final = [line for line in lines if "accuracy" in line][-1]
    rows = [
        {
            "level": level, "width": LEVELS.get(level, 1.0), "depth": None, "start": 0.1,
            "last": final["accuracy"][level], "best": final["accuracy"][level],
            "parameters": 28_650 >> 2 * k, "macs": 212_288 >> 2 * k, "bytes": 114_600 >> 2 * k,
        }
        for k, level in enumerate(levels)
    ]  # fmt: skip
    summary = {"rounds": rounds, "score": "accuracy", "best_round": final["round"], "best_by": "validation"}
    (folder / "table.json").write_text(json.dumps({"levels": rows, **summary}))
    labels = rng.integers(0, classes, 40 * clients)
    seed = int(values.get("run.seed", 0))
    size = np.random.default_rng(seed).multinomial(labels.size, np.full(clients, 1 / clients))
    np.savez(folder / "partition.npz", index=np.argsort(labels, kind="stable"), size=size, labels=labels)
    about = {
        "clients": clients,
        "examples": labels.size,
        "size": {"min": int(size.min()), "median": 40.0, "max": int(size.max())},
    }
    (folder / "partition.json").write_text(json.dumps(about))
    (folder / "environment.json").write_text(
        json.dumps({"hetfl_jax": "0.1.0", "device": "cpu", "backend": "cpu", "devices": 2})
    )

"""The same FedAvg in this library and in others: seconds a round, and how far the models are apart at the end.

taskset -c 0 python -m experiments.throughput.peers --peer fedjax=/path/to/its/python

Task: 8 x 8 digits, 50 clients of 28 images each, all in every round, MLP 64-200-10, 5 epochs of 2 batches of 14 in a
fixed order, SGD of rate 0.1, plain averaging. Starts and order are the same, so that the models must agree.
Every peer runs in a process of its own, in the Python that is named (where it is installed), and they take turns.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.throughput import common, peer_rounds
from experiments.throughput.peer_rounds import CLIENTS, EACH, HIDDEN, PEERS, Params
from hetfl_jax.data import sources


def task(seed: int = 0) -> Params:
    """Data and starts as plain arrays, so that peers need not agree on more than NumPy."""
    data, rng = sources.load("digits"), np.random.default_rng(seed)
    rows = rng.permutation(len(data.y_train))[: CLIENTS * EACH]
    x = data.x_train[rows].reshape(CLIENTS, EACH, -1).astype(np.float32) / 255
    return {
        "x": x,
        "y": data.y_train[rows].reshape(CLIENTS, EACH).astype(np.int32),
        "x_test": data.x_test.reshape(len(data.y_test), -1).astype(np.float32) / 255,
        "y_test": data.y_test.astype(np.int32),
        "w1": rng.uniform(-1, 1, (x.shape[-1], HIDDEN)).astype(np.float32) / x.shape[-1] ** 0.5,
        "b1": np.zeros(HIDDEN, np.float32),
        "w2": rng.uniform(-1, 1, (HIDDEN, 10)).astype(np.float32) / HIDDEN**0.5,
        "b2": np.zeros(10, np.float32),
    }


def turn(name: str, python: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Run a peer once, in its own Python, which finds nothing of this repository but ``peer_rounds``."""
    call = f"import peer_rounds as p; p.work({name!r}, p.Path('task.npz'), p.Path('{name}.npz'), {rounds})"
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])] if name == "hetfl_jax" else [str(folder)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([python, "-c", call], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr[-800:]}")
    return json.loads((folder / f"{name}.json").read_text())


def accuracy(given: Params, params: Params) -> float:
    """On the test images."""
    hidden = np.maximum(given["x_test"] @ params["w1"] + params["b1"], 0)
    return float(((hidden @ params["w2"] + params["b2"]).argmax(1) == given["y_test"]).mean())


def row_of(name: str, told: list[dict[str, Any]], model: Params, ours: Params, given: Params) -> common.Row:
    """A peer's row: medians over all rounds but the first of each process."""
    later = [pair for each in told for pair in each["seconds"][1:]]
    return {
        "peer": name,
        "versions": ", ".join(f"{package} {number}" for package, number in told[0]["versions"].items()),
        "ms a round": 1e3 * float(np.median([pair[0] for pair in later])),
        "processor ms": 1e3 * float(np.median([pair[1] for pair in later])),
        "first round, s": float(np.median([each["seconds"][0][0] for each in told])),
        "apart from hetfl_jax": max(float(np.abs(model[leaf] - ours[leaf]).max()) for leaf in ours),
        "accuracy": accuracy(given, model),
    }


def main() -> None:
    parser = common.flags(__doc__)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=21, help="of a process; the first one is told apart")
    given = parser.parse_args()
    pythons = {"hetfl_jax": sys.executable, **dict(peer.split("=", 1) for peer in given.peer)}
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        shutil.copy(peer_rounds.__file__, folder)
        arrays = task()
        np.savez(folder / "task.npz", **arrays)
        for _ in range(given.repeats):
            for name, python in pythons.items():
                told[name].append(turn(name, python, folder, given.rounds))
        models = {name: dict(np.load(folder / f"{name}.npz")) for name in pythons}
    rows = [row_of(name, told[name], models[name], models["hetfl_jax"], arrays) for name in pythons]
    common.keep(
        given.name or "peers", "The same FedAvg in several simulators", rows, {},
        lambda axes: common.bars(axes, [r["peer"] for r in rows], [r["ms a round"] for r in rows], "ms a round"),
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""FedDyn's sums of 10,000 clients in sparse files: ``python -m experiments.client_memory.rounds``.

FedAvg's CNN (1,663,370 parameters), 100 clients a round, 20 rounds, a commit every 5; dense it would be 66.5 GB.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.data import preprocess
from hetfl_jax.data.population import population
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import Packing, file_store
from hetfl_jax.methods import feddyn
from hetfl_jax.models import build, families, windows
from hetfl_jax.parts.local import local
from hetfl_jax.results.folder import write_json


def run(folder: Path, clients: int, cohort: int, rounds: int) -> dict[str, float]:
    """Train on random digits of 10 images a client and say what it took."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (6000, 28, 28, 1)).astype(np.uint8), rng.integers(0, 10, 6000).astype(np.int32)
    people = population(x, y, rng.integers(0, 6000, 10 * clients), np.full(clients, 10), classes=10)
    example = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.uint8)
    family = families.family(build("cnn"), [{}], example, preprocess.images((0.13,), (0.31,)))
    settings = local(learning_rate=0.05, batch_size=10)
    algorithm = feddyn.make(family, settings, cohort=cohort, clients_per_level=(clients,), feddyn_alpha=0.1)
    one = jax.eval_shape(algorithm.init, jax.random.key(0))[1]
    store = file_store(folder, Packing(np.zeros(clients, int), windows.memory_extents(family, one)))
    key = jax.random.key(0)
    state, step = start(algorithm, store, clients, key), make_round(algorithm, executor("bucketed"), store)
    seconds, commits, seen = [], [], set()
    for round in range(rounds):
        began = time.perf_counter()
        state, info = step(state, people, key)
        jax.block_until_ready(state.server)
        seconds.append(time.perf_counter() - began)
        assert int(info.numbers["failed"]) == 0
        if (round + 1) % 5 == 0:
            began = time.perf_counter()
            store.commit(round + 1, [round - 4])
            commits.append(time.perf_counter() - began)
    m = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(state.server.slot))])
    total = np.zeros(m.size)
    written = sorted({int(c) for c in np.flatnonzero(np.load(folder / f"index_{rounds}.npz")["index"] >= 0)})
    for client in written:
        row = store.gather((), np.array([client]))
        total += np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(row)])
        seen.add(client)
    used = sum(path.stat().st_blocks * 512 for path in folder.glob("*"))
    return {
        "clients": clients,
        "rounds": rounds,
        "clients with a row": len(seen),
        "dense GB": 4 * m.size * clients / 1e9,
        "disk GB": used / 1e9,
        "apparent GB": sum(path.stat().st_size for path in folder.glob("*")) / 1e9,
        "peak memory GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "seconds a round": float(np.median(seconds[1:])),
        "seconds a commit": float(np.median(commits)),
        "sum of rows against N m": float(np.abs(total / clients - m).max() / np.abs(m).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        found = run(Path(folder), given.clients, given.cohort, given.rounds)
    write_json(Path(__file__).parent / "results.json", found)
    for name, value in found.items():
        print(f"{name:26s}{value:,.6g}")


if __name__ == "__main__":
    main()

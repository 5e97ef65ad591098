"""IFCA from the official starts and partition on reduced Rotated MNIST, beside what the official code reached.

    python -m experiments.ifca_rotated_mnist.peer ifca_rotmnist_240x200.npz
    taskset -c 0 python -m experiments.ifca_rotated_mnist.peer ifca_rotmnist_240x200.npz --rounds 10

The file holds starts, image numbers of every client and the official curves: 240 clients x 200 images, the first 12,000
training images under four rotations, 10 full-batch steps of rate 0.1, MLP 784-200-10.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.throughput import common
from hetfl_jax.clusters.report import matched
from hetfl_jax.core import machine
from hetfl_jax.core.types import State
from hetfl_jax.data import preprocess
from hetfl_jax.data.population import population
from hetfl_jax.data.sources import load
from hetfl_jax.data.views import rotations
from hetfl_jax.engine.execute import compiled
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import ifca
from hetfl_jax.models import MLP, families
from hetfl_jax.models.costs import costs
from hetfl_jax.parts.local import local
from hetfl_jax.results.folder import write_json
from hetfl_jax.run.evaluate import tallies

Row = dict[str, Any]
RATE, STEPS = 0.1, 10
TIMES = ("seconds", "CPU seconds", "matmul GFLOP/s", "of the roof")


def follow(path: Path, rounds: int, seed: int = 0) -> list[Row]:
    """Rows of our run beside the official one, the first before training; ``seed`` 1 is a start that gets stuck."""
    with np.load(path, allow_pickle=False) as file:
        z = {name: file[name] for name in file.files}
    index = z[f"train_client_index_s{seed}"].astype(np.int64)
    clients, n = index.shape
    source = load("npz:mnist.npz")
    turns = rotations(28, range(4), classes=10)
    first, tests = len(source.y_train), len(source.y_test)
    x, y = np.concatenate([source.x_train, source.x_test]), np.concatenate([source.y_train, source.y_test])
    group = np.arange(clients) // (clients // 4)
    train = population(x, y, index.ravel(), np.full(clients, n), classes=10, view=group, views=turns)
    test_group = np.arange(4 * tests // n) // (tests // n)
    rows = np.tile(np.arange(first, first + tests), 4)
    test = population(train.x, train.y, rows, np.full(test_group.size, n), classes=10, view=test_group, views=turns)
    example = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.uint8)
    fam = families.family(MLP(), [{"width": 1.0}], example, preprocess.images([0.0], [1.0]))
    training = local(learning_rate=RATE, batch_size=n, epochs=STEPS, full_batch=True)
    algorithm = ifca.make(fam, training, cohort=clients, clusters=4)
    run = executor("bucketed", devices=jax.device_count())
    w1, b1, w2, b2 = (jnp.asarray(z[f"init_s{seed}_{name}"]) for name in ("W1", "b1", "W2", "b2"))
    start, _ = algorithm.init(jax.random.key(0))
    params = {"dense_0": {"kernel": w1, "bias": b1}, "head": {"kernel": w2, "bias": b2}}
    start = start._replace(members=start.members._replace(variables={"params": params}))
    key = jax.random.key(0)
    state, train, test, key = run.place((State(start, (), jnp.int32(0)), train, test, key))
    step = make_round(algorithm, run, device_store())
    ask = compiled(lambda server, data: tallies(algorithm, run, server, 0, data, n), run)
    product, product_flops = common.matmul()
    product().block_until_ready()
    forward = 2 * 4 * int(costs(fam).macs[0]) * (clients * n + 4 * tests)  # every model on all that is placed
    work = forward + common.training_flops(fam, 0) * clients * n * STEPS

    out = [_row(-1, jax.device_get(ask(state.server, test)), test_group, z, seed)]
    for number in range(rounds):
        began, used = time.perf_counter(), _cpu()
        state, info = step(state, train, key)
        seen = jax.device_get(ask(state.server, test))
        row = _row(number, seen, test_group, z, seed)
        row |= {"seconds": time.perf_counter() - began, "CPU seconds": _cpu() - used}
        began = time.perf_counter()
        product().block_until_ready()
        roof = product_flops / (time.perf_counter() - began)
        row |= {"matmul GFLOP/s": roof / 1e9, "of the roof": work / row["seconds"] / roof}
        ids, cluster = np.asarray(info.arrays["member_ids"]), np.asarray(info.arrays["member"])
        row["train recovery before"] = matched(cluster, group[ids])
        out.append(row)
    return out


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _row(number: int, seen: Any, groups: np.ndarray, z: dict[str, np.ndarray], seed: int) -> Row:
    mean = seen.loss / seen.examples
    chosen = mean.argmin(1)
    hits = np.take_along_axis(seen.correct, chosen[:, None], 1).sum()
    row = {
        "round": number,
        "accuracy": float(hits / seen.examples[:, 0].sum()),
        "loss": float(mean.min(1).mean()),
        "recovery": matched(chosen, groups),
        "counts": np.bincount(chosen, minlength=4).tolist(),
    }
    if seed == 0:
        at = number + 1
        row |= {"official accuracy": float(z["torch_test_acc"][at]), "official loss": float(z["torch_test_loss"][at])}
        row["official counts"] = z["torch_test_counts"][at].tolist()
    elif number >= 0:
        recovery, accuracy, loss = z["stuck_s1_rec_acc_loss_counts"][number, :3]
        row |= {
            "official accuracy": float(accuracy),
            "official loss": float(loss),
            "official recovery": float(recovery),
        }
    return row


def main() -> None:
    """Print and keep the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the reference file")
    parser.add_argument("--rounds", type=int, default=32, choices=range(1, 33), metavar="1..32")
    parser.add_argument("--seed", type=int, default=0, choices=(0, 1))
    given = parser.parse_args()
    if not given.file.is_file():
        parser.error(f"{given.file}: no such file")
    machine.use_all_cores()
    machine.use_cache()
    rows = follow(given.file, given.rounds, given.seed)
    table = Table(title=f"IFCA from the official starts, seed {given.seed}")
    shown = "round,accuracy,official accuracy,loss,official loss,recovery,counts,CPU seconds,of the roof"
    columns = shown.split(",")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns))
    Console(width=140).print(table)
    timed = rows[2:] or rows[1:]  # the first round compiles
    median = {name: float(np.median([row[name] for row in timed])) for name in TIMES}
    print(
        "  ".join(f"{name} {value:.3g}" for name, value in median.items()),
        "(medians after the first round)",
    )
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    write_json(results / f"peer_s{given.seed}.json", {"cores": machine.cores(), "medians": median, "rows": rows})


if __name__ == "__main__":
    main()

"""The same FedAvg in this library and in others: what runs in each one's own Python, which has NumPy and that library.

``peers`` starts these. Each imports its own library inside, since the others are not installed beside it.
"""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

CLIENTS, EACH, BATCH, EPOCHS, RATE, HIDDEN = 50, 28, 14, 5, 0.1, 200
Params = dict[str, np.ndarray]
#: (wall and processor seconds) of every round, the model at the end, packages
Outcome = tuple[list[tuple[float, float]], Params, list[str]]


def start_of(given: Params) -> Params:
    """The starts among the arrays of a task."""
    return {name: given[name] for name in ("w1", "b1", "w2", "b2")}


def now() -> tuple[float, float]:
    """Wall and processor seconds."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    """The same since ``began``."""
    wall, cpu = now()
    return wall - began[0], cpu - began[1]


def run_hetfl_jax(given: Params, rounds: int) -> Outcome:
    import jax

    import hetfl_jax as hf
    from hetfl_jax.data import preprocess
    from hetfl_jax.methods import fedavg
    from hetfl_jax.models import MLP

    x, y = given["x"].reshape(CLIENTS * EACH, -1), given["y"].ravel()
    population = hf.population(x, y, np.arange(len(y)), np.full(CLIENTS, EACH), classes=10)
    family = hf.family(MLP(hidden=(HIDDEN,)), [{}], population.x[:1], preprocess.features)
    local = hf.local(learning_rate=RATE, batch_size=BATCH, epochs=EPOCHS, shuffle=False)
    algorithm, store, key = fedavg.make(family, local, cohort=CLIENTS), hf.device_store(), jax.random.key(0)
    state, executor = hf.start(algorithm, store, CLIENTS, key), hf.executor("bucketed")
    own = {
        "dense_0": {"kernel": given["w1"], "bias": given["b1"]},
        "head": {"kernel": given["w2"], "bias": given["b2"]},
    }
    own = {"params": jax.tree.map(jax.numpy.asarray, own)}
    state, step = state._replace(server=state.server._replace(variables=own)), hf.make_round(algorithm, executor, store)
    spent = []
    for _ in range(rounds):
        began = now()
        state, _info = jax.block_until_ready(step(state, population, key))
        spent.append(since(began))
    found = jax.device_get(state.server.variables["params"])
    dense, head = found["dense_0"], found["head"]
    names = {"w1": dense["kernel"], "b1": dense["bias"], "w2": head["kernel"], "b2": head["bias"]}
    return spent, names, ["hetfl_jax", "jax"]


def gradient_of() -> Any:
    """``(params, x, y) -> gradients`` of the mean cross-entropy, in plain JAX, for peers that bring no net."""
    import jax
    import jax.numpy as jnp

    def loss(params: Any, x: Any, y: Any) -> Any:
        logits = jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    return jax.grad(loss)


def run_fedjax(given: Params, rounds: int) -> Outcome:
    import jax

    if not hasattr(jax, "tree_map"):  # fedjax 0.0.17 calls it; jax dropped the name
        jax.tree_map = jax.tree.map
    import fedjax
    from fedjax.algorithms import fed_avg

    gradient = gradient_of()
    hparams = fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH, num_epochs=EPOCHS, skip_shuffle=True)
    algorithm = fed_avg.federated_averaging(
        lambda params, batch, rng: gradient(params, batch["x"], batch["y"]), fedjax.optimizers.sgd(RATE),
        fedjax.optimizers.sgd(1.0), hparams,
    )  # fmt: skip
    key, spent = jax.random.PRNGKey(0), []
    clients = [
        (i, fedjax.ClientDataset({"x": given["x"][i], "y": given["y"][i]}), jax.random.fold_in(key, i))
        for i in range(CLIENTS)
    ]
    state = algorithm.init({name: jax.numpy.asarray(v) for name, v in start_of(given).items()})
    for _ in range(rounds):
        began = now()
        state, _diagnostics = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)
        spent.append(since(began))
    return spent, jax.device_get(state.params), ["fedjax", "jax"]


PEERS = {"hetfl_jax": run_hetfl_jax, "fedjax": run_fedjax}


def work(name: str, given: Path, out: Path, rounds: int) -> None:
    """One peer, in its own process: its model to ``out``, the rest beside it."""
    spent, params, packages = PEERS[name](dict(np.load(given)), rounds)
    np.savez(out, **params)
    told = {"seconds": spent, "versions": {package: version(package) for package in packages}}
    out.with_suffix(".json").write_text(json.dumps(told))

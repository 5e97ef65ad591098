"""FedPAQ's figures: training loss over simulated time, for levels s, local steps tau and participants r.

    python -m experiments.communication.fedpaq --problem logistic
    python -m experiments.communication.fedpaq --problem net

``logistic``: MNIST's 0 against 8, 50 nodes of 200 examples, 785 parameters, one scale for the whole change,
communication to computation 100 to 1. ``net``: CIFAR-10, 10,000 examples, 3072-30-10 with 92,500 parameters, one scale
a tensor, 1000 to 1. 100 iterations in batches of 10; every curve has the best of the rates by its last loss, and is the
mean over seeds, which draw who takes part, batches and roundings.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.federated import cell, markdown
from hetfl_jax.core import machine
from hetfl_jax.core.types import Population
from hetfl_jax.data import preprocess, sources
from hetfl_jax.data.population import population
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import fedpaq
from hetfl_jax.models import build, families
from hetfl_jax.models.windows import Family
from hetfl_jax.parts.local import local
from hetfl_jax.results.folder import write_json

RESULTS = Path(__file__).parent / "results"
NODES, BATCH, ITERATIONS = 50, 10, 100
#: (r, tau, s) of each curve, by figure; s = 0 is float32
FIGURES = {
    "levels": [(25, 2, s) for s in (1, 5, 10, 0)],
    "local steps": [(25, tau, 1) for tau in (1, 2, 5, 10, 20)],
    "participants": [(r, 5, 1) for r in (5, 10, 25, 50)],
    "methods": [(50, 2, 1), (50, 2, 0), (50, 1, 1)],
}
METHODS = {(50, 2, 1): "FedPAQ, tau 2, s 1", (50, 2, 0): "FedAvg, tau 2", (50, 1, 1): "QSGD, s 1"}


class Problem(NamedTuple):
    """A net on the nodes' examples."""

    family: Family
    people: Population
    scope: str
    ratio: float
    rates: tuple[float, ...]


def logistic(source: str) -> Problem:
    """MNIST's 0 against 8."""
    found = sources.load(source)
    rows = np.flatnonzero(np.isin(found.y_train, (0, 8)))
    rows = np.random.default_rng(0).permutation(rows)[: 200 * NODES]
    x, y = found.x_train[rows].astype(np.float32) / 255, (found.y_train[rows] == 8).astype(np.int32)
    fam = families.family(build("logistic"), [{}], jnp.zeros((1, *x.shape[1:])), preprocess.features)
    return Problem(fam, _split(x, y), "whole", 100.0, (0.05, 0.2, 0.5))


def net(source: str) -> Problem:
    """A net of 92,500 parameters on 10,000 images of CIFAR-10."""
    found = sources.load(source)
    rows = np.random.default_rng(0).permutation(len(found.y_train))[: 200 * NODES]
    x = (found.x_train[rows].astype(np.float32) / 255 - 0.47) / 0.25
    fam = families.family(build("mlp", hidden=(30,)), [{}], jnp.zeros((1, *x.shape[1:])), preprocess.features)
    return Problem(fam, _split(x, found.y_train[rows].astype(np.int32)), "tensor", 1000.0, (0.01, 0.02, 0.05, 0.1))


def _split(x: np.ndarray, y: np.ndarray) -> Population:
    return population(x.reshape(len(x), -1), y, np.arange(len(y)), np.full(NODES, len(y) // NODES))


def curve(problem: Problem, r: int, tau: int, s: int) -> Callable[[float, int], tuple[np.ndarray, np.ndarray]]:
    """(rate, seed) -> (simulated time, training loss of all examples) after every round, the start first."""
    family, store = problem.family, device_store()

    def loss(variables: Any, people: Population) -> jax.Array:
        logits = family.nets[0].apply(variables, people.x)[0][-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), people.y[:, None], 1).mean()

    @jax.jit
    def run(rate: jax.Array, key: jax.Array, people: Population) -> Any:
        settings = local(learning_rate=1.0, batch_size=BATCH, steps=tau)._replace(learning_rate=lambda round: rate)
        algorithm = fedpaq.make(family, settings, cohort=r, levels=s, scope=problem.scope, ratio=problem.ratio)
        step, first = make_round(algorithm, executor("bucketed"), store), start(algorithm, store, NODES, key)

        def one(state: Any, _: None) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            state, info = step(state, people, key)
            return state, (info.numbers["simulated_time"], loss(state.server.variables, people))

        return loss(first.server.variables, people), jax.lax.scan(one, first, length=ITERATIONS // tau)[1]

    def of(rate: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        before, (time, after) = jax.device_get(run(jnp.float32(rate), jax.random.key(seed), problem.people))
        return np.append(0.0, time), np.append(before, after)

    return of


def best(problem: Problem, r: int, tau: int, s: int, seeds: int) -> dict[str, Any]:
    """The curves of all seeds at the rate with the least last loss of the first seed."""
    of, ends = curve(problem, r, tau, s), {}
    for rate in problem.rates:
        last = float(of(rate, 0)[1][-1])
        ends[rate] = last if np.isfinite(last) else np.inf
    rate = min(ends, key=lambda one: ends[one])
    time, loss = map(np.array, zip(*(of(rate, seed) for seed in range(seeds))))
    last = loss[:, -1].tolist()
    return {"r": r, "tau": tau, "s": s, "rate": rate, "time": time.mean(0), "loss": loss.mean(0), "last": last}


def label(one: dict[str, Any], figure: str) -> str:
    """What a legend says of a curve."""
    if figure == "methods":
        return METHODS[one["r"], one["tau"], one["s"]]
    name = {"levels": f"s = {one['s']}" if one["s"] else "float32", "local steps": f"tau = {one['tau']}"}
    return name.get(figure, f"r = {one['r']}")


def draw(found: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """A panel a figure, loss over simulated time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    for axes, (name, curves) in zip(figure.subplots(2, 2).ravel(), found.items(), strict=True):
        for one in curves:
            axes.plot(one["time"], one["loss"], marker=".", markersize=3, linewidth=1, label=label(one, name))
        axes.set(title=name, xlabel="simulated time (gradients of an example)", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run, print, keep and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=["logistic", "net"], default="logistic")
    parser.add_argument("--source", help="of the images; npz:mnist.npz and npz:cifar10.npz by default")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    given = parser.parse_args()
    machine.use_cache()
    mnist = given.problem == "logistic"
    problem = (logistic if mnist else net)(given.source or ("npz:mnist.npz" if mnist else "npz:cifar10.npz"))
    known: dict[tuple[int, int, int], dict[str, Any]] = {}
    for points in FIGURES.values():
        for point in points:
            known.setdefault(point, known.get(point) or best(problem, *point, given.seeds))
    found = {name: [known[point] for point in points] for name, points in FIGURES.items()}
    reference, body = known[25, 2, 0]["loss"][(ITERATIONS // 2) // 2], []
    for name, curves in found.items():
        for one in curves:
            there = np.flatnonzero(one["loss"] <= reference)
            when = f"{one['time'][there[0]]:,.0f}" if there.size else "-"
            numbers = (f"{one['rate']:g}", cell(one["last"], 4), f"{one['time'][-1]:,.0f}", when)
            body.append((name, label(one, name), *numbers))
    titles = ("last loss", "simulated time", "time to the loss of float32, r 25, tau 2 half-way")
    print(markdown(("figure", "curve", "rate", *titles), body))
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"fedpaq_{given.problem}.json", found)
    draw(found, f"FedPAQ, {given.problem}: training loss over simulated time", RESULTS / f"fedpaq_{given.problem}.png")


if __name__ == "__main__":
    main()

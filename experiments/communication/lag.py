"""LAG's table: how many uploads until the loss is within 1e-8 of the least, in float64.

    python -m experiments.communication.lag                       nine workers of unequal smoothness, linear regression
    python -m experiments.communication.lag --data FILE --splits 3 6 9

FILE has the rows of the workers in order, X [M, n, p], y [M, n] and mask [M, n], three workers a data set; each data
set is cut anew into so many consecutive blocks. The loss is ``log(1 + exp(-y x' theta))``, plus
``1e-4 / 2 ||theta||^2`` for every worker. Without FILE ``X_m = c_m v_m v_m' + I`` with ``c_m = 1.3^(m-1)`` and
orthonormal v_m, 50 x 50, and the loss is ``(x' theta - y)^2 / 2``. The rate is 1 / L; LAG starts as
the published code does.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import machine
from hetfl_jax.data.population import population
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import lag
from hetfl_jax.models import families
from hetfl_jax.parts import objective, uploads
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.local import local
from hetfl_jax.results.folder import write_json

RESULTS = Path(__file__).parent / "results"
NEAR, MOST = 1e-8, 20_000
RULES = ("gd", "wk", "ps", "cyclic_iag", "num_iag")
#: uploads of the authors' code on the same data
OFFICIAL = {
    9: {"gd": 33_309, "ps": 14_419, "wk": 584},
    18: {"gd": 65_322, "ps": 29_968, "wk": 1_098},
    27: {"gd": 97_821, "ps": 44_598, "wk": 1_718},
}


class Problem(NamedTuple):
    """Workers' examples, and what one of them costs."""

    x: np.ndarray  #: [n, p] worker after worker
    y: np.ndarray  #: [n]
    size: np.ndarray  #: [M]
    each: Callable[[Any, Any], Any]  #: (score, label) -> loss
    curvature: float  #: its largest second derivative by the score
    l2: float  #: of every worker


class Linear(nn.Module):
    """``x' theta`` in float64, from 0."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, p] -> [B, 1]."""
        zeros = nn.initializers.zeros
        return nn.Dense(1, use_bias=False, kernel_init=zeros, param_dtype=jnp.float64, name="head")(x)


def logistic(file: Path, split: int) -> Problem:
    """The file's data sets in ``split`` blocks each; rows that are left over are dropped."""
    with np.load(file) as found:
        x, y, mask = found["X"], found["y"], found["mask"] > 0
    blocks = []
    for first in range(0, len(x), 3):
        rows = mask[first : first + 3]
        size = rows.sum() // split
        whole = x[first : first + 3][rows], y[first : first + 3][rows]
        blocks += [tuple(part[i * size : (i + 1) * size] for part in whole) for i in range(split)]
    size = np.array([len(block[1]) for block in blocks])
    x, y = (np.concatenate([block[i] for block in blocks]) for i in range(2))
    return Problem(x, y, size, lambda f, label: jnp.logaddexp(0, -label * f), 0.25, 1e-4)


def linear(workers: int = 9, features: int = 50) -> Problem:
    """Linear regression by workers of unequal smoothness."""
    rng = np.random.default_rng(0)
    v = np.linalg.qr(rng.normal(size=(features, features)))[0]
    x = [1.3**m * np.outer(v[:, m], v[:, m]) + np.eye(features) for m in range(workers)]
    y = rng.normal(size=workers * features)
    return Problem(np.concatenate(x), y, np.full(workers, features), lambda f, label: (f - label) ** 2 / 2, 1.0, 0.0)


def smoothness(problem: Problem) -> tuple[np.ndarray, float]:
    """L_m of every worker, and that of the sum."""
    parts = np.split(problem.x, np.cumsum(problem.size)[:-1])
    each = [problem.curvature * np.linalg.eigvalsh(part.T @ part)[-1] + problem.l2 for part in parts]
    whole = problem.curvature * np.linalg.eigvalsh(problem.x.T @ problem.x)[-1]
    return np.array(each), float(whole + (problem.l2 if problem.curvature < 1 else 0.0))


def least(problem: Problem) -> float:
    """The least value of the sum, by Newton's method."""

    def total(theta: jax.Array) -> jax.Array:
        loss = problem.each(problem.x @ theta, problem.y).sum()
        return loss + len(problem.size) * problem.l2 / 2 * (theta @ theta)

    theta = jnp.zeros(problem.x.shape[1])
    gradient, hessian = jax.jit(jax.grad(total)), jax.jit(jax.hessian(total))
    for _ in range(50):
        theta = theta - jnp.linalg.solve(hessian(theta), gradient(theta))
    return float(total(theta))


def run(problem: Problem, rule: str, target: float) -> dict[str, Any]:
    """Rounds and uploads until the sum is near its least value, its distance over rounds, and who sent when."""
    of_outputs = lambda outputs, labels: problem.each(outputs[:, 0], labels)  # noqa: E731
    value = lambda exits, active, labels, valid, context: (  # noqa: E731
        jnp.where(valid, of_outputs(exits[-1], labels), 0).sum() / valid.sum()
    )
    goal = objective.of_exits(value, score=objective.RMSE._replace(each=of_outputs), numbers=True)
    each, whole = smoothness(problem)
    workers = len(problem.size)
    people = population(problem.x, problem.y, np.arange(len(problem.y)), problem.size)
    people = people._replace(y=jnp.asarray(problem.y))  # in float64
    fam = families.family(Linear(), [{}], jnp.zeros((1, problem.x.shape[1])))
    settings = local(learning_rate=1 / whole, batch_size=int(problem.size.max()), full_batch=True)
    algorithm = lag.make(
        fam, settings, clients=workers, rule=rule, l2=problem.l2, smoothness=tuple(each),
        lc_start=rule in ("wk", "ps"), slots=Slots(objective=goal),
    )  # fmt: skip
    store, key = device_store(), jax.random.key(0)
    step = make_round(algorithm, executor("bucketed"), store)

    def one(state: Any, _: None) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        state, info = step(state, people, key)
        return state, (info.numbers["objective"], (info.items.seen.up > 0).any(-1))

    many = jax.jit(lambda state: jax.lax.scan(one, state, length=500))
    state, gaps, sent = start(algorithm, store, workers, key), [], []
    while not gaps or (len(gaps) * 500 < MOST and np.abs(gaps[-1]).min() >= NEAR):
        state, (values, fired) = many(state)
        gaps.append(np.asarray(values) - target)
        sent.append(np.asarray(fired))
    gap, mask = np.concatenate(gaps), np.concatenate(sent)
    near = np.flatnonzero(np.abs(gap) < NEAR)
    rounds = int(near[0]) if near.size else len(gap)
    return {"rounds": rounds, "uploads": int(mask[:rounds].sum()), "reached": bool(near.size), "gap": gap[:rounds],
            "mask": mask[:rounds]}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Uploads by workers and rule."""
    lines = ["| M | rule | rounds | uploads | official | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        official = row["official"]
        more = f"{official:,} | {row['uploads'] / official:.4f}" if official else " | "
        count = f"{row['uploads']:,}" if row["reached"] else f"> {row['uploads']:,}"
        lines.append(f"| {row['workers']} | {row['rule']} | {row['rounds']:,} | {count} | {more} |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """The distance from the least value over uploads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for rule, run in found.items():
        axes.plot(np.cumsum(run["mask"].sum(1)), np.abs(run["gap"]), label=rule, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="uploads", ylabel="loss above the least", ylim=(NEAR, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run, print, keep and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="npz with X, y and mask")
    parser.add_argument("--splits", type=int, nargs="+", default=[3, 6], help="blocks of each data set")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    given = parser.parse_args()
    machine.use_cache()
    jax.config.update("jax_enable_x64", True)
    rows = []
    for split in given.splits if given.data else [0]:
        problem = logistic(given.data, split) if given.data else linear()
        name, workers, target = "logistic" if given.data else "linear", len(problem.size), least(problem)
        found = {rule: run(problem, rule, target) for rule in given.rules}
        for rule, one in found.items():
            official = OFFICIAL.get(workers, {}).get(rule) if given.data else None
            counts = {key: one[key] for key in ("rounds", "uploads", "reached")}
            rows.append({"problem": name, "workers": workers, "rule": rule, **counts, "official": official})
        draw(found, RESULTS / f"lag_{name}_{workers}.png")
        if "wk" in found:
            uploads.draw(found["wk"]["mask"]).savefig(RESULTS / f"lag_{name}_{workers}_uploads.png", dpi=150)
    write_json(RESULTS / f"lag_{rows[0]['problem']}.json", rows)
    print(table(rows))


if __name__ == "__main__":
    main()

"""IFCA by gradient averaging on clustered linear regression (Ghosh et al. 2020, section 6.1): are the centres found?

    python -m experiments.ifca_synthetic.recover                     p = 2, m = n = 100, d = 1000, r = 1, sigma = 0.1
    python -m experiments.ifca_synthetic.recover --separation 0.25
    python -m experiments.ifca_synthetic.recover --clusters 4 --clients 400 --rate 2 --rounds 30

Client ``i`` of cluster ``c``: ``y = X theta_c + sigma e`` with X standard normal and ``theta_c = r Bernoulli(1/2)^d``;
the starts are ``Bernoulli(1/2)^d``, not times r. Success: the mean distance of the models to their nearest centre is
below ``0.6 sigma``. All restarts run in one program. Centres and starts follow NumPy's legacy stream in the official
order; X and e are drawn by NumPy where the official code uses torch's stream, so single figures differ and rates are
comparable.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from hetfl_jax.core import machine
from hetfl_jax.core.types import State
from hetfl_jax.data.population import population
from hetfl_jax.engine import rounds
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import ifca
from hetfl_jax.models import families
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.local import local
from hetfl_jax.parts.objective import squared_error
from hetfl_jax.results.folder import write_json

FOREVER = 10**6


class Linear(nn.Module):
    """One weight vector, no intercept."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, d] -> [B, 1]."""
        return nn.Dense(1, use_bias=False, name="theta")(x)


def regression(seed: int, clients: int, clusters: int, n: int, d: int, r: float, sigma: float) -> tuple[Any, ...]:
    """(x [m n, d], y [m n], centres [p, d]); clusters are consecutive blocks of clients."""
    rng = np.random.RandomState(seed)
    centres = r * np.stack([rng.binomial(1, 0.5, d) for _ in range(clusters)])
    of = np.arange(clients) * clusters // clients
    x = rng.normal(size=(clients, n, d)).astype(np.float32)
    y = np.einsum("mnd,md->mn", x, centres[of]) + sigma * rng.normal(size=(clients, n))
    return x.reshape(-1, d), y.ravel().astype(np.float32), centres


def start(seed: int, clusters: int, d: int) -> np.ndarray:
    """Random starts; one dummy draw first, or equal seeds would start at the true centres."""
    rng = np.random.RandomState(seed)
    rng.normal()
    return np.stack([rng.binomial(1, 0.5, d) for _ in range(clusters)])


def recover(given: Any, seed: int) -> dict[str, Any]:
    """One data set: distances of all restarts, and which of them the training loss prefers."""
    x, y, centres = regression(
        seed, given.clients, given.clusters, given.examples, given.dimensions, given.separation, given.noise
    )
    size = np.full(given.clients, given.examples)
    data = population(x, y, np.arange(len(y)), size)
    fam = families.family(Linear(), [{}], jnp.zeros((1, given.dimensions)))
    training = local(learning_rate=given.rate, batch_size=given.examples, full_batch=True)
    algorithm = ifca.make(
        fam, training, cohort=given.clients, clusters=given.clusters, averaging="gradients",
        slots=Slots(objective=squared_error()), restarts=given.restarts, restart_rounds=FOREVER,
    )  # fmt: skip
    starts = np.concatenate(
        [start(100 * seed + 1 + i, given.clusters, given.dimensions) for i in range(given.restarts)]
    )
    bank, _ = algorithm.init(jax.random.key(0))
    kernel = {"params": {"theta": {"kernel": jnp.asarray(starts[..., None], jnp.float32)}}}
    bank = bank._replace(members=bank.members._replace(variables=kernel))
    run = executor("bucketed", devices=jax.device_count())
    state, data, key = run.place((State(bank, (), jnp.int32(0)), data, jax.random.key(0)))
    step = rounds.make_round(algorithm, run, device_store())
    began = time.perf_counter()
    for _ in range(given.rounds):
        state, _ = step(state, data, key)
    theta = np.asarray(state.server.members.variables["params"]["theta"]["kernel"])[..., 0]
    distance = np.linalg.norm(theta[:, None] - centres, axis=-1).min(1).reshape(given.restarts, -1).mean(1)
    return {
        "data seed": seed,
        "distances": distance.tolist(),
        "successes": int((distance < 0.6 * given.noise).sum()),
        "chosen by loss": float(distance[int(state.server.route.leader)]),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("clusters", 2), ("clients", 100), ("examples", 100), ("dimensions", 1000), ("rounds", 60)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--restarts", type=int, default=8)
    parser.add_argument("--data-seeds", type=int, default=2)
    parser.add_argument("--separation", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=0.5)
    given = parser.parse_args()
    machine.use_all_cores()
    machine.use_cache()
    rows = [recover(given, seed) for seed in range(given.data_seeds)]
    table = Table(title=f"success below {0.6 * given.noise:.3f}; {given.clusters} clusters, r = {given.separation}")
    for column in ("data seed", "successes", "best distance", "chosen by loss", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = (f"{min(row['distances']):.4f}", f"{row['chosen by loss']:.4f}", f"{row['seconds']:.1f}")
        table.add_row(str(row["data seed"]), f"{row['successes']} of {given.restarts}", *cells)
    Console(width=110).print(table)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    write_json(results / f"p{given.clusters}_r{given.separation:g}.json", {**vars(given), "rows": rows})


if __name__ == "__main__":
    main()

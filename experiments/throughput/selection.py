"""What selections cost: a round with Power-of-Choice against its parts, DivFL's greedy, and a million clients.

taskset -c 0 python -m experiments.throughput.selection
python -m experiments.throughput.selection --only greedy --repeats 20
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.throughput import common
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg
from hetfl_jax.models.costs import costs
from hetfl_jax.parts import choose, divfl
from hetfl_jax.parts.compose import Slots

CLIENTS, EXAMPLES, COHORT = 1_000, 60, 30
MANY, FEW_EXAMPLES, LARGE_COHORT = 1_000_000, 20, 100
ROWS_OF_DIVFL, WIDTH = 1_000, 512


def side(clients: int, examples: int, cohort: int, select: Any = None) -> common.Bench:
    """Rounds of FedAvg's MLP, with a selection of its own or uniform."""
    slots = Slots(select=select, clients=clients) if select else None
    algorithm = fedavg.make(common.family("mlp"), common.settings(), cohort=cohort, slots=slots)
    return common.bench(algorithm, common.data((784,), clients, examples), executor("bucketed"))


def power_of_choice(repeats: int) -> list[common.Row]:
    """A round with d = 3 m candidates over the multiply-adds of its parts, from the time of a round without."""
    asked = choose.power_of_choice(COHORT, 3 * COHORT)
    sides = {
        "uniform": side(CLIENTS, EXAMPLES, COHORT).round,
        "pow-d": side(CLIENTS, EXAMPLES, COHORT, asked).round,
    }
    s = common.medians(sides, repeats)
    fam = common.family("mlp")
    step = common.training_flops(fam, 0) / 2
    factor = (COHORT * step + 3 * COHORT * float(costs(fam).macs[0])) / (COHORT * step)
    return [_row("pow-d, d = 3 m: round over its multiply-adds", s["pow-d"] / s["uniform"] / factor, 1.15, s)]


def greedy(repeats: int) -> list[common.Row]:
    """Ten and a hundred picks among 1,000 clients; their distances from rows of 512 numbers."""
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS_OF_DIVFL, WIDTH)), jnp.float32)
    distance = divfl.distances(rows)
    programs = {m: jax.jit(lambda d, m=m: divfl.greedy(d, m)) for m in (10, 100)}
    anew = jax.jit(divfl.distances)
    sides: dict[str, Callable[[], Any]] = {f"{m} picks": lambda f=f: f(distance) for m, f in programs.items()}
    s = common.medians({**sides, "distances": lambda: anew(rows)}, repeats)
    return [
        _row("DivFL: 10 picks of 1,000 clients, ms", 1e3 * s["10 picks"], 20, s),
        _row("DivFL: 100 picks of 1,000 clients, ms", 1e3 * s["100 picks"], None, s),
        _row("DivFL: distances of 1,000 x 512 rows, ms", 1e3 * s["distances"], None, s),
    ]


def many_clients(repeats: int) -> list[common.Row]:
    """Uniform rounds of a million clients against a thousand, and selections that read all clients against uniform."""
    rules = {
        "weighted": choose.weighted(LARGE_COHORT),
        "rpow-d": choose.power_of_choice(LARGE_COHORT, 3 * LARGE_COHORT, kind="rpow"),
    }
    sides = {"thousand": side(CLIENTS, FEW_EXAMPLES, LARGE_COHORT).round}
    sides["million"] = side(MANY, FEW_EXAMPLES, LARGE_COHORT).round
    sides |= {name: side(MANY, FEW_EXAMPLES, LARGE_COHORT, rule).round for name, rule in rules.items()}
    s = common.medians(sides, repeats)
    return [
        _row("uniform: 1,000,000 clients over 1,000", s["million"] / s["thousand"], 1.1, s),
        _row("weighted over uniform, 1,000,000 clients", s["weighted"] / s["million"], 1.3, s),
        _row("rpow-d over uniform, 1,000,000 clients", s["rpow-d"] / s["million"], 1.3, s),
    ]


def _row(what: str, value: float, most: float | None, seconds: Mapping[str, float]) -> common.Row:
    allowed, met = ("", "") if most is None else (f"<= {most}", "yes" if value <= most else "NO")
    measured = ", ".join(f"{name} {value:.4g}" for name, value in seconds.items())
    return {"what": what, "value": value, "allowed": allowed, "met": met, "s": measured}


PARTS: dict[str, Callable[[int], list[common.Row]]] = {
    "power_of_choice": power_of_choice,
    "greedy": greedy,
    "many_clients": many_clients,
}


def main() -> None:
    """Measure the parts that are asked for."""
    parser = common.flags(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    given = common.begin(parser)
    rows = [row for name in given.only for row in PARTS[name](given.repeats)]

    def draw(axes: Any) -> None:
        common.bars(axes, [row["what"] for row in rows], [row["value"] for row in rows], "value")

    common.keep(given.name or "selection", "What selections cost", rows, {"executor": "bucketed"}, draw)


if __name__ == "__main__":
    main()

"""What coding messages costs: its share of the CNN's round, and the peak memory of small and large cohorts.

    taskset -c 0 python -m experiments.throughput.encoding
    taskset -c 0 python -m experiments.throughput.encoding --only time --codecs qsgd top_k

``time`` sets one message of each codec, added to a sum, against a client's local training in the round of the other
benchmarks (60 examples, one epoch of batches of 20); the sides take turns. ``memory`` runs whole rounds of 1,000
clients, a process each, without error feedback, so that nothing but the round itself grows with the cohort.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.throughput import common
from hetfl_jax.core.types import ClientContext
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg
from hetfl_jax.models import families, windows
from hetfl_jax.parts import codec
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.message import bits

MOST_TIME, MOST_MEMORY = 0.05, 1.1
COHORTS = (10, 1_000)
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "qsgd": ("qsgd", {"levels": 7}),
    "uniform": ("uniform", {"bits": 4}),
    "signs": ("signs", {"error_feedback": True}),
    "top_k": ("top_k", {"fraction": 0.05, "error_feedback": True}),
    "random_k": ("random_k", {"fraction": 0.05, "error_feedback": True}),
    "drive": ("drive", {}),
    "low_rank": ("low_rank", {"rank": 2, "error_feedback": True}),
}


def message(family: windows.Family, rule: codec.Codec) -> Callable[[], Any]:
    """One message of a random change after another, each added to a sum as a round does; memory is used and kept."""
    params = families.init(family, jax.random.key(0))["params"]
    delta = jax.tree.map(lambda v: 0.01 * jax.random.normal(jax.random.key(1), v.shape), params)

    @partial(jax.jit, donate_argnums=(2, 3))
    def encode(key: jax.Array, delta: Any, memory: Any, total: Any) -> Any:
        context = ClientContext(key, jnp.int32(0), 0, (), (), (), memory)
        sent, kept, count = rule.encode(key, delta, context, memory)
        return kept, jax.tree.map(jnp.add, total, sent), count

    held = [rule.init(params), jax.tree.map(jnp.zeros_like, params), jax.random.key(2)]

    def run() -> Any:
        held[2], key = jax.random.split(held[2])
        held[0], held[1], count = encode(key, delta, held[0], held[1])
        return held[1], count

    return run


def time(names: list[str], given: argparse.Namespace) -> list[common.Row]:
    """One row a codec: seconds of a message over those of a client's local training."""
    family, clients = common.family("cnn"), 10
    pop = common.data(common.SHAPES["cnn"], 100, 60)
    bench = common.bench(fedavg.make(family, common.settings(), cohort=clients), pop, executor("bucketed"))
    rules = {name: codec.make(CODECS[name][0], family, **CODECS[name][1]) for name in names}
    sides = {"round": bench.round} | {name: message(family, rule) for name, rule in rules.items()}
    seconds = common.medians(sides, given.repeats, common.clock(given))
    each = seconds["round"] / clients
    return [
        {
            "codec": name,
            "ms a message": 1e3 * seconds[name],
            "ms a client": 1e3 * each,
            "share": seconds[name] / each,
            "of float32": bits(family, rule)[0] / bits(family, codec.none(family))[0],
            "allowed": MOST_TIME,
            "holds": "yes" if seconds[name] <= MOST_TIME * each else "no",
        }
        for name, rule in rules.items()
    ]


def memory(names: list[str], given: argparse.Namespace) -> list[common.Row]:
    """One row a codec: peak memory of the large cohort over the small one's."""
    rows = []
    for name in names:
        small, large = (_child(name, cohort) for cohort in COHORTS)
        rows.append(
            {
                "codec": name,
                **{f"MB, cohort {cohort}": peak / 1e6 for cohort, peak in zip(COHORTS, (small, large))},
                "ratio": large / small,
                "allowed": MOST_MEMORY,
                "holds": "yes" if large <= MOST_MEMORY * small else "no",
            }
        )
    return rows


def peak(name: str, cohort: int) -> int:
    """Peak bytes of two rounds of one local step a client."""
    family = common.family("cnn")
    pop = common.data(common.SHAPES["cnn"], max(COHORTS), 20)
    kind, args = CODECS[name]
    plain = {key: value for key, value in args.items() if key != "error_feedback"}
    with np.errstate(all="ignore"):
        rule = codec.CODECS[kind](family, **plain)
    common.reset_peak()
    algorithm = fedavg.make(family, common.settings(), cohort=cohort, slots=Slots(uplink=rule))
    common.bench(algorithm, pop, executor("chunked", 1))
    return common.peak_bytes()


def _child(name: str, cohort: int) -> int:
    command = [sys.executable, "-m", "experiments.throughput.encoding", "--peak", name, str(cohort)]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(out.stdout.splitlines()[-1]))


def main() -> None:
    """Measure what is asked for."""
    parser = common.flags(__doc__)
    parser.add_argument("--cpu-time", action="store_true", help="not the wall clock, if others run on the core too")
    parser.add_argument("--only", nargs="+", default=["time", "memory"], choices=["time", "memory"])
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = common.begin(parser)
    if given.peak:
        print(peak(given.peak[0], int(given.peak[1])))
        return
    for what in given.only:
        rows = {"time": time, "memory": memory}[what](given.codecs, given)
        column, label = ("share", "share of a client's training") if what == "time" else ("ratio", "peak memory, ratio")
        labels = [row["codec"] for row in rows]

        def draw(axes: Any, rows: Any = rows, column: str = column, label: str = label, labels: Any = labels) -> None:
            common.bars(axes, labels, [row[column] for row in rows], label)

        title = {"time": "Coding a message of the CNN", "memory": f"Peak memory, cohorts {COHORTS}"}[what]
        common.keep(given.name or f"encoding_{what}", title, rows, {"net": "cnn"}, draw)


if __name__ == "__main__":
    main()

"""The cells of ``experiments.throughput.accelerator``: what each of its steps measures, the most telling ones first."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hetfl_jax as hf
from experiments.throughput import aggregation, common, constants, depths, published, sweep
from hetfl_jax.core import tree
from hetfl_jax.engine import buckets
from hetfl_jax.engine.chunks import MOST
from hetfl_jax.engine.constants import CONSTANTS
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import depthfl, fedavg
from hetfl_jax.models import families, windows
from hetfl_jax.models.costs import costs
from hetfl_jax.run import lab
from hetfl_jax.run.buckets import holds
from hetfl_jax.run.federation import Own
from hetfl_jax.run.ledger import BACKWARD
from hetfl_jax.run.mix import parse_mix

Rows = list[common.Row]
FIVE, BATCH, EXAMPLES = "a1-b1-c1-d1-e1", 20, 60
PRECISIONS = ("tf32", "bfloat16", "float32")
_PRODUCTS = {"tf32": "tensorfloat32", "float32": "float32", "bfloat16": "bfloat16"}
TESTS = ("tests/test_conv.py", "tests/test_precision.py", "tests/test_identities.py")


class Cell(NamedTuple):
    """One thing to measure."""

    name: str
    measure: Callable[[float], Rows]  #: (seconds that are left) -> rows


class Step(NamedTuple):
    """Cells that share a part of the time."""

    meaning: str
    share: float  #: of the whole time
    cells: Callable[[bool], Sequence[Cell]]  #: (tiny) -> cells


def of_constants(tiny: bool) -> list[Cell]:
    """The three constants of ``train.buckets=auto``."""
    return [Cell("constants", lambda left: constants.measured(1 if tiny else 5, "mlp" if tiny else "cnn"))]


@lru_cache
def roof(precision: str, tiny: bool) -> float:
    """Multiply-adds a second of a large square product."""
    size = 256 if tiny else 2048 if jax.default_backend() == "cpu" else 8192
    kind = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    x = jax.random.normal(jax.random.key(0), (size, size), kind)
    with jax.default_matmul_precision(_PRODUCTS[precision]):
        product = jax.jit(lambda a: a @ a)
        return size**3 / common.medians({"product": lambda: product(x)}, 5)["product"]


@lru_cache
def bandwidth(tiny: bool) -> float:
    """Bytes a second of a copy, read and written."""
    x = jnp.zeros((1 << 20) if tiny else (1 << 26) if jax.default_backend() == "cpu" else 1 << 28)
    copy = jax.jit(lambda v: v + 1)
    return 2 * tree.nbytes(x) / common.medians({"copy": lambda: copy(x)}, 5)["copy"]


def of_rounds(tiny: bool) -> list[Cell]:
    """Nets x cohorts x mixes x buckets x precisions; TF32 at a cohort of 100 first."""
    nets = ("mlp",) if tiny else ("mlp", "cnn", "conv", "preresnet_1112", "resnet18_exits")
    cells = list[Cell]()
    for precision in PRECISIONS[: 1 if tiny else None]:
        for cohort in (4,) if tiny else (100, 10, 1_000):
            for net in nets:
                many = "4x1-3x1-2x1-1x1" if net == "resnet18_exits" else FIVE
                if net == "resnet18_exits" and cohort == 1_000:
                    continue
                for mix, kinds in (("a1", ("each",)), (many, ("auto", "each", "one"))):
                    if net == "resnet18_exits" and mix != "a1":
                        kinds = ("each",)  # its batch norms and exits: a level runs at its true shape
                    for kind in kinds[: 1 if tiny else None]:
                        name = f"{net} {mix} {cohort} {kind} {precision}"
                        cells.append(Cell(name, partial(a_round, net, mix, cohort, kind, precision, tiny)))
    return cells


def a_round(net: str, mix: str, cohort: int, kind: str, precision: str, tiny: bool, left: float) -> Rows:
    """Time of a round, its rate over the roof of its precision, and its traffic of parameters over a copy's."""
    fam = families.computing_in(precision, _family(net, mix, tiny))
    price, shape = costs(fam), (32, 32, 3) if net == "resnet18_exits" else common.SHAPES[net]
    groups, wanted = _buckets(fam, mix, cohort, kind)
    run = executor("bucketed", 0, 1, groups, wanted)
    clients, examples = max(1_000, cohort) if not tiny else 2 * cohort, EXAMPLES if not tiny else BATCH
    people = common.data(shape, clients, examples, fam.levels, pool=600 if tiny else 60_000)
    common.reset_peak()
    bench = common.bench(_method(net, mix, fam, cohort), people, run)
    once = common.medians({"round": bench.round}, 1)["round"]
    repeats = 1 if tiny else max(1, min(15, int(left / 4 / once)))
    seconds = common.medians({"round": bench.round}, repeats)["round"]
    shares = _shares(fam, mix)
    steps = cohort * examples // BATCH
    done = float(shares @ [common.training_flops(fam, level) for level in range(fam.levels)]) * cohort * examples
    moved = 5 * steps * float(shares @ np.asarray(price.bytes))  # read twice and updated; the gradient written and read
    return [{
        "net": net, "mix": mix, "cohort": cohort, "buckets": kind, "precision": precision,
        "ran as": str([list(g) for g in groups] or "each"), "ms": 1e3 * seconds, "clients/s": cohort / seconds,
        "TFLOP/s": done / seconds / 1e12, "of the roof": done / 2 / seconds / roof(precision, tiny),
        "of a copy": moved / seconds / bandwidth(tiny), "compile s": bench.compile_seconds,
        "peak MB": common.peak_bytes() / 1e6, "repeats": repeats,
    }]  # fmt: skip


def _family(net: str, mix: str, tiny: bool) -> windows.Family:
    if net == "resnet18_exits":
        return depths.family(64, (4,) if mix == "a1" else (4, 3, 2, 1))
    return common.family(net, mix, **({"hidden": (16,)} if tiny else {}))


def _shares(fam: windows.Family, mix: str) -> np.ndarray:
    share = np.asarray(parse_mix(mix).proportions, float)
    return share / share.sum() if len(share) == fam.levels else np.full(fam.levels, 1 / fam.levels)


def _method(net: str, mix: str, fam: windows.Family, cohort: int) -> Any:
    if net != "resnet18_exits":
        return common.method(
            "fedavg" if mix == "a1" else "heterofl", fam, common.settings(batch_size=BATCH), cohort, mix
        )
    each = [1_000 // fam.levels] * fam.levels
    return depthfl.make(fam, common.settings(batch_size=BATCH), cohort=cohort, clients_per_level=each, feddyn=False)


def _buckets(fam: windows.Family, mix: str, cohort: int, kind: str) -> tuple[Any, tuple[int, ...]]:
    if kind != "auto":
        return ((tuple(range(fam.levels)),) if kind == "one" else ()), ()
    device, price = jax.default_backend(), costs(fam)
    asked = buckets.Work(
        (price.macs * float((1 + BACKWARD) * BATCH)).tolist(), _shares(fam, mix).tolist(), int(price.layers.max()),
        cohort, EXAMPLES / BATCH, 1_000,
    )  # fmt: skip
    kinds = CONSTANTS["gpu" if device in ("gpu", "cuda", "rocm") else device]
    found = buckets.best(asked, holds(parse_mix(mix)), kinds, 1 if device == "cpu" else MOST)
    return tuple(b.levels for b in found), tuple(b.clients for b in found)


def of_aggregation(tiny: bool) -> list[Cell]:
    """Masked means against a plain sum over the same bytes."""
    sizes = ((0.02, 6),) if tiny else ((1.66, 1_000), (1.66, 128))

    def rules(millions: float, clients: int, left: float) -> Rows:
        rows = aggregation.measure(millions, clients, 1 if tiny else 10)
        return [{**row, "of a copy": 1e9 * row["GB/s"] / bandwidth(tiny)} for row in rows]

    return [Cell(f"{clients} x {millions} M", partial(rules, millions, clients)) for millions, clients in sizes]


def of_sweep(tiny: bool) -> list[Cell]:
    """64 points of the digits MLP, in one process."""

    def points(left: float) -> Rows:
        rates, seeds = (sweep.RATES[:2], 1) if tiny else (sweep.RATES, 8)
        with tempfile.TemporaryDirectory() as folder:
            small = ("train.rounds=2",) if tiny else ()
            config = hf.load_config("heterofl_digits:mix=a1", *sweep.MLP, *small, f"run.folder={folder}",
                                    tell=lambda text: None)  # fmt: skip
            over = {"train.learning_rate": list(rates), "run.seed": list(range(seeds))}
            taken = sweep.seconds(lambda: hf.sweep(config, over, quiet=True))
        count = len(rates) * seeds
        return [{"points": count, "rounds each": config.train.rounds, "s": taken, "s a point": taken / count}]

    return [Cell("points", points)]


def of_million(tiny: bool) -> list[Cell]:
    """One million clients of 60 examples, each trained once."""
    clients, cohort = (40, 20) if tiny else (1_000_000, 10_000)
    return [Cell(net, partial(everybody, net, clients, cohort, tiny)) for net in (("mlp",) if tiny else ("mlp", "cnn"))]


def everybody(net: str, clients: int, cohort: int, tiny: bool, left: float) -> Rows:
    """All clients, a cohort after the other; what the time does not suffice for is extrapolated, and said."""
    end = time.monotonic() + 0.9 * left
    fam = families.computing_in("tf32", _family(net, "a1", tiny))
    base = fedavg.make(fam, common.settings(batch_size=BATCH), cohort=cohort)

    def in_turn(key: Any, round: Any, *rest: Any) -> Any:
        ids = (round * cohort + jnp.arange(cohort, dtype=jnp.int32)) % clients
        return base.plan(key, round, *rest)._replace(ids=ids)

    examples = EXAMPLES if not tiny else BATCH
    people = common.data(common.SHAPES[net], clients, examples, pool=600 if tiny else 60_000)
    common.reset_peak()
    bench = common.bench(base._replace(plan=in_turn), people, executor("bucketed"))
    began, rounds = time.monotonic(), 0
    while rounds * cohort < clients and time.monotonic() < end:
        jax.block_until_ready(bench.round())
        rounds += 1
    taken, trained = time.monotonic() - began, rounds * cohort
    return [{
        "net": net, "clients": trained, "of": clients, "s": taken, "s of all (extrapolated if fewer)":
        taken * clients / trained, "clients/s": trained / taken, "compile s": bench.compile_seconds,
        "peak MB": common.peak_bytes() / 1e6,
    }]  # fmt: skip


def of_published(tiny: bool) -> list[Cell]:
    """Protocols of others on random data of their shapes."""
    names = ("blazefl",) if tiny else published.PROTOCOLS
    return [Cell(name, partial(protocol, name, tiny)) for name in names]


def protocol(name: str, tiny: bool, left: float) -> Rows:
    """Seconds of all rounds of a protocol, without evaluation."""
    of, end = published.PROTOCOLS[name], time.monotonic() + 0.8 * left
    config = published.get_config(f"protocol={name}")
    with config.unlocked():
        config.train.devices, config.train.precision = 1, "tf32"
        config.run.eval_batch_size = 100
        if tiny:
            config.data.clients, config.method.args.cohort, config.data.examples = 2, 2, 0
            config.train.epochs, config.train.rounds = 1, 2
    made = lab.prepare(config, Own(data=published.random_data(of, 100 if tiny else 0)))
    state, began = made.start(), time.monotonic()
    state, _ = made.step(state, made.population, made.key)
    jax.block_until_ready(state)
    first, began, rounds, wanted = time.monotonic() - began, time.monotonic(), 0, config.train.rounds
    while rounds < wanted and time.monotonic() < end:
        for _ in range(min(10, wanted - rounds)):
            state, _ = made.step(state, made.population, made.key)
            rounds += 1
        jax.block_until_ready(state)
    taken = time.monotonic() - began
    return [{
        "protocol": name, "their time": of.theirs or "none published", "their hardware": of.hardware,
        "ours s (extrapolated if fewer rounds)": taken * wanted / rounds, "rounds": rounds, "of": wanted,
        "first round s": first, "our hardware": jax.devices()[0].device_kind,
        "command": f"hetfl train --config=experiments/throughput/published.py:protocol={name}", "source": of.source,
    }]  # fmt: skip


def of_tests(tiny: bool) -> list[Cell]:
    """Tests that need one device, on this one, with full products."""
    return [Cell(name, partial(tested, name)) for name in (("tests/test_ladder.py",) if tiny else TESTS)]


def tested(name: str, left: float) -> Rows:
    """What pytest says at its end."""
    backend = jax.default_backend()
    environment = {**os.environ, "JAX_PLATFORMS": "cuda,cpu" if backend == "gpu" else backend,
                   "JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", name]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=left, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [done.stderr[-200:]]
    failed = [line for line in lines if line.startswith("FAILED")]
    return [{"tests": name, "exit": done.returncode, "said": lines[-1], "failed": "; ".join(failed)[:400]}]


STEPS = {
    "constants": Step("constants of train.buckets=auto", 0.05, of_constants),
    "rounds": Step("time of a round", 0.40, of_rounds),
    "aggregation": Step("masked means of client models", 0.06, of_aggregation),
    "sweep": Step("a sweep of 64 points", 0.07, of_sweep),
    "million": Step("one million clients of 60 examples, each trained once", 0.2, of_million),
    "published": Step("published protocols of others; random data, no evaluation", 0.14, of_published),
    "tests": Step("tests on one device, products in float32", 0.08, of_tests),
}


def every(tiny: bool) -> Iterator[tuple[str, str]]:
    """Names of all steps and cells.

    >>> list(every(True))[:2]
    [('constants', 'constants'), ('rounds', 'mlp a1 4 each tf32')]
    """
    for name, step in STEPS.items():
        for cell in step.cells(tiny):
            yield name, cell.name

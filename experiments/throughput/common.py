"""What the benchmarks share: interleaved timing, the matmul roof, peak memory, federations, and keeping results."""

import argparse
import contextlib
import datetime
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from hetfl_jax.core import machine
from hetfl_jax.core.types import ClientContext
from hetfl_jax.data import preprocess
from hetfl_jax.data.population import population
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import fedavg, heterofl
from hetfl_jax.models import build, families, windows
from hetfl_jax.models.costs import costs
from hetfl_jax.parts.local import local
from hetfl_jax.results import tables
from hetfl_jax.results.folder import write_json
from hetfl_jax.run.mix import parse_mix

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def clock(given: argparse.Namespace) -> Callable[[], float]:
    """Seconds on the wall, or with ``--cpu-time`` those that this process had the one core it may use."""
    if not given.cpu_time:
        return time.perf_counter
    if len(os.sched_getaffinity(0)) > 1:
        raise SystemExit("--cpu-time adds up the threads of all cores: need one core (taskset -c 0)")
    return time.process_time


def medians(
    sides: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each side, the sides taking turns so that a noisy machine is noisy for all; warmed up first."""
    for run in sides.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            began = clock()
            jax.block_until_ready(run())
            seconds[name].append(clock() - began)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def matmul() -> tuple[Callable[[], Any], float]:
    """A square float32 product that fills the device, and its floating-point operations: the roof."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    product, x = jax.jit(lambda a: a @ a), jax.random.normal(jax.random.key(0), (size, size))
    return lambda: product(x), 2.0 * size**3


def reset_peak() -> None:
    """Start a new measurement of peak memory, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak memory since ``reset_peak``: the device's own count where it keeps one, else the process's."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    try:
        line = next(t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def data(shape: Sequence[int], clients: int, size: int | np.ndarray, levels: int = 1, pool: int = 60_000) -> Any:
    """Clients with ``size`` random examples each out of one pool, in rotating capacity levels."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (pool, *shape)).astype(np.uint8) if len(shape) == 3 else rng.normal(size=(pool, *shape))
    y = rng.integers(0, 10, pool)
    sizes = np.broadcast_to(size, clients)
    index = np.arange(int(sizes.sum())) % pool
    held = np.ones((clients, 10), bool)
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    return population(x, y, index, sizes, level=np.arange(clients) % levels, levels=levels, classes=held)


SHAPES = {"mlp": (784,), "cnn": (28, 28, 1), "conv": (28, 28, 1), "preresnet_1112": (32, 32, 3)}


def family(net: str, mix: str = "a1", **fields: Any) -> windows.Family:
    """One of the benchmarked nets at the widths of a mix."""
    shape = SHAPES[net]
    image = len(shape) == 3
    prepare = preprocess.images([0.5] * shape[-1], [0.25] * shape[-1]) if image else preprocess.features
    example = jax.ShapeDtypeStruct((1, *shape), jnp.uint8 if image else jnp.float32)
    return families.family(build(net, **fields), [{"width": w} for w in parse_mix(mix).widths], example, prepare)


class Bench(NamedTuple):
    """A federation whose rounds can be timed."""

    round: Callable[[], Any]  #: one more round; returns its info
    compile_seconds: float
    programs: Callable[[], int]  #: compilations so far
    state: Callable[[], Any]


def bench(algorithm: Any, pop: Any, run: Any) -> Bench:
    """Start a federation and run its first round."""
    store, key = device_store(), jax.random.key(0)
    state, pop, key = run.place((start(algorithm, store, pop.size.shape[0], key), pop, key))
    step = make_round(algorithm, run, store)
    held = [state]

    def once() -> Any:
        held[0], info = step(held[0], pop, key)
        return info

    began = time.perf_counter()
    jax.block_until_ready(once())
    first = time.perf_counter() - began
    began = time.perf_counter()
    jax.block_until_ready(once())
    return Bench(once, first - (time.perf_counter() - began), lambda: step._cache_size(), lambda: held[0])  # type: ignore[attr-defined]


def method(name: str, fam: windows.Family, settings: Any, cohort: int, mix: str) -> Any:
    """FedAvg, or HeteroFL with levels drawn anew each round."""
    if name == "fedavg":
        return fedavg.make(fam, settings, cohort=cohort)
    return heterofl.make(fam, settings, cohort=cohort, proportions=parse_mix(mix).proportions)


def settings(**changes: Any) -> Any:
    """One epoch of plain SGD in batches of 20."""
    return local(**{"learning_rate": 0.01, "batch_size": 20, "epochs": 1} | changes)


def context_of(shard: Any, sent: Any = (), client: Any = 0) -> ClientContext:
    """What a client knows that trains at full size, without memory."""
    key = jax.random.fold_in(jax.random.key(1), client)
    return ClientContext(key, jnp.int32(0), 0, shard, (), sent, {})


def training_flops(fam: windows.Family, level: int) -> int:
    """Floating-point operations of one example's step: multiply-adds x 2, no gradient of the first layer's input."""
    cost = costs(fam)
    return 2 * int(3 * cost.macs[level] - cost.first_macs[level])


def flags(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side (median)")
    parser.add_argument("--name", help="name of the result files")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; compiled programs are kept between runs."""
    given = parser.parse_args()
    machine.use_cache()
    return given


def keep(name: str, title: str, rows: Sequence[Row], about: Mapping[str, Any], draw: Callable[[Any], None]) -> None:
    """Print a table and write it as JSON and PNG under ``results/``, with command, versions, device and date."""
    from matplotlib.figure import Figure

    RESULTS.mkdir(exist_ok=True)
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    module = Path(sys.argv[0]).stem
    command = " ".join(["python -m", f"experiments.throughput.{module}", *sys.argv[1:]])
    environment = tables.environment(jax.device_count()) | {"cores": len(affinity), "command": command, **about}
    environment["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_json(RESULTS / f"{name}.json", {"title": title, **environment, "rows": list(rows)})
    table = Table(title=f"{title} ({environment['device']}, {len(affinity)} core(s), jax {environment['jax']})")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=170).print(table)
    figure = Figure(figsize=(7.2, 0.9 + 0.38 * max(6, len(rows))), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title, fontsize=10)
    figure.savefig(RESULTS / f"{name}.png", dpi=130)
    print(f"written to {RESULTS.relative_to(Path.cwd()) if _inside() else RESULTS}/{name}.json, .png")


def _inside() -> bool:
    return RESULTS.is_relative_to(Path.cwd())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def bars(axes: Any, labels: Sequence[str], values: Sequence[float], label: str) -> None:
    """Horizontal bars, the first row on top."""
    places = np.arange(len(labels))[::-1]
    axes.barh(places, values, color="#1b6ca8")
    axes.set(yticks=places, yticklabels=labels, xlabel=label)
    for place, value in zip(places, values):
        axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)

"""Masked means of client models: gigabytes a second, and the ratio to ``jnp.sum`` over the same bytes.

    taskset -c 0 python -m experiments.throughput.aggregation
    python -m experiments.throughput.aggregation --clients 10 100 --millions 0.1 1.66 10

Rules: ``heterofl`` (five widths, class rows), ``mean`` (five widths), ``one level``, ``depth`` (four prefixes), and
``clusters`` (k = 4 sums). ``stacked`` reads client models that lie in memory at their true shapes; ``streaming`` adds
them as a round does: one at a time on a CPU, 64 at a time on an accelerator. Cells above half of the memory are
skipped and named.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.throughput import common
from experiments.throughput.compare import Residual
from hetfl_jax.core import tree
from hetfl_jax.engine.runners import add_reply
from hetfl_jax.models import families, windows
from hetfl_jax.parts.merge import mean_of_stacks

CNN_MILLIONS = 1.66337  #: parameters of the FedAvg CNN, in millions
CLUSTERS = 4
AT_ONCE = 64  #: replies that a round on an accelerator adds together


def cnn(millions: float, mix: str) -> windows.Family:
    """The FedAvg CNN with its layers scaled to about this many million parameters."""
    scale = (millions / CNN_MILLIONS) ** 0.5
    return common.family("cnn", mix, hidden=tuple(max(16, round(h * scale / 16) * 16) for h in (32, 64, 512)))


def depth(millions: float) -> windows.Family:
    """Four residual blocks, of which a level holds a prefix; its size is what it is."""
    levels = [{"depth": d} for d in (4, 3, 2, 1)]
    return families.family(Residual(), levels, jnp.zeros((1, 16, 16, 32)), masked=False)


def stacks(fam: windows.Family, clients: int) -> list[Any]:
    """One stack a level, the clients dealt evenly."""
    counts = [len(part) for part in np.array_split(np.arange(clients), fam.levels)]
    return [jax.tree.map(lambda s, c=c: jnp.full((c, *s.shape), 0.5), fam.shapes[i]) for i, c in enumerate(counts)]


def stacked(fam: windows.Family, trees: list[Any], rows: bool) -> Callable[[], Any]:
    """The masked mean of stacks."""
    weights = [jnp.ones(jax.tree.leaves(t)[0].shape[0]) for t in trees]
    classes = [jnp.ones((w.shape[0], 10), bool) for w in weights] if rows else None
    mean = jax.jit(partial(mean_of_stacks, fam))
    return lambda: mean(trees, weights, classes)


def added(stack: Any, member: Any, zero: Any) -> Any:
    """``zero`` plus all replies of a stack, in the order and number in which a round adds them."""
    clients = jax.tree.leaves(stack)[0].shape[0]
    if jax.default_backend() == "cpu":
        return jax.lax.fori_loop(0, clients, lambda i, total: add_reply(*tree.take((stack, member), i), total), zero)
    each = min(AT_ONCE, clients)
    whole, rest = divmod(clients, each)

    def part(start: Any, size: int) -> tuple[Any, Any]:
        return jax.tree.map(lambda v: jax.lax.dynamic_slice_in_dim(v, start, size), (stack, member))

    total = jax.lax.fori_loop(0, whole, lambda i, total: add_reply(*part(i * each, each), total), zero)
    return add_reply(*part(whole * each, rest), total) if rest else total


def zeros(stack: Any, k: int) -> Any:
    """Accumulators of k models."""
    return jax.tree.map(lambda s: jnp.zeros((k, *s.shape[1:]), s.dtype), stack)


def streaming(fam: windows.Family, trees: list[Any]) -> Callable[[], Any]:
    """The same sums as replies come, widened once a level."""

    @jax.jit
    def run(trees: list[Any]) -> Any:
        total = None
        for level, stack in enumerate(trees):
            member = jnp.zeros(jax.tree.leaves(stack)[0].shape[0], jnp.int32)
            wide = windows.widen(fam, tree.take(added(stack, member, zeros(stack, 1)), 0), level)
            total = wide if total is None else jax.tree.map(jnp.add, total, wide)
        return total

    return lambda: run(trees)


def clusters(trees: list[Any], k: int, together: bool) -> Callable[[], Any]:
    """k sums, each reply added to the row of its cluster, as a bank of k models does; ``together``: from one stack."""
    stack, clients = trees[0], jax.tree.leaves(trees[0])[0].shape[0]
    add = add_reply if together else added
    run = jax.jit(lambda stack, member: add(stack, member, zeros(stack, k)))
    member = jnp.arange(clients) % k
    return lambda: run(stack, member)


def sides(millions: float, clients: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is measured at one size: (function, bytes that it reads)."""
    five, one, deep = cnn(millions, "a1-b1-c1-d1-e1"), cnn(millions, "a1"), depth(millions)
    each = {name: stacks(fam, clients) for name, fam in (("five", five), ("one", one), ("deep", deep))}
    size = {name: tree.nbytes(trees) for name, trees in each.items()}
    return {
        "one level, stacked": (stacked(one, each["one"], False), size["one"]),
        "one level, streaming": (streaming(one, each["one"]), size["one"]),
        "five levels, stacked": (stacked(five, each["five"], False), size["five"]),
        "five levels, streaming": (streaming(five, each["five"]), size["five"]),
        "HeteroFL with class rows, stacked": (stacked(five, each["five"], True), size["five"]),
        "depth levels, stacked": (stacked(deep, each["deep"], False), size["deep"]),
        "cluster sums, k = 1, stacked": (clusters(each["one"], 1, True), size["one"]),
        f"cluster sums, k = {CLUSTERS}, stacked": (clusters(each["one"], CLUSTERS, True), size["one"]),
        "cluster sums, k = 1, streaming": (clusters(each["one"], 1, False), size["one"]),
        f"cluster sums, k = {CLUSTERS}, streaming": (clusters(each["one"], CLUSTERS, False), size["one"]),
    }


def measure(millions: float, clients: int, repeats: int) -> list[common.Row]:
    """All rules at one size, each in turn with a plain sum over as many bytes."""
    rows = []
    total = jax.jit(jnp.sum)
    for name, (run, size) in sides(millions, clients).items():
        flat = jnp.full(size // 4, 0.5)
        s = common.medians({"rule": run, "sum": lambda flat=flat: total(flat)}, repeats)
        rows.append(
            {
                "rule": name,
                "clients": clients,
                "parameters": millions,
                "MB": size / 1e6,
                "ms": 1e3 * s["rule"],
                "GB/s": size / s["rule"] / 1e9,
                "sum GB/s": size / s["sum"] / 1e9,
                "ratio": s["sum"] / s["rule"],
            }
        )
    return rows


def main() -> None:
    """Measure every size that fits."""
    parser = common.flags(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 128, 1000])
    parser.add_argument("--millions", type=float, nargs="+", default=[0.1, 1.66, 10.0], help="parameters, in millions")
    given = common.begin(parser)
    stats = jax.devices()[0].memory_stats() or {}
    memory = int(stats.get("bytes_limit", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    rows: list[common.Row] = []
    for millions in given.millions:
        for clients in given.clients:
            need = 4e6 * millions * clients * 3  # one level, five levels, and the plain sum's
            if need > memory / 2:
                print(f"skipped: {clients} clients of {millions} M parameters need {need / 1e9:.1f} GB")
                continue
            rows += measure(millions, clients, given.repeats)

    def draw(axes: Any) -> None:
        largest = [row for row in rows if row["MB"] > 50] or rows
        labels = [f"{row['rule']}, {row['clients']} x {row['parameters']} M" for row in largest]
        common.bars(axes, labels, [row["ratio"] for row in largest], "rate over that of a plain sum")

    common.keep(given.name or "aggregation", "Aggregation", rows, {}, draw)


if __name__ == "__main__":
    main()

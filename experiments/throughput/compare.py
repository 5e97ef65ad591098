"""Rounds against what they must be compared with: a loop, the bare products, narrower and shallower clients.

    taskset -c 0 python -m experiments.throughput.compare

Each row is a ratio of two sides that took turns in one process; "allowed" is what this project holds itself to on one
CPU core. ``--only NAME ...`` picks rows.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.throughput import common
from hetfl_jax.core import tree
from hetfl_jax.core.types import Shard
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg, heterofl
from hetfl_jax.models import families
from hetfl_jax.models.costs import costs
from hetfl_jax.models.layers import conv_layer, dense_layer
from hetfl_jax.parts.merge import overlap_mean
from hetfl_jax.run.mix import parse_buckets, parse_mix

FIVE = "a1-b1-c1-d1-e1"
COHORT, CLIENTS, EXAMPLES, BATCH = 100, 1_000, 60, 20


def plain(net: str, cohort: int = COHORT, **local: Any) -> tuple[Any, common.Bench]:
    """FedAvg at full size on one device."""
    fam = common.family(net)
    algorithm = fedavg.make(fam, common.settings(batch_size=BATCH, **local), cohort=cohort)
    pop = common.data(common.SHAPES[net], CLIENTS, EXAMPLES)
    return algorithm, common.bench(algorithm, pop, executor("bucketed"))


def cnn_roof(repeats: int) -> common.Row:
    """FedAvg CNN: its rate over a matrix product's."""
    _, bench = plain("cnn")
    product, flops = common.matmul()
    s = common.medians({"round": bench.round, "matmul": product}, repeats)
    work = common.training_flops(common.family("cnn"), 0) * COHORT * EXAMPLES
    return _row("FedAvg CNN: rate over the matmul roof", (work / s["round"]) / (flops / s["matmul"]), ">=", 0.55, s)


def cnn_loop(repeats: int) -> common.Row:
    """The same round against a Python loop over one jitted client update."""
    algorithm, bench = plain("cnn")
    return _row("FedAvg CNN: round over a Python loop", *_against_loop(algorithm, bench, repeats), "<=", 1.1)


def _against_loop(algorithm: Any, bench: common.Bench, repeats: int) -> tuple[float, dict[str, float]]:
    pop = common.data(common.SHAPES["cnn"], CLIENTS, EXAMPLES)
    server = jax.tree.map(jnp.copy, bench.state().server)  # the round reuses its state's buffers
    sent = algorithm.send(server, jnp.int32(0))

    @jax.jit
    def update(client: jax.Array, sent: Any, pop: Any) -> Any:
        shard = Shard(pop.x, pop.y, pop.rows, pop.offset[client], pop.size[client], pop.classes[client])
        return algorithm.client(common.context_of(shard, sent, client)).total

    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)

    def loop() -> Any:
        total = update(0, sent, pop)
        for client in range(1, COHORT):
            total = add(total, update(client, sent, pop))
        return total

    s = common.medians({"round": bench.round, "loop": loop}, repeats)
    return s["round"] / s["loop"], s


def mlp_products(repeats: int) -> common.Row:
    """FedAvg MLP against its per-client products alone, each client with weights of its own."""
    _, bench = plain("mlp")
    steps = EXAMPLES // BATCH
    key = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(key[0], (BATCH, 784)) / 28
    w1, w2 = jax.random.normal(key[1], (COHORT, 784, 200)), jax.random.normal(key[2], (COHORT, 200, 10))

    @jax.jit
    def products(x: jax.Array, w1: jax.Array, w2: jax.Array) -> Any:
        def step(_: Any, carry: Any) -> Any:
            a, b = carry
            hidden = x @ a
            out = hidden @ b
            return x.T @ (out @ b.T), hidden.T @ out

        def client(i: Any, carry: Any) -> Any:
            return jax.lax.fori_loop(0, steps, step, (w1[i], w2[i]))

        return jax.lax.fori_loop(0, COHORT, client, (w1[0], w2[0]))

    s = common.medians({"round": bench.round, "products": lambda: products(x, w1, w2)}, 10 * repeats)
    return _row("FedAvg MLP: time of its products over the round", s["products"] / s["round"], ">=", 0.6, s)


def width_mix(repeats: int) -> common.Row:
    """HeteroFL CNN with five widths, exactly a fifth of the cohort each, against all at full width."""
    fam, full = common.family("cnn", FIVE), common.family("cnn")
    every = parse_mix(FIVE)
    options = {"cohort": COHORT, "assignment": "fixed"}
    mixed = heterofl.make(fam, common.settings(), proportions=every.proportions, **options)
    same = heterofl.make(full, common.settings(), proportions=(1,), **options)
    pop = common.data(common.SHAPES["cnn"], COHORT, EXAMPLES, levels=5)
    sides = {
        "a1": common.bench(same, common.data(common.SHAPES["cnn"], COHORT, EXAMPLES), executor("bucketed")).round,
        "five": common.bench(mixed, pop, executor("bucketed", buckets=parse_buckets("a-b-c-de", every))).round,
    }
    s = common.medians(sides, repeats)
    macs = costs(fam).macs
    s["multiply-adds"] = float(macs.mean() / macs[0])
    return _row("HeteroFL CNN: a1-b1-c1-d1-e1 over a1", s["five"] / s["a1"], "<=", 0.42, s)


class Residual(nn.Module):
    """Four pre-activation blocks of 32 channels at 16x16 with an exit each; its depth is a field."""

    depth: int = 4
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, 16, 16, 32] -> [depth, B, C]."""
        exits = []
        for block in range(self.depth):
            y = conv_layer(nn.relu(x), 32, 3, bias=False, name=f"block{block}_conv0")
            x = x + conv_layer(nn.relu(y), 32, 3, bias=False, name=f"block{block}_conv1")
            exits.append(dense_layer(x.mean((1, 2)), self.classes, name=f"block{block}_exit"))
        return jnp.stack(exits)


def depth_mix(repeats: int) -> common.Row:
    """Clients of depths 1 to 4, a quarter each, against all at depth 4, over the ratio of their multiply-adds."""
    shape, cohort = (16, 16, 32), 40
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2_000, *shape)).astype(np.float32))

    def side(depths: tuple[int, ...]) -> tuple[Any, common.Bench]:
        fam = families.family(Residual(), [{"depth": d} for d in depths], x[:1], masked=False)
        pop = common.data((1,), cohort, EXAMPLES, levels=len(depths), pool=2_000)._replace(x=x)
        return fam, common.bench(fedavg.make(fam, common.settings(), cohort=cohort), pop, executor("bucketed"))

    fam, mixed = side((4, 3, 2, 1))
    _, deep = side((4,))
    s = common.medians({"mixed": mixed.round, "depth 4": deep.round}, repeats)
    macs = costs(fam).macs
    s["multiply-adds"] = float(macs.mean() / macs[0])
    ratio = s["mixed"] / s["depth 4"] / s["multiply-adds"]
    return _row("Depths 1-4 over depth 4, over their multiply-adds", ratio, "<=", 1.15, s)


def aggregation_share(repeats: int) -> common.Row:
    """Weighing, checking and adding each client's reply in the loop, and settling, over the CNN's round."""
    _, bench = plain("cnn")
    rule = overlap_mean(common.family("cnn"))
    variables = jax.tree.map(jnp.copy, bench.state().server.variables)
    shard = Shard(None, None, None, 0, jnp.int32(EXAMPLES), jnp.ones(10, bool))

    @jax.jit
    def merge(variables: Any) -> Any:
        def one(i: Any, total: Any) -> Any:
            delta = jax.tree.map(lambda v: v * i, variables)  # another reply each time, made while it is weighed
            reply = tree.select(tree.finite(delta), rule.lift(delta, common.context_of(shard)), zero)
            return jax.tree.map(jnp.add, total, reply)

        zero = jax.tree.map(jnp.zeros_like, rule.lift(variables, common.context_of(shard)))
        return rule.settle(jax.lax.fori_loop(0, COHORT, one, zero))

    s = common.medians({"round": bench.round, "merge": lambda: merge(variables)}, repeats)
    return _row("Streaming aggregation: share of the CNN's round", s["merge"] / s["round"], "<=", 0.03, s)


def zero_steps(repeats: int) -> common.Row:
    """A round without local steps: what the library itself costs."""
    fam = families.family(common.build("mlp", hidden=()), [{"width": 1.0}], jnp.zeros((1, 60)))
    algorithm = fedavg.make(fam, common.settings(epochs=0), cohort=10)
    bench = common.bench(algorithm, common.data((60,), CLIENTS, EXAMPLES), executor("bucketed"))
    s = common.medians({"round": bench.round}, 100 * repeats)
    return _row("Round without local steps, MLP 60-10, ms", 1e3 * s["round"], "<=", 1.5, s)


def compilations(repeats: int) -> common.Row:
    """Programs compiled after the first round, cohort and levels drawn anew each round."""
    fam = common.family("mlp", FIVE)
    algorithm = common.method("heterofl", fam, common.settings(), 10, FIVE)
    bench = common.bench(algorithm, common.data((784,), CLIENTS, EXAMPLES), executor("bucketed"))
    before = bench.programs()
    levels = {tuple(np.sort(np.asarray(bench.round().items.level)).tolist()) for _ in range(20)}
    after = float(bench.programs() - before)
    return _row("Compilations in 20 rounds after the first", after, "<=", 0, {"level counts seen": float(len(levels))})


def _row(name: str, value: float, *rest: Any) -> common.Row:
    seconds, relation, bar = (rest[2], rest[0], rest[1]) if isinstance(rest[2], dict) else rest
    fine = value >= bar if relation == ">=" else value <= bar
    measured = ", ".join(f"{k} {v:.4g}" for k, v in seconds.items())
    return {"what": name, "value": value, "allowed": f"{relation} {bar}", "met": "yes" if fine else "NO", "s": measured}


ROWS: dict[str, Callable[[int], common.Row]] = {
    "cnn_roof": cnn_roof,
    "cnn_loop": cnn_loop,
    "mlp_products": mlp_products,
    "width_mix": width_mix,
    "depth_mix": depth_mix,
    "aggregation_share": aggregation_share,
    "zero_steps": zero_steps,
    "compilations": compilations,
}


def main() -> None:
    """Measure the rows that are asked for."""
    parser = common.flags(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    given = common.begin(parser)
    rows = [ROWS[name](given.repeats) for name in given.only]

    def draw(axes: Any) -> None:
        common.bars(axes, [row["what"] for row in rows], [row["value"] for row in rows], "value")

    common.keep(given.name or "compare", "Rounds against their yardsticks", rows, {"executor": "bucketed"}, draw)


if __name__ == "__main__":
    main()

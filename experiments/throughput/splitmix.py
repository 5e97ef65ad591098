"""Base nets of Split-Mix against a HeteroFL level of the same width, and attacked against clean training.

    taskset -c 0 python -m experiments.throughput.splitmix

``bases``: two clients train all eight bases of width 1/8, against HeteroFL with one level of that width and as many
items of as many images; the ratio of their rates, bar 0.8. ``programs``: compilations of rounds with eight bases,
bar 1. ``PGD-7``: a step on images attacked in seven steps against a clean one, bar 8.5; ``both losses`` has the clean
pass too.
"""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.throughput import common
from hetfl_jax.data import preprocess
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg, heterofl, splitmix
from hetfl_jax.models import build, families, windows
from hetfl_jax.parts.adversary import pgd
from hetfl_jax.parts.compose import Slots


def family(width: float, **fields: Any) -> windows.Family:
    """The net for digits at a share of its full width."""
    hidden = tuple(int(width * full) for full in (64, 64, 128, 2048, 512))
    prepare = preprocess.images([0.5], [0.25])
    example = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.uint8)
    return families.family(build("digits_cnn", hidden=hidden, **fields), [{"width": 1.0}], example, prepare)


def bases(given: Any) -> list[common.Row]:
    """Rounds of sixteen items: eight bases of two clients, or sixteen clients of HeteroFL."""
    fam, settings, run = family(1 / 8), common.settings(batch_size=given.batch, steps=given.steps), executor("bucketed")
    mixed = splitmix.make(fam, settings, cohort=2, clients=2, base_width=1 / 8, budgets="1")
    level = heterofl.make(fam, settings, cohort=16, proportions=(1,), mask=False)
    size = given.batch * given.steps
    sides = {
        "Split-Mix": common.bench(mixed, common.data((28, 28, 1), 2, size, pool=2 * size), run),
        "HeteroFL": common.bench(level, common.data((28, 28, 1), 16, size, pool=16 * size), run),
    }
    s = common.medians({name: side.round for name, side in sides.items()}, given.repeats)
    rate = s["HeteroFL"] / s["Split-Mix"]
    return [
        {"what": "bases", "s": s["Split-Mix"], "against s": s["HeteroFL"], "value": rate, "bar": ">= 0.8",
         "holds": "yes" if rate >= 0.8 else "no"},
        {"what": "programs", "s": None, "against s": None, "value": sides["Split-Mix"].programs(), "bar": "1",
         "holds": "yes" if sides["Split-Mix"].programs() == 1 else "no"},
    ]  # fmt: skip


def attacks(given: Any) -> list[common.Row]:
    """A client's steps with and without an attack, at a quarter of the full width."""
    fam, settings, run = family(1 / 4), common.settings(batch_size=given.batch, steps=given.steps), executor("bucketed")
    weights = {"clean": 0.0, "PGD-7": 1.0, "both losses": 0.5}
    size = given.batch * given.steps
    pop = common.data((28, 28, 1), 1, size, pool=size)
    sides = {
        name: common.bench(
            fedavg.make(fam, settings, cohort=1, slots=Slots(adversary=pgd(weight=weight)) if weight else None),
            pop,
            run,
        ).round
        for name, weight in weights.items()
    }
    s = common.medians(sides, given.repeats)
    return [
        {"what": name, "s": s[name], "against s": s["clean"], "value": s[name] / s["clean"], "bar": bar,
         "holds": "-" if bar == "-" else "yes" if s[name] <= 8.5 * s["clean"] else "no"}
        for name, bar in (("PGD-7", "<= 8.5"), ("both losses", "-"))
    ]  # fmt: skip


def main() -> None:
    """Time both."""
    parser = common.flags(__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    given = common.begin(parser)
    rows = [*bases(given), *attacks(given)]

    def draw(axes: Any) -> None:
        common.bars(axes, [row["what"] for row in rows], [row["value"] for row in rows], "ratio of times, or programs")

    about = {"batch": given.batch, "steps": given.steps}
    common.keep(given.name or "splitmix", "Split-Mix and attacks", rows, about, draw)


if __name__ == "__main__":
    main()

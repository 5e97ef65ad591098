"""The constants by which ``train.buckets=auto`` chooses, measured on this device.

taskset -c 0 python -m experiments.throughput.constants

A local step of c clients at once is taken to cost ``launch * layers + c * multiply-adds / rate``. Rounds of the CNN at
its full and at its least width give two equations for the two; the time to compile the latter is the third constant.
"""

from typing import NamedTuple

import jax
import numpy as np

from experiments.throughput import common
from hetfl_jax.engine.constants import CONSTANTS
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg
from hetfl_jax.models import build
from hetfl_jax.models.costs import costs
from hetfl_jax.models.layers import active_channels
from hetfl_jax.run.ledger import BACKWARD

CLIENTS, EXAMPLES, BATCH, LEAST = 20, 60, 20, 0.0625


class Steps(NamedTuple):
    """What was measured of the two families."""

    seconds: np.ndarray  #: [2] of a local step
    work: np.ndarray  #: [2] multiply-adds of it
    layers: int
    compile_seconds: float


def steps_of(net: str, repeats: int) -> Steps:
    """A local step of a net at full and at least width."""
    at_once = 1 if jax.default_backend() == "cpu" else CLIENTS
    steps = EXAMPLES // BATCH * CLIENTS / at_once
    full = build(net).hidden
    families = {
        width: common.family(net, "a1", hidden=tuple(active_channels(size, width) for size in full))
        for width in (1.0, LEAST)
    }
    people = common.data(common.SHAPES[net], CLIENTS, EXAMPLES)
    sides = {
        str(width): common.bench(fedavg.make(fam, common.settings(batch_size=BATCH), cohort=CLIENTS), people,
                                 executor("bucketed", at_once))
        for width, fam in families.items()
    }  # fmt: skip
    seconds = common.medians({name: side.round for name, side in sides.items()}, repeats)
    price = {width: costs(fam) for width, fam in families.items()}
    work = [at_once * float(price[width].macs[0]) * (1 + BACKWARD) * BATCH for width in families]
    return Steps(
        np.array([seconds[name] / steps for name in sides]), np.array(work), int(price[1.0].layers.max()),
        sides[str(LEAST)].compile_seconds,
    )  # fmt: skip


def kind_of_device() -> str:
    """As ``CONSTANTS`` calls it."""
    return {"cpu": "cpu", "gpu": "gpu"}.get(jax.default_backend(), "tpu")


def rows_of(found: Steps) -> list[common.Row]:
    """The constants beside those that are in use."""
    slope = (found.seconds[0] - found.seconds[1]) / (found.work[0] - found.work[1])
    values = {"launch": float(found.seconds[1] - slope * found.work[1]) / found.layers, "rate": float(1 / slope),
              "program": found.compile_seconds}  # fmt: skip
    used = CONSTANTS[kind_of_device()]._asdict()
    return [{"constant": name, "measured": value, "in use": used[name]} for name, value in values.items()]


def measured(repeats: int, net: str = "cnn") -> list[common.Row]:
    """The rows of a device, without files."""
    return rows_of(steps_of(net, repeats))


def main() -> None:
    """Measure, print and keep them beside those that are in use."""
    given = common.begin(common.flags(__doc__))
    kind, found = kind_of_device(), steps_of("cnn", given.repeats)
    common.keep(
        given.name or f"constants_{kind}",
        f"Constants of buckets, {kind}",
        rows_of(found),
        {},
        lambda axes: draw(axes, found.seconds, found.work),
    )


def draw(axes: object, each: np.ndarray, work: np.ndarray) -> None:
    """The two measured steps, and the line through them."""
    axes.plot(work, 1e3 * each, marker="o")  # type: ignore[attr-defined]
    axes.set(xlabel="multiply-adds of a local step", ylabel="ms", xlim=(0, None), ylim=(0, None))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()

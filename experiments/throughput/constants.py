"""The constants by which ``train.buckets=auto`` chooses, measured on this device.

taskset -c 0 python -m experiments.throughput.constants

A local step of c clients at once is taken to cost ``launch * layers + c * multiply-adds / rate``. Rounds of the CNN at
its full and at its least width give two equations for the two; the time to compile the latter is the third constant.
"""

import jax
import numpy as np

from experiments.throughput import common
from hetfl_jax.engine.constants import CONSTANTS
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg
from hetfl_jax.models.costs import costs
from hetfl_jax.run.ledger import BACKWARD

CLIENTS, EXAMPLES, BATCH, LEAST = 20, 60, 20, 0.0625


def main() -> None:
    """Measure, print and keep them beside those that are in use."""
    given = common.begin(common.flags(__doc__))
    kind = {"cpu": "cpu", "gpu": "gpu"}.get(jax.default_backend(), "tpu")
    at_once = 1 if kind == "cpu" else CLIENTS
    steps = EXAMPLES // BATCH * CLIENTS / at_once
    families = {width: common.family("cnn", f"w{width}x1") for width in (1.0, LEAST)}
    people = common.data((28, 28, 1), CLIENTS, EXAMPLES)
    sides = {
        str(width): common.bench(fedavg.make(fam, common.settings(batch_size=BATCH), cohort=CLIENTS), people,
                                 executor("bucketed", at_once))
        for width, fam in families.items()
    }  # fmt: skip
    seconds = common.medians({name: side.round for name, side in sides.items()}, given.repeats)
    each = np.array([seconds[name] / steps for name in sides])
    price = {width: costs(fam) for width, fam in families.items()}
    work = np.array([at_once * float(price[width].macs[0]) * (1 + BACKWARD) * BATCH for width in families])
    layers = int(price[1.0].layers.max())
    slope = (each[0] - each[1]) / (work[0] - work[1])
    found = {"launch": float(each[1] - slope * work[1]) / layers, "rate": float(1 / slope),
             "program": sides[str(LEAST)].compile_seconds}  # fmt: skip
    used = CONSTANTS[kind]._asdict()
    rows = [{"constant": name, "measured": found[name], "in use": used[name]} for name in found]
    common.keep(
        given.name or f"constants_{kind}",
        f"Constants of buckets, {kind}",
        rows,
        {},
        lambda axes: draw(axes, each, work),
    )


def draw(axes: object, each: np.ndarray, work: np.ndarray) -> None:
    """The two measured steps, and the line through them."""
    axes.plot(work, 1e3 * each, marker="o")  # type: ignore[attr-defined]
    axes.set(xlabel="multiply-adds of a local step", ylabel="ms", xlim=(0, None), ylim=(0, None))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()

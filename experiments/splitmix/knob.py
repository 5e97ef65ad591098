"""Clean against attacked accuracy as the knob between the branches of the norms turns, at two widths.

    taskset -c 0 python -m experiments.splitmix.knob

MNIST at 14 x 14, 8 iid clients of 250 images, all in every round, four base nets of width 1/4; half of the clients can
train two of them, half all four. Training is half clean, half attacked (PGD, 7 steps, within ``--epsilon``); every norm
has a clean and a noise branch, and at the knob's value lambda it gives ``(1 - lambda)`` of the one and lambda of the
other. The attack is on the very ensemble that is judged. Writes results/knob.json and .png; runs that
are done are kept in runs/experiments.
"""

from typing import Any

import numpy as np

from experiments.kept import once
from experiments.splitmix import common

KNOBS = (0.0, 0.2, 0.5, 0.8, 1.0)
TIERS = ("x1", "x0.25")


def scores(seed: int, given: Any, data: Any) -> dict[str, dict[str, list[float]]]:
    """Tier -> clean and robust -> accuracy at every knob."""
    target = f"splitmix_digits:robust,domains=plain,rounds={given.rounds},examples={given.examples}"
    changes = (
        "family.mix=w0.25x1", "data.clients=8", "method.args.cohort=8", "method.args.budgets=2-1",
        "method.args.bases=(4,1)", f"train.learning_rate={given.rate}", f"run.eval_every={given.rounds}",
        f"adversary.args.epsilon={given.epsilon}", f"adversary.args.step={1.25 * given.epsilon / 7}",
    )  # fmt: skip
    about = {"target": target, "changes": changes, "seed": seed}
    last = once("splitmix_knob", about, lambda: common.last_scores(target, seed, data, *changes))
    names = ["", *(f"lambda{knob:g}_" for knob in KNOBS[1:])]
    return {
        tier: {
            kind: [last[f"{before}{name}accuracy"][tier] for name in names]
            for kind, before in (("clean", ""), ("robust", "robust_"))
        }
        for tier in TIERS
    }


def main() -> None:
    """Run all seeds."""
    parser = common.flags(__doc__, rounds=40)
    parser.add_argument("--examples", type=int, default=2_000, help="training and test images")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--epsilon", type=float, default=0.1, help="how far a pixel of [0, 1] may move")
    given = common.begin(parser)
    data = common.images()
    seeds = [scores(seed, given, data) for seed in range(given.seeds)]
    of = lambda tier, kind: np.array([s[tier][kind] for s in seeds])  # noqa: E731

    def draw(axes: Any) -> None:
        for tier in TIERS:
            clean, robust = (100 * of(tier, kind).mean(0) for kind in ("clean", "robust"))
            axes.plot(clean, robust, marker="o", label=f"{tier}, lambda 0 to 1")
            for knob, x, y in zip(KNOBS, clean, robust):
                axes.annotate(f"{knob:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set(xlabel="clean test accuracy (%)", ylabel="test accuracy under attack (%)")

    common.keep(given.name or "knob", {"seeds": seeds, "knobs": KNOBS}, vars(given), draw)
    rows = {f"{tier}, {kind}": of(tier, kind).T.tolist() for tier in TIERS for kind in ("clean", "robust")}
    common.print_table("width, images", [f"lambda {knob:g}" for knob in KNOBS], rows)


if __name__ == "__main__":
    main()

"""Accuracy over widths on five digit domains, budgets that go with the domains: Split-Mix, SHeteroFL, FedAvg.

    taskset -c 0 python -m experiments.splitmix.domains

MNIST at 14 x 14 in five domains (plain, inverted, rotated, noisy, at half the resolution) x 4 clients of 200 images,
all in every round; a client's budget is x1/8, x1/4, x1/2 or x1, the last domains have the largest. FedAvg is one run a
width, which every client can afford. A score is the mean over clients of the accuracy on their own test data, in
batches of one client whose statistics the norms use. Writes results/domains.json and .png; runs that are done are kept
in runs/experiments.
"""

from typing import Any

import numpy as np

from experiments.kept import once
from experiments.splitmix import common

WIDTHS = ("0.125", "0.25", "0.5", "1")
#: rows: arguments of the config, and where the four widths stand in a run (FedAvg has a run a width)
ROWS = {
    "Split-Mix": [("method=splitmix", {w: f"x{w}" for w in WIDTHS})],
    "SHeteroFL": [("method=sheterofl", dict(zip(WIDTHS, "dcba")))],
    "SHeteroFL, counted once": [("method=sheterofl,once", dict(zip(WIDTHS, "dcba")))],
    "FedAvg": [(f"method=fedavg,width={w}", {w: f"w{w}"}) for w in WIDTHS],
}
CHANGES = ("data.clients=20", "method.args.cohort=20", "train.batch_size=20", "data.validation=0.0")


def scores(row: str, seed: int, given: Any, data: Any) -> dict[str, float]:
    """Mean accuracy over clients by width."""
    found: dict[str, float] = {}
    for text, tiers in ROWS[row]:
        counted = ("method.args.multiplicity=False",) if text.endswith("once") else ()
        rate = given.splitmix_rate if row == "Split-Mix" else given.rate
        target = f"splitmix_digits:{text.removesuffix(',once')},rounds={given.rounds},examples={given.examples}"
        changes = (*CHANGES, *counted, f"train.learning_rate={rate}", f"run.eval_every={given.rounds}")
        about = {"target": target, "changes": changes, "seed": seed}
        last = once("splitmix_domains", about, lambda t=target, c=changes: common.last_scores(t, seed, data, *c))
        last = last["local_accuracy"]
        found |= {width: last[tier] for width, tier in tiers.items()}
    return found


def main() -> None:
    """Run all rows over all seeds."""
    parser = common.flags(__doc__, rounds=40)
    parser.add_argument("--examples", type=int, default=4_000, help="training images of all domains together")
    parser.add_argument("--rate", type=float, default=0.1, help="of FedAvg and SHeteroFL")
    parser.add_argument("--splitmix-rate", type=float, default=0.1, help="of Split-Mix")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    given = common.begin(parser)
    data = common.images()
    found = {}
    for row in given.rows:
        found[row] = [scores(row, seed, given, data) for seed in range(given.seeds)]
        print(row, found[row], flush=True)

    def draw(axes: Any) -> None:
        for row, seeds in found.items():
            of = np.array([[100 * s[w] for w in WIDTHS] for s in seeds])
            spread = of.std(0, ddof=1) if len(of) > 1 else np.zeros(len(WIDTHS))
            axes.errorbar(range(len(WIDTHS)), of.mean(0), spread, marker="o", capsize=3, label=row)
        axes.set(xticks=range(len(WIDTHS)), xticklabels=[f"x{w}" for w in WIDTHS])
        axes.set(xlabel="width at evaluation", ylabel="mean test accuracy of the clients (%)")

    common.keep(given.name or "domains", found, vars(given), draw)
    rows = {row: [[s[w] for s in seeds] for w in WIDTHS] for row, seeds in found.items()}
    common.print_table("method", [f"x{w}" for w in WIDTHS], rows)


if __name__ == "__main__":
    main()

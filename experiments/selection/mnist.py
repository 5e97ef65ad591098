"""Power-of-Choice on MNIST with Dirichlet labels, and DivFL on MNIST by writer, against random selection.

    taskset -c 0 python -m experiments.selection.mnist

Writes results/choice_mnist.json, .png, divfl_mnist.json and .png.
"""

import time

from experiments.selection import curves

CHOICE = "choice_mnist:select="
SEED = "run.seed={seed}"
POWER = {
    "rand": (f"{CHOICE}random_with_replacement", SEED),
    "pow, d = 9": (f"{CHOICE}power_of_choice,d=9", SEED),
    "pow, d = 15": (f"{CHOICE}power_of_choice,d=15", SEED),
    "rpow, d = 50": (f"{CHOICE}power_of_choice,d=50", SEED, "select.args.kind=rpow"),
}
#: 10 of 539 writers, one linear layer, an epoch in batches of 10, weighed by examples
WRITERS = (
    "method.name=fedavg", "family.net=linear", "family.hidden=()", "train.steps=0", "train.batch_size=10",
    "train.learning_rate=0.01", "train.milestones=()", "train.weight_decay=0.0",
)  # fmt: skip
DIVERSE = {
    "random": (f"{CHOICE}uniform,split=natural,m=10", SEED, *WRITERS),
    "pow, d = 30": (f"{CHOICE}power_of_choice,split=natural,m=10,d=30", SEED, *WRITERS),
    "DivFL, stale": (f"{CHOICE}divfl,split=natural,m=10", SEED, *WRITERS),
    "DivFL, stale, 512 dimensions": (
        f"{CHOICE}divfl,split=natural,m=10", SEED, *WRITERS, "select.args.dimensions=512",
    ),
}  # fmt: skip


def main() -> None:
    """Both comparisons."""
    parser = curves.flags(__doc__, rounds=150)
    parser.add_argument("--divfl-rounds", type=int, default=60)
    given = parser.parse_args()
    began, title = time.perf_counter(), "MNIST, Dirichlet 0.3, 3 of 100 clients"
    curves.keep("choice_mnist", title, curves.runs_of(POWER, given, every=10), "rand", began)
    began, given.rounds = time.perf_counter(), given.divfl_rounds
    title = "MNIST by writer, 10 of 539"
    curves.keep("divfl_mnist", title, curves.runs_of(DIVERSE, given, every=5), "random", began)


if __name__ == "__main__":
    main()

"""Power-of-Choice's kinds and DivFL on Synthetic(1, 1), 30 devices: rounds to the loss that random selection ends with.

    taskset -c 0 python -m experiments.selection.synthetic

The data are drawn anew for each seed. Writes results/choice_synthetic.json, .png, divfl_synthetic.json and .png.
"""

import time

from experiments.selection import curves

CHOICE = "choice_synthetic:data_seed={seed},select="
SEED = "run.seed={seed}"
KIND = "select.args.kind="
#: Power-of-Choice's own settings: 3 of 30 devices, 30 steps of 50 examples
POWER = {
    "rand": (f"{CHOICE}random_with_replacement", SEED),
    "pow, d = 6": (f"{CHOICE}power_of_choice,d=6", SEED),
    "pow, d = 30": (f"{CHOICE}power_of_choice,d=30", SEED),
    "cpow, d = 6, b = 50": (f"{CHOICE}power_of_choice,d=6", SEED, f"{KIND}cpow", "select.args.examples=50"),
    "rpow, d = 30": (f"{CHOICE}power_of_choice,d=30", SEED, f"{KIND}rpow"),
    "adapow, d = 30": (f"{CHOICE}power_of_choice,d=30", SEED, f"{KIND}adapow", "select.args.every={half}"),
}
#: DivFL's: 5 of 30 devices, an epoch in batches of 10 at rate 0.01, weighed by examples
DIVFL = (
    "method.name=fedavg",
    "train.steps=0",
    "train.batch_size=10",
    "train.learning_rate=0.01",
    "train.milestones=()",
)
DIVERSE = {
    "random": (f"{CHOICE}uniform,m=5", SEED, *DIVFL),
    "pow, d = 15": (f"{CHOICE}power_of_choice,d=15,m=5", SEED, *DIVFL),
    "DivFL, stale": (f"{CHOICE}divfl,m=5", SEED, *DIVFL),
    "DivFL, full": (f"{CHOICE}divfl,m=5", SEED, *DIVFL, "select.args.gradients=full"),
    "DivFL, full, by clusters": (
        f"{CHOICE}divfl,m=5", SEED, *DIVFL, "select.args.gradients=full", "select.args.by=clusters",
    ),
}  # fmt: skip


def main() -> None:
    """Both comparisons."""
    parser = curves.flags(__doc__, rounds=800)
    parser.add_argument("--divfl-rounds", type=int, default=200)
    given = parser.parse_args()
    began, half = time.perf_counter(), str(given.rounds // 2)
    power = {name: tuple(text.replace("{half}", half) for text in row) for name, row in POWER.items()}
    title = "Synthetic(1, 1), 3 of 30 devices"
    curves.keep("choice_synthetic", title, curves.runs_of(power, given, every=10), "rand", began)
    began, given.rounds = time.perf_counter(), given.divfl_rounds
    title = "Synthetic(1, 1), 5 of 30 devices"
    curves.keep("divfl_synthetic", title, curves.runs_of(DIVERSE, given, every=5), "random", began)


if __name__ == "__main__":
    main()

"""What the experiments of this folder share: runs of several selections, the rounds they take, their costs, a plot."""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.federated import Line, cell, compact, markdown, play
from experiments.kept import once
from hetfl_jax.core import machine
from hetfl_jax.results.folder import leaves

RESULTS = Path(__file__).parent / "results"
DISTRIBUTIONS = ("client_accuracy", "local_accuracy")  #: of a line that are not kept
Runs = dict[str, list[list[Line]]]  #: of each selection, of each seed, a line an evaluated round


def flags(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of every experiment here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seeds", type=int, default=5)
    return parser


def runs_of(rows: dict[str, tuple[str, ...]], given: argparse.Namespace, every: int) -> Runs:
    """All rows over all seeds: a row is a config's name with arguments, then changes; ``{seed}`` is filled in.

    Runs that are done are kept in runs/experiments.
    """
    machine.use_cache()
    found: Runs = {}
    for name, (target, *changes) in rows.items():
        seeds = [[text.format(seed=seed) for text in (target, *changes)] for seed in range(given.seeds)]
        rounds = f"train.rounds={given.rounds}"
        found[name] = [
            once("selection", {"run": one, "rounds": rounds, "every": every},
                 partial(play, one[0], rounds, *one[1:], every=every, training_loss=True))
            for one in seeds
        ]  # fmt: skip
        last = [lines[-1] for lines in found[name]]
        print(name, cell([line["training_loss"] for line in last], 4), flush=True)
    return found


def rounds_to(lines: list[Line], loss: float) -> float:
    """The first evaluated round whose training loss is at most this; infinite if there is none."""
    return next((float(line["round"]) for line in lines if line["training_loss"] <= loss), float("inf"))


def table(found: Runs, baseline: str) -> str:
    """A row a selection: rounds to the loss that the baseline ends with (of the same seed), scores and bytes."""
    ends = [lines[-1]["training_loss"] for lines in found[baseline]]
    rows = []
    for name, seeds in found.items():
        taken = [rounds_to(lines, end) for lines, end in zip(seeds, ends)]
        reached = [t for t in taken if np.isfinite(t)]
        last = [lines[-1] for lines in seeds]
        own = [line["client_accuracy"] for line in last]
        rows.append([
            name,
            (cell(reached, 0) if reached else "-") + f" ({len(reached)} of {len(taken)})",
            cell([line["training_loss"] for line in last], 3),
            cell([100 * next(iter(line["accuracy"].values())) for line in last]),
            cell([100 * spread["worst_tenth"] for spread in own]),
            f"{np.mean([line['down_bytes'] for line in last]) / 1e6:.2f}",
            f"{np.mean([line['up_bytes'] for line in last]) / 1e6:.2f}",
        ])  # fmt: skip
    titles = ("rounds to its loss (seeds)", "training loss", "test accuracy %", "worst tenth %", "MB down", "MB up")
    return markdown(("selection", *titles), rows)


def draw(found: Runs, path: Path, title: str) -> None:
    """Training loss over rounds, mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, seeds in found.items():
        values = np.array([[line["training_loss"] for line in lines] for lines in seeds])
        axes.plot([line["round"] for line in seeds[0]], values.mean(0), label=name, linewidth=1.3)
    axes.set(xlabel="round", ylabel="loss over all training examples", yscale="log")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, which="both")
    figure.legend(frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=130)


def columns(lines: list[Line]) -> dict[str, list[Any]]:
    """A run's numbers as one list a name, over its evaluated rounds; what floats of 32 bits hold, 7 digits.

    >>> columns([{"round": 10, "loss": {"a": 0.25}}, {"round": 20, "loss": {"a": 0.1234567891}}])
    {'round': [10, 20], 'loss/a': [0.25, 0.1234568]}
    """
    flat = [leaves({k: v for k, v in line.items() if k not in DISTRIBUTIONS}, "/") for line in lines]
    short = lambda v: float(f"{v:.7g}") if isinstance(v, float) else v  # noqa: E731
    return {name: [short(line.get(name)) for line in flat] for name in flat[0]}


def keep(name: str, title: str, found: Runs, baseline: str, began: float) -> None:
    """Print the table; write numbers and plot."""
    RESULTS.mkdir(exist_ok=True)
    kept = {row: [columns(lines) for lines in seeds] for row, seeds in found.items()}
    seconds, text = round(time.perf_counter() - began), table(found, baseline)
    values = {"title": title, "seconds": seconds, "table": text, "runs": kept}
    (RESULTS / f"{name}.json").write_text(compact(values))
    draw(found, RESULTS / f"{name}.png", title)
    print(f"{text}\n\n{seconds} s")

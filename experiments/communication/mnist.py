"""Accuracy over bytes on MNIST, from finished runs or by running them.

    python -m experiments.communication.mnist --table fedlab        FedLab's row, config fedpaq_mnist
    python -m experiments.communication.mnist --table heterofl      five widths, with and without codecs
    python -m experiments.communication.mnist --table heterofl --changes train.rounds=5

Runs lie in ``runs/communication``; those that are finished are read. Writes ``results/<table>.json`` and ``.png``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.federated import cell, markdown
from hetfl_jax.core import machine
from hetfl_jax.results.folder import read_metrics, write_json
from hetfl_jax.run.config import load_config
from hetfl_jax.run.train import train

RESULTS = Path(__file__).parent / "results"
FIVE = "heterofl_mnist:mix=a1-b1-c1-d1-e1"
SMALL = ("family.net=mlp", "family.hidden=(200,)", "train.rounds=60", "train.epochs=2", "run.eval_every=10",
         "run.checkpoint_every=60", "method.args.assignment=fixed")  # fmt: skip
#: (config, further changes) of each run, by table
TABLES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "fedlab": {
        "float32": ("fedpaq_mnist", ()),
        "QSGD 4 bits": ("fedpaq_mnist:bits=4", ()),
        "QSGD 8 bits": ("fedpaq_mnist:bits=8", ()),
        "top 5 % + feedback": ("fedpaq_mnist:top=0.05", ()),
        "top 5 % alone": ("fedpaq_mnist:top=0.05,feedback=false", ()),
        "top 20 % alone": ("fedpaq_mnist:top=0.2,feedback=false", ()),
    },
    "heterofl": {
        "float32": (FIVE, SMALL),
        "QSGD 4 bits": (FIVE, (*SMALL, "uplink.name=qsgd", "uplink.args.levels=7", "uplink.args.scaling=max")),
        "top 5 % + feedback": (
            FIVE, (*SMALL, "uplink.name=top_k", "uplink.args.fraction=0.05", "uplink.error_feedback=True"),
        ),
    },
}  # fmt: skip
PUBLISHED = {"float32": (93.14, 302.45), "QSGD 4 bits": (93.03, 45.59), "QSGD 8 bits": (93.27, 85.06),
             "top 5 % alone": (11.35, 0.94), "top 20 % alone": (89.96, 3.79)}  # fmt: skip
#: messages that FedLab's figure for float32 counts: one model down and one up in each of 199 rounds, in MiB
MESSAGES, MEGABYTE = 398, 2**20


Lines = list[dict[str, Any]]


def run(table: str, name: str, seed: int, folder: Path, changes: list[str]) -> Lines:
    """The metrics lines of a run, which is done if it is not finished."""
    config, own = TABLES[table][name]
    slug = "".join(c if c.isalnum() else "_" for c in f"{table}_{name}_{seed}")
    places = (f"run.name={slug}", f"run.folder={folder}", f"run.seed={seed}")
    found = load_config(config, *own, *changes, *places, tell=lambda text: None)
    if not (folder / slug / "table.json").exists():
        train(found, quiet=True, overwrite=True)
    return read_metrics(folder / slug)


def row(name: str, seeds: list[Lines], cohort: int) -> dict[str, Any]:
    """Accuracies of the last round, one a seed, what was sent, and that as FedLab's table counts it."""
    ends = [[line for line in lines if "accuracy" in line][-1] for lines in seeds]
    last = ends[0]
    message = np.mean([end["up_bytes"] for end in ends]) / (last["round"] * cohort)
    return {
        "run": name,
        "rounds": last["round"],
        "accuracy": {level: [100 * end["accuracy"][level] for end in ends] for level in last["accuracy"]},
        "down MB": float(np.mean([end["down_bytes"] for end in ends]) / 1e6),
        "up MB": float(np.mean([end["up_bytes"] for end in ends]) / 1e6),
        "of float32": last.get("up_ratio", 1.0),
        "message bytes": float(message),
        "as counted there": float(MESSAGES * message / MEGABYTE),
        "seconds": [sum(line.get("seconds", 0.0) for line in lines) for lines in seeds],
    }


def fedlab(rows: list[dict[str, Any]]) -> str:
    """FedLab's table beside ours."""
    head = ("", "accuracy, %", "published", "MB as counted there", "published", "up, MB in all", "of float32")
    body = []
    for one in rows:
        accuracy, size = PUBLISHED.get(one["run"], ("", ""))
        (ours,) = one["accuracy"].values()
        sent = (f"{one['as counted there']:.2f}", str(size), f"{one['up MB']:,.1f}", f"{one['of float32']:.4f}")
        body.append((one["run"], cell(ours, 2), str(accuracy), *sent))
    return markdown(head, body)


def heterofl(rows: list[dict[str, Any]]) -> str:
    """Accuracy of every level, and what was sent."""
    levels = list(rows[0]["accuracy"])
    body = [
        (one["run"], *(cell(one["accuracy"][level]) for level in levels), f"{one['up MB']:.2f}",
         f"{one['down MB']:.2f}", f"{one['of float32']:.4f}")
        for one in rows
    ]  # fmt: skip
    return markdown(("", *levels, "up, MB", "down, MB", "of float32"), body)


def draw(found: dict[str, list[Lines]], path: Path) -> None:
    """Accuracy of each level over what clients sent, a panel a level, mean over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    scored = {name: [[x for x in lines if "accuracy" in x and x["round"]] for lines in s] for name, s in found.items()}
    levels = list(next(iter(scored.values()))[0][-1]["accuracy"])
    figure = Figure(figsize=(max(5.2, 3.2 * len(levels)), 3.6), layout="constrained")
    for axes, level in zip(figure.subplots(1, len(levels), sharey=True, squeeze=False)[0], levels, strict=True):
        for name, seeds in scored.items():
            sent = np.mean([[line["up_bytes"] / 1e6 for line in lines] for lines in seeds], 0)
            reached = np.mean([[100 * line["accuracy"][level] for line in lines] for lines in seeds], 0)
            axes.plot(sent, reached, marker=".", label=name)
        axes.set(xlabel="MB sent by clients", xscale="log", title=f"level {level}" if len(levels) > 1 else "")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("test accuracy (%)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, print, keep and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=list(TABLES), default="fedlab")
    parser.add_argument("--runs", type=Path, default=Path("runs/communication"))
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--only", nargs="+", help="names of runs; the others are left out")
    parser.add_argument("--changes", nargs="*", default=[], help="of the config, e.g. train.rounds=5")
    given = parser.parse_args()
    machine.use_cache()
    names = given.only or list(TABLES[given.table])
    seeds = range(given.seeds)
    found = {name: [run(given.table, name, s, given.runs, given.changes) for s in seeds] for name in names}
    rows = [row(name, lines, 10) for name, lines in found.items()]
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{given.table}.json", rows)
    draw(found, RESULTS / f"{given.table}.png")
    print({"fedlab": fedlab, "heterofl": heterofl}[given.table](rows))
    print(json.dumps({one["run"]: [round(s) for s in one["seconds"]] for one in rows}))


if __name__ == "__main__":
    main()

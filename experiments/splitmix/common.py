"""What the experiments of this folder share: reduced digits, runs over seeds, and tables."""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.federated import cell, markdown
from hetfl_jax.core import machine
from hetfl_jax.data import sources
from hetfl_jax.data.domains import resized
from hetfl_jax.results import tables
from hetfl_jax.results.folder import read_metrics, write_json
from hetfl_jax.run.config import load_config
from hetfl_jax.run.train import train

RESULTS = Path(__file__).parent / "results"
SIDE = 14  #: of the images; MNIST's 28 halved
HIDDEN = "family.hidden=(32,32,64,256,64)"  #: a half to an eighth of the published net

Scores = dict[str, dict[str, float]]  #: score -> tier -> value


def images() -> tuple[np.ndarray, ...]:
    """MNIST at 14 x 14: x_train, y_train, x_test, y_test."""
    data = sources.load("npz:mnist.npz")
    x_train, x_test = (resized(x.reshape(-1, 28, 28, 1), (SIDE, SIDE)) for x in (data.x_train, data.x_test))
    return x_train, data.y_train, x_test, data.y_test


def last_scores(target: str, seed: int, data: tuple[np.ndarray, ...], *changes: str) -> Scores:
    """Scores of the last round of one run of a config with some of its values changed."""
    folder = tempfile.mkdtemp()
    config = load_config(target, HIDDEN, *changes, f"run.seed={seed}", f"run.folder={folder}")
    try:
        result = train(config, data=data, quiet=True)
        line = [line for line in read_metrics(result.folder) if "accuracy" in line][-1]
    finally:
        shutil.rmtree(folder)
    return {name: value for name, value in line.items() if name.endswith("accuracy") and isinstance(value, dict)}


def flags(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all experiments have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--name", help="name of the result files")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; compiled programs are kept between runs, one client at a time on one device."""
    given = parser.parse_args()
    machine.use_cache()
    return given


def print_table(first: str, columns: Sequence[str], rows: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """A row a name: mean and deviation over seeds of shares, in percent."""
    cells = [[name, *(cell([100 * v for v in values]) for values in row)] for name, row in rows.items()]
    print(markdown([first, *columns], cells))


def keep(name: str, found: Mapping[str, Any], about: Mapping[str, Any], draw: Callable[[Any], None]) -> None:
    """Write the numbers with what they ran on as JSON, and a plot."""
    from matplotlib.figure import Figure

    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", {**tables.environment(jax.device_count()), **about, "rows": dict(found)})
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(RESULTS / f"{name}.png", dpi=150)

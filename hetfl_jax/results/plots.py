"""Plots of one run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hetfl_jax.core.types import Arguments

_MOST_CLASSES = 200  #: that a heat map shows
_COLORS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e6a117", "#7b4ea3")


def _percent(share: float | None) -> float:
    """What is drawn of a score; nothing where there is none."""
    return np.nan if share is None else 100 * share


def plot(folder: Path, lines: Sequence[Arguments], counts: np.ndarray) -> list[Path]:
    """Accuracy over rounds and over bytes sent, per level, and the partition as a heat map; returns the files."""
    from matplotlib.figure import Figure

    points = [line for line in lines if "accuracy" in line]
    files = []

    def curves(name: str, x: Sequence[float], label: str) -> None:
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for color, letter in zip(_COLORS, points[0]["accuracy"]):
            axes.plot(
                x, [_percent(p["accuracy"][letter]) for p in points], color=color, label=f"level {letter}", marker="."
            )
        first = next(iter(points[0]["accuracy"]))
        if "local_accuracy" in points[-1]:
            local = [_percent(p["local_accuracy"][first]) for p in points]
            axes.plot(x, local, color="0.55", linestyle="--", label=f"level {first}, local")
        axes.set(xlabel=label, ylabel="test accuracy (%)", ylim=(0, 100))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="lower right")
        files.append(folder / name)
        figure.savefig(files[-1], dpi=150)

    curves("accuracy.png", [p["round"] for p in points], "round")
    sent = [(p.get("down_bytes", 0) + p.get("up_bytes", 0)) / 1e6 for p in points]
    curves("bytes.png", sent, "MB sent, down and up")
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    common = np.sort(np.argsort(-counts.sum(0), kind="stable")[:_MOST_CLASSES])
    image = axes.imshow(counts[:, common].T, aspect="auto", interpolation="nearest", cmap="viridis")
    label = "class" if counts.shape[1] <= _MOST_CLASSES else f"class (the {_MOST_CLASSES} most common)"
    axes.set(xlabel="client", ylabel=label, yticks=range(counts.shape[1]) if counts.shape[1] <= 20 else [])
    figure.colorbar(image, ax=axes, label="examples")
    files.append(folder / "partition.png")
    figure.savefig(files[-1], dpi=150)
    return files

"""How evenly a model serves the clients: a line under the table, and the distribution over clients as a plot."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hetfl_jax.core.types import Arguments

CURVES = 4  #: evaluated rounds that the plot shows, the first and the last among them


def sentence(spread: Mapping[str, Any]) -> str:
    """Figures of ``core.fairness`` in one line, "" where a score has none.

    Args:
      spread: of one evaluated round: ``mean_over_examples`` (share), ``variance`` over clients (squared percent),
        ``angle`` (degrees from equal accuracies) and ``kl`` (divergence from equal ones, nats).

    >>> sentence({"mean_over_examples": 0.625, "variance": 625.0, "angle": 18.43, "kl": 0.0566})
    'over all their examples 62.50%, variance over clients 625.0 %^2, angle 18.4 degrees, KL 0.0566'
    >>> sentence({"mean": 2.0})
    ''
    """
    if "variance" not in spread:
        return ""
    turned = [f"angle {spread['angle']:.1f} degrees"] if _is_number(spread["angle"]) else []
    turned += [f"KL {spread['kl']:.4f}"] if _is_number(spread["kl"]) else []
    return ", ".join([
        f"over all their examples {100 * spread['mean_over_examples']:.2f}%",
        f"variance over clients {spread['variance']:.1f} %^2", *turned,
    ])  # fmt: skip


def _is_number(value: float | None) -> bool:
    """Whether a figure is there: without any right answer, the angle and the KL divergence are not defined."""
    return value is not None and math.isfinite(value)


def distribution(folder: Path, lines: Sequence[Arguments], title: str = "") -> list[Path]:
    """Draw the clients' accuracies in rising order, of a few evaluated rounds.

    Args:
      folder: gets ``clients.png``.
      lines: of metrics; those whose ``client_accuracy`` has ``quantiles``, of clients' own test data, are used.
      title: above the curves.

    Returns:
      The file, or nothing where no line has quantiles.

    >>> distribution(Path("nowhere"), [{"round": 1, "accuracy": {"a": 0.5}}])
    []
    """
    told = [line for line in lines if "quantiles" in line.get("client_accuracy", {})]
    if not told:
        return []
    from matplotlib.figure import Figure

    places = np.unique(np.linspace(0, len(told) - 1, CURVES).astype(int))
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for place, shade in zip(places, np.linspace(0.75, 0.0, places.size)):
        values = 100 * np.asarray(told[place]["client_accuracy"]["quantiles"])
        share = np.linspace(0, 100, values.size)
        color = "#0072b2" if place == places[-1] else str(shade)
        axes.plot(share, values, color=color, label=f"round {told[place]['round']}")
    axes.axvspan(0, 10, color="#d55e00", alpha=0.12, linewidth=0, label="worst tenth")
    axes.set(xlabel="clients, from the worst to the best (%)", ylabel="accuracy on their own test data (%)")
    axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(folder / "clients.png", dpi=150)
    return [folder / "clients.png"]

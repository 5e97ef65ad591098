"""Plots of one run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hetfl_jax.core.types import Arguments
from hetfl_jax.results import fairness
from hetfl_jax.results.scores import evaluated, is_share, score_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: width and depth of a level by its name; a depth of None where all levels have the same
Sizes = Mapping[str, tuple[float, int | None]]

_MOST_CLASSES = 200  #: that a heat map shows
#: eight colours that colour-blind readers tell apart (Okabe and Ito, 2008), yellow darkened for white paper
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#000000", "#7f7f7f")
DASHES = ("-", "--", "-.", ":")  #: one for each time the colours are used up
_IN_THE_PLOT = 6  #: a legend of more entries stands beside the plot


def level_label(name: str, sizes: Sizes) -> str:
    """What a legend says of a level.

    >>> level_label("c", {"c": (0.25, None)}), level_label("2", {"2": (1.0, 2)}), level_label("4 nets", {})
    ('c (width 0.25)', '2 (depth 2)', '4 nets')
    """
    if name not in sizes:
        return name
    width, depth = sizes[name]
    parts = [f"width {width:g}"] if depth is None or width != 1 else []
    return f"{name} ({', '.join([*parts, *([f'depth {depth}'] if depth is not None else [])])})"


def line_style(number: int) -> tuple[str, str]:
    """Colour and dashes of a curve: no two of the first 32 are alike.

    >>> line_style(0), line_style(8)
    (('#0072b2', '-'), ('#0072b2', '--'))
    """
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def plot(
    folder: Path, lines: Sequence[Arguments], counts: np.ndarray, sizes: Sizes | None = None, title: str = ""
) -> list[Path]:
    """Draw a run: score over rounds, bytes and simulated hours by level, the training loss, and the partition.

    Args:
      folder: where the files go.
      lines: of metrics, at least one of them evaluated.
      counts: [clients, classes] examples.
      sizes: of the levels, for the legend.
      title: above the curves, e.g. the run's name.

    Returns:
      The files: ``accuracy.png`` (or by the score's name), ``bytes.png``, ``partition.png``, ``training_loss.png``
      where there is a loss, and ``clients.png`` where clients have test data of their own.
    """
    points = evaluated(lines)
    sent = [(p.get("down_bytes", 0) + p.get("up_bytes", 0)) / 1e6 for p in points]
    figures = {
        f"{score_of(points)}.png": _scores(points, [p["round"] for p in points], "round", sizes or {}, title),
        "bytes.png": _scores(points, sent, "MB sent, down and up", sizes or {}, title),
        "partition.png": _partition(counts),
    }
    if "simulated_seconds" in points[-1]:
        seconds = [p.get("simulated_seconds", 0) for p in points]
        unit, size = ("hours", 3600) if max(seconds) >= 3600 else ("seconds", 1)
        figures["hours.png"] = _scores(points, [s / size for s in seconds], f"simulated {unit}", sizes or {}, title)
    if any(line.get("train_loss") is not None for line in lines):
        figures["training_loss.png"] = _training_loss(lines, title)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [*(folder / name for name in figures), *fairness.distribution(folder, lines, title)]


def _new(size: tuple[float, float], title: str) -> tuple["Figure", "Axes"]:
    """A figure of ``size`` inches with one pair of axes; it belongs to no window and needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize="medium")
    return figure, axes


def _scores(points: Sequence[Arguments], x: Sequence[float], label: str, sizes: Sizes, title: str) -> "Figure":
    """The test score of every level over ``x``, and the largest one's on the clients' own data.

    Args:
      points: evaluated metrics lines.
      x: [points] rounds or megabytes.
      label: of the horizontal axis.
    """
    figure, axes = _new((6.4, 4.0), title)
    score = score_of(points)
    share = is_share(score)

    def drawn(value: float | None) -> float:
        return np.nan if value is None else value * (100 if share else 1)

    curves = {level_label(name, sizes): [drawn(p[score].get(name)) for p in points] for name in points[0][score]}
    for number, (name, values) in enumerate(curves.items()):
        color, dashes = line_style(number)
        axes.plot(x, values, color=color, linestyle=dashes, label=name, marker=".")
    if f"local_{score}" in points[-1]:
        first = next(iter(points[0][score]))
        values = [drawn(p[f"local_{score}"][first]) for p in points]
        curves["local"] = values
        own = "classes" if share else "data"
        axes.plot(x, values, color="0.55", linestyle=(0, (1, 1)), label=f"{first} on the clients' own {own}")
    limits = _limits([v for c in curves.values() for v in c]) if share else (0.0, None)
    axes.set(xlabel=label, ylabel=f"test {score} (%)" if share else f"test {score}", ylim=limits)
    _finish(axes, len(curves), whole=label == "round")
    return figure


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """From 0 to the next ten above the highest value, so that low scores are not a line at the bottom.

    >>> _limits([3.0, 11.5]), _limits([97.0]), _limits([float("nan")])
    ((0.0, 20.0), (0.0, 100.0), (0.0, 100.0))
    """
    finite = [value for value in values if np.isfinite(value)]
    return 0.0, float(min(100, 10 * np.floor(max(finite) / 10 + 1))) if finite else 100.0


def _training_loss(lines: Sequence[Arguments], title: str) -> "Figure":
    """Mean loss of the clients' training over rounds."""
    told = [line for line in lines if line.get("train_loss") is not None]
    figure, axes = _new((6.4, 4.0), title)
    marker = "." if len(told) <= 100 else ""
    axes.plot([t["round"] for t in told], [t["train_loss"] for t in told], color=COLORS[0], marker=marker)
    axes.set(xlabel="round", ylabel="training loss of the round's clients")
    _finish(axes, 0, whole=True)
    return figure


def _finish(axes: "Axes", curves: int, *, whole: bool) -> None:
    """Grid, ticks and legend; rounds are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if curves > _IN_THE_PLOT:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif curves:
        axes.legend(frameon=True, framealpha=0.8, edgecolor="none", loc="best")


def _partition(counts: np.ndarray) -> "Figure":
    """Examples of each class that each client holds, as a heat map.

    Args:
      counts: [clients, classes]; of more than 200 classes the most common ones are shown.
    """
    figure, axes = _new((6.4, 3.4), "")
    common = np.sort(np.argsort(-counts.sum(0), kind="stable")[:_MOST_CLASSES])
    image = axes.imshow(counts[:, common].T, aspect="auto", interpolation="nearest", cmap="viridis")
    label = "class" if counts.shape[1] <= _MOST_CLASSES else f"class (the {_MOST_CLASSES} most common)"
    label = label if counts.shape[1] > 1 else ""
    axes.set(xlabel="client", ylabel=label, yticks=range(counts.shape[1]) if 1 < counts.shape[1] <= 20 else [])
    _finish(axes, 0, whole=True)
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="examples")
    return figure

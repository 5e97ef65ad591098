"""Pictures of the site, drawn from the library's own windows and rules, each for a light and a dark page.

python docs/pictures.py FOLDER      writes PNGs to look at
"""

import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from hetfl_jax.engine.executors import deal
from hetfl_jax.models import build, families
from hetfl_jax.models.windows import Family, mask_leaf
from hetfl_jax.parts.budgets import schedule
from hetfl_jax.parts.rotation import start, turns, with_others


class Theme(NamedTuple):
    """Colours of a page."""

    ink: str
    quiet: str
    box: str
    low: str  #: of few
    high: str  #: of many
    marks: tuple[str, ...]  #: of levels, the largest first


THEMES = {
    "light": Theme("#1f2430", "#6b7280", "#eef1fb", "#e9edfb", "#27379b",
                   ("#27379b", "#4f66d0", "#8c9ee6", "#c3cdf4")),
    "dark": Theme("#e8eaf2", "#a3a9b8", "#2d3240", "#2a3045", "#b4c1ff",
                  ("#b4c1ff", "#8496e6", "#5c6cb5", "#3f4a80")),
}  # fmt: skip
WIDTHS = (1.0, 0.75, 0.5, 0.25)
DEPTHS = (4, 3, 2, 1)


def mlp(levels: list[dict[str, Any]], hidden: tuple[int, ...] = (8, 8)) -> Family:
    """An MLP at several levels, small enough that every weight is a square of a picture."""
    return families.family(build("mlp", hidden=hidden, classes=4), levels, jnp.zeros((1, 6)))


def figure(theme: Theme, width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure without a background, and its empty axes side by side."""
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(1, columns, squeeze=False, **options)[0]
    for ax in axes:
        ax.set_facecolor("none")
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ax.spines.values():
            side.set_visible(False)
    fig.patch.set_alpha(0)
    return fig, list(axes)


def ramp(theme: Theme, steps: int) -> list[Any]:
    """``steps`` colours from few to many."""
    return [LinearSegmentedColormap.from_list("", [theme.low, theme.high])(v) for v in np.linspace(0, 1, steps)]


def squares(ax: Any, theme: Theme, colours: list[list[Any]], title: str, below: str) -> None:
    """A matrix of squares, row by row."""
    rows, columns = len(colours), len(colours[0])
    for i, row in enumerate(colours):
        for j, colour in enumerate(row):
            ax.add_patch(Rectangle((j, i), 0.92, 0.92, facecolor=colour, edgecolor="none"))
    ax.set(xlim=(-0.2, columns + 0.1), ylim=(rows + 0.1, -0.2), aspect="equal")
    ax.set_title(title, color=theme.ink, fontsize=10)
    ax.set_xlabel(below, color=theme.quiet, fontsize=9)


def key(fig: Figure, theme: Theme, colours: list[Any], words: list[str]) -> None:
    """What the colours of a picture mean, under it."""
    patches = [Rectangle((0, 0), 1, 1, facecolor=colour) for colour in colours]
    fig.legend(patches, words, loc="outside lower center", ncols=len(words), frameon=False, labelcolor=theme.ink,
               fontsize=9, handlelength=1.0, handleheight=1.0)  # fmt: skip


def owners(fam: Family, path: tuple[str, ...]) -> np.ndarray:
    """How many levels own each entry of a leaf."""
    return np.sum([np.asarray(mask_leaf(fam, path, level)) for level in range(fam.levels)], 0)


def the_round(theme: Theme) -> Figure:
    """Plan, send, client, sum, server."""
    fig, (ax,) = figure(theme, 9.6, 3.5)
    ax.set(xlim=(0, 96), ylim=(0, 40))

    def box(x: float, y: float, w: float, h: float, title: str, text: str, colour: str = "") -> None:
        style = "round,pad=0.2,rounding_size=1"
        ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=colour or theme.box, edgecolor="none"))
        ax.text(x + w / 2, y + h - 2.6, title, ha="center", va="center", color=theme.ink, fontsize=11, weight="bold")
        ax.text(x + w / 2, y + (h - 4) / 2, text, ha="center", va="center", color=theme.ink, fontsize=8.5)

    def arrow(a: tuple[float, float], b: tuple[float, float], bend: float = 0.0) -> None:
        way = {"arrowstyle": "-|>", "color": theme.quiet, "lw": 1.3, "connectionstyle": f"arc3,rad={bend}"}
        ax.annotate("", xy=b, xytext=a, arrowprops=way)

    box(1, 11, 17, 13, "plan", "who takes part,\nat which level\n(select, capacity)")
    sizes = ((24.5, 9.0, "level 0"), (13.8, 6.6, "level 1"), (5.6, 4.6, "level 2"))
    for number, (y, h, name) in enumerate(sizes):
        w = (20, 15, 10)[number]
        x = 30 + (20 - w) / 2
        ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.2,rounding_size=0.8",
                                    facecolor=theme.marks[number], edgecolor="none"))  # fmt: skip
        dark = (theme is THEMES["light"]) == (number < 2)
        ax.text(40, y + h / 2, f"client, {name}", ha="center", va="center", fontsize=8.5,
                color="#ffffff" if dark else "#14171f")  # fmt: skip
        arrow((18.8, 17.5), (x - 0.8, y + h / 2))
        arrow((x + w + 0.8, y + h / 2), (57.4, 17.5))
    ax.text(40, 1.6, "objective, drift, local training: each net at its own size", ha="center", color=theme.quiet,
            fontsize=8.5)  # fmt: skip
    ax.text(24, 27.2, "send\n(downlink)", ha="center", color=theme.quiet, fontsize=8.5)
    ax.text(55.5, 27.2, "reply\n(uplink)", ha="center", color=theme.quiet, fontsize=8.5)
    box(58, 11, 16, 13, "sum", "every entry over\nthe clients that\nhold it (merge)")
    box(79, 11, 16, 13, "server", "uses the sum:\nmean, Adam,\nFedDyn, ...")
    arrow((74.6, 17.5), (78.4, 17.5))
    arrow((87, 25), (9.5, 25), bend=0.32)
    ax.text(70, 37.6, "next round", color=theme.quiet, fontsize=8.5, ha="center")
    return fig


def heterofl(theme: Theme) -> Figure:
    """How many levels hold each weight of an MLP."""
    fam = mlp([{"width": w} for w in WIDTHS])
    fig, axes = figure(theme, 8.2, 3.3, 3, width_ratios=(8, 8, 4))
    colours = ramp(theme, fam.levels)
    names = ("dense_0: 6 inputs x 8 units", "dense_1: 8 x 8", "head: 8 x 4 classes")
    for ax, layer, name in zip(axes, ("dense_0", "dense_1", "head"), names):
        held = owners(fam, ("params", layer, "kernel"))
        squares(ax, theme, [[colours[n - 1] for n in row] for row in held], name, "output units")
    axes[0].set_ylabel("input units", color=theme.quiet, fontsize=9)
    words = [f"width {w:g}{' only' if i == 0 else ' and wider'}" for i, w in enumerate(WIDTHS)]
    key(fig, theme, colours, words)
    return fig


def depthfl(theme: Theme) -> Figure:
    """Which layers and exits each depth has."""
    fam = mlp([{"depth": d} for d in DEPTHS], (8, 8, 8, 8))
    layers = [f"dense_{i}" for i in range(4)]
    exits = sorted({path[1] for path in fam.windows if path[1] not in layers})
    fig, axes = figure(theme, 8.2, 3.1, fam.levels)
    for level, ax in enumerate(axes):
        for place, layer in enumerate(layers):
            there = bool(np.asarray(mask_leaf(fam, ("params", layer, "kernel"), level)).all())
            own = [name for name in exits if fam.reach[("params", name, "kernel")][level].any()]
            box = {"facecolor": theme.marks[1] if there else "none", "edgecolor": theme.quiet, "lw": 0.8,
                   "ls": "-" if there else ":"}  # fmt: skip
            ax.add_patch(Rectangle((0, place), 5, 0.72, **box))
            ax.text(2.5, place + 0.36, layer, ha="center", va="center", fontsize=8.5,
                    color=("#ffffff" if theme is THEMES["light"] else "#14171f") if there else theme.quiet)  # fmt: skip
            if place < len(exits) and exits[place] in own:
                ax.add_patch(Rectangle((5.6, place), 2.6, 0.72, facecolor=theme.marks[3], edgecolor="none"))
                ax.text(6.9, place + 0.36, "exit", ha="center", va="center", color=theme.ink, fontsize=8.5)
        ax.set(xlim=(-0.3, 8.6), ylim=(-0.3, 4.1))
        ax.set_title(f"depth {DEPTHS[level]}", color=theme.ink, fontsize=10)
        ax.set_xlabel("input below, deeper above", color=theme.quiet, fontsize=8.5)
    return fig


def fjord(theme: Theme) -> Figure:
    """How often a batch of each client trains a weight: its rate is drawn among those that it affords."""
    fam = mlp([{"width": w} for w in WIDTHS])
    fig, axes = figure(theme, 8.6, 2.9, fam.levels)
    colours = ramp(theme, 13)  # by twelfths: of 2, 3 or 4 rates
    path = ("params", "dense_1", "kernel")
    for level, ax in enumerate(axes):
        affordable = range(level, fam.levels)
        share = np.mean([np.asarray(mask_leaf(fam, path, rate)) for rate in affordable], 0)
        tints = [[colours[round(12 * s)] if s else "none" for s in row] for row in share]
        squares(
            ax,
            theme,
            tints,
            f"client of width {WIDTHS[level]:g}",
            f"draws one of {len(affordable)}" if len(affordable) > 1 else "always its own",
        )
        ax.add_patch(Rectangle((-0.1, -0.1), 8.1, 8.1, fill=False, edgecolor=theme.quiet, lw=0.6, ls=":"))
    key(fig, theme, colours[3::3], ["trained in 1/4 of its batches", "1/2", "3/4", "all"])
    return fig


def splitmix(theme: Theme) -> Figure:
    """A wide net as base nets, and who trains which of them in one round."""
    bases, clients = 8, 8
    fam = mlp([{"width": 1.0}, {"width": 1 / bases}], (16, 16))
    base = int(fam.windows["params", "dense_1", "kernel"].extents[1, 0])
    colours = [theme.marks[i % 2] for i in range(bases)]
    full = [["none"] * (base * bases) for _ in range(base * bases)]
    for i in range(bases):
        for row in range(base * i, base * (i + 1)):
            full[row][base * i : base * (i + 1)] = [colours[i]] * base
    fig, axes = figure(theme, 8.2, 3.6, 2)
    squares(axes[0], theme, full, "dense_1 of the full net: 8 base nets", "weights between base nets do not exist")
    axes[0].add_patch(Rectangle((-0.1, -0.1), 16.1, 16.1, fill=False, edgecolor=theme.quiet, lw=0.6, ls=":"))
    budgets = schedule("8-4-2-1", 1 / bases, clients)
    own = np.asarray(budgets.of(jnp.arange(clients)))
    first, _ = turns(jax.random.key(0), start(bases), jnp.ones(clients, bool))
    ax = axes[1]
    for client in range(clients):
        members = with_others(jax.random.key(client), first[client], bases, int(own[client]))
        for number in range(bases):
            there, turn = number in np.asarray(members), number == int(first[client])
            colour = theme.marks[0] if turn else theme.marks[2] if there else theme.low
            ax.add_patch(Rectangle((number, client), 0.92, 0.92, facecolor=colour, edgecolor="none"))
    ax.set(xlim=(-0.2, bases + 0.1), ylim=(clients + 0.1, -0.2), aspect="equal")
    ax.set_title("one round, budgets 1, 2, 4, 8", color=theme.ink, fontsize=10)
    ax.set_xlabel("base net", color=theme.quiet, fontsize=9)
    ax.set_yticks(np.arange(clients) + 0.5, [f"client {i}" for i in range(clients)], color=theme.ink, fontsize=8)
    ax.tick_params(length=0)
    key(fig, theme, [theme.marks[0], theme.marks[2], theme.low], ["its turn", "drawn besides", "not trained"])
    return fig


def mesh(theme: Theme) -> Figure:
    """Clients of four levels dealt over four devices."""
    devices, levels = 4, np.repeat(np.arange(4), 8)
    size = np.random.default_rng(0).integers(20, 100, levels.size)
    order = np.asarray(deal(jnp.asarray(levels), jnp.asarray(size), jnp.ones(levels.size, bool), devices))
    fig, (ax,) = figure(theme, 8.2, 3.0)
    work = size * np.asarray(WIDTHS)[levels] ** 2
    for device, items in enumerate(order.reshape(devices, -1)):
        at = 0.0
        for item in items:
            ax.barh(devices - 1 - device, work[item], left=at, height=0.62, color=theme.marks[levels[item]],
                    edgecolor=theme.box, lw=1.0)  # fmt: skip
            at += work[item]
        ax.text(at + 2, devices - 1 - device, f"{at:.0f}", va="center", color=theme.quiet, fontsize=9)
    ax.set_xlim(0, 1.08 * max(work[items].sum() for items in order.reshape(devices, -1)))
    ax.set_yticks(range(devices), [f"device {devices - 1 - i}" for i in range(devices)], color=theme.ink, fontsize=9)
    ax.tick_params(length=0)
    ax.set_title("32 clients, sorted by level and size, dealt there and back", color=theme.ink, fontsize=10)
    ax.set_xlabel("work: examples x width squared", color=theme.quiet, fontsize=9)
    key(fig, theme, list(theme.marks), [f"width {w:g}" for w in WIDTHS])
    return fig


PICTURES: dict[str, Callable[[Theme], Figure]] = {
    "round": the_round, "heterofl": heterofl, "depthfl": depthfl, "fjord": fjord, "splitmix": splitmix, "mesh": mesh,
}  # fmt: skip


def draw_all(kind: str = "svg", background: bool = False) -> dict[str, bytes]:
    """Every picture in every theme, by ``name-theme``."""
    drawn = {}
    with mpl.rc_context({"svg.hashsalt": "hetfl", "svg.fonttype": "path", "font.size": 9}):
        for name, draw in PICTURES.items():
            for called, theme in THEMES.items():
                fig, out = draw(theme), BytesIO()
                if background:
                    fig.patch.set(alpha=1, facecolor="#ffffff" if called == "light" else "#1e2129")
                fig.savefig(out, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
                drawn[f"{name}-{called}"] = out.getvalue()
    return drawn


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in draw_all("png", background=True).items():
        (folder / f"{name}.png").write_bytes(content)

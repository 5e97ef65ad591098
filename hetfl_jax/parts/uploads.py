"""Who sent something in which round, where not everybody does: lines and a figure for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hetfl_jax.core.types import Arguments, Info, PyTree, Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def shown() -> Shown:
    """The senders of every round in its metrics line, and who they were over rounds as ``uploads.png``.

    >>> shown().sentence({"senders": [0, 3], "round": 7})
    'clients that uploaded in round 7: 2 (0, 3)'
    """

    def figures(folder: Path, lines: Sequence[Arguments], server: PyTree, losses: PyTree, groups: PyTree) -> list[Path]:
        told = [line for line in lines if "senders" in line]
        if not told:
            return []
        draw(mask(told), told[0]["round"]).savefig(folder / "uploads.png", dpi=150)
        return [folder / "uploads.png"]

    return Shown(line=lambda info, groups: {"senders": senders(info)}, sentence=sentence, figures=figures)


def senders(info: Info) -> list[int]:
    """Clients whose message had bits, in the order of their ids.

    Args:
      info: of one round, on the host.

    >>> from types import SimpleNamespace
    >>> seen = SimpleNamespace(up=np.array([[9, 0, 0], [0, 0, 0], [0, 1, 0]]))
    >>> items = SimpleNamespace(ids=np.array([4, 2, 1]), valid=np.ones(3, bool), ok=np.ones(3, bool), seen=seen)
    >>> senders(SimpleNamespace(items=items))
    [1, 4]
    """
    items = info.items
    sent = np.asarray(items.valid) & np.asarray(items.ok) & (np.asarray(items.seen.up) > 0).any(-1)
    return sorted(np.asarray(items.ids)[sent].tolist())


def sentence(line: Arguments) -> str:
    """What the table says of the last round.

    >>> sentence({"senders": [0, 3], "round": 7})
    'clients that uploaded in round 7: 2 (0, 3)'
    """
    names = ", ".join(map(str, line["senders"][:12])) + (", ..." if len(line["senders"]) > 12 else "")
    return f"clients that uploaded in round {line['round']}: {len(line['senders'])}" + (f" ({names})" if names else "")


def mask(lines: Sequence[Arguments]) -> np.ndarray:
    """[rounds, clients] bool: who sent in each round, up to the last client that ever did.

    >>> mask([{"senders": [0, 2]}, {"senders": [1]}]).astype(int).tolist()
    [[1, 0, 1], [0, 1, 0]]
    """
    most = max((max(line["senders"], default=-1) for line in lines), default=-1) + 1
    found = np.zeros((len(lines), most), bool)
    for row, line in zip(found, lines):
        row[line["senders"]] = True
    return found


def draw(sent: np.ndarray, first: int = 1) -> "Figure":
    """Who sent in each round, and how many messages there were so far.

    Args:
      sent: [rounds, clients] bool.
      first: number of the first round.

    Returns:
      A figure of two panels, which is not saved yet.

    >>> who, total = draw(np.array([[True, False], [True, True]])).axes
    >>> total.lines[0].get_ydata().tolist()  # messages so far
    [1, 3]
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rounds, clients = np.arange(first, first + len(sent)), np.arange(sent.shape[1])
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    who, total = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    who.eventplot([rounds[sent[:, c]] for c in clients], lineoffsets=clients, linelengths=0.8, linewidths=0.8)
    who.set(ylabel="client", ylim=(len(clients) - 0.4, -0.6))
    who.yaxis.set_major_locator(MaxNLocator(integer=True))
    total.step(rounds, np.cumsum(sent.sum(1)), where="post", label="uploads")
    total.plot(rounds, len(clients) * np.arange(1, len(sent) + 1), color="0.55", linestyle="--", label="if all sent")
    total.set(xlabel="round", ylabel="uploads so far", yscale="log")
    total.xaxis.set_major_locator(MaxNLocator(integer=True))
    total.legend(frameon=False)
    for axes in (who, total):
        axes.grid(alpha=0.25)
    return figure

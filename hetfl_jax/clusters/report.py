"""What people want to see of clusters: who is where, whether it is true, and how it came about."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from hetfl_jax.core.types import Arguments, Line, PyTree, Shown
from hetfl_jax.parts.bank import alike


def matched(found: np.ndarray, groups: np.ndarray) -> float:
    """Share of clients in the right cluster under the best one-to-one matching of clusters and true groups.

    Args:
      found: [n] cluster of each client.
      groups: [n] its true group.

    >>> matched(np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])), matched(np.array([0, 0, 0, 0]), np.array([0, 0, 1, 1]))
    (1.0, 0.5)
    """
    found, groups = np.asarray(found), np.asarray(groups)
    table = np.zeros((found.max() + 1, groups.max() + 1), int)
    np.add.at(table, (found, groups), 1)
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum() / found.size)


def shown(models: int, tree: bool = False) -> Shown:
    """What people see of a bank of ``models``; with ``tree`` its route keeps a tree of splits.

    Args:
      models: k, in the bank.
      tree: whether the route keeps a tree of splits, as CFL's.

    >>> shown(2).sentence({"clusters": [3, 1]})[:11]
    '2 model(s),'
    """

    def figures(
        folder: Path, lines: Sequence[Arguments], server: PyTree, losses: np.ndarray, groups: np.ndarray | None
    ) -> list[Path]:
        files = plot(folder, lines) + plot_losses(folder, losses, groups)
        if tree:
            route, count = server.route, int(server.route.count)
            files += plot_tree(folder, route.parent[:count], route.born[:count], route.table, int(route.rounds))
        return files

    def warning(server: PyTree) -> str:
        return "all models start equal: every client will prefer the first (method.args)" if alike(server) else ""

    return Shown(
        line=lambda info, groups: of_round(info.arrays, models, groups),
        sentence=sentence,
        placed=lambda placed, groups: {"test_recovery": matched(placed, groups)},
        figures=figures,
        warning=warning if not tree else lambda server: "",
    )


def sentence(line: Arguments) -> str:
    """What the table says below of the models and who used them in the last round.

    >>> sentence({"clusters": [3, 1], "recovery": 0.75})
    '2 model(s), the best one counts for a test batch; clients of the last round: 3, 1; 75% of them in the right one \
    (best matching)'
    """
    counts, recovery = line["clusters"], line.get("recovery")
    known = "" if recovery is None else f"; {100 * recovery:.0f}% of them in the right one (best matching)"
    each = ", ".join(map(str, counts[:12])) + (", ..." if len(counts) > 12 else "")
    return f"{len(counts)} model(s), the best one counts for a test batch; clients of the last round: {each}{known}"


def of_round(info: Arguments, models: int, groups: np.ndarray | None) -> Line:
    """The metrics line of a round with clusters: clients in each, recovery of known groups, and CFL's criteria.

    Args:
      info: arrays of the round, on the host: ``member`` and ``member_ids`` [K], -1 of items that are not shown.
      models: k.
      groups: [N] true group of each client, ``None`` where there is none.

    >>> info = {"member": np.array([1, 0, -1, 1]), "member_ids": np.array([0, 1, -1, 2])}
    >>> of_round(info, 2, np.array([1, 0, 1]))
    {'clusters': [1, 2], 'recovery': 1.0}
    """
    cluster, ids = np.asarray(info["member"]), np.asarray(info["member_ids"])
    cluster, ids = cluster[ids >= 0], ids[ids >= 0]
    line: Line = {"clusters": np.bincount(cluster, minlength=models).tolist()}
    if groups is not None and ids.size:
        line["recovery"] = matched(cluster, groups[ids])
    if "mean_norm" in info:
        alive = int(info["count"])
        line["clusters"] = line["clusters"][:alive]
        line["mean_norm"], line["largest_norm"] = (np.asarray(info[k])[:alive].tolist() for k in _NORMS)
    return line


_NORMS = ("mean_norm", "largest_norm")


def plot(folder: Path, lines: Sequence[Arguments]) -> list[Path]:
    """Clients in each cluster over rounds, and how many are in the right one where that is known; returns the file.

    Args:
      folder: of the run; gets ``clusters.png``.
      lines: of ``metrics.jsonl``; those without clusters are left out.

    >>> plot(Path("nowhere"), [{"round": 1}])
    []
    """
    from matplotlib.figure import Figure

    points = [line for line in lines if "clusters" in line]
    if not points:
        return []
    rounds = [p["round"] for p in points]
    most = max(len(p["clusters"]) for p in points)
    counts = np.array([[*p["clusters"], *[0] * (most - len(p["clusters"]))] for p in points])
    known = "recovery" in points[-1]
    figure = Figure(figsize=(6.4, 4.6 if known else 3.2), layout="constrained")
    axes = figure.subplots(2 if known else 1, squeeze=False, height_ratios=(2, 1) if known else None)[:, 0]
    axes[0].stackplot(rounds, counts.T, step="mid", labels=[f"cluster {k}" for k in range(most)], alpha=0.85)
    axes[0].set(ylabel="clients of the round", xlim=(rounds[0], max(rounds[-1], rounds[0] + 1)))
    axes[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    if known:
        axes[1].plot(rounds, [100 * p["recovery"] for p in points], color="0.2", marker=".")
        axes[1].set(ylabel="in the right one (%)", ylim=(0, 103), xlim=axes[0].get_xlim())
        axes[1].grid(alpha=0.25)
    axes[-1].set_xlabel("round")
    figure.savefig(folder / "clusters.png", dpi=150)
    return [folder / "clusters.png"]


def plot_losses(folder: Path, losses: np.ndarray, groups: np.ndarray | None) -> list[Path]:
    """The loss of every model on every client, clients in the order of their true groups; returns the file.

    Args:
      folder: of the run.
      losses: [N, models] mean training losses.
      groups: [N] true group of each client, or ``None``.

    >>> import tempfile
    >>> [file] = plot_losses(Path(tempfile.mkdtemp()), np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 0]))
    >>> file.name, file.exists()
    ('losses.png', True)
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    order = np.arange(len(losses)) if groups is None else np.argsort(groups, kind="stable")
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(losses[order].T, aspect="auto", interpolation="nearest", cmap="viridis_r")
    axes.set(xlabel="client" if groups is None else "client, by true group", ylabel="model")
    axes.set_yticks(range(losses.shape[1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="mean training loss")
    figure.savefig(folder / "losses.png", dpi=150)
    return [folder / "losses.png"]


def plot_tree(folder: Path, parent: np.ndarray, born: np.ndarray, table: np.ndarray, rounds: int) -> list[Path]:
    """CFL's splits over rounds, the clients of each cluster at its end; returns the file.

    Args:
      folder: of the run.
      parent: [models] the cluster that each was split off.
      born: [models] the round of the split.
      table: [N] cluster of each client.
      rounds: so far.

    >>> import tempfile
    >>> folder, table = Path(tempfile.mkdtemp()), np.array([0, 1, 0])
    >>> [file] = plot_tree(folder, parent=np.array([0, 0]), born=np.array([0, 3]), table=table, rounds=5)
    >>> file.name, file.exists()
    ('tree.png', True)
    """
    from matplotlib.figure import Figure

    count = len(parent)
    place = {0: 0.0}
    order = [0]
    for split in range(1, count):  # a child stands right below its parent
        order.insert(order.index(int(parent[split])) + 1, split)
    place = {cluster: float(-row) for row, cluster in enumerate(order)}
    figure = Figure(figsize=(6.4, 1.0 + 0.5 * count), layout="constrained")
    axes = figure.add_subplot()
    for cluster in range(count):
        start = int(born[cluster]) if cluster else 0
        axes.plot([start, rounds], [place[cluster]] * 2, color="#1b6ca8", lw=2)
        if cluster:
            axes.plot([start] * 2, [place[int(parent[cluster])], place[cluster]], color="#1b6ca8", lw=1)
        members = np.flatnonzero(table == cluster)
        text = ", ".join(map(str, members[:12])) + (f", ... ({members.size})" if members.size > 12 else "")
        axes.text(rounds, place[cluster], f"  {text}", va="center", fontsize=8)
    axes.set(xlabel="round", yticks=[], xlim=(0, rounds * 1.5 + 1))
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(folder / "tree.png", dpi=150)
    return [folder / "tree.png"]

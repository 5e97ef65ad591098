"""What a run cost so far: bits and multiply-adds, summed exactly on the host from what every item reported."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hetfl_jax.core import bits
from hetfl_jax.core.types import Account, Info, Line
from hetfl_jax.models.costs import Costs

BACKWARD = 2  #: multiply-adds of a backward pass over those of a forward pass: gradients of activations and of weights


class Totals(NamedTuple):
    """Costs so far, exact."""

    down_bits: int = 0
    up_bits: int = 0
    client_macs: int = 0
    full_size_bits: int = 0  #: one way, had every client of a round taken the full model once

    def line(self) -> dict[str, float]:
        """As a metrics line has them: bytes, and multiply-adds."""
        return {
            "down_bytes": _bytes(self.down_bits),
            "up_bytes": _bytes(self.up_bits),
            "client_macs": self.client_macs,
            "full_size_bytes": _bytes(self.full_size_bits),
        }


def _bytes(count: int) -> int | float:
    return count // 8 if count % 8 == 0 else count / 8


def saved(values: Mapping[str, int]) -> Totals:
    """Totals from a checkpoint; one written before messages were counted in bits has bytes.

    >>> saved({"down_bytes": 2, "up_bytes": 1, "client_macs": 5, "full_size_bytes": 3}).down_bits
    16
    """
    return Totals(
        **{n.replace("_bytes", "_bits"): int(v) * (8 if n.endswith("_bytes") else 1) for n, v in values.items()}
    )


def macs_of(work: np.ndarray, costs: Costs) -> np.ndarray:
    """[...] multiply-adds of [..., 2, L] examples forward and backward."""
    work = np.asarray(work, np.int64)
    return work[..., 0, :] @ costs.macs + BACKWARD * (work[..., 1, :] @ costs.macs)


def spent(info: Info, costs: Costs) -> Totals:
    """What one round cost, surveys before it included."""
    down = up = macs = 0
    for account in (info.items, info.asked):
        if isinstance(account, Account):
            there = np.asarray(account.valid)
            down += int(bits.total(np.asarray(account.seen.down))[there].sum())
            up += int(bits.total(np.asarray(account.seen.up))[there].sum())
            macs += int(macs_of(np.asarray(account.seen.work)[there], costs).sum())
    clients = np.unique(np.asarray(info.items.ids)[np.asarray(info.items.valid)]).size
    return Totals(down, up, macs, clients * int(costs.bytes[0]) * 8)


def add(first: Totals, second: Totals) -> Totals:
    """The sum."""
    return Totals(*(a + b for a, b in zip(first, second)))


def imbalance(info: Info, costs: Costs, devices: int) -> float:
    """Multiply-adds of the busiest device over the mean of all."""
    there = np.asarray(info.items.valid)
    macs = macs_of(np.asarray(info.items.seen.work), costs) * there
    work = np.bincount(np.asarray(info.device), macs, devices)
    return round(float(work.max() / max(work.mean(), 1.0)), 4)


def of_levels(account: Account, names: tuple[str, ...]) -> dict[str, int]:
    """How many items of each level took part."""
    level = np.asarray(account.level)[np.asarray(account.valid)]
    return dict(zip(names, np.bincount(level, minlength=len(names)).tolist()))


def failed_ids(account: Account) -> list[int]:
    """Clients whose replies were not finite."""
    return np.asarray(account.ids)[np.asarray(account.valid & ~np.asarray(account.ok))].tolist()


def line_of(info: Info, number: int, totals: Totals, costs: Costs, names: tuple[str, ...], devices: int) -> Line:
    """A round's metrics line without what the method adds."""
    failed = failed_ids(info.items)
    line: Line = {"round": number}
    line |= {name: float(value) for name, value in info.numbers.items() if name not in ("clients", "failed")}
    if not np.asarray(info.items.ok).any():  # nobody trained: there is no loss
        line |= dict.fromkeys(("train_loss", "train_accuracy"))
    line |= {"clients": int(info.items.ok.sum()), "failed": len(failed), **totals.line()}
    if devices > 1:
        line["imbalance"] = imbalance(info, costs, devices)
    line["items"] = of_levels(info.items, names)
    return line | ({"failed_ids": failed} if failed else {})

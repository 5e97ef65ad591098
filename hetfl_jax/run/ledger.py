"""What a run cost so far: bits and multiply-adds, summed exactly on the host from what every item reported."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hetfl_jax.core import bits
from hetfl_jax.core.types import Account, Info, Line
from hetfl_jax.models.costs import BACKWARD, Costs
from hetfl_jax.parts.local import Local

Plain = tuple[np.ndarray, np.ndarray] | tuple[()]


class Totals(NamedTuple):
    """Costs so far, exact: Python's integers, which do not overflow.

    >>> add(Totals(down_bits=8), Totals(down_bits=16, client_macs=5)).line()["down_bytes"]
    3
    """

    down_bits: int = 0
    up_bits: int = 0
    client_macs: int = 0
    full_size_bits: int = 0  #: one way, had every client of a round taken the full model once
    plain_down_bits: int = 0  #: had nothing been coded: every message in float32
    plain_up_bits: int = 0

    def line(self) -> dict[str, float]:
        """As a metrics line has them: bytes, and multiply-adds; ratios where messages are coded."""
        return {
            "down_bytes": _bytes(self.down_bits),
            "up_bytes": _bytes(self.up_bits),
            "client_macs": self.client_macs,
            "full_size_bytes": _bytes(self.full_size_bits),
            **self.ratios(),
        }

    def ratios(self) -> dict[str, float]:
        """Bits sent over those of float32, of the directions where they differ.

        >>> Totals(down_bits=32, up_bits=8, plain_down_bits=32, plain_up_bits=32).ratios()
        {'up_ratio': 0.25}
        """
        pairs = {
            "down_ratio": (self.down_bits, self.plain_down_bits),
            "up_ratio": (self.up_bits, self.plain_up_bits),
        }
        return {name: bits / plain for name, (bits, plain) in pairs.items() if plain and bits != plain}


def _bytes(count: int) -> int | float:
    """Whole bytes where bits make some.

    >>> _bytes(16), _bytes(5)
    (2, 0.625)
    """
    return count // 8 if count % 8 == 0 else count / 8


def saved(values: Mapping[str, int]) -> Totals:
    """Totals from a checkpoint; an older one has bytes, or does not say what float32 would have been: as much.

    >>> saved({"down_bytes": 2, "up_bytes": 1, "client_macs": 5, "full_size_bytes": 3}).down_bits
    16
    """
    found = {n.replace("_bytes", "_bits"): int(v) * (8 if n.endswith("_bytes") else 1) for n, v in values.items()}
    plain = {"plain_down_bits": found["down_bits"], "plain_up_bits": found["up_bits"]}
    return Totals(**{**plain, **found})


def macs_of(work: np.ndarray, costs: Costs) -> np.ndarray:
    """[...] multiply-adds of [..., 2, L] examples forward and backward, ``sum_l (f_l + 2 b_l) macs_l``; int64.

    A backward pass counts as two forward passes.

    >>> from hetfl_jax.models.costs import Costs
    >>> costs = Costs(*[np.array([100, 10])] * len(Costs._fields))
    >>> int(macs_of(np.array([[2, 0], [2, 1]]), costs))  # (2 + 2 * 2) * 100 + (0 + 2 * 1) * 10
    620
    """
    work = np.asarray(work, np.int64)
    return work[..., 0, :] @ costs.macs + BACKWARD * (work[..., 1, :] @ costs.macs)


def spent(info: Info, costs: Costs, full: int | None = None, plain: Plain = ()) -> Totals:
    """What one round cost, surveys before it included.

    Args:
      info: of the round, on the host.
      costs: of the net at each level.
      full: bytes of the full model, by default of level 0.
      plain: see ``Price.plain``. What a client does not send counts as sent, a model that it does not receive does not.
    """
    down = up = macs = plain_down = plain_up = 0
    for account in (info.items, info.asked):
        if isinstance(account, Account):
            there = np.asarray(account.valid)
            received, sent = (bits.total(np.asarray(v))[there] for v in (account.seen.down, account.seen.up))
            level, trains = np.asarray(account.level)[there], account is info.items
            down, up = down + int(received.sum()), up + int(sent.sum())
            plain_down += int((np.where(received > 0, plain[0][level], 0) if plain else received).sum())
            plain_up += int((plain[1][level] if plain and trains else sent).sum())
            macs += int(macs_of(np.asarray(account.seen.work)[there], costs).sum())
    clients = np.unique(np.asarray(info.items.ids)[np.asarray(info.items.valid)]).size
    whole = clients * int(costs.bytes[0] if full is None else full) * 8
    return Totals(down, up, macs, whole, plain_down, plain_up)


def add(first: Totals, second: Totals) -> Totals:
    """The sum of two rounds' costs, field by field."""
    return Totals(*(a + b for a, b in zip(first, second)))


def imbalance(info: Info, costs: Costs, devices: int) -> float:
    """Multiply-adds of the busiest device over the mean of all, at least 1; four decimals."""
    there = np.asarray(info.items.valid)
    macs = macs_of(np.asarray(info.items.seen.work), costs) * there
    work = np.bincount(np.asarray(info.device), macs, devices)
    return round(float(work.max() / max(work.mean(), 1.0)), 4)


def mean_steps(settings: Local, size: np.ndarray) -> float:
    """Local steps of a client, on average: ``steps``, or epochs times batches of its size, the last one short.

    >>> from hetfl_jax.parts.local import local
    >>> mean_steps(local(learning_rate=0.1, batch_size=4, epochs=2), np.array([4, 5]))
    3.0
    """
    return float(_steps(settings, np.asarray(size)).mean())


def _steps(settings: Local, size: np.ndarray) -> np.ndarray:
    """[N] local steps of clients of these sizes."""
    by_epochs = settings.epochs * -(-size // settings.batch_size)
    return np.full_like(size, settings.steps) if settings.steps else by_epochs


def executed(info: Info, costs: Costs, settings: Local, size: np.ndarray) -> float:
    """Multiply-adds of the round's local training that ran, over those that its clients needed.

    A bucket runs at the shape of its largest level; a chunk of clients as long as its longest, full of clients or not;
    and a batch is as long as any, full of examples or not. 1 is no waste.

    Args:
      info: of the round; ``ran`` says at which level's shape, and how many at once.
      settings: local training.
      size: [N] examples of every client.
    """
    base, at_once = np.asarray(info.ran)
    there = np.asarray(info.items.valid)
    needed = macs_of(np.asarray(info.items.seen.work)[there], costs).astype(float)
    level, device = np.asarray(info.items.level)[there], np.broadcast_to(np.asarray(info.device), there.shape)[there]
    held = np.asarray(size)[np.asarray(info.items.ids)[there]]
    steps, per_epoch = _steps(settings, held), -(-held // settings.batch_size)
    trained = steps // per_epoch * held + np.minimum(steps % per_epoch * settings.batch_size, held)
    each = (
        needed
        * steps
        * settings.batch_size
        / np.maximum(trained, 1)
        * (costs.macs[base] / np.maximum(costs.macs, 1))[level]
    )
    ran = 0.0
    for place in np.unique(np.stack([device, base[level]]), axis=1).T:
        here = (device == place[0]) & (base[level] == place[1])
        ordered, chunk = -np.sort(-each[here]), int(at_once[level[here][0]])
        ran += chunk * float(ordered[::chunk].sum())
    return round(ran / needed.sum(), 4) if needed.sum() else 1.0


def by_level(account: Account, costs: Costs, names: tuple[str, ...]) -> Line:
    """What the round's items of each level took, late ones too: seconds, multiply-adds and bytes.

    Args:
      account: of items whose time was simulated; of others nothing.
    """
    if isinstance(account.seconds, tuple):
        return {}
    there = np.asarray(account.valid)
    level, seen = np.asarray(account.level)[there], account.seen
    moved = (bits.total(np.asarray(seen.down)) + bits.total(np.asarray(seen.up)))[there] / 8
    parts = {
        "level_seconds": np.asarray(account.seconds, float)[there],
        "level_macs": macs_of(np.asarray(seen.work)[there], costs),
        "level_bytes": moved,
    }
    sums = {part: np.bincount(level, values, minlength=len(names)) for part, values in parts.items()}
    return {part: dict(zip(names, values.tolist())) for part, values in sums.items()}


def of_levels(account: Account, names: tuple[str, ...]) -> dict[str, int]:
    """How many items of each level took part, by the level's name."""
    level = np.asarray(account.level)[np.asarray(account.valid)]
    return dict(zip(names, np.bincount(level, minlength=len(names)).tolist()))


def failed_ids(account: Account) -> list[int]:
    """Clients whose replies were not finite, one entry an item; late ones are another matter."""
    failed = np.asarray(account.valid) & ~np.asarray(account.ok)
    if not isinstance(account.late, tuple):
        failed &= ~np.asarray(account.late)
    return np.asarray(account.ids)[failed].tolist()


def line_of(
    info: Info, number: int, totals: Totals, costs: Costs, names: tuple[str, ...], devices: int, settings: Local,
    size: np.ndarray,
) -> Line:  # fmt: skip
    """A round's metrics line without what the method adds.

    Args:
      number: of the round, from 1.
      totals: costs since the start.
      names: of the levels.
      devices: over which the round's items were spread.
      settings, size: as ``executed``.

    Returns:
      The method's numbers, ``clients`` (whose replies counted), ``failed`` (items), costs, ``items`` a level; and
      ``failed_ids`` where there are any. Without any reply the training loss is ``None``.
    """
    failed = failed_ids(info.items)
    line: Line = {"round": number}
    line |= {name: float(value) for name, value in info.numbers.items() if name not in ("clients", "failed")}
    if not np.asarray(info.items.ok).any():  # nobody trained: there is no loss
        line |= {name: None for name in line if name.startswith("train_")}
    trained = np.unique(np.asarray(info.items.ids)[np.asarray(info.items.ok)])
    line |= {"clients": trained.size, "failed": len(failed), **totals.line()}
    line["executed_over_needed"] = executed(info, costs, settings, size)
    if devices > 1:
        line["imbalance"] = imbalance(info, costs, devices)
    line["items"] = of_levels(info.items, names)
    if not isinstance(info.items.late, tuple):
        line["late"] = int(np.asarray(info.items.late).sum())
    line |= by_level(info.items, costs, names)
    return line | ({"failed_ids": list(dict.fromkeys(failed))} if failed else {})

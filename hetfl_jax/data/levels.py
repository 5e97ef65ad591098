"""Which capacity level each client has, where levels are fixed."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np


def levels_fixed(proportions: tuple[int, ...], clients: int) -> np.ndarray:
    """HeteroFL's fixed assignment: blocks of ``clients // sum * proportion`` in id order, leftovers the last level.

    Args:
      proportions: of each level, the largest level first.
      clients: N.

    Returns:
      [N] int32.

    >>> levels_fixed((1, 2), 7).tolist()
    [0, 0, 1, 1, 1, 1, 1]
    """
    _proportions(proportions, clients)
    each = clients // sum(proportions)
    level = np.repeat(np.arange(len(proportions)), [each * p for p in proportions])
    return np.concatenate([level, np.full(clients - level.size, len(proportions) - 1)]).astype(np.int32)


def levels_by_id(proportions: tuple[int, ...], clients: int) -> np.ndarray:
    """DepthFL's fixed assignment: the smallest level (the last) to the first ids; any remainder is spread.

    With D equal proportions client i gets depth ``floor(D i / N) + 1``.

    >>> levels_by_id((1, 1), 5).tolist()
    [1, 1, 1, 0, 0]
    """
    _proportions(proportions, clients)
    share = np.arange(clients) * sum(proportions) // clients
    from_smallest = np.searchsorted(np.cumsum(proportions[::-1]), share, side="right")
    return (len(proportions) - 1 - from_smallest).astype(np.int32)


def _proportions(proportions: tuple[int, ...], clients: int) -> None:
    """Refuse proportions that are no whole numbers >= 0 with one above 0."""
    _need(_whole(clients, 1), f"clients {clients!r}: need a whole number >= 1")
    _need(isinstance(proportions, Sequence) and len(proportions) > 0, f"proportions {proportions!r}: need some")
    for value in proportions:
        _need(_whole(value, 0), f"proportions {proportions!r}: {value!r}: need a whole number >= 0")
    _need(sum(proportions) > 0, f"proportions {proportions!r}: need one above 0")


def _whole(value: object, low: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low


def _need(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(f"{message} (family.mix)")


def check_levels(level: np.ndarray, levels: int, names: Sequence[str]) -> None:
    """Refuse [N] fixed levels of which one has no client, above all the global one: nobody would train it.

    Args:
      level: the level of each client, 0 is the global one.
      levels: how many there are.
      names: what they are called, in that order.

    Raises:
      ValueError: with the number of clients of each level.

    >>> check_levels(np.array([1, 1]), 2, ("a", "e"))
    Traceback (most recent call last):
    ValueError: no client has level a, the global one: a 0, e 2 clients; need one each, so more clients or other
    proportions (family.mix, data.clients)
    """
    count = np.bincount(level, minlength=levels)
    if empty := [i for i in range(levels) if not count[i]]:
        told = ", ".join(f"{name} {clients}" for name, clients in zip(names, count))
        raise ValueError(
            f"no client has level {names[empty[0]]}{', the global one' if not empty[0] else ''}: {told} clients; need "
            "one each, so more clients or other proportions (family.mix, data.clients)"
        )

"""Split-Mix's budgets: how wide a net each client can train, in whole base nets."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.random import shuffled
from hetfl_jax.core.types import Array

ORDERS = ("clients", "shuffled")


class Budgets(NamedTuple):
    """Groups of clients, the smallest budget first."""

    bases: tuple[int, ...]  #: base nets that a client of each group can train
    ends: tuple[int, ...]  #: the first rank after each group
    shuffled: bool = False  #: whether ranks are client ids, or shuffled ones

    def of(self, ids: Array) -> Array:
        """[K] base nets that clients ``ids`` can train."""
        rank = shuffled(ids, self.ends[-1]) if self.shuffled else ids
        group = jnp.searchsorted(jnp.asarray(self.ends), rank, side="right")
        return jnp.asarray(self.bases, jnp.int32)[jnp.minimum(group, len(self.bases) - 1)]

    def counts(self) -> list[int]:
        """Clients of each group."""
        return np.diff(self.ends, prepend=0).tolist()

    def most_pairs(self, cohort: int) -> int:
        """Base nets that any ``cohort`` different clients train together, at most."""
        each = np.repeat(self.bases, self.counts())
        return int(np.sort(each)[::-1][:cohort].sum())

    def mean(self) -> float:
        """Base nets that a client trains, on average."""
        return float(np.average(self.bases, weights=self.counts()))


def schedule(text: str, base_width: float, clients: int, order: str = "clients") -> Budgets:
    """The budgets that a schedule gives to ``clients`` clients.

    Client i of K gets entry ``floor(S i / K)`` of the S widths in rising order.

    Args:
      text: widths of a net as divisors, ``8-4-2-1`` for 1/8, 1/4, 1/2 and 1, where ``8d3`` is 3/8; or
        ``ln<s>_<scale>``: the multiples of the base width, where the share of clients below width w follows the
        log-normal distribution function, set to 0 at the smallest width.
      base_width: of one base net, against the full net.
      order: ``clients`` in the order of their ids (where data is sorted by domain, budgets go with domains, as in the
        published figures), or ``shuffled``, always alike.

    Raises:
      ValueError: a schedule that cannot be read, or a width that is not one or more whole base nets.

    >>> schedule("8-4-2-1", 0.125, 50)
    Budgets(bases=(1, 2, 4, 8), ends=(13, 25, 38, 50), shuffled=False)
    >>> schedule("ln0.5_0.4", 0.125, 100).counts()
    [16, 28, 22, 15, 8, 5, 2, 4]
    """
    where = "(method.args.budgets)"
    if order not in ORDERS:
        raise ValueError(f"order {order!r} is not one of {', '.join(ORDERS)} (method.args.budget_order)")
    if clients < 1:
        raise ValueError(f"budgets of {clients} clients, allowed >= 1 {where}")
    base = base_fraction(base_width)
    shuffled = order == "shuffled"
    if found := re.fullmatch(r"ln(\d+\.?\d*)_(\d+\.?\d*)", text):
        bases = tuple(range(1, int(1 / base) + 1))
        ends = _log_normal([float(base) * b for b in bases], float(found[1]), float(found[2]), clients)
        return Budgets(bases, ends, shuffled)
    parts = text.split("-")
    if not all(re.fullmatch(r"[1-9]\d*(d[1-9]\d*)?", part) for part in parts):
        raise ValueError(f"budgets {text!r}: allowed divisors such as 8-4-2-1 or 8-8d3-1, or ln0.5_0.4 {where}")
    widths = sorted(_width(part) for part in parts)
    for width in widths:
        if width < base:
            raise ValueError(f"budget {width} in {text!r} is below one base net of width {base} {where}")
        if width % base:
            raise ValueError(f"budget {width} in {text!r} is no multiple of the base width {base} {where}")
        if width > 1:
            raise ValueError(f"budget {width} in {text!r}, allowed at most 1, the full net {where}")
    ends = tuple(-(-(number + 1) * clients // len(widths)) for number in range(len(widths)))
    return Budgets(tuple(int(width / base) for width in widths), ends, shuffled)


def base_fraction(base_width: float) -> Fraction:
    """The width of a base net as a ratio of whole numbers.

    Raises:
      ValueError: a width outside (0, 1].

    >>> base_fraction(0.125), base_fraction(1 / 3)
    (Fraction(1, 8), Fraction(1, 3))
    """
    if not 0 < base_width <= 1:
        raise ValueError(f"base width {base_width}, allowed 0 < width <= 1 (family.mix)")
    return Fraction(base_width).limit_denominator(4096)


def _width(part: str) -> Fraction:
    """1/8 of ``8``, 3/8 of ``8d3``."""
    below, _, above = part.partition("d")
    return Fraction(int(above or 1), int(below))


def _log_normal(widths: Sequence[float], spread: float, scale: float, clients: int) -> tuple[int, ...]:
    if not (spread > 0 and scale > 0):
        raise ValueError(f"log-normal budgets of spread {spread:g}, scale {scale:g}: need > 0 (method.args.budgets)")

    def below(width: float) -> float:
        return 0.5 * (1 + math.erf(math.log(width / scale) / (spread * math.sqrt(2))))

    first = below(widths[0])
    starts = [int(clients * (below(w) - first) / (1 - first)) for w in widths]
    return (*starts[1:], clients)

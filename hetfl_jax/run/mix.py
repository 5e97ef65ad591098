"""Capacity levels written as text: which there are, how often each occurs, and which share a bucket."""

import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from hetfl_jax.core.random import shuffled
from hetfl_jax.core.types import Line
from hetfl_jax.data.levels import levels_by_id, levels_fixed

ORDERS = ("usual", "smallest_first", "shuffled", "by_data", "against_data")

RATES = {letter: 0.5**i for i, letter in enumerate("abcde")}  #: width of each level letter


class Mix(NamedTuple):
    """Capacity levels and how often each occurs, the global (largest) one first."""

    names: tuple[str, ...]  #: of each level, e.g. ``b``, ``3``, ``b3`` or ``w0.75``
    widths: tuple[float, ...]  #: relative to the global level
    proportions: tuple[int, ...]
    global_rate: float
    depths: tuple[int, ...] = ()  #: of each level, where levels have one


def sizes(mix: Mix) -> dict[str, tuple[float, int | None]]:
    """Width and depth of each level by its name; a depth of None where the levels have none.

    >>> sizes(parse_mix("a1-b1")), sizes(parse_mix("2x1-1x1"))
    ({'a': (1.0, None), 'b': (0.5, None)}, {'2': (1.0, 2), '1': (1.0, 1)})
    """
    return dict(zip(mix.names, zip(mix.widths, mix.depths or [None] * len(mix.widths))))


_PART = re.compile(r"w(?P<width>\d+(?:\.\d+)?)x(?P<often>\d+)|([a-z])?(?:(\d+)x)?(\d+)")


def parse_mix(text: str) -> Mix:
    """A mix such as ``a1-b1-e2``: levels with integer proportions, the global (largest) level first.

    A level is a width letter (a to e: 1, 1/2, ... 1/16), a depth (``4x1-3x1``: depth 4 and 3, once each), both
    (``a4x1-b2x3``), or any width (``w1x2-w0.75x1``: width 1 twice, 0.75 once). Widths of a ``Mix`` are relative to the
    first one; ``global_rate`` is the first one's own.

    Raises:
      ValueError: an unknown letter, a missing or zero proportion, a level above the global one, a repeated level.

    >>> parse_mix("b1-e3").widths, parse_mix("a4x1-b2x1").depths, parse_mix("w1x2-w0.75x1").proportions
    ((1.0, 0.125), (4, 2), (2, 1))
    >>> parse_mix("b1-a1")
    Traceback (most recent call last):
    ValueError: level 'a' in mix 'b1-a1' is above the global level 'b', the first (family.mix)
    """
    found = [_level(part, text) for part in (text.split("-") if text else [])]
    names = tuple(name for name, *_ in found)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"mix {text!r}: need at least one level, each level once (family.mix)")
    if len({(rate is None, depth == 0) for _, rate, depth, _ in found}) > 1:
        raise ValueError(f"mix {text!r}: levels differ in width, in depth or in both, all alike (family.mix)")
    first, deepest = found[0][1] or 1.0, found[0][2]
    if above := [name for name, rate, depth, _ in found if (rate or 1.0) > first or depth > deepest]:
        raise ValueError(
            f"level {above[0]!r} in mix {text!r} is above the global level {names[0]!r}, the first (family.mix)"
        )
    widths = tuple((rate or 1.0) / first for _, rate, *_ in found)
    depths = tuple(depth for _, _, depth, _ in found) if deepest else ()
    return Mix(names, widths, tuple(count for *_, count in found), first, depths)


def _level(part: str, text: str) -> tuple[str, float | None, int, int]:
    """Name, width if it has one, depth (0: none) and proportion of one level.

    >>> _level("b2x3", ""), _level("w0.75x1", "")
    (('b2', 0.5, 2, 3), ('w0.75', 0.75, 0, 1))
    """
    if part[:1].isalpha() and part[0] != "w" and part[0] not in RATES:
        raise ValueError(f"level {part[:1]!r} in mix {text!r} is not one of {', '.join(RATES)} (family.mix)")
    match = _PART.fullmatch(part)
    wide = match is not None and match["width"] is not None
    letter, depth, often = match.groups()[2:] if match else (None, None, None)
    count = int((match["often"] if match and wide else often) or 0)
    if not match or count < 1 or depth == "0" or not (letter or depth or wide):
        raise ValueError(
            f"part {part!r} in mix {text!r}: need a level and a proportion >= 1, as in a1-b1, 4x1 or w0.75x1 "
            "(family.mix)"
        )
    if not wide:
        return f"{letter or ''}{depth or ''}", RATES.get(letter or ""), int(depth or 0), count
    width = float(match["width"])
    if not 0 < width <= 1:
        raise ValueError(f"width {width:g} in mix {text!r}, allowed 0 < width <= 1 (family.mix)")
    return f"w{width:g}", width, 0, count


def assigned(mix: Mix, clients: int, order: str = "usual", size: np.ndarray | None = None) -> np.ndarray:
    """[N] int32 the fixed level of every client.

    Args:
      order: ``usual``, in blocks by id: the largest width first (HeteroFL), the smallest depth first (DepthFL);
        ``smallest_first``: by id, shares rounded as in DepthFL and Split-Mix; ``shuffled``: the same, by a shuffled id;
        ``by_data``: the same, by ``size``, so that those with most examples have the largest level; ``against_data``:
        those with most have the smallest. Equal sizes go by id.
      size: [N] examples of each client.

    Raises:
      ValueError: an unknown order.

    >>> assigned(parse_mix("a1-b1"), 5, "smallest_first").tolist(), assigned(parse_mix("a1-b1"), 5).tolist()
    ([1, 1, 1, 0, 0], [0, 0, 1, 1, 1])
    """
    if order not in ORDERS:
        raise ValueError(f"order {order!r} is not one of {', '.join(ORDERS)} (capacity.order)")
    if order == "usual" and not mix.depths:
        return levels_fixed(mix.proportions, clients)
    level = levels_by_id(mix.proportions, clients)
    if order == "shuffled":
        return level[shuffled(np.arange(clients), clients)]
    if order in ("by_data", "against_data"):
        if size is None:
            raise ValueError(f"order {order!r} without the clients' sizes (capacity.order)")
        rank = np.empty(clients, int)
        rank[np.argsort(size if order == "by_data" else -size, kind="stable")] = np.arange(clients)
        return level[rank]
    return level


def level_fields(mix: Mix, level: int, norm: str = "none") -> Line:
    """What a level changes in the net of the global one.

    Args:
      level: its number, 0 is the largest.
      norm: ``bn_tiers`` has statistics for the level and all below, so that it is told how many these are.

    >>> level_fields(parse_mix("4x1-2x1"), 1), level_fields(parse_mix("a1-b1"), 0, "bn_tiers")
    ({'depth': 2}, {'width': 1.0, 'tiers': 2})
    """
    width = {"width": mix.widths[level]} if not mix.depths or len(set(mix.widths)) > 1 else {}
    tiers = {"tiers": len(mix.names) - level} if norm == "bn_tiers" else {}
    return width | ({"depth": mix.depths[level]} if mix.depths else {}) | tiers


def uniform_tiers(count: int, drop_scale: float = 1.0) -> str:
    """The mix of widths 1, (k-1)/k ... 1/k: each below 1 for the share ``drop_scale / k`` of clients, 1 for the rest.

    Raises:
      ValueError: a count below 1, or a scale that leaves nobody, or less than nobody, for a width.

    >>> uniform_tiers(5), uniform_tiers(5, 0.5)
    ('w1x1-w0.8x1-w0.6x1-w0.4x1-w0.2x1', 'w1x6-w0.8x1-w0.6x1-w0.4x1-w0.2x1')
    """
    if count < 1 or not 0 < drop_scale <= 1:
        raise ValueError(f"{count} tiers with drop scale {drop_scale}: allowed >= 1 and 0 < scale <= 1 (family.mix)")
    each = Fraction(str(drop_scale)) / count
    top = (1 - (count - 1) * each) / each
    names = [f"w{round(k / count, 6):g}x{top.denominator}" for k in range(count - 1, 0, -1)]
    return "-".join([f"w1x{top.numerator}", *names])


def capped(text: str, width: float) -> str:
    """A mix of widths whose levels above ``width``, one of them, join it.

    Raises:
      ValueError: a width that is none of the mix's.

    >>> capped(uniform_tiers(5), 0.4)
    'w0.4x4-w0.2x1'
    """
    mix = parse_mix(text)
    widths = [round(w * mix.global_rate, 6) for w in mix.widths]
    if width not in widths:
        raise ValueError(f"width {width:g} is not one of {', '.join(f'{w:g}' for w in widths)} (family.mix)")
    place = widths.index(width)
    first = f"w{width:g}x{sum(mix.proportions[: place + 1])}"
    rest = [f"w{w:g}x{n}" for w, n in zip(widths[place + 1 :], mix.proportions[place + 1 :])]
    return "-".join([first, *rest])


def parse_buckets(text: str, mix: Mix) -> tuple[tuple[int, ...], ...]:
    """Which levels share a bucket: ``each``, ``one``, or groups of level names such as ``a-b-cde``.

    Raises:
      ValueError: groups that do not name every level of the mix once, or whose first level does not hold the others.

    >>> parse_buckets("a-be", parse_mix("a1-b1-e1")), parse_buckets("one", parse_mix("a1-b1"))
    (((0,), (1, 2)), ((0, 1),))
    """
    if text == "each":
        return ()
    if text == "one":
        numbers: tuple[tuple[int, ...], ...] = (tuple(range(len(mix.names))),)
    else:
        name = r"(?:w\d+(?:\.\d+)?|[a-z]\d*|\d)"
        groups = [re.findall(name, group) for group in text.split("-")]
        named = re.fullmatch(f"{name}+(-{name}+)*", text) and sorted(each for group in groups for each in group)
        if named != sorted(mix.names):
            raise ValueError(
                f"buckets {text!r}: allowed each, one, or groups of {', '.join(mix.names)}, each once (train.buckets)"
            )
        numbers = tuple(tuple(mix.names.index(name) for name in group) for group in groups)
    sizes = list(zip(mix.widths, mix.depths or [0] * len(mix.widths)))
    for bucket in numbers:
        largest = sizes[min(bucket)]
        if smaller := [i for i in bucket if sizes[i][0] > largest[0] or sizes[i][1] > largest[1]]:
            raise ValueError(
                f"buckets {text!r}: {mix.names[smaller[0]]} is not inside {mix.names[min(bucket)]}, the first of its "
                "bucket in the mix (train.buckets)"
            )
    return numbers

"""Domains: one data set seen in several ways, or several data sets, each for a group of clients."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from hetfl_jax.data.partition import Partition
from hetfl_jax.data.sources import Source, images_of

#: what an image [M, H, W, C] uint8 becomes in a domain: (images, argument, generator) -> images of the same size
Change = Callable[[np.ndarray, str, np.random.Generator], np.ndarray]


def combined(source: Source | None, texts: Sequence[str], load: Callable[[str], Source], seed: int) -> Source:
    """The rows of all domains, one domain after the other, equally many of each.

    ``plain``, ``inverted``, ``blended:<npz>``, ``rotated:<degrees>``, ``noisy:<deviation>`` and ``downscaled:<factor>``
    are each an equal random part of ``source``, changed; ``npz:<path>`` is a data set of its own, brought to the image
    size of the first domain. Grey images become RGB where another domain has colours. Larger domains are cut.

    Args:
      source: of the changed domains; not needed where there are none.
      texts: the domains, e.g. ``("plain", "rotated:30")``.
      load: reads the data set of an ``npz:`` domain.
      seed: of the parts and of noise.

    Raises:
      ValueError: a domain that there is not, or that cannot be made of these images.

    >>> x, y = np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 0, 1])
    >>> combined(Source(x, y, x, y), ("plain", "inverted"), Source, 0).x_test[:, 0, 0, 0].tolist()
    [0, 0, 255, 255]
    """
    if not texts:
        _fail("domains (): need one or more")
    changed = changes(texts)
    parts = iter(_parts(source, len(changed), seed) if changed else ())
    found = []
    for number, text in enumerate(texts):
        if text.startswith("npz:"):
            found.append(load(text))
            continue
        found.append(_changed(next(parts), text, np.random.default_rng([seed, number])))
    side = found[0].x_train.shape[1:3]
    channels = max(domain.x_train.shape[-1] for domain in found)
    sets: dict[str, np.ndarray] = {}
    for s in ("train", "test", "validation"):
        if getattr(found[0], f"x_{s}") is None:
            continue
        least = min(len(getattr(domain, f"y_{s}")) for domain in found)
        x = [_alike(getattr(domain, f"x_{s}")[:least], side, channels) for domain in found]
        sets |= {f"x_{s}": np.concatenate(x), f"y_{s}": np.concatenate([getattr(d, f"y_{s}")[:least] for d in found])}
    return Source(**sets)


def changes(texts: Sequence[str]) -> list[str]:
    """The domains that are made of the source; of no domains the source itself.

    >>> changes(("plain", "npz:svhn.npz", "inverted")), changes(())
    (['plain', 'inverted'], ['plain'])
    """
    return [text for text in texts if not text.startswith("npz:")] if texts else ["plain"]


def per_domain(examples: int, clients: int, domains: int, test_examples: int) -> Partition:
    """Equal consecutive parts of every domain's rows for its clients, who follow each other; test rows alike.

    >>> part = per_domain(10, 4, 2, 5)
    >>> part.rows.tolist(), part.test_index.tolist()
    ([0, 1, 2, 3, 5, 6, 7, 8], [0, 1, 2, 3])

    Args:
      examples: rows of all domains, domain after domain, equally many of each.
      clients: N, a multiple of ``domains``.
      domains: how many there are.
      test_examples: rows of all domains' test sets.

    Raises:
      ValueError: clients that cannot be dealt evenly, or without an example.
    """
    if clients % domains or clients < domains:
        _fail(f"{clients} clients in {domains} domains: need equally many in each, data.clients")
    each = clients // domains

    def deal(count: int) -> tuple[np.ndarray, np.ndarray]:
        size = count // domains // each
        start = np.repeat(np.arange(domains) * (count // domains), each) + np.tile(np.arange(each) * size, domains)
        return (start[:, None] + np.arange(size)).reshape(-1), np.full(clients, size)

    rows, size = deal(examples)
    if not size[0]:
        _fail(f"{examples} examples for {clients} clients: need one or more each")
    test = deal(test_examples)
    return Partition(rows, size, *(test if test[1][0] else (None, None)))


def _fail(text: str) -> NoReturn:
    """Refuse with a message and the key ``data.domains``."""
    raise ValueError(f"{text} (data.domains)")


def _parts(source: Source | None, count: int, seed: int) -> list[Source]:
    """Equal random parts of all sets of a source.

    Raises:
      ValueError: examples that are no images uint8, or fewer than there are domains.
    """
    assert source is not None
    for x in (source.x_train, source.x_test):
        if x.ndim != 4 or x.dtype != np.uint8:
            _fail(f"domains of examples of shape {x.shape[1:]}, {x.dtype}: need images stored as whole numbers 0..255")
    rng, rows = np.random.default_rng(seed), {}
    for s in ("train", "test", "validation"):
        size = len(y) if (y := getattr(source, f"y_{s}")) is not None else 0
        if y is not None and size < count:
            _fail(f"{count} domains of {size} examples in the {s} set: need one or more each")
        rows[s] = np.array_split(rng.permutation(size)[: size // count * count], count)

    def part(number: int) -> Source:
        found: dict[str, Any] = {}
        for s, chosen in rows.items():
            for name in (f"x_{s}", f"y_{s}"):
                value = getattr(source, name)
                found[name] = None if value is None else value[chosen[number]]
        return Source(**found)

    return [part(number) for number in range(count)]


def _changed(part: Source, text: str, rng: np.random.Generator) -> Source:
    """A part as a domain sees it: its images changed, its labels as they are.

    Args:
      text: of the domain; an argument after the colon, else the default one (45 degrees, deviation 0.2, factor 2).
      rng: of noise and patches.
    """
    kind, _, argument = text.partition(":")
    if kind not in CHANGES:
        _fail(f"domain {text!r} is not one of npz:<path>, {', '.join(CHANGES)}")
    change, default = CHANGES[kind]
    of = {name: change(x, argument or default, rng) for name, x in part._asdict().items()
          if name.startswith("x_") and x is not None}  # fmt: skip
    return part._replace(**of)


def _number(text: str, kind: str, low: float, high: float) -> float:
    """A domain's argument, above ``low`` and at most ``high``.

    >>> _number("30", "rotated", -360, 360)
    30.0
    >>> _number("3", "noisy", 0, 1)
    Traceback (most recent call last):
    ValueError: domain 'noisy:3', allowed a number above 0, at most 1 (data.domains)
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low < value <= high:
        _fail(f"domain '{kind}:{text}', allowed a number above {low:g}, at most {high:g}")
    return value


def _plain(x: np.ndarray, argument: str, rng: np.random.Generator) -> np.ndarray:
    return x


def _inverted(x: np.ndarray, argument: str, rng: np.random.Generator) -> np.ndarray:
    return 255 - x


def _noisy(x: np.ndarray, argument: str, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise whose deviation is a share of 255, cut to 0..255."""
    deviation = 255 * _number(argument, "noisy", 0, 1)
    noise = rng.normal(0, deviation, x.shape).astype(np.float32)
    return np.clip(np.round(x + noise), 0, 255).astype(np.uint8)


def _downscaled(x: np.ndarray, argument: str, rng: np.random.Generator) -> np.ndarray:
    """Images shrunk by a factor and brought back to their size, so that they are blurred."""
    factor, side = int(_number(argument, "downscaled", 1, min(x.shape[1:3]))), x.shape[1:3]
    small = resized(x, tuple(-(-s // factor) for s in side))
    return resized(small, side)


def _rotated(x: np.ndarray, argument: str, rng: np.random.Generator) -> np.ndarray:
    """Images turned counter-clockwise by degrees about their centre, black where nothing was."""
    angle = np.deg2rad(_number(argument, "rotated", -360, 360))
    grid = np.stack(np.meshgrid(*(np.arange(s) - (s - 1) / 2 for s in x.shape[1:3]), indexing="ij"))
    rows = np.cos(angle) * grid[0] + np.sin(angle) * grid[1] + (x.shape[1] - 1) / 2
    columns = -np.sin(angle) * grid[0] + np.cos(angle) * grid[1] + (x.shape[2] - 1) / 2
    return _between(x, rows, columns, outside=0.0)


def _blended(x: np.ndarray, argument: str, rng: np.random.Generator) -> np.ndarray:
    """``|image - patch|`` with a random patch of a random other image, as MNIST-M is made."""
    if not argument:
        _fail("domain 'blended': needs the images to blend with, as in blended:<npz path>")
    others, (high, wide) = images_of(argument), x.shape[1:3]
    if others.shape[1] < high or others.shape[2] < wide:
        _fail(f"domain 'blended:{argument}' has images of {others.shape[1:3]}: need {(high, wide)} or larger")
    which = rng.integers(0, len(others), len(x))
    top, left = (rng.integers(0, room + 1, len(x)) for room in (others.shape[1] - high, others.shape[2] - wide))
    rows, columns = top[:, None] + np.arange(high), left[:, None] + np.arange(wide)
    patch = others[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return np.abs(x.astype(np.int16) - patch).astype(np.uint8)


CHANGES: dict[str, tuple[Change, str]] = {
    "plain": (_plain, ""),
    "inverted": (_inverted, ""),
    "blended": (_blended, ""),
    "rotated": (_rotated, "45"),
    "noisy": (_noisy, "0.2"),
    "downscaled": (_downscaled, "2"),
}


def _between(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, outside: float | None = None) -> np.ndarray:
    """Images at fractional places [H', W'], bilinear; what lies outside is the nearest edge, or a value.

    Args:
      x: [M, H, W, C] uint8.
      rows, columns: places in pixels from the top left one.

    Returns:
      [M, H', W', C] uint8.
    """
    high, wide = x.shape[1:3]
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    out = np.zeros((len(x), *rows.shape, x.shape[-1]), np.float32)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = top + i, left + j
        weight = (1 - np.abs(rows - row)) * (1 - np.abs(columns - column))
        inside = (row >= 0) & (row < high) & (column >= 0) & (column < wide)
        pixel = x[:, row.clip(0, high - 1), column.clip(0, wide - 1)].astype(np.float32)
        pixel = pixel if outside is None else np.where(inside[..., None], pixel, np.float32(outside))
        out += weight[..., None].astype(np.float32) * pixel
    return np.clip(np.round(out), 0, 255).astype(np.uint8)


def resized(x: np.ndarray, side: Sequence[int]) -> np.ndarray:
    """Images [M, H, W, C] uint8 at another size, bilinear with half-pixel centres; smaller ones are means of windows.

    >>> resized(np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1), (1, 2))[0, 0, :, 0].tolist()
    [1, 5]

    Args:
      x: [M, H, W, C] uint8.
      side: new height and width.
    """
    if tuple(side) == x.shape[1:3]:
        return x
    places = [(np.arange(s) + 0.5) * full / s - 0.5 for s, full in zip(side, x.shape[1:3])]
    spans = [max(1, int(np.ceil(full / s))) for s, full in zip(side, x.shape[1:3])]
    steps = [((np.arange(span) + 0.5) / span - 0.5) * full / s for span, full, s in zip(spans, x.shape[1:3], side)]
    total = np.zeros((len(x), *side, x.shape[-1]), np.float32)
    for i in steps[0]:
        for j in steps[1]:
            total += _between(x, *np.meshgrid(places[0] + i, places[1] + j, indexing="ij"))
    return np.round(total / (spans[0] * spans[1])).astype(np.uint8)


def _alike(x: np.ndarray, side: Sequence[int], channels: int) -> np.ndarray:
    """Images of one size, grey ones as RGB where ``channels`` asks for it."""
    if x.ndim != 4 or x.dtype != np.uint8:
        _fail(f"a domain of examples of shape {x.shape[1:]}, {x.dtype}: need images stored as whole numbers 0..255")
    if x.shape[-1] not in (1, channels):
        _fail(f"domains with {x.shape[-1]} and {channels} channels: need 1 or {channels} in all")
    return np.repeat(resized(x, side), channels // x.shape[-1], axis=-1)

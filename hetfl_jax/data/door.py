"""The one door of data: labels, pixels and ids of any kind are read as a person means them, or refused in one line.

Command line and Python pass ``admit`` before any split. What it changes in a way that one may not expect, it says.
"""

import hashlib
import math
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np

from hetfl_jax.core.types import Arguments, Line
from hetfl_jax.data.partition import Partition
from hetfl_jax.data.reading import (
    are_sequences,
    array_of,
    class_labels,
    client_ids,
    fail,
    float32,
    pixels,
    said,
    targets,
    tokens,
)
from hetfl_jax.data.sources import Source

FLOAT_RANGE = 4.0  #: largest absolute value of images stored as floats, where their scale is not given
SCALED_RANGE = 8.0  #: the same after ``mean`` and ``std``, where these are given
_CHANNELS = (1, 3, 4)

Arrays = dict[str, np.ndarray]
Scaling = tuple[Sequence[float] | None, Sequence[float] | None]


class Admitted(NamedTuple):
    """A source that may be split: images uint8 or float32, features float32 or uint8, labels int32 from 0."""

    source: Source
    labels_table: dict[str, int] | None  #: old label -> new one, where labels were renumbered; fit for JSON
    notes: list[str]  #: one sentence for each change that one may not expect


def admit(
    source: Source,
    *,
    images: bool | None = None,
    regression: bool = False,
    classes: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Admitted:
    """Check and convert a data set before any split; valid arrays come back as they are.

    Labels are text, bool, integers or floats that are whole numbers, of shape [M] or [M, 1], or one-hot rows [M, C].
    Text is always renumbered, in alphabetical order (texts that are all whole numbers count as numbers). Numbers are
    renumbered, in rising order, if one is negative, if none is 0, or if the largest is at least 4 x as many as there
    are distinct ones; other gaps stay. All sets count together. Sequences [M, S] (integers, like x) never are.

    Integer images mean 0..255 whatever their width and become uint8, bool becomes 0 and 255, [M, H, W] gets a channel
    axis, [M, 1|3|4, H, W] is moved to channels last. Flat rows [M, D] are features.

    Args:
      source: arrays, or lists of them, with as many rows of x as of y, and a writer for each training row, if any.
      images: whether x are images (then flat ones are refused) or not (then no axis is touched); default: if x has 3
        or 4 axes.
      regression: y are numbers to predict; they become float32.
      classes: outputs of the net, if they are fixed: labels from 0 to below that stay as they are.
      mean, std: what images are normalised with, if known: 1 or C entries, of pixels in 0..1.

    Raises:
      ValueError: one line that names the array and the row.

    >>> x = np.zeros((2, 5, 5), int)
    >>> found = admit(Source(x, np.array(["cat", "dog"]), x, np.array(["dog", "cat"])))
    >>> found.source.x_train.shape, found.source.y_test.tolist(), found.labels_table
    ((2, 5, 5, 1), [1, 0], {'cat': 0, 'dog': 1})
    """
    arrays = {name: array_of(name, value) for name, value in source._asdict().items() if value is not None}
    sets = ["train", "test"] + ["validation"] * ("x_validation" in arrays or "y_validation" in arrays)
    for s in sets:
        _check_rows(arrays, s)
    x, y = ({f"{kind}_{s}": arrays[f"{kind}_{s}"] for s in sets} for kind in "xy")
    for name, value in x.items():
        if value.shape[1:] != x["x_train"].shape[1:]:
            fail(f"{name} has rows of shape {value.shape[1:]}, x_train of {x['x_train'].shape[1:]}: need them alike")
    table, notes = None, list[str]()
    if not regression and are_sequences(x["x_train"], y["y_train"]):
        if images:
            need_images(source)
        x, y = ({name: tokens(name, ids) for name, ids in each.items()} for each in (x, y))
        if unlike := [s for s in sets if x[f"x_{s}"].shape != y[f"y_{s}"].shape]:
            fail(f"y_{unlike[0]} has shape {y[f'y_{unlike[0]}'].shape}: need a label for each token of x_{unlike[0]}")
    else:
        x = _examples(x, images, (mean, std), notes)
        if regression:
            y = {name: targets(name, value) for name, value in y.items()}
        else:
            y, table, line = class_labels(y, classes)
            notes += [line] if line else []
    ids = {"writer": client_ids("writer", arrays["writer"], len(y["y_train"]))} if "writer" in arrays else {}
    return Admitted(source._replace(**x, **y, **ids), table, notes)


def _check_rows(arrays: Arrays, s: str) -> None:
    """Both arrays of a set must be there, with as many rows, at least one."""
    for name in (f"x_{s}", f"y_{s}"):
        if name not in arrays:
            fail(f"the {s} set has no {name}")
    count = len(arrays[f"x_{s}"])
    if count != len(arrays[f"y_{s}"]):
        fail(f"x_{s} has {count} rows, y_{s} has {len(arrays[f'y_{s}'])}: need as many")
    if not count:
        fail(f"the {s} set is empty: x_{s} has 0 rows")


def _examples(found: Arrays, images: bool | None, scaling: Scaling, notes: list[str]) -> Arrays:
    """Images [M, H, W, C], or features as they lie.

    Args:
      found: arrays of all sets, which have rows of one shape.
      images: whether they are; ``None`` decides by the number of axes.
      scaling: mean and std, if known.
      notes: gets a sentence for each change that one may not expect.

    Raises:
      ValueError: text, no axis of values, whole numbers in one set and floats in another, or a range that is no
        image's.
    """
    shape = found["x_train"].shape
    for name, x in found.items():
        if x.dtype.kind in "US":
            fail(f"{name} is text: need numbers; token ids go with a label for each token")
    if len(shape) == 1 or 0 in shape:
        fail(f"x_train has shape {shape}: need rows of values, x.reshape(-1, 1) for one value a row")
    if images:
        _need_images(shape)
    if not (len(shape) in (3, 4) if images is None else images):
        whole = all(x.dtype == np.uint8 for x in found.values())
        return {name: x if whole else float32(name, x) for name, x in found.items()}
    if len(shape) == 3:
        found = {name: x[..., None] for name, x in found.items()}
    elif shape[1] in _CHANNELS and min(shape[2:]) > max(_CHANNELS):
        found = {name: np.moveaxis(x, 1, -1) for name, x in found.items()}
        notes.append(f"x_train has shape {shape}: read as channels first and moved to {found['x_train'].shape}")
    floats = {x.dtype.kind == "f" for x in found.values()}
    if len(floats) > 1:
        fail("; ".join(f"{name} has {x.dtype}" for name, x in found.items()) + ": need integers or floats in all")
    mean, std = scaling
    if mean is not None or std is not None:
        check_scaling(() if mean is None else mean, () if std is None else std, found["x_train"].shape[-1])
    if floats.pop():
        return {name: _scaled(name, float32(name, x), mean, std) for name, x in found.items()}
    found = {name: pixels(name, x) for name, x in found.items()}
    if (most := int(found["x_train"].max())) < 32:
        notes.append(f"x_train's largest pixel is {most}: integers mean 0..255, floats 0..1")
    return found


def _scaled(name: str, x: np.ndarray, mean: Sequence[float] | None, std: Sequence[float] | None) -> np.ndarray:
    """Refuse floats of images that look like 0..255: beyond 4 in absolute value, or, after mean and std, beyond 8."""
    if max(x.max(), -x.min()) > FLOAT_RANGE:
        low, high = x.min((0, 1, 2)), x.max((0, 1, 2))
        most, allowed = np.inf, FLOAT_RANGE
        if mean is not None and std is not None:
            shift, scale = np.asarray(mean, np.float64), np.asarray(std, np.float64)
            most, allowed = max(np.abs((side - shift) / scale).max() for side in (low, high)), SCALED_RANGE
        if most > allowed:
            fail(
                f"{name} has floats of {low.min():g}..{high.max():g}: floats of images mean 0..1 or a normalised "
                "range; save 0..255 as uint8, divide by 255, or set data.mean and data.std to this range"
            )
    return x


def need_images(source: Source) -> None:
    """Refuse a source whose examples are no images [M, H, W] or [M, H, W, C], for a net that wants images.

    Raises:
      ValueError: with the ``reshape`` that helps, where there is one.

    >>> need_images(Source(np.zeros((1, 784)), np.zeros(1), np.zeros((1, 784)), np.zeros(1)))
    Traceback (most recent call last):
    ValueError: x_train has shape (1, 784), the net wants images [M, H, W, C]: x.reshape(-1, 28, 28, 1) (family.net)
    """
    _need_images(np.shape(source.x_train))


def _need_images(shape: tuple[int, ...]) -> None:
    """Refuse a shape that is no images', with the ``reshape`` that would make it one."""
    if len(shape) in (3, 4):
        return
    sides = [(math.isqrt(shape[1] // c), c) for c in _CHANNELS] if len(shape) == 2 else []
    fits = [f": x.reshape(-1, {side}, {side}, {c})" for side, c in sides if side > 1 and side * side * c == shape[1]]
    fail(f"x_train has shape {shape}, the net wants images [M, H, W, C]{fits[0] if fits else ''}", "family.net")


def check_outputs(labels: np.ndarray, outputs: int) -> None:
    """Refuse labels [M] or [M, S] for which a net with ``outputs`` outputs has none.

    Raises:
      ValueError: with the largest label and the number of outputs.

    >>> check_outputs(np.array([0, 9]), 10)
    """
    most = int(np.max(labels, initial=-1))
    if most >= outputs:
        fail(f"labels go up to {most}, the net has {outputs} outputs: need at least {most + 1}", "family.outputs")


def check_scaling(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Refuse ``mean`` or ``std`` without 1 or C finite entries, and a ``std`` that is not above 0.

    Args:
      mean, std: of pixels in 0..1.
      channels: C, of the images.

    Raises:
      ValueError: with the value and what is allowed.

    >>> check_scaling([0.5], [0.25, 0.25, 0.25], channels=3)
    >>> check_scaling([0.5], [0.0], channels=1)
    Traceback (most recent call last):
    ValueError: std [0.0]: need finite numbers > 0 (data.std)
    """
    for name, value in (("mean", mean), ("std", std)):
        try:
            entries = np.asarray(value, np.float64)
        except (ValueError, TypeError):
            fail(f"{name} {said(value)}: need numbers", f"data.{name}")
        allowed = "1 entry" if channels == 1 else f"1 or {channels} entries"
        if entries.ndim != 1 or entries.size not in (1, channels):
            fail(f"{name} {said(value)} for images of {channels} channels: need {allowed}", f"data.{name}")
        if not np.isfinite(entries).all() or (name == "std" and (entries <= 0).any()):
            fail(f"{name} {said(value)}: need finite numbers{' > 0' if name == 'std' else ''}", f"data.{name}")


def sample(source: Source, examples: int, seed: int = 0) -> Source:
    """A random sample of at most ``examples`` training rows, and as many test rows in proportion to their classes.

    Training rows come in random order, test rows in their own; where there are no more test rows than asked for, all
    of them. Validation rows stay.

    Args:
      examples: how many of either, 0 for all.
      seed: of the sample; it does not depend on the run's, so that all seeds of a run see the same rows.

    Raises:
      ValueError: a number that is not whole or is negative.

    >>> x, y = np.zeros((6, 1)), np.repeat([0, 1, 2], 2)
    >>> sample(Source(x, y, x, y), 3).y_test.tolist()
    [0, 1, 2]
    """
    for name, value in (("examples", examples), ("seed", seed)):
        if not isinstance(value, Integral) or value < 0:
            fail(f"{name} {said(value)}: need a whole number >= 0", f"data.{name}")
    if not examples:
        return source
    keep = np.random.default_rng(seed).permutation(len(source.y_train))[:examples]
    rows = _in_proportion(source.y_test, int(examples), np.random.default_rng([seed, 1]))
    return source._replace(
        x_train=source.x_train[keep],
        y_train=source.y_train[keep],
        x_test=source.x_test[rows],
        y_test=source.y_test[rows],
        writer=None if source.writer is None else source.writer[keep],
    )


def _in_proportion(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Every n / count-th row in the order of labels, random among equal ones and from a random start.

    >>> _in_proportion(np.array([0, 0, 0, 0, 1, 1]), 3, np.random.default_rng(0)).size
    3
    """
    n = len(labels)
    if count >= n:
        return np.arange(n)
    order = np.lexsort((rng.random(n), labels if labels.ndim == 1 else np.zeros(n)))
    return np.sort(order[(np.arange(count) * n + rng.integers(n)) // count])


def fingerprint(source: Source, partition: Partition) -> Line:
    """What binds a run to its data and split: shapes, dtypes, label counts, hashes of 64 rows an array; for JSON.

    Labels, ids and the partition are hashed as a whole.

    >>> x, y = np.zeros((2, 1)), np.array([0, 1])
    >>> found = fingerprint(Source(x, y, x, y), Partition(y, np.array([1, 1])))
    >>> found["y_train"]["shape"], found["y_train"]["counts"], found["writer"]
    ([2], {'0': 1, '1': 1}, None)
    """
    named = source._asdict() | {f"partition.{name}": value for name, value in partition._asdict().items()}
    return {name: None if value is None else _about(name, np.asarray(value)) for name, value in named.items()}


def _about(name: str, array: np.ndarray) -> Line:
    """Shape, dtype and hash of an array; of labels also how many rows each class has."""
    rows = array
    if array.ndim > 1:
        rows = array[np.linspace(0, max(len(array) - 1, 0), min(64, len(array)), dtype=int)]
    data = repr(rows.tolist()).encode() if array.dtype == object else np.ascontiguousarray(rows).tobytes()
    digest = hashlib.sha256(data).hexdigest()[:16]
    about: Line = {"shape": list(array.shape), "dtype": str(array.dtype), "hash": digest}
    if name.startswith("y_") and array.ndim == 1 and array.dtype.kind in "iu":
        label, count = np.unique(array, return_counts=True)
        about["counts"] = dict(zip(map(str, label.tolist()), count.tolist()))
    return about


def same_fingerprint(old: Arguments, new: Arguments) -> str:
    """The first difference of two fingerprints in one line, "" if there is none; what ``old`` lacks is not compared.

    >>> same_fingerprint({"y_train": {"shape": [3]}}, {"y_train": {"shape": [4]}})
    'y_train has another shape: [4], was [3]'
    """
    for name, before in old.items():
        now = new.get(name)
        if before is None or now is None:
            if before is not now:
                return f"{name} is {'new' if before is None else 'gone'}"
            continue
        for field, was in before.items():
            has = now.get(field)
            if was == has:
                continue
            if field == "hash":
                return f"{name} has other values in the same shape"
            if field == "counts" and has:
                label = next(c for c in {**was, **has} if was.get(c) != has.get(c))
                return f"{name} has {has.get(label, 0)} rows of class {label}, had {was.get(label, 0)}"
            return f"{name} has another {field}: {has}, was {was}"
    return ""

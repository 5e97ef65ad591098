"""What one array means: text, numbers or one-hot rows as labels, integers as pixels; faults are named by row."""

import math
from typing import Any, NoReturn

import numpy as np

_BLOCK = 4096  # rows that are looked at together


def fail(message: str, place: str = "data.source") -> NoReturn:
    """Raise the one line, with the config key or file that it is about.

    >>> fail("x_train is text")
    Traceback (most recent call last):
    ValueError: x_train is text (data.source)
    """
    raise ValueError(f"{message} ({place})")


def said(value: Any) -> str:
    """A value in at most 40 characters.

    >>> said(float("nan")), said(np.float32(0.1)), said("cat")
    ('NaN', '0.1', "'cat'")
    """
    if isinstance(value, float | np.floating):
        return "NaN" if math.isnan(value) else f"{value:g}"
    text = repr(value.item() if isinstance(value, np.generic) else value).replace("\n", " ")
    return text if len(text) <= 40 else f"{text[:37]}..."


def first(name: str, x: np.ndarray, wrong: np.ndarray, start: int = 0) -> str:
    """The first row of an array that has a wrong value, and the value; ``start`` rows came before.

    >>> first("x", np.array([1, 2, 3]), np.array([False, True, True]))
    'x row 1 has 2'
    """
    place = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return f"{name} row {start + int(place[0])} has {said(x[place])}"


def array_of(name: str, value: Any) -> np.ndarray:
    """An array of numbers, bool or text with a row for each example.

    Args:
      name: of the array, for the message.
      value: an array, a list, or a column of a table.

    Raises:
      ValueError: rows of different length, objects that are neither numbers nor text, or both.

    >>> array_of("y_train", ["cat", "dog"]).dtype.kind
    'U'
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):
        fail(f"{name} is a {type(value).__name__} of uneven rows: need an array")
    if array.ndim == 0:
        fail(f"{name} is {said(value)}: need an array with a row for each example")
    if array.dtype == object:
        array = _of_objects(name, array)
    if array.dtype.kind not in "biufUS":
        fail(f"{name} has dtype {array.dtype}: need numbers, bool or text")
    return array


def _of_objects(name: str, array: np.ndarray) -> np.ndarray:
    """Python objects, as tables keep them, as text or as numbers.

    Raises:
      ValueError: with the first row that is another kind, such as ``None`` for a missing value.
    """
    values = array.ravel().tolist()
    text = bool(values) and isinstance(values[0], str)
    kinds = (str,) if text else (int, float, np.number, np.bool_)
    for place, value in enumerate(values):
        if not isinstance(value, kinds):
            row = place // math.prod(array.shape[1:])
            fail(f"{name} row {row} is {said(value)}, a {type(value).__name__}: need numbers or text, all alike")
    found = np.array(values, None if values else float).reshape(array.shape)
    if found.dtype == object:
        fail(f"{name} has whole numbers beyond 64 bits")
    return found


def float32(name: str, x: np.ndarray) -> np.ndarray:
    """As float32, in which every value must be finite.

    Raises:
      ValueError: with the first row that has NaN, an infinity, or a number beyond float32.

    >>> float32("x_train", np.array([[0.0], [np.nan]]))
    Traceback (most recent call last):
    ValueError: x_train row 1 has NaN: need finite numbers (float32) (data.source)
    """
    if x.dtype.kind == "f":
        largest = min(np.finfo(np.float32).max, np.finfo(x.dtype).max)
        for start in range(0, len(x), _BLOCK):
            block = x[start : start + _BLOCK]
            if block.size and not (-largest <= block.min() and block.max() <= largest):
                wrong = ~(np.abs(block) <= largest)
                fail(f"{first(name, block, wrong, start)}: need finite numbers (float32)")
    return x.astype(np.float32, copy=False)


def pixels(name: str, x: np.ndarray) -> np.ndarray:
    """Integers 0..255 and bool as uint8.

    Raises:
      ValueError: with the first row that has another number.

    >>> pixels("x_train", np.array([[0, 255]])).dtype, pixels("x_train", np.array([[True]])).tolist()
    (dtype('uint8'), [[255]])
    """
    if x.dtype == bool:
        return x.astype(np.uint8) * np.uint8(255)
    if x.dtype == np.uint8:
        return x
    wrong = (x < 0) | (x > 255)
    if wrong.any():
        fail(f"{first(name, x, wrong)}: integers of images are pixels 0..255; save other numbers as floats")
    return x.astype(np.uint8)


def not_one_hot(y: np.ndarray) -> np.ndarray:
    """[M] bool: rows of [M, C] that are not a single 1 among zeros.

    >>> not_one_hot(np.array([[0, 1], [1, 1], [0, 0]])).tolist()
    [False, True, True]
    """
    return ((y != 0) & (y != 1)).any(1) | ((y != 0).sum(1) != 1)


def are_sequences(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether there is a label for each token: integers of one shape [M, S], the same or not one-hot rows.

    >>> are_sequences(np.array([[5, 7]]), np.array([[7, -1]]))
    True
    """
    if not (x.ndim == 2 and x.shape == y.shape and x.dtype.kind in "iu" and y.dtype.kind in "iu"):
        return False
    return np.array_equal(x, y) or (x.shape[1] > 1 and bool(not_one_hot(y).any()))


def tokens(name: str, ids: np.ndarray) -> np.ndarray:
    """[M, S] token ids as int32, -1 for no token.

    Raises:
      ValueError: another shape or dtype, an id below -1 or beyond int32, or no token at all.

    >>> tokens("x_train", np.array([[3, -1]])).tolist()
    [[3, -1]]
    """
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        fail(f"{name} has shape {ids.shape}, dtype {ids.dtype}: need token ids [M, S] as in x_train")
    most = np.iinfo(np.int32).max
    wrong = (ids < -1) | (ids > most)
    if wrong.any():
        fail(f"{first(name, ids, wrong)}: token ids are -1 (none) or 0..{most}")
    if ids.size == 0 or ids.max() < 0:
        fail(f"{name} has no token")
    return ids.astype(np.int32, copy=False)


def targets(name: str, y: np.ndarray) -> np.ndarray:
    """[M] or [M, 1] numbers to predict as float32 [M].

    Raises:
      ValueError: several numbers a row, text, or one that is not finite.

    >>> targets("y_train", np.array([[1], [2]])).tolist()
    [1.0, 2.0]
    """
    y = _flat(y)
    if y.ndim != 1 or y.dtype.kind not in "biuf":
        fail(f"{name} has shape {y.shape}, dtype {y.dtype}: a regression needs one number a row")
    return float32(name, y)


def client_ids(name: str, ids: np.ndarray, rows: int, place: str = "data.writers") -> np.ndarray:
    """[rows] or [rows, 1] client ids of any kind as [rows].

    Args:
      rows: how many there must be.
      place: the config key, for the message.

    Raises:
      ValueError: another number of ids, or a row without one.

    >>> client_ids("writer", np.array([4, 4]), 3)
    Traceback (most recent call last):
    ValueError: writer has 2 client ids for 3 training rows: need one each (data.writers)
    """
    ids = _flat(ids)
    if ids.ndim != 1:
        fail(f"{name} has shape {ids.shape}: need one client id for each of {rows} training rows", place)
    if len(ids) != rows:
        fail(f"{name} has {len(ids)} client ids for {rows} training rows: need one each", place)
    if ids.dtype.kind == "f" and (wrong := ~np.isfinite(ids)).any():
        fail(f"{first(name, ids, wrong)}: need a client id in every row", place)
    return ids


def _flat(y: np.ndarray) -> np.ndarray:
    """[M, 1] as [M]; anything else as it is."""
    return y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y


def class_labels(
    arrays: dict[str, np.ndarray], classes: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, int] | None, str]:
    """Labels of all sets as int32 [M] in 0..C-1, the table old -> new if they were renumbered, and a line that says so.

    The rule stands at ``door.admit``.

    Args:
      arrays: labels of each set by name; the sets count together.
      classes: outputs of the net, 0 if they are not fixed.

    Raises:
      ValueError: text in one set and numbers in another, rows that are no label, or sets of different shapes.

    >>> class_labels({"y_train": np.array([-1, 1])})
    ({'y_train': array([0, 1], dtype=int32)}, {'-1': 0, '1': 1}, 'labels were renumbered to 0..1: -1 -> 0, 1 -> 1')
    """
    found, fixed = {}, {}
    for name, y in arrays.items():
        found[name], fixed[name] = _column(name, y)
    text = {name: y.dtype.kind == "U" for name, y in found.items()}
    if len(set(text.values())) > 1:
        fail("; ".join(f"{name} holds {'text' if t else 'numbers'}" for name, t in text.items()) + ": need one kind")
    numbers = not any(text.values())
    known = np.unique(np.concatenate(list(found.values())))
    if not numbers and all(_is_whole(label) for label in known.tolist()):
        found, numbers = {name: y.astype(np.int64) for name, y in found.items()}, True
        known = np.sort(known.astype(np.int64))
    if width := max(fixed.values()):
        if known[-1] >= width or known[0] < 0 or set(fixed.values()) - {0, width}:
            shapes = ", ".join(f"{name} {y.shape}" for name, y in arrays.items())
            fail(f"labels {known[0]}..{known[-1]} of shapes {shapes} do not go together: need one kind")
        stay = True
    else:
        stay = numbers and known[0] >= 0 and (known[-1] < classes or (known[0] == 0 and known[-1] < 4 * known.size))
    if stay:
        return {name: y.astype(np.int32) for name, y in found.items()}, None, ""
    rows = sum(y.size for y in found.values())
    shown = ", ".join(f"{said(label)} -> {new}" for new, label in enumerate(known[:4].tolist()))
    more = ", ..." if known.size > 4 else ""
    doubtful = numbers and 2 * known.size >= rows > 20
    doubt = "; numbers to predict (a regression) need objective.name=squared_error" if doubtful else ""
    table = {str(label): new for new, label in enumerate(known.tolist())}
    new = {name: np.searchsorted(known, y).astype(np.int32) for name, y in found.items()}
    return new, table, f"labels were renumbered to 0..{known.size - 1}: {shown}{more}{doubt}"


def _is_whole(text: str) -> bool:
    """Whether a text is a whole number as Python writes it.

    >>> _is_whole("-3"), _is_whole("03"), _is_whole("cat")
    (True, False, False)
    """
    return text.removeprefix("-").isdecimal() and len(text) < 18 and str(int(text)) == text


def _column(name: str, y: np.ndarray) -> tuple[np.ndarray, int]:
    """[M] labels as text or int64, and how many there are where the kind itself says so (bool, one-hot rows).

    >>> _column("y_train", np.array([[0, 1, 0], [1, 0, 0]]))
    (array([1, 0]), 3)
    >>> _column("y_train", np.array([1.5]))
    Traceback (most recent call last):
    ValueError: y_train row 0 has 1.5: classes are whole numbers; numbers to predict (a regression) need ...
    """
    y = _flat(y)
    if y.ndim == 2 and y.dtype.kind in "biuf":
        if (wrong := not_one_hot(y)).any():
            fail(
                f"{name} has shape {y.shape}, row {int(wrong.argmax())} is not one-hot: need one label a row, one-hot "
                "rows, or a label for each token of x"
            )
        return y.argmax(1), y.shape[1]
    if y.ndim != 1:
        fail(f"{name} has shape {y.shape}: need one label a row")
    if y.dtype.kind == "b":
        return y.astype(np.int64), 2
    if y.dtype.kind in "US":
        return (np.char.decode(y, "utf-8", "replace") if y.dtype.kind == "S" else y), 0
    if y.dtype.kind == "f":
        y = y.astype(np.float64)
        if (wrong := ~np.isfinite(y)).any():
            fail(f"{first(name, y, wrong)}: need a label in every row")
        if (wrong := y != np.floor(y)).any():
            fail(
                f"{first(name, y, wrong)}: classes are whole numbers; numbers to predict (a regression) need "
                "objective.name=squared_error"
            )
    if (wrong := (y > 2**53) | (y < -(2**53))).any():
        fail(f"{first(name, y, wrong)}: labels are at most 2^53")
    return y.astype(np.int64), 0

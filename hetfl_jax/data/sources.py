"""Data sets by name: digits, npz:<path>, text:<path>, tfds:<name>, synthetic, teacher. Arrays come back on the host."""

import importlib
import importlib.util
import inspect
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hetfl_jax.data.synthetic import linear_clients, teacher_clients

GENERATED = {"synthetic": 10, "teacher": 10}  #: classes of a generator, whether a draw has them all or not
DATA_FOLDER = "HETFL_DATA"  #: environment variable: where ``npz:`` looks for files that the working folder lacks


class Source(NamedTuple):
    """A data set: images [M, H, W, C] uint8, features [M, D] float32, or tokens [M, S] int32; labels int32."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    writer: np.ndarray | None = None  #: [M] client id of each training example, for natural partitions
    x_validation: np.ndarray | None = None  #: held out of the training rows by ``hold_out``
    y_validation: np.ndarray | None = None


def hold_out(source: Source, fraction: float) -> Source:
    """Move a fixed random share of the training rows to a validation set, for choosing a round.

    Raises:
      ValueError: a fraction outside [0, 1).

    >>> data = hold_out(load("digits"), 0.1)
    >>> data.x_train.shape[0], data.y_validation.shape
    (1294, (143,))
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction {fraction}, allowed 0 <= f < 1 (data.validation)")
    count = int(fraction * len(source.y_train))
    if not count:
        return source
    order = np.random.default_rng(1).permutation(len(source.y_train))
    out, kept = np.sort(order[:count]), np.sort(order[count:])
    return source._replace(
        x_train=source.x_train[kept],
        y_train=source.y_train[kept],
        writer=None if source.writer is None else source.writer[kept],
        x_validation=source.x_train[out],
        y_validation=source.y_train[out],
    )


def load(name: str, *, clients: int = 0, seed: int = 0, writers: str = "", **options: Any) -> Source:
    """The data set called ``name``.

    Args:
      name: ``digits`` (1,797 images that scikit-learn ships), ``npz:<path>`` with x_train, y_train, x_test, y_test,
        ``text:<path>`` with streams of token ids train and test, ``tfds:<name>`` prepared beforehand, or
        ``synthetic`` (Synthetic(alpha, beta)) or ``teacher``, which are made for so many clients.
      clients, seed: of ``synthetic`` and ``teacher`` only.
      options: keyword arguments of ``synthetic``, ``teacher`` and ``text``.
      writers: ``<npz path>:<array>`` with the client id of each training example.

    Raises:
      ValueError: an unknown name; FileNotFoundError: a data set that is not there, with the command that prepares it.

    >>> load("digits").x_train.shape
    (1437, 8, 8, 1)
    """
    kind, _, rest = name.partition(":")
    _check_options(kind, options)
    if kind == "digits":
        source = _digits()
    elif kind in GENERATED:
        source = (synthetic if kind == "synthetic" else teacher)(clients, seed, **options)
    elif kind == "npz" and rest:
        source = _npz(rest)
    elif kind == "text" and rest:
        source = text(rest, **options)
    elif kind == "tfds" and rest:
        source = _tfds(rest)
    else:
        raise ValueError(
            f"data source {name!r} is not one of digits, synthetic, teacher, npz:<path>, text:<path>, tfds:<name> "
            "(data.source)"
        )
    if writers:
        path, _, array = writers.rpartition(":")
        found, names = _read(path, (array,), place="data.writers")
        if array not in found:
            raise ValueError(f"{path} has no array {array!r}; it has {', '.join(names)} (data.writers)")
        source = source._replace(writer=found[array])
    return source


def _check_options(kind: str, options: dict[str, Any]) -> None:
    """Options must be arguments of the source; most sources have none.

    >>> _check_options("digits", {"length": 64})
    Traceback (most recent call last):
    ValueError: option 'length' is not one of none of digits (data.options)
    """
    makers: dict[str, Callable[..., Source]] = {"synthetic": synthetic, "teacher": teacher, "text": text}
    known = inspect.signature(makers[kind]).parameters.values() if kind in makers else ()
    own = [p.name for p in known if p.kind is p.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in own:
            raise ValueError(f"option {name!r} is not one of {', '.join(own) or 'none'} of {kind} (data.options)")
        default = next(p.default for p in known if p.name == name)
        if not isinstance(value, Real) or (isinstance(default, int) and not float(value).is_integer()):
            kind_of = "a whole number" if isinstance(default, int) else "a number"
            raise ValueError(f"option {name} {value!r}, allowed {kind_of} (data.options.{name})")


def _digits() -> Source:
    """1,797 images 8 x 8 of scikit-learn, 1,437 to train on; pixels 0..16 become 0..255."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    x = np.round(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    y = raw.target.astype(np.int32)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    return Source(x_train, y_train, x_test, y_test)


def _read(
    path: str, wanted: Sequence[str], arrays: str = "x_train=..., y_train=..., x_test=..., y_test=...",
    place: str = "data.source",
) -> tuple[dict[str, np.ndarray], list[str]]:  # fmt: skip
    """Those of the wanted arrays that an .npz file has, and the names of all it has.

    Args:
      path: here, or below the folder that ``HETFL_DATA`` names.
      wanted: names of arrays.
      arrays: what the file should hold, for the message where there is no file.
      place: the config key, for the message.

    Raises:
      FileNotFoundError: no such file, with what to do.
      ValueError: no .npz file of plain arrays.
    """
    try:
        with np.load(_find(path, arrays), allow_pickle=False) as file:
            return {name: file[name] for name in wanted if name in file.files}, list(file.files)
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as an .npz file of plain arrays: {why} ({place})") from None


def _find(path: str, arrays: str) -> Path:
    """The file here, or in the folder of ``HETFL_DATA``."""
    folder = os.environ.get(DATA_FOLDER, "../shared/data")
    for place in (Path(path), Path(folder) / path):
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"no file {path} here or in {folder}: write it with numpy.savez(path, {arrays}), "
        f"set {DATA_FOLDER} to its folder, or use --config.data.source=tfds:<name> (data.source)"
    )


def _npz(path: str) -> Source:
    """The four arrays of a file, and ``writer_train`` [M], a client id for each training example, if it has one."""
    needed = ("x_train", "y_train", "x_test", "y_test")
    found, names = _read(path, (*needed, "writer_train"))
    if missing := set(needed) - set(found):
        raise ValueError(f"{path} has no array {', '.join(sorted(missing))}; it has {', '.join(names)} (data.source)")
    x_train, y_train, x_test, y_test = (found[name] for name in needed)
    return Source(x_train, y_train, x_test, y_test, found.get("writer_train"))


def images_of(path: str) -> np.ndarray:
    """The training images of an .npz file, [M, H, W, C] uint8.

    Args:
      path: as of ``npz:``; [M, H, W] gets a channel axis.

    Raises:
      ValueError: there are none.

    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "faces.npz")
    >>> np.savez(path, x_train=np.zeros((5, 8, 8), np.uint8), y_train=np.zeros(5, int))
    >>> images_of(path).shape
    (5, 8, 8, 1)
    """
    x = _read(path, ("x_train",), place="data.domains")[0].get("x_train", np.zeros(0))
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise ValueError(f"{path} has no x_train of images stored as whole numbers 0..255 (data.domains)")
    return x[..., None] if x.ndim == 3 else x


def given(data: Any) -> Source:
    """A data set from a user's arrays: (x_train, y_train, x_test, y_test), or a dict of them.

    A dict may have ``writer`` (or ``writer_train``) too, a client id for each training example.

    Raises:
      ValueError: something else, or an array that is missing.

    >>> given((np.zeros((4, 2)), np.arange(4), np.zeros((1, 2)), np.zeros(1, int))).x_train.shape
    (4, 2)
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, dict):
        names = ("x_train", "y_train", "x_test", "y_test")
        if missing := [name for name in names if name not in data]:
            raise ValueError(f"data has no {missing[0]}; it has {', '.join(map(str, data))} (data)")
        writer = data.get("writer", data.get("writer_train"))
        x_train, y_train, x_test, y_test = (data[name] for name in names)
        return Source(x_train, y_train, x_test, y_test, writer)
    if isinstance(data, tuple | list) and len(data) == 4:
        x_train, y_train, x_test, y_test = data
        return Source(x_train, y_train, x_test, y_test)
    raise ValueError(
        f"data is a {type(data).__name__}: allowed (x_train, y_train, x_test, y_test), a dict of them, or (Population, "
        "(x_test, y_test)) (data)"
    )


def text(path: str, *, length: int = 64, rows: int = 100, test_rows: int = 10, test_tokens: int = 0) -> Source:
    """Windows of a token stream, whose every token is to be predicted (WikiText-2 as in HeteroFL).

    The streams ``train`` and ``test`` (integer ids) are cut into equal rows, the rest dropped, and each row into
    windows of ``length``; a row's last window may be shorter, filled up with -1. The writer of a training window is its
    row. Test windows stand place by place: a batch of ``test_rows`` is one place of all rows. Of the test stream only
    the first ``test_tokens`` are taken, 0 for all.

    Args:
      path: of an .npz file with the streams.
      length: tokens of a window.
      rows: N, equal parts of the training stream, a writer each.
      test_rows: equal parts of the test stream.
      test_tokens: 0 for all.

    Raises:
      ValueError: a value out of range, or arrays that are not streams.

    >>> import tempfile
    >>> path = f"{tempfile.mkdtemp()}/stream.npz"
    >>> np.savez(path, train=np.arange(10), test=np.arange(4))
    >>> text(path, length=3, rows=2, test_rows=1).x_train.tolist()
    [[0, 1, 2], [3, 4, -1], [5, 6, 7], [8, 9, -1]]
    """
    found, _ = _read(path, ("train", "test"), "train=..., test=...")
    streams = [found.get(name, np.zeros((0, 0))) for name in ("train", "test")]
    if any(s.ndim != 1 or not np.issubdtype(s.dtype, np.integer) for s in streams):
        raise ValueError(f"{path}: need streams of token ids, train [n] and test [m] of integers (data.source)")
    if not 0 <= test_tokens <= streams[1].size:
        raise ValueError(f"test_tokens {test_tokens}, allowed 0..{streams[1].size} (data.options)")
    streams[1] = streams[1][: test_tokens or None]
    for name, count, stream in (("rows", rows, streams[0]), ("test_rows", test_rows, streams[1])):
        if not 1 <= count <= stream.size:
            raise ValueError(f"{name} {count}, allowed 1..{stream.size} (data.options)")
    if length < 1:
        raise ValueError(f"length {length}, allowed >= 1 (data.options)")

    def windows(stream: np.ndarray, count: int) -> np.ndarray:
        each = stream.size // count
        cut = stream[: count * each].astype(np.int32).reshape(count, each)
        return np.pad(cut, ((0, 0), (0, -each % length)), constant_values=-1).reshape(count, -1, length)

    train, test = windows(streams[0], rows), windows(streams[1], test_rows).swapaxes(0, 1)
    writer = np.repeat(np.arange(rows), train.shape[1])
    train, test = train.reshape(-1, length), test.reshape(-1, length)
    return Source(train, train, test, test, writer)


def _tfds(name: str) -> Source:
    """Through ``tfds.data_source`` (array_record, no TensorFlow), else ``tfds.load`` where only TFRecords are there."""
    tfds = importlib.import_module("tensorflow_datasets")
    try:
        splits = tfds.data_source(name, split=["train", "test"], download=False)
    except Exception as error:
        splits = _tfds_records(tfds, name, error)

    def stack(split: Any, key: str) -> np.ndarray:
        return np.stack([example[key] for example in split])

    first = next(iter(splits[0]))
    feature = next((key for key in ("image", "features", "x") if key in first), None)
    if feature is None or "label" not in first:
        raise ValueError(
            f"tfds:{name} has {', '.join(first)}; needs 'label' and one of image, features, x (data.source)"
        )
    train, test = splits
    return Source(*(stack(split, key) for split in (train, test) for key in (feature, "label")))


def _tfds_records(tfds: Any, name: str, error: Exception) -> list[Any]:
    """The TFRecord fallback; without records or without TensorFlow, say which command prepares the set."""
    if importlib.util.find_spec("tensorflow") is not None:
        try:
            return [tfds.as_numpy(split) for split in tfds.load(name, split=["train", "test"], download=False)]
        except Exception as second:
            error = second
    raise FileNotFoundError(
        f"tfds:{name} is not prepared in {os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')}: run "
        f"`tfds build {name} --file_format=array_record` once, online (data.source; {type(error).__name__})"
    ) from error


def synthetic(
    clients: int, seed: int, *, alpha: float = 1.0, beta: float = 1.0, sigma: float = 2.0, iid: bool = False,
    hybrid: int = 0, test: float = 0.1,
) -> Source:  # fmt: skip
    """Synthetic(alpha, beta) of Li et al. (FedProx, q-FFL): 60 features, 10 classes, one linear model per client.

    ``linear_clients`` has the equations. The published sets are alpha, beta, sigma = (1, 1, 2), (0.5, 0.5, 2) and
    (0, 0, 2), ``iid`` with sigma 1, and the hybrid set of 100 clients: (1, 1, 1) with ``hybrid`` 50, the first 50 iid.
    The last tenth of each client is test data, or another share ``test``; with 0 all rows are for the clients to split,
    and the test set is a copy of them that no score should be taken from.

    Raises:
      ValueError: a share outside [0, 1), and as ``linear_clients``.

    >>> synthetic(3, seed=1).x_train.shape[1]
    60
    """
    return _by_client(linear_clients(clients, seed, alpha=alpha, beta=beta, sigma=sigma, iid=iid, hybrid=hybrid), test)


def teacher(
    clients: int, seed: int, *, covariate: float = 1.0, concept: float = 0.5, hidden: int = 64, least: int = 20,
    most: int = 600, test: float = 0.0,
) -> Source:  # fmt: skip
    """60 features, 10 classes, labelled by a net with ReLUs whose last layer every client bends its own way.

    ``teacher_clients`` has the equations. With ``test`` 0 all rows are for the clients to split, see ``synthetic``.

    Raises:
      ValueError: a share outside [0, 1), and as ``teacher_clients``.

    >>> teacher(3, seed=1).x_train.shape[1]
    60
    """
    drawn = teacher_clients(clients, seed, covariate=covariate, concept=concept, hidden=hidden, least=least, most=most)
    return _by_client(drawn, test)


def _by_client(drawn: Iterable[tuple[np.ndarray, np.ndarray]], test: float) -> Source:
    """The examples of all clients, of each the last share ``test`` as test data."""
    parts = [(x.astype(np.float32), y) for x, y in drawn]
    x, y = (np.concatenate(part) for part in zip(*parts))
    sizes = np.array([y.size for _, y in parts])
    writer = np.repeat(np.arange(sizes.size), sizes)
    place = np.arange(writer.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    if not 0 <= test < 1:
        raise ValueError(f"test {test}, allowed 0 <= share < 1 (data.options)")
    last = place >= np.repeat(((1 - test) * sizes).astype(int), sizes)
    tested = last if test else ~last
    return Source(x[~last], y[~last], x[tested], y[tested], writer[~last])

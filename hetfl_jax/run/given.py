"""The data that a config or a user gives: examples, who holds them, and how clients see them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from hetfl_jax.core.types import Config, Population, Views
from hetfl_jax.data import door, partition, sources
from hetfl_jax.data.partition import Partition
from hetfl_jax.data.population import held_classes, stored_as
from hetfl_jax.data.reading import client_ids
from hetfl_jax.data.views import renamings, rotations
from hetfl_jax.run.config import method_name
from hetfl_jax.run.domains import in_domains, sampled, source_name
from hetfl_jax.run.slots import objective_of
from hetfl_jax.run.splits import split


class Own(NamedTuple):
    """What the user brings in place of what a config names; ``None`` leaves it to the config.

    >>> [name for name, value in Own(net="a net")._asdict().items() if value is not None]
    ['net']
    """

    net: Any = None  #: a linen module
    data: Config = None  #: (x_train, y_train, x_test, y_test), a ``Source``, or (Population, (x_test, y_test))
    split: Any = None  #: (labels, clients, seed) -> Partition, a ``Partition``, or a client id a training example
    method: Any = None  #: a ``make``, an ``Algorithm``, or a name


CONFIG = "of the config"  #: what is not brought


def brought(own: Own) -> dict[str, str]:
    """Names of what the user brings, for a run's folder; it goes on only with the same.

    >>> brought(Own(data=([], [], [], [])))["source"], brought(Own())["net"]
    ('data of yours', 'of the config')
    """
    return {
        "net": CONFIG if own.net is None else type(own.net).__name__,
        "method": CONFIG if own.method is None else method_name(None, own.method),
        "split": CONFIG if own.split is None and not is_population(own.data) else "split of yours",
        "source": CONFIG if own.data is None else "data of yours",
    }


def named_of(config: Config, own: Own) -> dict[str, str]:
    """What method, source, net and split are called; what the user brings goes by its own name.

    >>> from hetfl_jax.run.config import changed
    >>> named_of(changed(), Own(split=np.zeros(5)))["split"], named_of(changed(), Own())["split"]
    ('split of yours', 'iid')
    """
    data, in_config = config.data, {"net": config.family.net, "method": config.method.name}
    in_config |= {"split": data.split, "source": data.source}
    return {name: in_config[name] if value == CONFIG else value for name, value in brought(own).items()}


def source_of(config: Config, own: Own) -> tuple[sources.Source, door.Admitted]:
    """The data set: read, checked, sampled, with a validation set held out, in its domains.

    Returns:
      The data set, and what the check found: labels that were renumbered, notes for people.

    Raises:
      ValueError: data that cannot be read, named by array and row.
    """
    data, objective = config.data, objective_of(config)
    if is_population(own.data):
        raw = _of_population(data, own)
    elif own.data is None:
        seed = config.run.seed if data.seed < 0 else data.seed
        options = {"clients": data.clients, "seed": seed, "writers": data.writers, **data.options.to_dict()}
        raw = sources.load(source_name(data), **options)
    else:
        raw = sources.given(own.data)
    if own.split is not None and not (callable(own.split) or isinstance(own.split, Partition)):
        raw = raw._replace(writer=client_ids("split", np.asarray(own.split), len(raw.y_train), "split"))
    known = sources.GENERATED.get(data.source, 0) if own.data is None else 0
    admitted = door.admit(
        raw,
        regression=objective is not None and objective.numbers,
        classes=config.family.outputs or known,
        mean=data.mean,
        std=data.std,
    )
    return in_domains(config, sampled(data, admitted.source)), admitted


def is_population(data: Config) -> bool:
    """Whether the user's data is a population with a test set.

    Raises:
      ValueError: a population alone.

    >>> is_population(None), is_population(([], [], [], []))
    (False, False)
    """
    if isinstance(data, Population):
        raise ValueError("a Population alone has no test set: give (population, (x_test, y_test)) (data)")
    return isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Population)


def _of_population(data: Config, own: Own) -> sources.Source:
    """The pool of the user's population and its test set, as a source.

    Raises:
      ValueError: a split beside it, no test set, or rows to be left out (``data.examples``, ``data.validation``).
    """
    pop, test = own.data
    if own.split is not None:
        raise ValueError("a Population says already who holds which rows: leave split away (split)")
    if not (isinstance(test, tuple | list) and len(test) == 2):
        raise ValueError(f"beside a Population is a {type(test).__name__}: need the test set (x_test, y_test) (data)")
    for name in ("examples", "validation"):
        if data[name]:
            raise ValueError(f"{name} {data[name]} of a Population, whose rows have clients: need 0 (data.{name})")
    return sources.Source(np.asarray(pop.x), np.asarray(pop.y), *test)


def partition_of(data: Config, source: sources.Source, seed: int, own: Own) -> Partition:
    """Who holds which training rows: of a population as it says, of the user's split, or of the config's.

    Args:
      data: the config's block.
      seed: of the split.

    Raises:
      ValueError: a partition of the user's that does not fit the data.
    """
    if is_population(own.data):
        return Partition(np.asarray(own.data[0].rows), np.asarray(own.data[0].size))
    if own.split is None:
        return split(data, source, seed)
    if isinstance(own.split, Partition):
        return checked(own.split, source)
    if isinstance(own.split, Callable):  # type: ignore[arg-type]
        return checked(own.split(source.y_train, data.clients, seed), source)
    return partition.natural(source.writer, seed, data.test_fraction)  # type: ignore[arg-type]


def notes_of(data: Config, source: sources.Source, part: Partition, own: Own) -> list[str]:
    """What is to be said of a partition: clients that a config did not ask for, and ids that are left out.

    Args:
      data: the config's block.
      part: as it came out.
    """
    found, clients = list[str](), part.size.size
    first = data.first_clients if own.split is None and not is_population(own.data) else 0
    if clients != (first or data.clients):
        found.append(f"the split has {clients} clients; data.clients={data.clients} is not used")
    ids = own.split is not None and not (callable(own.split) or isinstance(own.split, Partition))
    by_id = not first and (ids or (own.split is None and data.split == "natural"))
    if by_id and (dropped := np.unique(source.writer).size - clients):  # type: ignore[arg-type]
        found.append(f"{dropped} client ids with a single example each are left out")
    return found


def checked(part: Any, source: sources.Source) -> Partition:
    """A partition of the user's, if its rows and sizes fit the data.

    Args:
      part: ``rows`` [n] client after client and ``size`` [N]; ``test_index`` and ``test_size`` likewise, of the
        training rows if ``held_out``, else of the test set; ``classes`` [N, C].

    Raises:
      ValueError: with the first client or row that does not.

    >>> x, y = np.zeros((4, 1)), np.zeros(4, int)
    >>> checked(Partition(np.arange(5), np.array([2, 3])), sources.Source(x, y, x, y))
    Traceback (most recent call last):
    ValueError: rows names rows 0..4, allowed 0..3 (split)
    """
    if not isinstance(part, Partition):
        raise ValueError(f"the split gave a {type(part).__name__}: need a hetfl_jax.data.partition.Partition (split)")
    train, test = len(source.y_train), len(source.y_test)
    _check_rows("rows", part.rows, part.size, train, least=1)
    clients = np.size(part.size)
    if (part.test_index is None) != (part.test_size is None):
        raise ValueError("test_index and test_size go together: need both or neither (split)")
    if part.test_index is not None and part.test_size is not None:
        _check_rows("test_index", part.test_index, part.test_size, train if part.held_out else test, least=0)
        if np.size(part.test_size) != clients:
            raise ValueError(f"test_size has {np.size(part.test_size)} entries for {clients} clients (split)")
        both = np.intersect1d(part.rows, part.test_index) if part.held_out else np.zeros(0)
        if both.size:
            raise ValueError(f"training row {both[0]} is test data too: rows and test_index must be apart (split)")
    if part.classes is not None and (np.ndim(part.classes) != 2 or len(part.classes) != clients):
        raise ValueError(
            f"classes of shape {np.shape(part.classes)} for {clients} clients: need [clients, classes] (split)"
        )
    return part._replace(rows=np.asarray(part.rows), size=np.asarray(part.size))


def _check_rows(name: str, rows: Any, size: Any, count: int, least: int) -> None:
    """Rows 0..count-1, client after client, as many as the sizes say.

    Args:
      name: of the array, for messages.
      least: rows of a client, at least.
    """
    rows, size, sizes = np.asarray(rows), np.asarray(size), "size" if name == "rows" else "test_size"
    for what, array in ((name, rows), (sizes, size)):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"{what} has shape {array.shape}, dtype {array.dtype}: need whole numbers [n] (split)")
    if not size.size or size.min() < least:
        where = f"client {int(size.argmin())} has {size.min()} rows" if size.size else "there is no client"
        raise ValueError(f"{where} in {sizes}: need >= {least} for each (split)")
    if size.sum() != rows.size:
        raise ValueError(f"{sizes} adds up to {size.sum()}, {name} has {rows.size} rows: need as many (split)")
    if rows.size and not 0 <= rows.min() <= rows.max() < count:
        raise ValueError(f"{name} names rows {rows.min()}..{rows.max()}, allowed 0..{count - 1} (split)")


def held_of(
    source: sources.Source, part: Partition, classes: int, views: Views | None, groups: np.ndarray
) -> np.ndarray | None:
    """[N, C] bool, which classes each client holds, as it sees them; ``None`` where labels are numbers.

    Raises:
      ValueError: a split that says so of more classes than the data has.
    """
    if source.y_train.dtype.kind == "f":
        return None
    if views is not None:
        seen_as = np.asarray(views.labels)[np.repeat(groups, part.size), source.y_train[part.rows]]
        return held_classes(seen_as, part.size, classes)
    if part.classes is None:
        return held_classes(source.y_train[part.rows], part.size, classes)
    if part.classes.shape[1] > classes:
        raise ValueError(f"classes of {part.classes.shape[1]} columns for {classes} classes of the data (split)")
    return np.pad(part.classes, ((0, 0), (0, classes - part.classes.shape[1])))


def views_of(text: str, source: sources.Source, clients: int, classes: int) -> tuple[Views | None, np.ndarray]:
    """How groups of consecutive clients see their examples, and the group of each client.

    Args:
      text: ``none``, ``rotation:<k>`` (k = 1, 2 or 4 rotations by 360/k degrees) or ``labels:<k>`` (the first group as
        stored, each other one with class names permuted by a fixed generator).

    Returns:
      Views, ``None`` for ``none``; [N] the group of each client, of equal sizes up to one.

    Raises:
      ValueError: another text, or examples that cannot be seen so.

    >>> x, y = np.zeros((6, 4, 4, 1)), np.arange(6) % 3
    >>> views_of("rotation:2", sources.Source(x, y, x, y), clients=4, classes=3)[1].tolist()
    [0, 0, 1, 1]
    """
    kind, _, number = text.partition(":")
    count = int(number) if number.isdigit() else 0
    allowed = {"none": (0,), "rotation": (1, 2, 4), "labels": range(1, clients + 1)}
    if count not in allowed.get(kind, ()) or (text != "none" and not 1 <= count <= clients):
        raise ValueError(
            f"groups {text!r}: allowed none, rotation:1, 2 or 4, or labels:K with K <= {clients} clients (data.groups)"
        )
    groups = np.arange(clients) * max(count, 1) // clients
    shape = source.x_train.shape[1:]
    if kind == "rotation":
        if len(shape) != 3 or shape[0] != shape[1]:
            raise ValueError(f"groups {text!r} of examples of shape {shape}: need square images (data.groups)")
        return rotations(shape[0], [turn * 4 // count for turn in range(count)], classes), groups
    if kind == "labels":
        if source.y_train.ndim > 1 or source.y_train.dtype.kind == "f":
            what = "sequences" if source.y_train.ndim > 1 else "numbers to predict"
            raise ValueError(f"groups {text!r} of {what}: need one class an example (data.groups)")
        rng, used = np.random.default_rng(0), int(source.y_train.max()) + 1
        names = np.tile(np.arange(classes), (count, 1))
        names[1:, :used] = [rng.permutation(used) for _ in range(count - 1)]
        return renamings(int(np.prod(shape[:2])), names), groups
    return None, groups


def classes_of(source: sources.Source, outputs: int) -> int:
    """Outputs of the net: one for each label of training, test and validation; 1 where labels are numbers.

    A net may have more outputs than the data has classes (the published nets of EMNIST have 62).

    Args:
      outputs: ``family.outputs``, 0 for as many as there are classes.

    Raises:
      ValueError: several outputs where labels are numbers to predict, or fewer than there are classes.

    >>> x, y = np.zeros((3, 1)), np.array([0, 4, 1])
    >>> classes_of(sources.Source(x, y, x, y), 0), classes_of(sources.Source(x, y, x, y), 62)
    (5, 62)
    """
    labels = [y for y in (source.y_train, source.y_test, source.y_validation) if y is not None and y.size]
    if labels[0].dtype.kind == "f":
        if outputs > 1:
            raise ValueError(f"outputs {outputs} where labels are numbers to predict: need 0 or 1 (family.outputs)")
        return 1
    classes = max(int(y.max()) for y in labels) + 1
    if 0 < outputs < classes or outputs < 0:
        raise ValueError(f"outputs {outputs} for labels 0..{classes - 1}: need 0 or >= {classes} (family.outputs)")
    return max(classes, outputs)


def pool_of(source: sources.Source) -> tuple[jax.Array, jax.Array]:
    """All examples and labels: one pool on the device serves training, the statistics pass and all evaluation.

    Rows of the training set come first, then those of the test set, then those of the validation set.
    """
    empty = source.x_test[:0], source.y_test[:0]
    x_validation, y_validation = empty if source.y_validation is None else (source.x_validation, source.y_validation)
    x = np.concatenate([source.x_train, source.x_test, x_validation])
    y = np.concatenate([source.y_train, source.y_test, y_validation])
    return stored_as(x), stored_as(y)

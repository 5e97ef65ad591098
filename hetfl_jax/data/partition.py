"""Who holds which examples. Every function returns a ``Partition`` and is seeded; none loops over clients.

Two different things are called Dirichlet in the literature: ``dirichlet_per_class`` (proportions over clients for
each class) and ``dirichlet_per_client`` (a class prior for each client). The same number means different data.
"""

import math
import time
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np

from hetfl_jax.core.types import Line

DRAWS = 10_000  #: Dirichlet draws per class after which a split is given up
PATIENCE = 10.0  #: seconds after which it is, too


class Partition(NamedTuple):
    """Rows of the training and of the local test data, client after client."""

    rows: np.ndarray  #: [n] int
    size: np.ndarray  #: [N] int
    test_index: np.ndarray | None = None
    test_size: np.ndarray | None = None
    classes: np.ndarray | None = None  #: [N, C] bool where the split itself fixes them
    held_out: bool = False  #: test rows are rows of the training data, split off
    validation: np.ndarray | None = None  #: rows of the training data, split off from all clients


def _need(fine: bool, message: str) -> None:
    """Refuse with a message."""
    if not fine:
        raise ValueError(f"{message} (data.partition)")


def _whole(value: object, name: str, low: int) -> None:
    """Refuse anything but a whole number of at least ``low``.

    >>> _whole(1.5, "clients", 1)
    Traceback (most recent call last):
    ValueError: clients 1.5: need a whole number >= 1 (data.partition)
    """
    fine = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low
    _need(fine, f"{name} {value!r}: need a whole number >= {low}")


def _number(value: object, name: str) -> None:
    fine = isinstance(value, Real) and math.isfinite(float(value))
    _need(fine, f"{name} {value!r}: need a finite number")


def _clients(clients: object, examples: int, seed: object) -> None:
    """Refuse a seed below 0, and more clients than examples."""
    _whole(seed, "seed", 0)
    fine = isinstance(clients, Integral) and 1 <= int(clients) <= examples
    _need(fine, f"{clients!r} clients, allowed 1..{examples} (one example each)")


def _classes(labels: np.ndarray) -> np.ndarray:
    """Labels that a split can group by: [M], 0..C-1. Others would take memory for classes that nobody has."""
    labels = np.asarray(labels)
    _need(labels.ndim == 1 and labels.size > 0, f"labels of shape {labels.shape}: need one an example")
    whole = labels.dtype.kind in "biu" or (labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all()))
    _need(whole, f"labels of dtype {labels.dtype}: a split by classes needs whole numbers 0..C-1")
    low, high, most = labels.min(), labels.max(), max(10 * labels.size, 999)
    _need(low >= 0 and high <= most, f"labels {low}..{high}, allowed 0..{most} for {labels.size} rows: renumber them")
    return labels


def _grouped(owner: np.ndarray, clients: int) -> tuple[np.ndarray, np.ndarray]:
    """CSR index and sizes from the owner of each row; owner -1 means nobody.

    >>> [v.tolist() for v in _grouped(np.array([1, -1, 0, 1]), 2)]
    [[2, 0, 3], [1, 2]]
    """
    order = np.argsort(owner, kind="stable")
    order = order[np.searchsorted(owner[order], 0) :]
    return order, np.bincount(owner[owner >= 0], minlength=clients)


def iid(examples: int, clients: int, seed: int, test_examples: int = 0) -> Partition:
    """Equal random parts of ``examples // clients`` rows without replacement, the remainder dropped; test data alike.

    Args:
      examples, test_examples: rows of the training and of the test set.
      clients: N, at most one an example; with fewer test rows than clients nobody has test data.

    >>> iid(10, 3, seed=0).size.tolist()
    [3, 3, 3]
    """
    _whole(examples, "examples", 0)
    _whole(test_examples, "test examples", 0)
    _clients(clients, examples, seed)
    rng = np.random.default_rng(seed)

    def deal(count: int) -> tuple[np.ndarray, np.ndarray]:
        each = count // clients
        return rng.permutation(count)[: each * clients], np.full(clients, each)

    train = deal(examples)
    return Partition(*train, *(deal(test_examples) if test_examples >= clients else (None, None)))


def per_group(examples: int, clients: int, groups: int, seed: int, shuffle: bool = True) -> Partition:
    """Every group of consecutive clients gets all examples (IFCA's rotated sets): permuted anew, cut into equal parts.

    NumPy's legacy generator in the official call order, so the index sets equal the official ones.

    Args:
      examples: rows, a multiple of the clients of a group.
      clients: N, a multiple of ``groups``.
      shuffle: whether rows are permuted.

    Raises:
      ValueError: parts that would not be equal.

    >>> per_group(4, 4, 2, seed=0, shuffle=False).rows.tolist()
    [0, 1, 2, 3, 0, 1, 2, 3]
    """
    for name, value in (("examples", examples), ("clients", clients), ("groups", groups)):
        _whole(value, name, 1)
    _whole(seed, "seed", 0)
    _need(1 <= groups <= clients and clients % groups == 0, f"{clients} clients in {groups} equal groups")
    each = clients // groups
    _need(
        examples >= each and examples % each == 0,
        f"{examples} examples for the {each} clients of a group: need equal parts",
    )
    rng = np.random.RandomState(seed)
    index = [rng.permutation(examples) if shuffle else np.arange(examples) for _ in range(groups)]
    return Partition(np.concatenate(index), np.full(clients, examples // each))


def hold_out_own(part: Partition, fraction: float, seed: int) -> Partition:
    """A share of every client's own rows as its test data; every client keeps at least one row for training.

    Args:
      fraction: 0 <= f < 1; a client of n rows tests on ``min(floor(f n), n - 1)``.

    >>> hold_out_own(iid(10, 2, seed=0), 0.2, seed=0).test_size.tolist()
    [1, 1]
    """
    _number(fraction, "local test fraction")
    _need(0 <= fraction < 1, f"local test fraction {fraction}, allowed 0 <= f < 1")
    _whole(seed, "seed", 0)
    size = np.asarray(part.size)
    owner = np.repeat(np.arange(size.size), size)
    order = np.lexsort((np.random.default_rng(seed).random(owner.size), owner))
    tests = np.minimum((size * fraction).astype(int), size - 1)
    place = np.arange(owner.size) - np.repeat(np.cumsum(size) - size, size)
    is_test = place < np.repeat(tests, size)
    index = np.asarray(part.rows)[order]
    return part._replace(
        rows=index[~is_test], size=size - tests, test_index=index[is_test], test_size=tests, held_out=True
    )


def first_clients(part: Partition, count: int) -> Partition:
    """The first ``count`` clients of a partition (0: all); the data of the others is not used.

    >>> first_clients(iid(10, 5, seed=0), 2).rows.size
    4
    """
    _whole(count, "first clients", 0)
    if not count:
        return part
    _need(0 < count <= part.size.size, f"first {count} clients, allowed 1..{part.size.size}, or 0 for all")
    test: Line = {}
    if part.test_index is not None and part.test_size is not None:
        kept = part.test_size[:count]
        test = {"test_index": part.test_index[: kept.sum()], "test_size": kept}
    classes = None if part.classes is None else part.classes[:count]
    size = part.size[:count]
    return part._replace(rows=part.rows[: size.sum()], size=size, classes=classes, **test)


def shards(
    labels: np.ndarray, clients: int, classes_per_client: int, seed: int, test_labels: np.ndarray | None = None
) -> Partition:
    """HeteroFL's non-iid-N split (its ``data.py``): N classes a client, one shard of each.

    The rows of a class, in dataset order, are cut into ``N * clients / C`` equal shards, leftover rows going one each
    to the first of them. Class ids, each repeated once per shard, are shuffled and dealt N a client; duplicates
    collapse, so some clients hold fewer classes and some shards stay unused. A client takes a random unused shard of
    each class it holds. Test rows are split the same way with the same classes.

    Args:
      labels: [M] integers 0..C-1.
      classes_per_client: N; ``N * clients`` must be a multiple of C.
      test_labels: of the test set, which is dealt only if they are given.

    Raises:
      ValueError: a value out of range, or a class with fewer rows than shards.

    >>> part = shards(np.repeat([0, 1], 6), clients=4, classes_per_client=1, seed=0)
    >>> part.size.tolist(), part.classes.sum(1).tolist()
    ([3, 3, 3, 3], [1, 1, 1, 1])
    """
    labels = _classes(labels)
    classes = int(labels.max()) + 1
    _clients(clients, labels.size, seed)
    _whole(classes_per_client, "classes per client", 1)
    _need(
        1 <= classes_per_client <= classes and classes_per_client * clients % classes == 0,
        f"{classes_per_client} classes a client for {clients} clients: N * clients must be a multiple of {classes}",
    )
    per_class = classes_per_client * clients // classes
    rng = np.random.default_rng(seed)
    dealt = rng.permutation(np.repeat(np.arange(classes), per_class)).reshape(clients, classes_per_client)
    held = np.zeros((clients, classes), bool)
    held[np.repeat(np.arange(clients), classes_per_client), dealt.ravel()] = True

    def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        owner = np.full(labels.size, -1)
        for c in range(classes):
            rows = np.flatnonzero(labels == c)
            _need(rows.size >= per_class, f"class {c} has {rows.size} examples for {per_class} shards")
            each = rows.size // per_class
            shard = np.arange(rows.size) // each
            shard = np.where(shard < per_class, shard, np.arange(rows.size) - each * per_class)
            owner_of_shard = np.full(per_class, -1)
            holders = np.flatnonzero(held[:, c])
            owner_of_shard[rng.permutation(per_class)[: holders.size]] = holders
            owner[rows] = owner_of_shard[shard]
        return _grouped(owner, clients)

    train = split(labels)
    test_index, test_size = (None, None) if test_labels is None else split(_classes(test_labels))
    return Partition(*train, test_index, test_size, held)


def dirichlet_per_class(
    labels: np.ndarray, clients: int, concentration: float, seed: int, least: int | None = None
) -> Partition:
    """For each class, proportions over clients ~ Dirichlet(concentration); used by DepthFL's code.

    Clients that already hold ``n / clients`` examples get none of the further classes; the whole draw repeats until
    the smallest client has ``least`` examples. NumPy's legacy generator in the official call order, so the index sets
    equal the official ones.

    Args:
      labels: [M] integers 0..C-1.
      clients: number of clients, at most one an example.
      concentration: > 0, small is skewed.
      seed: of the draws.
      least: examples that every client must get, by default 10, or half its fair share if that is less.

    Raises:
      ValueError: a value out of range, or no such draw in 10,000 or within 10 s.

    >>> dirichlet_per_class(np.repeat([0, 1], 8), 2, 1.0, seed=0, least=6).size.tolist()
    [10, 6]
    """
    labels = _classes(labels)
    _concentration(concentration)
    _clients(clients, labels.size, seed)
    rng = np.random.RandomState(seed)
    least = (min(10, labels.size // (2 * clients)) or 1) if least is None else least
    _whole(least, "least examples a client", 1)
    _need(least * clients <= labels.size, f"{clients} clients with {least} of {labels.size} examples each: too many")
    if clients == 1:
        return Partition(*_grouped(np.zeros(labels.size, int), 1))
    rows = [np.flatnonzero(labels == c) for c in range(int(labels.max()) + 1)]
    end, draws = time.monotonic() + PATIENCE, 0
    while draws < DRAWS and time.monotonic() < end:
        draws += 1
        owner = _dealt(rng, rows, clients, concentration)
        if owner is not None and np.bincount(owner, minlength=clients).min() >= least:
            return Partition(*_grouped(owner, clients))
    raise ValueError(
        f"no Dirichlet({concentration}) draw of {draws} gave {clients} clients {least} examples each: raise the "
        "concentration, or lower the minimum or the clients (data.partition)"
    )


def _dealt(rng: np.random.RandomState, rows: list[np.ndarray], clients: int, concentration: float) -> np.ndarray | None:
    """[M] owner of each row in one draw; ``None`` where no client that may still take a class has a share of it."""
    examples = sum(each.size for each in rows)
    owner, held = np.full(examples, -1), np.zeros(clients, int)
    for each in rows:
        mixed = each.copy()
        rng.shuffle(mixed)
        share = rng.dirichlet(np.repeat(concentration, clients)) * (held < examples / clients)
        if not 0 < share.sum() < np.inf:  # all shares have underflown to 0; NumPy's own 0 / 0 gives NaN
            return None
        cuts = (np.cumsum(share / share.sum()) * mixed.size).astype(int)[:-1]
        taken = np.diff(np.concatenate([[0], cuts, [mixed.size]]))
        owner[mixed] = np.repeat(np.arange(clients), taken)
        held += taken
    return owner


def _concentration(value: float) -> None:
    """Refuse a concentration that is not above 0."""
    _number(value, "Dirichlet concentration")
    _need(value > 0, f"Dirichlet concentration {value}, allowed > 0")


def dirichlet_per_client(labels: np.ndarray, clients: int, concentration: float, seed: int) -> Partition:
    """Every client draws a class prior ~ Dirichlet(concentration); used by FedDyn's code.

    Sizes are equal and fixed first; examples are dealt one by one to a random client that is not full, the class drawn
    from its prior among the classes that are left.

    Args:
      labels: [M] integers 0..C-1.
      clients: N, each with ``M // N`` rows.
      concentration: > 0, small is skewed.

    >>> dirichlet_per_client(np.repeat([0, 1], 8), 2, 0.1, seed=0).size.tolist()
    [8, 8]
    """
    labels = _classes(labels)
    _concentration(concentration)
    _clients(clients, labels.size, seed)
    rng = np.random.default_rng(seed)
    classes = int(labels.max()) + 1
    rows = [rng.permutation(np.flatnonzero(labels == c)) for c in range(classes)]
    left = np.array([r.size for r in rows])
    prior = rng.dirichlet(np.full(classes, concentration), clients)
    each = labels.size // clients
    owner = np.full(labels.size, -1)
    # A uniformly random order of all slots is the same as asking a random client that is not full, each time.
    for client, draw in zip(rng.permutation(np.repeat(np.arange(clients), each)), rng.random(each * clients)):
        weight = np.cumsum(prior[client] * (left > 0))
        if not weight[-1] > 0:  # the prior has no mass on what is left
            weight = np.cumsum(left)
        c = int(np.searchsorted(weight, draw * weight[-1], side="right"))
        if c == classes:  # the product was rounded up to the whole mass
            c = int(np.searchsorted(weight, weight[-1]))
        left[c] -= 1
        owner[rows[c][left[c]]] = client
    return Partition(*_grouped(owner, clients))


def natural(writer: np.ndarray, seed: int, test_fraction: float = 0.2, min_examples: int = 2) -> Partition:
    """One client per distinct id, with a local test split off each client's own rows.

    Clients with fewer than ``min_examples`` rows are dropped; every client keeps at least one row for training.

    >>> natural(np.array([7, 7, 9, 9, 9]), seed=0, test_fraction=0.5).size.tolist()
    [1, 2]
    """
    writer = np.asarray(writer)
    _need(writer.ndim == 1 and writer.size > 0, f"client ids of shape {writer.shape}: need one an example")
    kinds = {type(value) for value in writer} if writer.dtype == object else set()
    missing = bool((writer != writer).any())
    _need(len(kinds) < 2 and not missing, "client ids of several kinds or NaN: need numbers or text in every row")
    _whole(min_examples, "least examples a client", 1)
    _, client, count = np.unique(writer, return_inverse=True, return_counts=True)
    keep = count >= min_examples
    _need(bool(keep.any()), f"no client has {min_examples} examples; the largest has {count.max()}")
    renumbered = np.where(keep, np.cumsum(keep) - 1, -1)[client]
    return hold_out_own(Partition(*_grouped(renumbered, int(keep.sum()))), test_fraction, seed)


def summary(labels: np.ndarray, part: Partition) -> dict[str, object]:
    """Sizes and classes per client in numbers: what a run prints and saves in ``partition.json``.

    ``largest class share``: of a client's examples, those of its most common class, averaged over clients.

    >>> summary(np.array([0, 0, 1, 1]), Partition(np.arange(4), np.array([3, 1])))["largest class share"]
    0.8333
    """
    size = np.asarray(part.size)
    about = {
        "clients": int(size.size),
        "examples": int(size.sum()),
        "size": {"min": int(size.min()), "median": float(np.median(size)), "max": int(size.max())},
    }
    if labels.dtype.kind == "f":
        return about
    count = class_counts(labels, part)
    held = (count > 0).sum(1)
    return about | {
        "classes per client": {"min": int(held.min()), "median": float(np.median(held)), "max": int(held.max())},
        "largest class share": round(float((count.max(1) / count.sum(1)).mean()), 4),
    }


def class_counts(labels: np.ndarray, part: Partition) -> np.ndarray:
    """[N, C] examples of each class per client; of sequences, labels of each class; of a regression, one class.

    >>> class_counts(np.array([0, 0, 1, 1]), Partition(np.arange(4), np.array([3, 1]))).tolist()
    [[2, 1], [0, 1]]
    """
    if labels.dtype.kind == "f":
        return np.asarray(part.size)[:, None]
    classes, each = int(labels.max()) + 1, labels.size // len(labels)
    client = np.repeat(np.arange(part.size.size), part.size * each)
    held = labels[part.rows].ravel()
    flat = np.bincount((client * classes + held)[held >= 0], minlength=part.size.size * classes)
    return flat.reshape(part.size.size, classes)

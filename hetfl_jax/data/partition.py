"""Who holds which examples. Every function returns a ``Partition`` and is seeded; none loops over clients.

Two different things are called Dirichlet in the literature: ``dirichlet_per_class`` (proportions over clients for
each class) and ``dirichlet_per_client`` (a class prior for each client). The same number means different data.
"""

from typing import Any, NamedTuple

import numpy as np


class Partition(NamedTuple):
    """Rows of the training and of the local test data, client after client."""

    index: np.ndarray  # type: ignore[assignment]  #: [n] int
    size: np.ndarray  #: [N] int
    test_index: np.ndarray | None = None
    test_size: np.ndarray | None = None
    classes: np.ndarray | None = None  #: [N, C] bool where the split itself fixes them
    held_out: bool = False  #: test rows are rows of the training data, split off


def _need(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(f"{message} (data.partition)")


def _grouped(owner: np.ndarray, clients: int) -> tuple[np.ndarray, np.ndarray]:
    """CSR index and sizes from the owner of each row; owner -1 means nobody."""
    order = np.argsort(owner, kind="stable")
    order = order[np.searchsorted(owner[order], 0) :]
    return order, np.bincount(owner[owner >= 0], minlength=clients)


def iid(examples: int, clients: int, seed: int, test_examples: int = 0) -> Partition:
    """Equal random parts of ``examples // clients`` rows without replacement, the remainder dropped; test data alike.

    >>> iid(10, 3, seed=0).size.tolist()
    [3, 3, 3]
    """
    _need(1 <= clients <= examples, f"{clients} clients, allowed 1..{examples} (one example each)")
    rng = np.random.default_rng(seed)

    def deal(count: int) -> tuple[np.ndarray, np.ndarray]:
        each = count // clients
        return rng.permutation(count)[: each * clients], np.full(clients, each)

    train = deal(examples)
    return Partition(*train, *(deal(test_examples) if test_examples >= clients else (None, None)))


def per_group(examples: int, clients: int, groups: int, seed: int, shuffle: bool = True) -> Partition:
    """Every group of consecutive clients gets all examples (IFCA's rotated sets): permuted anew, cut into equal parts.

    NumPy's legacy generator in the official call order, so the index sets equal the official ones.

    >>> per_group(4, 4, 2, seed=0, shuffle=False).index.tolist()
    [0, 1, 2, 3, 0, 1, 2, 3]
    """
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

    >>> hold_out_own(iid(10, 2, seed=0), 0.2, seed=0).test_size.tolist()
    [1, 1]
    """
    _need(0 <= fraction < 1, f"local test fraction {fraction}, allowed 0 <= f < 1")
    size = np.asarray(part.size)
    owner = np.repeat(np.arange(size.size), size)
    order = np.lexsort((np.random.default_rng(seed).random(owner.size), owner))
    tests = np.minimum((size * fraction).astype(int), size - 1)
    place = np.arange(owner.size) - np.repeat(np.cumsum(size) - size, size)
    is_test = place < np.repeat(tests, size)
    index = np.asarray(part.index)[order]
    return part._replace(
        index=index[~is_test], size=size - tests, test_index=index[is_test], test_size=tests, held_out=True
    )


def first_clients(part: Partition, count: int) -> Partition:
    """The first ``count`` clients of a partition (0: all); the data of the others is not used.

    >>> first_clients(iid(10, 5, seed=0), 2).index.size
    4
    """
    if not count:
        return part
    _need(0 < count <= part.size.size, f"first {count} clients, allowed 1..{part.size.size}, or 0 for all")
    test: dict[str, Any] = {}
    if part.test_index is not None and part.test_size is not None:
        kept = part.test_size[:count]
        test = {"test_index": part.test_index[: kept.sum()], "test_size": kept}
    classes = None if part.classes is None else part.classes[:count]
    size = part.size[:count]
    return part._replace(index=part.index[: size.sum()], size=size, classes=classes, **test)


def shards(
    labels: np.ndarray, clients: int, classes_per_client: int, seed: int, test_labels: np.ndarray | None = None
) -> Partition:
    """HeteroFL's non-iid-N split (its ``data.py``): N classes a client, one shard of each.

    The rows of a class, in dataset order, are cut into ``N * clients / C`` equal shards, leftover rows going one each
    to the first of them. Class ids, each repeated once per shard, are shuffled and dealt N a client; duplicates
    collapse, so some clients hold fewer classes and some shards stay unused. A client takes a random unused shard of
    each class it holds. Test rows are split the same way with the same classes.
    """
    classes = int(labels.max()) + 1
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
    test_index, test_size = (None, None) if test_labels is None else split(test_labels)
    return Partition(*train, test_index, test_size, held)


def dirichlet_per_class(labels: np.ndarray, clients: int, concentration: float, seed: int) -> Partition:
    """For each class, proportions over clients ~ Dirichlet(concentration); used by DepthFL's code.

    Clients that already hold ``n / clients`` examples get none of the further classes; the whole draw repeats until
    the smallest client has 10 (or half its fair share, if that is less). NumPy's legacy generator in the official call
    order, so the index sets equal the official ones.
    """
    _need(concentration > 0, f"Dirichlet concentration {concentration}, allowed > 0")
    _need(1 <= clients <= labels.size, f"{clients} clients, allowed 1..{labels.size} (one example each)")
    rng = np.random.RandomState(seed)
    least = min(10, labels.size // (2 * clients)) or 1
    for _ in range(10_000):
        owner = np.empty(labels.size, int)
        held = np.zeros(clients, int)
        for c in range(int(labels.max()) + 1):
            rows = np.flatnonzero(labels == c)
            rng.shuffle(rows)
            share = rng.dirichlet(np.repeat(concentration, clients)) * (held < labels.size / clients)
            cuts = (np.cumsum(share / share.sum()) * rows.size).astype(int)[:-1]
            taken = np.diff(np.concatenate([[0], cuts, [rows.size]]))
            owner[rows] = np.repeat(np.arange(clients), taken)
            held += taken
        if held.min() >= least:
            return Partition(*_grouped(owner, clients))
    raise ValueError(
        f"no Dirichlet({concentration}) draw gave {clients} clients {least} examples each (data.partition)"
    )


def dirichlet_per_client(labels: np.ndarray, clients: int, concentration: float, seed: int) -> Partition:
    """Every client draws a class prior ~ Dirichlet(concentration); used by FedDyn's code.

    Sizes are equal and fixed first; examples are dealt one by one to a random client that is not full, the class drawn
    from its prior among the classes that are left.
    """
    _need(concentration > 0, f"Dirichlet concentration {concentration}, allowed > 0")
    _need(1 <= clients <= labels.size, f"{clients} clients, allowed 1..{labels.size} (one example each)")
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
        if weight[-1] <= 0:  # the prior has no mass on what is left
            weight = np.cumsum(left)
        c = int(np.searchsorted(weight, draw * weight[-1], side="right"))
        left[c] -= 1
        owner[rows[c][left[c]]] = client
    return Partition(*_grouped(owner, clients))


def natural(writer: np.ndarray, seed: int, test_fraction: float = 0.2, min_examples: int = 2) -> Partition:
    """One client per distinct id, with a local test split off each client's own rows.

    Clients with fewer than ``min_examples`` rows are dropped; every client keeps at least one row for training.

    >>> natural(np.array([7, 7, 9, 9, 9]), seed=0, test_fraction=0.5).size.tolist()
    [1, 2]
    """
    _, client, count = np.unique(writer, return_inverse=True, return_counts=True)
    keep = count >= min_examples
    _need(bool(keep.any()), f"no client has {min_examples} examples; the largest has {count.max()}")
    renumbered = np.where(keep, np.cumsum(keep) - 1, -1)[client]
    return hold_out_own(Partition(*_grouped(renumbered, int(keep.sum()))), test_fraction, seed)


def levels_fixed(proportions: tuple[int, ...], clients: int) -> np.ndarray:
    """HeteroFL's fixed assignment: blocks of ``clients // sum * proportion`` in id order, leftovers the last level.

    >>> levels_fixed((1, 2), 7).tolist()
    [0, 0, 1, 1, 1, 1, 1]
    """
    each = clients // sum(proportions)
    level = np.repeat(np.arange(len(proportions)), [each * p for p in proportions])
    return np.concatenate([level, np.full(clients - level.size, len(proportions) - 1)]).astype(np.int32)


def levels_by_id(proportions: tuple[int, ...], clients: int) -> np.ndarray:
    """DepthFL's fixed assignment: the smallest level (the last) to the first ids; any remainder is spread.

    With D equal proportions client i gets depth ``floor(D i / N) + 1``.

    >>> levels_by_id((1, 1), 5).tolist()
    [1, 1, 1, 0, 0]
    """
    share = np.arange(clients) * sum(proportions) // clients
    from_smallest = np.searchsorted(np.cumsum(proportions[::-1]), share, side="right")
    return (len(proportions) - 1 - from_smallest).astype(np.int32)


def summary(labels: np.ndarray, part: Partition) -> dict[str, object]:
    """Sizes and classes per client in numbers: what a run prints and saves."""
    count = class_counts(labels, part)
    held = (count > 0).sum(1)
    size = np.asarray(part.size)
    return {
        "clients": int(size.size),
        "examples": int(size.sum()),
        "size": {"min": int(size.min()), "median": float(np.median(size)), "max": int(size.max())},
        "classes per client": {"min": int(held.min()), "median": float(np.median(held)), "max": int(held.max())},
        "largest class share": round(float((count.max(1) / count.sum(1)).mean()), 4),
    }


def class_counts(labels: np.ndarray, part: Partition) -> np.ndarray:
    """[N, C] examples of each class per client; of sequences, labels of each class."""
    classes, each = int(labels.max()) + 1, labels.size // len(labels)
    client = np.repeat(np.arange(part.size.size), part.size * each)
    held = labels[part.index].ravel()
    flat = np.bincount((client * classes + held)[held >= 0], minlength=part.size.size * classes)
    return flat.reshape(part.size.size, classes)

"""Splits in which clients hold very different amounts, by a power law; and validation rows of every client's own."""

import numpy as np

from hetfl_jax.data.partition import Partition


def _need(fine: bool, message: str, key: str) -> None:
    """Refuse with a message and the config key that it is about."""
    if not fine:
        raise ValueError(f"{message} ({key})")


def lognormal_counts(
    labels: np.ndarray, clients: int, classes_per_client: int, seed: int, writer: np.ndarray | None = None
) -> Partition:
    """DivFL's FEMNIST: client u holds classes u, u + 1, ... (mod C), of each a number of rows from a lognormal law.

    The number is ``max(2, floor((LogNormal(4, 1) + 5) / 3))``. Rows of a class are dealt in the order of their writers,
    where these are known, so that a client's rows are by few hands, else in random order; no row is dealt twice (in
    the original, all clients get the first rows of a class).

    Args:
      labels: [M] integers 0..C-1.
      clients: how many; DivFL has 200 with 3 of 10 classes each.
      writer: [M] who made each row.

    Raises:
      ValueError: more classes a client than there are, or a class that has fewer rows than the draws ask for.

    >>> lognormal_counts(np.repeat([0, 1, 2], 900), 3, 2, seed=0).size.tolist()
    [39, 57, 39]
    """
    rng = np.random.default_rng(seed)
    client, held = _pairs(labels, clients, classes_per_client)
    count = np.maximum(2, ((rng.lognormal(4, 1, client.size) + 5) / 3).astype(int))
    return _dealt(rng, labels, client, held, count, writer)


def lognormal_shares(
    labels: np.ndarray, clients: int, classes_per_client: int, seed: int, writer: np.ndarray | None = None,
    least: int = 5,
) -> Partition:  # fmt: skip
    """FedProx's MNIST: client u holds classes u, u + 1, ... (mod C), ``least`` of each, and a share of the rest.

    What is left of a class goes to those that hold it in proportion to draws from LogNormal(0, 2), rounded down; rows
    are dealt as in ``lognormal_counts``.

    Args:
      labels: [M] integers 0..C-1.
      clients: how many; FedProx has 1,000 with 2 of 10 digits each.

    Raises:
      ValueError: as ``lognormal_counts``.

    >>> lognormal_shares(np.repeat([0, 1, 2], 100), 3, 2, seed=0).size.tolist()
    [59, 154, 84]
    """
    rng = np.random.default_rng(seed)
    client, held = _pairs(labels, clients, classes_per_client)
    there = np.bincount(labels)
    rest = there - least * np.bincount(held, minlength=there.size)
    if (rest < 0).any():
        c = int(np.flatnonzero(rest < 0)[0])
        _need(False, f"class {c} has {there[c]} rows for {(held == c).sum()} clients of {least}", "data.clients")
    draw = rng.lognormal(0, 2, client.size)
    share = draw / np.bincount(held, draw, there.size)[held]
    return _dealt(rng, labels, client, held, least + (share * rest[held]).astype(int), writer)


def lognormal_dirichlet(
    labels: np.ndarray, clients: int, concentration: float, seed: int, least: int = 20, most: int = 600
) -> Partition:
    """Amounts and labels that are independent: so many rows by a lognormal law, of classes by a Dirichlet law.

    ``n_k = min(floor(LogNormal(4, 1)) + least, most)``; the class of each of these rows is drawn from client k's prior
    ~ Dirichlet(concentration) over the classes that have rows left. No row is dealt twice; what is left is not used.

    Args:
      labels: [M] integers 0..C-1.
      concentration: > 0; at 100 the labels of all clients are much alike.

    Raises:
      ValueError: a value out of range, or fewer rows than the draws ask for.

    >>> lognormal_dirichlet(np.arange(900) % 10, 3, 0.3, seed=0).size.tolist()
    [81, 67, 123]
    """
    _need(concentration > 0, f"concentration {concentration}, allowed > 0", "data.concentration")
    _need(clients >= 1, f"{clients} clients, allowed >= 1", "data.clients")
    _need(1 <= least <= most, f"least {least}, allowed 1..{most}", "data.least")
    rng = np.random.default_rng(seed)
    size = np.minimum(rng.lognormal(4, 1, clients).astype(int) + least, most)
    rows = [rng.permutation(np.flatnonzero(labels == c)) for c in range(int(labels.max()) + 1)]
    left = np.array([r.size for r in rows])
    _need(size.sum() <= left.sum(), f"{left.sum()} rows, the draws ask for {size.sum()}", "data.clients")
    prior = rng.dirichlet(np.full(left.size, concentration), clients)
    parts = []
    for k in rng.permutation(clients):  # who draws first has no meaning
        wanted = np.zeros(left.size, int)
        while missing := size[k] - wanted.sum():
            weight = prior[k] * (left > wanted)
            weight = weight if weight.sum() > 0 else (left - wanted).astype(float)
            wanted = np.minimum(wanted + rng.multinomial(missing, weight / weight.sum()), left)
        parts.append((k, np.concatenate([rows[c][left[c] - n : left[c]] for c, n in enumerate(wanted)])))
        left -= wanted
    return Partition(np.concatenate([rows for _, rows in sorted(parts, key=lambda part: part[0])]), size)


def _pairs(labels: np.ndarray, clients: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """(client, class) of all pairs, client after client."""
    classes = int(labels.max()) + 1
    _need(1 <= each <= classes, f"{each} classes a client, allowed 1..{classes}", "data.classes_per_client")
    _need(clients >= 1, f"{clients} clients, allowed >= 1", "data.clients")
    client = np.repeat(np.arange(clients), each)
    return client, (client + np.tile(np.arange(each), clients)) % classes


def _dealt(
    rng: np.random.Generator, labels: np.ndarray, client: np.ndarray, held: np.ndarray, count: np.ndarray,
    writer: np.ndarray | None,
) -> Partition:  # fmt: skip
    """Every pair of client and class gets so many of the class's rows, the next ones in their order."""
    order = rng.permutation(labels.size)
    if writer is not None:
        order = order[np.argsort(np.asarray(writer)[order], kind="stable")]
    parts: list[np.ndarray] = [np.zeros(0, int)] * client.size
    for c in np.unique(held):
        rows, pairs = order[labels[order] == c], np.flatnonzero(held == c)
        ends = np.cumsum(count[pairs])
        _need(ends[-1] <= rows.size, f"class {c} has {rows.size} rows, the draws ask for {ends[-1]}", "data.clients")
        for pair, part in zip(pairs, np.split(rows[: ends[-1]], ends[:-1])):
            parts[pair] = part
    size = np.bincount(client, count).astype(int)
    return Partition(np.concatenate(parts), size)


def hold_out_validation(part: Partition, fraction: float, seed: int) -> Partition:
    """A share of every client's rows, its test rows counted, as validation data; these are one set for all clients.

    With test rows of a tenth held out before, ``fraction=0.1`` leaves eight tenths to train on (q-FFL's 80/10/10). A
    client keeps at least one row for training.

    Raises:
      ValueError: a share outside [0, 1).

    >>> part = hold_out_validation(Partition(np.arange(20), np.array([10, 10])), 0.1, seed=0)
    >>> part.size.tolist(), part.validation.size
    ([9, 9], 2)
    """
    _need(0 <= fraction < 1, f"own_validation {fraction}, allowed 0 <= f < 1", "data.own_validation")
    size = np.asarray(part.size)
    whole = size + (part.test_size if part.test_size is not None and part.held_out else 0)
    out = np.minimum((whole * fraction + 1e-9).astype(int), size - 1)
    owner = np.repeat(np.arange(size.size), size)
    order = np.lexsort((np.random.default_rng([seed, 1]).random(owner.size), owner))
    place = np.arange(owner.size) - np.repeat(np.cumsum(size) - size, size)
    taken = place < np.repeat(out, size)
    rows = np.asarray(part.rows)[order]
    return part._replace(rows=rows[~taken], size=size - out, validation=rows[taken])

"""Splits by name: who holds which examples, as ``config.data`` asks for it."""

import numpy as np

from hetfl_jax.core.types import Config
from hetfl_jax.data import amounts, domains, partition, sources
from hetfl_jax.data.partition import Partition

SPLITS = (
    "iid", "shards", "dirichlet_per_class", "dirichlet_per_client", "natural", "per_group", "domains",
    "lognormal_counts", "lognormal_shares", "lognormal_dirichlet",
)  # fmt: skip
TESTS = ("source", "clients")


def split(data: Config, source: sources.Source, seed: int) -> Partition:
    """The partition that ``config.data`` asks for, with test rows split off every client's own if it asks for them.

    Args:
      data: the config's block.
      source: whose training rows are dealt.
      seed: of the split.

    Raises:
      ValueError: an unknown split, or one that this data cannot have.

    >>> from hetfl_jax.run.keys import defaults
    >>> data, x, y = defaults().data, np.zeros((20, 1)), np.arange(20) % 2
    >>> data.update(dict(split="shards", clients=5, classes_per_client=2))
    >>> split(data, sources.Source(x, y, x, y), seed=0).size.tolist()
    [4, 4, 4, 4, 4]
    """
    if data.split == "natural" and data.own_test and data.test_fraction:
        raise ValueError(f"own_test {data.own_test}, test_fraction {data.test_fraction}: one must be 0 (data.own_test)")
    part = partition.first_clients(_split(data, source, seed), data.first_clients)
    part = partition.hold_out_own(part, data.own_test, seed) if data.own_test else part
    return amounts.hold_out_validation(part, data.own_validation, seed) if data.own_validation else part


def tested_rows(data: Config, part: Partition) -> np.ndarray | None:
    """Rows of the training data that make the test set, all clients' own test rows; ``None``: the source's test set.

    Args:
      data: the config's block; ``tested_on`` is ``source`` or ``clients``.

    Raises:
      ValueError: another word, or clients without test rows.
    """
    if data.tested_on not in TESTS:
        raise ValueError(f"tested_on {data.tested_on!r} is not one of {', '.join(TESTS)} (data.tested_on)")
    if data.tested_on == "source":
        if data.source in sources.GENERATED and not data.options.get("test", data.source == "synthetic"):
            raise ValueError(
                f"{data.source} with test=0 has no test set: need tested_on=clients (data.options, tested_on)"
            )
        return None
    if part.test_index is None or not part.held_out or not part.test_index.size:
        raise ValueError("tested_on 'clients', who have no test rows: need own_test or test_fraction (data.tested_on)")
    return part.test_index


def _split(data: Config, source: sources.Source, seed: int) -> Partition:
    """The partition by the split's name, before any rows are held out."""
    labels, clients = source.y_train, data.clients
    if data.split not in SPLITS:
        raise ValueError(f"split {data.split!r} is not one of {', '.join(SPLITS)} (data.split)")
    if data.split == "iid":
        return partition.iid(len(labels), clients, seed, len(source.y_test))
    if data.split == "domains":
        return domains.per_domain(len(labels), clients, max(len(data.domains), 1), len(source.y_test))
    if data.split == "per_group":
        groups = data.groups.partition(":")[2]
        return partition.per_group(len(labels), clients, int(groups) if groups.isdigit() else 1, seed)
    if labels.ndim > 1 and data.split != "natural":
        raise ValueError(f"split {data.split!r} of sequences, allowed iid, per_group, natural (data.split)")
    if data.split == "shards":
        return partition.shards(labels, clients, data.classes_per_client, seed, source.y_test)
    if data.split == "natural":
        if source.writer is None:
            raise ValueError(
                f"source {data.source!r} has no client ids: split 'natural' needs data.writers=<npz>:<array>"
            )
        return partition.natural(source.writer, seed, data.test_fraction)
    if data.split in ("lognormal_counts", "lognormal_shares"):
        deal = {"lognormal_counts": amounts.lognormal_counts, "lognormal_shares": amounts.lognormal_shares}[data.split]
        return deal(labels, clients, data.classes_per_client, seed, source.writer)
    if data.split == "lognormal_dirichlet":
        return amounts.lognormal_dirichlet(labels, clients, data.concentration, seed, least=data.least or 20)
    if data.split == "dirichlet_per_class":
        return partition.dirichlet_per_class(labels, clients, data.concentration, seed, data.least or None)
    return partition.dirichlet_per_client(labels, clients, data.concentration, seed)

"""Room for the data of several runs: arrays that are longer than needed, so that runs of other lengths share programs.

Another seed means another split, so other numbers of rows and of test batches, hence other shapes, hence another
program. Runs of a sweep fill their arrays up instead: pool rows that nobody holds, and test batches without examples.
"""

from typing import NamedTuple

import numpy as np

from hetfl_jax.core.types import Array, Population
from hetfl_jax.data.population import stored_as
from hetfl_jax.run.federation import Federation

SLACK = 8  #: a new room is longer than its first run needs by one part in so many


class Room(NamedTuple):
    """Lengths of the arrays of a federation."""

    pool: int  #: rows of examples
    rows: int  #: that clients hold
    batches: int  #: of all training data
    test_rows: int  #: of the test set and of clients' own test data
    test_batches: int  #: of the test set

    def holds(self, other: "Room") -> bool:
        """Whether another one's arrays fit in.

        >>> Room(9, 8, 2, 4, 1).holds(Room(9, 7, 2, 4, 1)), Room(9, 8, 2, 4, 1).holds(Room(9, 9, 2, 4, 1))
        (True, False)
        """
        return all(mine >= theirs for mine, theirs in zip(self, other))


def needed(fed: Federation) -> Room | None:
    """The lengths of a federation's arrays; ``None`` where what fills them up would count.

    An empty batch counts in a pass for batch statistics, in a mean over batches, and where batches choose their model.
    """
    method, train = fed.algorithm, fed.train
    counts = method.statistics or method.choice or method.order or any(asked.own for asked in method.questions)
    if counts or train.y.ndim > 1 or train.view != () or fed.reads_population:
        return None
    lengths = (train.x, train.rows, fed.train_batches.size, fed.test.rows)
    pool, rows, batched, tested = (int(array.shape[0]) for array in lengths)
    return Room(pool, rows, batched, tested, fed.test_batches)


def chosen(known: list[Room], needs: Room) -> Room:
    """The first known room that holds a run, or a new one, which joins them.

    The first run has just what it needs, so that runs of equal lengths are as they are alone; every further room has
    some slack over all before.

    >>> known = []
    >>> chosen(known, Room(80, 70, 7, 20, 1)) == chosen(known, Room(80, 70, 7, 20, 1)), len(known)
    (True, 1)
    >>> chosen(known, Room(80, 74, 8, 16, 1))
    Room(pool=90, rows=84, batches=9, test_rows=23, test_batches=2)
    """
    found = next((room for room in known if room.holds(needs)), None)
    if found is None:
        found = needs
        if known:
            most = [max(lengths) for lengths in zip(known[-1], needs)]
            found = Room(*(length + -(-length // SLACK) for length in most))
        known.append(found)
    return found


def placed(fed: Federation, room: Room) -> Federation:
    """The same federation with arrays of the room's lengths.

    Sums over examples, clients and test batches stay what they were: rows that are added belong to nobody, and batches
    that are added have no examples. Clients and their test rows keep their places.
    """
    if needed(fed) == room:
        return fed
    x, y = (_longer(array, room.pool) for array in (fed.train.x, fed.train.y))
    train, batched, test = (pop._replace(x=x, y=y) for pop in (fed.train, fed.train_batches, fed.test))
    train = train._replace(rows=_longer(train.rows, room.rows))
    batched = _more_clients(batched, batched.size.shape[0], room.batches)
    batched = batched._replace(rows=_longer(batched.rows, room.rows))
    test = _more_clients(test, fed.test_batches, room.test_batches)
    test = test._replace(rows=_longer(test.rows, room.test_rows))
    return fed._replace(train=train, train_batches=batched, test=test, test_batches=room.test_batches)


def _longer(array: Array, length: int, at: int | None = None) -> Array:
    """``array`` with zeros inserted before place ``at``, by default at its end; on the host, where nothing compiles.

    >>> _longer(np.array([1, 2, 3]), 5, at=1).tolist()
    [1, 0, 0, 2, 3]
    """
    known = np.asarray(array)
    at = known.shape[0] if at is None else at
    gap = np.zeros((length - known.shape[0], *known.shape[1:]), known.dtype)
    return stored_as(np.concatenate([known[:at], gap, known[at:]]))


def _more_clients(pop: Population, first: int, count: int) -> Population:
    """Of a population's ``first`` clients ``count``, those added without examples."""
    total = pop.size.shape[0] + count - first
    size, offset, level, classes = (_longer(v, total, first) for v in (pop.size, pop.offset, pop.level, pop.classes))
    return pop._replace(size=size, offset=offset, level=level, classes=classes)

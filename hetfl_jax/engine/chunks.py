"""How many clients run under one vmap: as many as asked for, or as many as a device holds, in equal chunks."""

from math import ceil, sqrt

MOST = 256  #: clients at once; 1,024 were no faster on a GPU, even of a net of 159,010 parameters


def clients_at_once(asked: int, slots: int, buckets: int, each: int, memory: int) -> int:
    """The size of a chunk.

    Args:
      asked: by the user; 0 lets the other arguments decide.
      slots: items of the round on this device, in ``buckets`` of unknown sizes; a bucket is taken to have an equal
        share and one deviation of a random draw, for what a chunk has too much is computed for nothing.
      each: bytes that one client computes; it was seen to hold a sixth (CNN) to a tenth (ResNet) of them at one time.
      memory: bytes of the device, which hold all that the chunk computes.

    >>> clients_at_once(0, slots=300, buckets=1, each=10**8, memory=10**10)
    100
    >>> clients_at_once(0, slots=100, buckets=5, each=10**6, memory=10**10), clients_at_once(16, 10, 1, 1, 1)
    (25, 10)
    """
    if asked:
        return min(asked, slots)
    share = slots / buckets
    likely = min(slots, ceil(share + (sqrt(share) if buckets > 1 else 0)))
    fits = that_fit(MOST, each, memory)
    return ceil(likely / ceil(likely / fits))


def that_fit(wanted: int, each: int, memory: int) -> int:
    """``wanted`` clients at once, or as many as fit into a device, at least one.

    Args:
      wanted: clients at once, if memory were no limit.
      each: bytes that one client computes, taken to be in memory all at one time.
      memory: bytes of the device.

    >>> that_fit(256, each=10**8, memory=16 * 10**9), that_fit(256, each=10**12, memory=16 * 10**9)
    (160, 1)
    """
    return max(1, min(wanted, memory // max(1, each)))

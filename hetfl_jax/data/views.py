"""Other ways to see one pool: images turned, classes renamed."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Views


def rotations(side: int, quarter_turns: Sequence[int], classes: int) -> Views:
    """Square images turned counter-clockwise (numpy's ``rot90``), as moved pixels: one pool serves all rotations.

    Args:
      side: pixels of an edge.
      quarter_turns: of each view, 0 to 3.
      classes: C; their names stay.

    >>> rotations(2, (0, 1), classes=3).pixels.tolist()
    [[0, 1, 2, 3], [1, 3, 0, 2]]
    """
    grid = np.arange(side * side).reshape(side, side)
    pixels = np.stack([np.rot90(grid, turns).ravel() for turns in quarter_turns])
    return Views(jnp.asarray(pixels, jnp.int32), jnp.tile(jnp.arange(classes, dtype=jnp.int32), (len(pixels), 1)))


def renamings(pixels: int, labels: np.ndarray) -> Views:
    """Images as they are under [V, C] other names of the classes (label swap).

    Args:
      pixels: H x W of an image.
      labels: view v calls class c ``labels[v, c]``.

    >>> renamings(2, np.array([[0, 1], [1, 0]])).pixels.tolist()
    [[0, 1], [0, 1]]
    """
    places = jnp.tile(jnp.arange(pixels, dtype=jnp.int32), (len(labels), 1))
    return Views(places, jnp.asarray(labels, jnp.int32))

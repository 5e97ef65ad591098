"""The devices of a population's clients, as arrays."""

from typing import NamedTuple

from jax import Array


class Devices(NamedTuple):
    """What clients compute and send with; a round that simulates time reads it.

    ``able``, ``online`` and ``here`` say who can be chosen: nobody who cannot afford a level, nobody who is offline.
    """

    speed: Array  #: [N] float32 multiply-adds a second
    down: Array  #: [N] float32 bits a second that they receive
    up: Array  #: [N] float32 bits a second that they send
    able: Array | tuple[()] = ()  #: [N] bool, who can afford a level; () for everybody
    online: tuple[Array, ...] = ()  #: seconds [N, S] of coming, [N, S] of going, [N] of the period; () for always
    seconds: Array | tuple[()] = ()  #: [N] float32 that a round is expected to take
    here: Array | tuple[()] = ()  #: [N] bool, who may be chosen now; () for everybody

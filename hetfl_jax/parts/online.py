"""Which clients can be chosen now: those that are online and can afford a level; when they come and go."""

import jax.numpy as jnp

from hetfl_jax.core.types import Array, Devices, Population


def later(seconds: Array, rest: Array, passed: Array) -> tuple[Array, Array]:
    """The time after ``passed`` more seconds, and what float32 cannot hold of it.

    After a day a float32 counts in steps of 8 ms; without the rest, rounds that are shorter would stop the clock.

    Args:
      seconds, rest: float32, the time before.
      passed: float32 >= 0.

    >>> seconds, rest = jnp.float32(86_400.0), jnp.float32(0.0)
    >>> for _ in range(1_000):
    ...     seconds, rest = later(seconds, rest, jnp.float32(0.001))
    >>> round(float(seconds), 2), float(jnp.float32(86_400.0) + jnp.float32(0.001))
    (86401.0, 86400.0)
    """
    added = passed + rest
    total = seconds + added
    return total, added - (total - seconds)


def devices_of(people: Population) -> Devices:
    """The devices of a population.

    Args:
      people: of clients.

    Raises:
      ValueError: it has none.

    >>> devices_of(Population(*[None] * 7))
    Traceback (most recent call last):
    ValueError: the population has no devices: population._replace(devices=Devices(...)) (data.population)
    """
    if not isinstance(people.devices, Devices):
        raise ValueError("the population has no devices: population._replace(devices=Devices(...)) (data.population)")
    return people.devices


def present(people: Population, now: Array) -> Array | None:
    """[N] bool, who can be chosen at this time; ``None`` for everybody.

    Args:
      people: with devices.
      now: seconds since the start.

    >>> one = jnp.ones(2)
    >>> online = jnp.array([[0.0], [5.0]]), jnp.array([[4.0], [9.0]]), jnp.array([10.0, 10.0])
    >>> people = Population(*[None] * 7, devices=Devices(one, one, one, online=online))
    >>> present(people, jnp.float32(12.0)).tolist(), present(people, jnp.float32(16.0)).tolist()
    ([True, False], [False, True])
    """
    devices = devices_of(people)
    here = None if isinstance(devices.able, tuple) else devices.able
    if devices.online:
        start, end, period = devices.online
        at = (now % period)[:, None]
        on = ((start <= at) & (at < end)).any(1)
        here = on if here is None else here & on
    return here


def among(people: Population, here: Array | None) -> Population:
    """A population in which a selection finds only some clients; the others have no examples.

    Args:
      people: with devices.
      here: [N] bool, who can be chosen; ``None`` for everybody.

    >>> one = jnp.ones(2)
    >>> people = Population(*[None] * 7, devices=Devices(one, one, one))._replace(size=jnp.array([5, 6]))
    >>> among(people, jnp.array([False, True])).size.tolist()
    [0, 6]
    """
    if here is None:
        return people
    devices = devices_of(people)._replace(here=here)
    return people._replace(size=jnp.where(here, people.size, 0), devices=devices)


def leaving(devices: Devices, ids: Array, now: Array) -> Array:
    """[K] seconds until these clients, which are online, go; an interval that ends with the period may go on.

    Args:
      devices: of all clients.
      ids: [K] int32.
      now: seconds since the start.

    >>> one, online = jnp.ones(1), (jnp.array([[2.0]]), jnp.array([[7.0]]), jnp.array([10.0]))
    >>> leaving(Devices(one, one, one, online=online), jnp.array([0]), jnp.float32(13.0)).tolist()
    [4.0]
    """
    if not devices.online:
        return jnp.full(ids.shape, jnp.inf)
    start, end, period = (part[ids] for part in devices.online)
    at = (now % period)[:, None]
    inside = (start <= at) & (at < end)
    till = jnp.where(inside, end, 0).max(1)
    again = jnp.where((till >= period) & (start[:, 0] <= 0), end[:, 0], 0)
    whole = (again >= period) & inside.any(1)
    return jnp.where(whole, jnp.inf, till + again - at[:, 0])


def coming(devices: Devices, now: Array) -> Array:
    """Seconds until the next client that is able comes online; 0 where clients are always online.

    Args:
      devices: of all clients.
      now: seconds since the start.

    >>> one, online = jnp.ones(1), (jnp.array([[2.0]]), jnp.array([[7.0]]), jnp.array([10.0]))
    >>> float(coming(Devices(one, one, one, online=online), jnp.float32(18.0)))
    4.0
    """
    if not devices.online:
        return jnp.float32(0)
    start, _, period = devices.online
    at = (now % period)[:, None]
    first = jnp.where(start > at, start - at, jnp.inf).min(1)
    first = jnp.minimum(first, start[:, 0] + period - at[:, 0])
    able = jnp.ones(first.shape, bool) if isinstance(devices.able, tuple) else devices.able
    return jnp.where(able, first, jnp.inf).min()

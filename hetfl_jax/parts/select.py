"""Who takes part in a round, and at which capacity level."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.random import permute
from hetfl_jax.core.types import Array, Cohort, Devices, Needs, Plan, Population, PyTree, Seen, Tally


class Capacity(NamedTuple):
    """A rule for the level of an item."""

    of: Callable[[Array, Array, Population], Array]  #: (key, ids, population) -> level [K]
    drawn: tuple[float, ...] = ()  #: [L] how often each level is drawn; () where a client always has its own
    by_client: bool = False  #: whether it is the population that says the level


class Ask(Protocol):
    """A survey: what the model says of clients' own training data, before the round. Its cost is counted."""

    def __call__(self, ids: Array, level: int | None = None, examples: int = 0, valid: Array | None = None) -> Tally:
        """[K] sums over all of a client's examples, or over ``examples`` of them in a keyed order.

        Each client is asked at its own level, or all at ``level``. Who is not ``valid`` is not asked and answers 0.
        """
        ...

    def gradients(
        self, ids: Array, valid: Array | None = None, of: Callable[[Array], PyTree] | None = None, numbers: int = 0
    ) -> PyTree:
        """[K, P] gradients of the clients' mean losses, flat and at full shape; see ``parts.gradient``.

        With ``of`` a client sends ``of(row [P])`` instead, which has so many ``numbers``. Who is not ``valid`` is not
        asked and answers 0.
        """
        ...


class Select(NamedTuple):
    """A rule for who takes part; its state is part of the server's."""

    init: Callable[[int], PyTree]  #: (clients) -> state, ``()`` if it has none
    #: (key, round, state, population, ask) -> (cohort, state)
    choose: Callable[[Array, Array, PyTree, Population, Ask], tuple[Cohort, PyTree]]
    #: (state after ``choose``, plan, what every item did, ok) -> state
    update: Callable[[PyTree, Plan, Seen, Array], PyTree] = lambda state, plan, seen, ok: state
    repeats: bool = False  #: whether a client may come several times in one round
    hears: int = 0  #: bits that each item sends for ``update`` besides its reply, e.g. 32 of a loss
    info: Callable[[PyTree], dict[str, Array]] = lambda state: {}  #: state -> numbers to watch, by name
    needs: Callable[[int], Needs] = lambda clients: Needs()  #: (clients) -> memory at the server, and what to know


def stateless(
    choose: Callable[[Array, Population], Cohort], needs: Callable[[int], Needs] = lambda clients: Needs()
) -> Select:
    """A selection from (key, population) alone.

    Args:
      choose: (key, population) -> ``Cohort`` with K places.
      needs: (clients) -> what it takes at the server.

    >>> first_two = stateless(lambda key, population: Cohort(jnp.arange(2), jnp.ones(2, bool)))
    >>> first_two.choose(None, 0, (), None, None)[0].ids.tolist(), first_two.init(5)
    ([0, 1], ())
    """
    rule = lambda key, round, state, population, ask: (choose(key, population), state)  # noqa: E731
    return Select(lambda clients: (), rule, needs=needs)


def per_client(numbers: int, note: str = "") -> Callable[[int], Needs]:
    """What a selection needs that holds so many numbers of 4 bytes for every client in a round.

    >>> per_client(2)(1000).bytes
    8000
    """

    def needs(clients: int) -> Needs:
        what = f"{numbers} numbers for each of {clients:,} clients"
        return Needs(4 * numbers * clients, what, "uniform, which needs none", note)

    return needs


def uniform(cohort: int) -> Select:
    """``cohort`` distinct clients uniformly at random: the first places of a keyed permutation of all clients.

    Costs O(cohort), whatever the population; O(N) where only some clients can be chosen now (``Devices.here``).

    Args:
      cohort: K, >= 1 and at most the clients of the population.

    Raises:
      ValueError: a cohort below 1, or (when the round is built) above the population.

    >>> from hetfl_jax.core.types import Population
    >>> people = Population(None, None, None, None, jnp.ones(5, int), jnp.array([0, 1, 1, 0, 1]), None)
    >>> cohort, _ = uniform(3).choose(jax.random.key(0), 0, (), people, None)
    >>> len(set(cohort.ids.tolist())), cohort.valid.tolist()
    (3, [True, True, True])
    """
    if cohort < 1:
        raise ValueError(f"cohort of {cohort} clients, allowed >= 1 (method.args.cohort)")

    def choose(key: Array, population: Population) -> Cohort:
        clients = population.size.shape[0]
        if cohort > clients:
            raise ValueError(f"cohort of {cohort} clients, allowed 1..{clients} (method.args.cohort)")
        if isinstance(population.devices, Devices) and not isinstance(population.devices.here, tuple):
            here = population.devices.here
            noise = jnp.where(here, jax.random.uniform(key, (clients,)), -1.0)
            ids = jax.lax.top_k(noise, cohort)[1]
            return Cohort(ids, here[ids])
        return Cohort(permute(key, jnp.arange(cohort), clients), jnp.ones(cohort, bool))

    return stateless(choose)


def everyone() -> Select:
    """All clients, in the order of their ids; K is N.

    >>> from hetfl_jax.core.types import Population
    >>> people = Population(None, None, None, None, jnp.ones(3, int), None, None)
    >>> everyone().choose(jax.random.key(0), 0, (), people, None)[0].ids.tolist()
    [0, 1, 2]
    """

    def choose(key: Array, population: Population) -> Cohort:
        clients = population.size.shape[0]
        return Cohort(jnp.arange(clients), jnp.ones(clients, bool))

    return stateless(choose)


def bernoulli(probability: float, clients: int) -> Select:
    """Every client independently with ``probability``, given that somebody takes part (FedDyn's code redraws).

    The number of participants is drawn first (binomial, without 0), then they are, uniformly: the same law. The cohort
    has as many places as are exceeded with probability below 1e-9; a larger draw is cut there.

    Args:
      probability: of each client, 0 < p <= 1.
      clients: N, in the population.

    Raises:
      ValueError: a probability outside (0, 1].

    >>> cohort, _ = bernoulli(0.3, 10).choose(jax.random.key(0), 0, (), None, None)
    >>> cohort.ids.shape, bool(cohort.valid.any())
    ((10,), True)
    """
    if not 0 < probability <= 1:
        raise ValueError(f"participation probability {probability}, allowed 0 < p <= 1 (method.args.participation)")
    from scipy.stats import binom  # a second to import

    counts = np.arange(1, clients + 1)
    below = binom.cdf(counts, clients, probability)
    places = int(np.searchsorted(below, 1 - 1e-9)) + 1
    none = binom.pmf(0, clients, probability)
    below = ((below - none) / (1 - none))[: min(places, clients)].astype(np.float32)

    def choose(key: Array, population: Population) -> Cohort:
        how_many, who = jax.random.split(key)
        count = 1 + jnp.searchsorted(jnp.asarray(below[:-1]), jax.random.uniform(how_many))
        place = jnp.arange(below.size)
        return Cohort(permute(who, place, clients), place < count)

    return stateless(choose)


def own_level() -> Capacity:
    """Fixed capacity: the level that the population assigns to the client.

    >>> from hetfl_jax.core.types import Population
    >>> people = Population(None, None, None, None, None, jnp.array([0, 1, 1, 0, 1]), None)
    >>> own_level().of(None, jnp.array([1, 3]), people).tolist()
    [1, 0]
    """
    return Capacity(lambda key, ids, population: population.level[ids], by_client=True)


def drawn_level(proportions: Sequence[float]) -> Capacity:
    """Dynamic capacity (HeteroFL): each round a level for every client, independently, with these proportions.

    The draw depends on the round and the client id only, as if made for all clients before selecting.

    Args:
      proportions: [L] how often each level occurs, > 0; they need not sum to 1.

    >>> levels = drawn_level((1, 3)).of(jax.random.key(0), jnp.arange(1000), None)
    >>> 0.7 < float(levels.mean()) < 0.8
    True
    """
    logits = np.log(np.asarray(proportions, np.float32))

    def capacity(key: Array, ids: Array, population: Population) -> Array:
        def draw(client: Array) -> Array:
            return jax.random.categorical(jax.random.fold_in(key, client), jnp.asarray(logits))

        return jax.vmap(draw)(ids).astype(jnp.int32)

    return Capacity(capacity, tuple(float(p) for p in proportions))

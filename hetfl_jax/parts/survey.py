"""The plan of a round: a selection, which may ask clients before it chooses; what asking costs is counted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import bits
from hetfl_jax.core.types import Account, Array, Gradient, Level, Plan, Population, PyTree, Seen, Shard, Tally
from hetfl_jax.parts.select import Capacity, Select

ANSWER = 32  #: bits of a number that a client sends back


def planner(
    select: Select,
    capacity_of: Capacity,
    send: Callable[[PyTree, Array], PyTree],
    judge: Callable[..., Tally],
    down_bits: Callable[[PyTree], Array],
    levels: int,
    gradient: Gradient | None = None,
    known: Callable[[PyTree, Array], PyTree] = lambda state, ids: (),
) -> Callable[..., Plan]:
    """``Algorithm.plan`` of a server whose field ``select`` is the selection's state.

    Args:
      send: (state, round) -> what clients receive.
      judge: (sent, level, shard, key, examples) -> ``Tally``.
      down_bits: (sent) -> [L, 3] bits of the model at each level.
      gradient: for selections that ask for it.
      known: (state, ids) -> what the server weighs the replies of these clients with, see ``Plan``.

    >>> from types import SimpleNamespace
    >>> from hetfl_jax.parts import select
    >>> plan = planner(select.uniform(2), select.own_level(), None, None, None, 2)
    >>> people = Population(None, None, None, None, jnp.ones(3, int), jnp.ones(3, int), None, levels=((), ()))
    >>> found = plan(jax.random.key(0), 0, SimpleNamespace(select=()), people, None)
    >>> found.valid.tolist(), found.level.tolist(), found.asked  # nobody was asked
    ([True, True], [1, 1], ())
    """

    def plan(key: Array, round: Array, state: PyTree, population: Population, survey: Callable[..., PyTree]) -> Plan:
        _check_levels(capacity_of, population, levels)
        who, how = jax.random.split(key)
        level_of = lambda ids: capacity_of.of(how, ids, population)  # noqa: E731
        ask = Asker(survey, judge, gradient, lambda: send(state, round), level_of, down_bits, levels, population)
        cohort, chosen = select.choose(who, round, state.select, population, ask)
        return Plan(
            cohort.ids, cohort.valid, level_of(cohort.ids), stream=cohort.stream, notes=chosen, asked=ask.cost(),
            share=cohort.share, known=known(state, cohort.ids),
        )  # fmt: skip

    return plan


def _check_levels(capacity_of: Capacity, population: Population, levels: int) -> None:
    """Where clients have levels of their own, somebody must have said which; tracing knows for how many levels."""
    counted = len(population.levels)
    if capacity_of.by_client and counted == 1 < levels:
        raise ValueError(
            f"the population was built for 1 level, the method has {levels}: say which "
            f"client has which, population(..., level=, levels={levels}) (data.population)"
        )


class Asker:
    """The ``Ask`` of one round, which writes down what all asking cost.

    A client that is asked receives the model at its level, goes through its examples, and sends its answer.
    """

    def __init__(
        self, survey: Callable[..., PyTree], judge: Callable[..., Tally], gradient: Gradient | None,
        send: Callable[[], PyTree], level_of: Callable[[Array], Array], down_bits: Callable[[PyTree], Array],
        levels: int, population: Population,
    ) -> None:  # fmt: skip
        """As ``planner``; ``survey`` is what ``Algorithm.plan`` gets."""
        self._survey, self._judge, self._gradient, self._send = survey, judge, gradient, send
        self._level_of, self._down_bits, self._levels, self._population = level_of, down_bits, levels, population
        self._accounts: list[Account] = []

    def __call__(self, ids: Array, level: int | None = None, examples: int = 0, valid: Array | None = None) -> Tally:
        """See ``Ask``: sums [K] of the model at each client's level (or ``level``) over its examples.

        Args:
          ids: [K] who is asked.
          examples: if > 0, at most so many of each client, drawn by its key.
          valid: [K] who is asked at all; nobody else costs anything.
        """
        sent = self._send()

        def one(key: Array, sent: PyTree, at: Level, shard: Shard) -> Tally:
            return self._judge(sent, at if level is None else level, shard, key, examples)

        at = self._level_of(ids) if level is None else jnp.full(ids.shape, level, jnp.int32)
        there = jnp.ones(ids.shape, bool) if valid is None else valid
        found: Tally = self._survey(one, sent, ids, at if level is None else None, there)
        number = self._population.size[ids]
        number = jnp.minimum(number, examples) if examples else number
        up = jnp.broadcast_to(jnp.asarray(bits.digits(ANSWER)), (*ids.shape, 3))
        self._note(sent, ids, at, there, found, number, 0 * number, up)
        return found

    def gradients(
        self, ids: Array, valid: Array | None = None, of: Callable[[Array], PyTree] | None = None, numbers: int = 0
    ) -> PyTree:
        """See ``Ask``: [K, P] gradients before training, or what ``of`` makes of each.

        Args:
          of: of one row, at the client; then ``numbers`` float32 travel in place of the row.
        """
        if self._gradient is None:
            raise ValueError("this method has no gradients for a selection: need another one (select.name)")
        sent, rows = self._send(), self._gradient.of

        def one(key: Array, sent: PyTree, at: Level, shard: Shard) -> PyTree:
            row = rows(sent, at, shard)
            return row if of is None else of(row)

        at = self._level_of(ids)
        there = jnp.ones(ids.shape, bool) if valid is None else valid
        found = self._survey(one, sent, ids, at, there)
        size, zero = self._population.size[ids], jnp.zeros(ids.shape)
        per_level = [ANSWER * (numbers or entries) for entries in self._gradient.parameters.tolist()]
        up = jnp.asarray(bits.digits(np.asarray(per_level)))[at]
        self._note(sent, ids, at, there, Tally(zero, zero, zero), size, size, up)
        return found

    def _note(
        self, sent: PyTree, ids: Array, at: Array, there: Array, tally: Tally, forward: Array, backward: Array,
        up: Array,
    ) -> None:  # fmt: skip
        """Write down bits down and up, and [K] examples forward and backward, of one question."""
        empty, place = jnp.zeros((*ids.shape, 2, self._levels), jnp.int32), jnp.arange(ids.size)
        work = empty.at[place, 0, at].set(forward).at[place, 1, at].set(backward)
        self._accounts.append(Account(ids, at, there, there, Seen(tally, work, self._down_bits(sent)[at], up)))

    def cost(self) -> Account | tuple[()]:
        """What all asking so far cost; nothing where nobody was asked."""
        if not self._accounts:
            return ()
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *self._accounts)


def first_receipt(plan: Plan, seen: Seen) -> Seen:
    """``seen`` without the bits of a model that a survey of the same round had already brought to the client.

    A client that was asked at the level at which it then trains has the model; it is not sent again.

    Args:
      plan: of the round, with what its survey cost.
      seen: leaves [K, ...], of its items.

    >>> seen = Seen((), jnp.zeros((1, 2, 1)), jnp.array([[64, 0, 0]]), ())
    >>> asked = Account(jnp.array([7]), jnp.array([0]), jnp.array([True]), (), seen)
    >>> plan = Plan(jnp.array([7, 3]), jnp.ones(2, bool), jnp.zeros(2, int), asked=asked)
    >>> first_receipt(plan, seen._replace(down=jnp.array([[64, 0, 0], [64, 0, 0]]))).down.tolist()
    [[0, 0, 0], [64, 0, 0]]
    """
    had = brought(plan, seen.work.shape[-1])
    return seen if had is None else seen._replace(down=seen.down - had)


def brought(plan: Plan, levels: int) -> Array | None:
    """[K, 3] bits of the model that a survey has brought to each item's client at its level; ``None`` without one.

    Args:
      plan: of the round.
      levels: L.

    >>> seen = Seen((), (), jnp.array([[64, 0, 0]]), ())
    >>> asked = Account(jnp.array([7]), jnp.array([0]), jnp.array([True]), (), seen)
    >>> plan = Plan(jnp.array([7, 3, 7]), jnp.ones(3, bool), jnp.array([0, 0, 1]), asked=asked)
    >>> brought(plan, 2).tolist()  # the last item trains at another level than the survey asked for
    [[64, 0, 0], [0, 0, 0], [0, 0, 0]]
    """
    if not isinstance(plan.asked, Account):
        return None
    asked = plan.asked
    code = jnp.where(asked.valid, asked.ids * levels + asked.level, -1)
    order, own = jnp.argsort(code), plan.ids * levels + plan.level
    place = order[jnp.minimum(jnp.searchsorted(code[order], own), code.size - 1)]
    return jnp.where((code[place] == own)[:, None], asked.seen.down[place], 0)

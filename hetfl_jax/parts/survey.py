"""The plan of a round: a selection, which may ask clients for the model's loss before; what asking costs is counted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hetfl_jax.core import bits
from hetfl_jax.core.types import Account, Array, Level, Plan, Population, PyTree, Seen, Shard, Tally
from hetfl_jax.parts.select import Ask, Capacity, Select

ANSWER = 32  #: bits of a loss that a client sends back


def planner(
    select: Select,
    capacity_of: Capacity,
    send: Callable[[PyTree, Array], PyTree],
    judge: Callable[..., Tally],
    down_bits: Callable[[PyTree], Array],
    levels: int,
) -> Callable[..., Plan]:
    """``Algorithm.plan`` of a server whose field ``select`` is the selection's state; arguments as in ``_asker``."""

    def plan(key: Array, round: Array, state: PyTree, population: Population, survey: Callable[..., PyTree]) -> Plan:
        who, how = jax.random.split(key)
        ask, cost = _asker(
            survey,
            judge,
            lambda: send(state, round),
            lambda ids: capacity_of.of(how, ids, population),
            down_bits,
            levels,
            population,
        )
        cohort, chosen = select.choose(who, round, state.select, population, ask)
        level = capacity_of.of(how, cohort.ids, population)
        return Plan(cohort.ids, cohort.valid, level, stream=cohort.stream, notes=chosen, asked=cost())

    return plan


def _asker(
    survey: Callable[..., PyTree],
    judge: Callable[..., Tally],
    send: Callable[[], PyTree],
    level_of: Callable[[Array], Array],
    down_bits: Callable[[PyTree], Array],
    levels: int,
    population: Population,
) -> tuple[Ask, Callable[[], Account | tuple[()]]]:
    """The ``ask`` of a selection, and a function that says what all asking cost.

    A client that is asked receives the model at its level, goes forward through its examples, and sends one number.

    Args:
      survey: see ``Algorithm``.
      judge: (sent, level, shard, key, examples) -> ``Tally``.
      send: what clients receive.
      level_of: (ids) -> [K] the level at which each client is asked.
      down_bits: (sent) -> [L, 3] bits of the model at each level.
    """
    accounts: list[Account] = []

    def ask(ids: Array, level: int | None = None, examples: int = 0, valid: Array | None = None) -> Tally:
        sent = send()

        def one(key: Array, sent: PyTree, at: Level, shard: Shard) -> Tally:
            return judge(sent, at if level is None else level, shard, key, examples)

        at = level_of(ids) if level is None else jnp.full(ids.shape, level, jnp.int32)
        there = jnp.ones(ids.shape, bool) if valid is None else valid
        found = survey(one, sent, ids, at if level is None else None, there)
        number = population.size[ids]
        number = jnp.minimum(number, examples) if examples else number
        work = jnp.zeros((*ids.shape, 2, levels), jnp.int32).at[jnp.arange(ids.size), 0, at].set(number)
        up = jnp.broadcast_to(jnp.asarray(bits.digits(ANSWER)), (*ids.shape, 3))
        accounts.append(Account(ids, at, there, there, Seen(found, work, down_bits(sent)[at], up)))
        return found

    def cost() -> Account | tuple[()]:
        if not accounts:
            return ()
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *accounts)

    return ask, cost

"""A bank whose members are handed out in rotation: a client trains as many of them as it can afford."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core import tree
from hetfl_jax.core.types import Array, Plan, PyTree, Seen, Tally
from hetfl_jax.parts.bank import Route
from hetfl_jax.parts.budgets import Budgets
from hetfl_jax.parts.select import Select


class Rotation(NamedTuple):
    """Whose turn it is: kept over rounds, and in checkpoints."""

    order: Array  #: [M] int32, the members in their present order
    pointer: Array  #: int32, how many of them have had their turn; M before the first round


def start(size: int) -> Rotation:
    """Before the first round: a new order is drawn at once.

    Args:
      size: M, members of the bank.

    >>> start(3).order.tolist(), int(start(3).pointer)
    ([0, 1, 2], 3)
    """
    return Rotation(jnp.arange(size, dtype=jnp.int32), jnp.int32(size))


def turns(key: Array, state: Rotation, valid: Array) -> tuple[Array, Rotation]:
    """[K] int32 the member whose turn it is at each valid client, one after the other, and the state after them.

    Members come in a random order, all of them before any comes again; then a new order is drawn.

    Args:
      key: of the round.
      state: orders and how many had their turn.
      valid: [K] bool, items that are there.

    Source: Hong et al., ICLR 2022, algorithm 2.

    >>> first, state = turns(jax.random.key(0), start(4), jnp.ones(6, bool))
    >>> sorted(first[:4].tolist()), int(state.pointer)
    ([0, 1, 2, 3], 2)
    """
    size, cohort = state.order.shape[0], valid.shape[0]
    keys = jax.random.split(key, cohort // size + 2)
    orders = jnp.concatenate([state.order[None], jax.vmap(lambda k: jax.random.permutation(k, size))(keys)])
    place = state.pointer + jnp.cumsum(valid) - valid
    end = state.pointer + valid.sum()
    return orders.reshape(-1)[place].astype(jnp.int32), Rotation(
        orders[end // size].astype(jnp.int32), (end % size).astype(jnp.int32)
    )


def with_others(key: Array, first: Array, size: int, count: int) -> Array:
    """[count] int32 ``first`` and then others of ``size`` members, at random and without repetition.

    >>> found = with_others(jax.random.key(0), jnp.int32(2), 4, 4).tolist()
    >>> found[0], sorted(found)
    (2, [0, 1, 2, 3])
    """
    others = jax.random.permutation(key, size - 1)[: count - 1] if size > 1 else jnp.zeros(0, jnp.int32)
    return jnp.concatenate([first[None], others + (others >= first)]).astype(jnp.int32)


def rotation(size: int, budgets: Budgets, repeats: bool = False) -> Route:
    """Items are pairs of a client and a member; all pairs of a client have its one stream of batches.

    A client's first member is the one whose turn it is, see ``turns``; the others are random ones.

    Args:
      size: members of the bank.
      budgets: how many of them each client trains.
      repeats: whether a client may come several times in one round.

    Source: Hong et al., ICLR 2022, algorithm 2.

    >>> from hetfl_jax.parts.budgets import schedule
    >>> rotation(4, schedule("4-2-1", 0.25, 6)).models
    4
    """
    most = max(budgets.bases)
    unjudged = Tally(*(jnp.zeros(1) for _ in Tally._fields))

    def plan(key: Array, state: Rotation, plan: Plan, ask: PyTree) -> tuple[Plan, Rotation]:
        turn, others = jax.random.split(jax.random.fold_in(key, 1))  # apart from the selection's
        first, state = turns(turn, state, plan.valid)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(others, plan.ids)
        members = jax.vmap(lambda k, f: with_others(k, f, size, most))(keys, first)
        wanted = plan.valid[:, None] & (jnp.arange(most) < budgets.of(plan.ids)[:, None])
        places = wanted.size if repeats else budgets.most_pairs(plan.ids.shape[0])
        pair = jnp.argsort(~wanted.reshape(-1), stable=True)[:places]  # pairs that are wanted come first
        client, member = pair // most, members.reshape(-1)[pair]
        ids, level, share, known = tree.take((plan.ids, plan.level, plan.share, plan.known), client)
        stream = plan.stream if isinstance(plan.stream, int) else plan.stream[client]
        pairs = plan._replace(ids=ids, level=level, stream=stream, share=share, known=known, ticket=member)
        return pairs._replace(valid=wanted.reshape(-1)[pair], row=ids * size + member), state

    return Route(
        lambda: start(size), plan,
        choose=lambda ticket, judge: (ticket, unjudged),
        server=lambda state, plan, report, ok: state,
        row=lambda state, number: number,
        place=lambda state, losses, ids: losses.argmin(-1),
        models=size,
    )  # fmt: skip


def once_a_client(select: Select) -> Select:
    """``select`` that learns from the first item of each client alone, where a client has several, side by side.

    Args:
      select: any; only its ``update`` changes.

    >>> plan = Plan(jnp.array([4, 4, 2]), jnp.ones(3, bool), jnp.zeros(3, int))
    >>> heard = Select(lambda clients: (), None, lambda state, plan, seen, ok: plan.ids[plan.valid & ok])
    >>> [rule.update((), plan, (), plan.valid).tolist() for rule in (heard, once_a_client(heard))]
    [[4, 4, 2], [4, 2]]
    """

    def update(state: PyTree, plan: Plan, seen: Seen, ok: Array) -> PyTree:
        first = jnp.arange(plan.ids.size) == 0
        first |= plan.ids != jnp.roll(plan.ids, 1)
        return select.update(state, plan._replace(valid=plan.valid & first), seen, ok & first)

    return select._replace(update=update)

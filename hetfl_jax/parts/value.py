"""Who takes part, by what a client's loss and its amount of data are worth together.

Papers that choose clients by their loss differ in what the amount of data adds: nothing (Power-of-Choice), a root
(Active FL), a factor (Oort). Here both enter with an exponent, and the loss may be taken relative to clients of the
same capacity, as a small sub-model has a larger loss for reasons that have nothing to do with its data.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core.absent import LOWEST
from hetfl_jax.core.random import permute
from hetfl_jax.core.types import Array, Cohort, Population
from hetfl_jax.parts.choose import CANDIDATES, draw_without_replacement, largest, mean_loss, need, need_cohort
from hetfl_jax.parts.select import Ask, Select, per_client


class Watched(NamedTuple):
    """What a selection by value keeps for people; no choice depends on it."""

    times: Array  #: [N] int32 how often each client was chosen
    correlation: Array  #: float32, of the candidates' losses with their levels in the latest round, 0 is the largest


def relative_to_level(loss: Array, level: Array, levels: int) -> Array:
    """[d] each loss divided by the mean loss of those with the same level; ``LOWEST`` where there is no loss.

    Args:
      loss: [d] float32 >= 0, ``LOWEST`` where there is none.
      level: [d] int, 0 .. ``levels`` - 1.

    >>> relative_to_level(jnp.array([1.0, 3.0, 8.0]), jnp.array([0, 0, 1]), 2).tolist()
    [0.5, 1.5, 1.0]
    """
    there = loss > LOWEST
    total = jnp.zeros(levels).at[level].add(jnp.where(there, loss, 0))
    mean = total / jnp.maximum(jnp.zeros(levels).at[level].add(there), 1)
    return jnp.where(there, loss / jnp.maximum(mean[level], 1e-12), LOWEST)


def correlation(a: Array, b: Array, there: Array) -> Array:
    """Pearson's correlation of two rows [d] over the entries that are ``there``; 0 where one of them is constant.

    >>> float(correlation(jnp.array([1.0, 2.0, 9.0]), jnp.array([4.0, 2.0, 0.0]), jnp.array([True, True, False])))
    -1.0
    """
    count = jnp.maximum(there.sum(), 1)

    def centred(row: Array) -> Array:
        row = jnp.where(there, row, 0).astype(jnp.float32)
        return jnp.where(there, row - row.sum() / count, 0)

    x, y = centred(a), centred(b)
    scale = jnp.sqrt((x**2).sum() * (y**2).sum())
    return jnp.where(scale > 0, (x * y).sum() / jnp.where(scale > 0, scale, 1), 0.0)


def loss_and_data(
    cohort: int, candidates: int, *, loss: float = 1.0, data: float = 0.0, relative: bool = False,
    weighted: bool = False, level: int | None = None,
) -> Select:  # fmt: skip
    """Of ``candidates`` clients, drawn uniformly, the ``cohort`` of largest ``F_k^loss n_k^data``.

    ``F_k`` is the mean loss of the current model on client k's training examples, at the client's own level, ``n_k``
    how many these are. With both exponents 0 all values are equal and the first candidates drawn take part: a uniform
    choice, which asks nobody. With ``loss`` 0 the choice depends on ``n_k`` alone, and asks nobody either. Ties go to
    the candidate that was drawn earlier; selections that differ in their exponents see the same candidates.

    Args:
      loss, data: the exponents, >= 0.
      relative: divide ``F_k`` by the mean over the candidates of the client's level, where levels are fixed.
      weighted: draw candidates in proportion to their examples, as Power-of-Choice does, which counts data once more.
      level: at which capacity level candidates are asked; default: their own.

    Raises:
      ValueError: a value out of range, or (when the round is built) fewer clients than candidates.

    >>> from hetfl_jax.core.types import Population, Tally
    >>> clients = Population(None, None, None, None, jnp.array([1, 2, 9]), jnp.zeros(3, int), None)
    >>> ask = lambda ids, level, examples, valid: Tally(jnp.array([6.0, 8.0, 9.0])[ids], 0, clients.size[ids])
    >>> chosen = lambda **of: loss_and_data(1, 3, **of).choose(jax.random.key(0), 0, None, clients, ask)[0].ids[0]
    >>> int(chosen()), int(chosen(data=0.5)), int(chosen(loss=0.0, data=1.0))
    (0, 0, 2)
    """
    need(cohort >= 1, f"cohort of {cohort} clients, allowed >= 1", "cohort")
    need(candidates >= cohort, f"{candidates} candidates, allowed >= {cohort}, the cohort", "candidates")
    need(loss >= 0, f"loss {loss}, allowed >= 0", "loss")
    need(data >= 0, f"data {data}, allowed >= 0", "data")
    asks = bool(loss > 0)
    need(asks or not relative, "relative without a loss, allowed with loss > 0", "relative")

    def value(ids: Array, population: Population, ask: Ask) -> tuple[Array, Array]:
        size = population.size[ids]
        there = size > 0
        scale = jnp.asarray(size, jnp.float32) ** data
        if not asks:
            return jnp.where(there, scale, LOWEST), jnp.float32(0)
        found = mean_loss(ask(ids, level, 0, there))
        known = found > LOWEST
        seen = correlation(found, population.level[ids], known)
        if relative:
            found = relative_to_level(found, population.level[ids], max(len(population.levels), 1))
        return jnp.where(known, jnp.maximum(jnp.where(known, found, 0), 0) ** loss * scale, LOWEST), seen

    def choose(
        key: Array, round: Array, state: Watched | None, population: Population, ask: Ask
    ) -> tuple[Cohort, Watched | None]:
        clients = population.size.shape[0]
        need_cohort(cohort, clients)
        need(candidates <= clients, f"{candidates} candidates, allowed {cohort}..{clients}", "candidates")
        draw = jax.random.fold_in(key, CANDIDATES)
        if weighted:
            ids = draw_without_replacement(draw, population.size, candidates)
        else:
            ids = permute(draw, jnp.arange(candidates), clients)
        score, seen = value(ids, population, ask)
        chosen = largest(ids, score, cohort)
        if state is not None:
            state = Watched(state.times.at[chosen.ids].add(chosen.valid), seen)
        return chosen, state

    def info(state: Watched) -> dict[str, Array]:
        told = {"largest_share": state.times.max() / jnp.maximum(state.times.sum(), 1)}
        return told | {"correlation_of_loss_and_level": state.correlation} if asks else told

    def init(clients: int) -> Watched:
        return Watched(jnp.zeros(clients, jnp.int32), jnp.float32(0))

    return Select(init, choose, info=info, needs=per_client(2 if weighted else 1))

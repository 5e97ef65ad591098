"""Models that are means of the logits of several members of a bank: how they are offered and judged."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.types import Algorithm, Array, Batch, Level, Order, Price, PyTree, Question, Shard, Tier
from hetfl_jax.models.costs import costs
from hetfl_jax.models.families import forward_at
from hetfl_jax.models.windows import Family, index_of
from hetfl_jax.parts.adversary import Adversary, judged
from hetfl_jax.parts.bank import BankState
from hetfl_jax.parts.local import client_statistics
from hetfl_jax.parts.objective import readings
from hetfl_jax.parts.private import OWN, Private, replaced


def of_members(
    made: Algorithm, base: Algorithm, family: Family, counts: Iterable[int], size: int, each: float,
    adversary: Adversary | None = None, private: Private | None = None, passes: int = 0, batch: int = 1,
    ordered: bool = False,
) -> Algorithm:  # fmt: skip
    """A bank whose models are ensembles: tier t is the mean of the logits of the first ``counts[t]`` members.

    Args:
      made: the bank of ``size`` members, each of them ``base`` over ``family``.
      counts: numbers of members; the tiers have them in falling order, and are named by their share of all members.
      each: items that a client of a round has, on average.
      adversary: who attacks the ensembles, if anybody.
      private: leaves that each client has of its own; then a client's model is judged on its own test data.
      ordered: members are used in the order of their validation accuracy, the best first.
      passes: if > 0, a client's model has the statistics of so many passes over its training data, ``batch`` at a time.

    Raises:
      ValueError: a number of members that there is not, or passes where no statistics are collected.

    >>> from hetfl_jax.methods import fedavg
    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts import bank, budgets, local, rotation
    >>> fam = families.family(MLP(hidden=(4,)), [{}], jnp.zeros((1, 3)))
    >>> base = fedavg.make(fam, local.local(learning_rate=0.1, batch_size=4), cohort=2)
    >>> made = bank.bank(base, 4, rotation.rotation(4, budgets.schedule("4-2-1", 0.25, 6)))
    >>> [(tier.name, tier.parameters) for tier in of_members(made, base, fam, [1, 4], 4, 2.0).tiers]
    [('x1', 264), ('x0.25', 66)]
    """
    number = _checked(counts, size, base, private, passes, ordered)

    def model(state: BankState, tier: Level, member: int = 0) -> PyTree:
        """Leaves [k, ...] of the members that count, or of all where the tier is traced."""
        kept = int(number[tier]) if isinstance(tier, int) else size
        return jax.tree.map(lambda rows: rows[:kept], state.members.variables)

    def weights(tier: Level) -> Array:
        count = jnp.asarray(number)[index_of(tier)]
        return (jnp.arange(size) < count) / count

    def mean(tier: Level, of: Callable[[PyTree], Array], variables: PyTree) -> Array:
        # One after the other: convolutions of several nets at once are slow on a CPU.
        exits = jax.lax.map(of, variables)
        return exits.mean(0) if isinstance(tier, int) else jnp.tensordot(weights(tier), exits, 1)

    def predict(
        variables: PyTree, tier: Level, x: Array, shard: Shard | None = None, valid: Array | None = None
    ) -> Array:
        return mean(tier, lambda one: base.predict(one, 0, x, shard, valid), variables)

    def outputs(
        variables: PyTree, tier: Level, x: Array, shard: Shard | None, valid: Array, noise: Array | float
    ) -> Array:
        forward = forward_at(family, 0)
        return mean(tier, lambda one: forward(one, x, valid=valid, noise=noise)[0], variables)

    def read(variables: PyTree, tier: Level, batch: Batch, shard: Shard | None) -> dict[str, Array]:
        return readings(predict(variables, tier, batch.x, shard, batch.valid))

    def statistics(variables: PyTree, tier: Level, x: Array, valid: Array) -> PyTree:
        assert base.statistics is not None
        collect = base.statistics
        return jax.lax.map(lambda one: collect(one, 0, x, valid), variables)

    def price() -> Price:
        assert made.price is not None
        return made.price()._replace(items=each)

    own = partial(_own, base, private, passes, batch) if private or passes else None
    variables = lambda server, memory, tier: model(server, tier)  # noqa: E731
    asked = Question("", variables, read, memory=private is not None, own=own)
    return made._replace(
        model=model, predict=predict, questions=judged(adversary, family, outputs, (asked,)),
        statistics=None if base.statistics is None or passes else statistics, choice=None, price=price,
        memory_rows=size, order=_by_members() if ordered else None, tiers=_tiers(family, number.tolist(), size),
    )  # fmt: skip


def _checked(
    counts: Iterable[int], size: int, base: Algorithm, private: Private | None, passes: int, ordered: bool
) -> np.ndarray:
    """Numbers of members in falling order.

    Raises:
      ValueError: as ``of_members``.
    """
    if ordered and private:
        raise ValueError("an order of bases with local norms, which stand in their own: need one of them (method.args)")
    if passes < 0 or (passes and base.statistics is None):
        raise ValueError(f"post_average {passes}: need 0, or >= 1 with norm bn (method.args.post_average, family.norm)")
    number = np.asarray(sorted(counts, reverse=True))
    if wrong := [n for n in number.tolist() if not 1 <= n <= size]:
        raise ValueError(f"{wrong[0]} bases, allowed 1..{size} (method.args.bases)")
    return number


def _tiers(family: Family, number: Sequence[int], size: int) -> tuple[Tier, ...]:
    """An ensemble of n members costs n times as much as one."""
    cost = costs(family)
    parameters, nbytes, macs = (int(each[0]) for each in (cost.parameters, cost.bytes, cost.macs))
    return tuple(Tier(f"x{n / size:g}", n * parameters, n * nbytes, n * macs, n) for n in number)


def _by_members() -> Order:
    """Members one by one, and a bank whose members are put in another order."""

    def each(state: BankState) -> PyTree:
        return jax.tree.map(lambda v: v[:, None], state.members.variables)

    def by(state: BankState, order: Array) -> BankState:
        return state._replace(members=tree.take(state.members, order))

    return Order(each, by)


def _own(
    base: Algorithm, private: Private | None, passes: int, batch: int, variables: PyTree, memory: PyTree, shard: Shard,
    tier: Level,
) -> PyTree:  # fmt: skip
    """A client's model: with the leaves that are its own, or with the statistics of its training data."""
    if private:
        count = jax.tree.leaves(variables)[0].shape[0]
        variables = replaced(variables, jax.tree.map(lambda rows: rows[:count], memory[OWN]))
    if passes and base.statistics is not None:
        collect = base.statistics
        of = lambda one: client_statistics(partial(collect, one, 0), shard, batch, passes)  # noqa: E731
        variables = {**variables, "batch_stats": jax.lax.map(of, variables)}
    return variables

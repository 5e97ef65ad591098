"""Servers that learn from the losses of the model they sent: how large they are, and which clients' are large."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Array, Plan, PyTree, Seen, Tally
from hetfl_jax.parts.fair import afl_step
from hetfl_jax.parts.server import Server


def received_losses(seen: Seen, ok: Array) -> Array:
    """[K] mean loss of the received model on each item's examples; 0 where there is none.

    Args:
      seen: what every item did, with ``received``.
      ok: [K] bool, whose reply counts.

    >>> seen = Seen((), (), (), (), Tally(jnp.array([8.0, 6.0, 9.0]), (), jnp.array([4.0, 3.0, 0.0])))
    >>> received_losses(seen, jnp.array([True, False, True])).tolist()
    [2.0, 0.0, 0.0]
    """
    received = seen.received
    assert isinstance(received, Tally), "these servers need Weights(..., asks_received=True)"
    return jnp.where(ok & (received.examples > 0), received.loss / jnp.maximum(received.examples, 1), 0)


class Level(NamedTuple):
    """A server with what it knows of the clients' losses."""

    inner: PyTree
    loss: Array  #: float32 scalar, of the latest round in which somebody replied


def with_level(server: Server, start: float, of: Callable[[Array, Array, Array], Array]) -> Server:
    """``server`` that weighs replies with one number of the round before, the same for all.

    Weights such as F^q overflow; divided by a number near F they do not, and the mean is the same.

    Args:
      start: the number in the first round.
      of: (losses [K], examples [K], ok [K]) -> the number; items that are not ok are to be left out.

    >>> from hetfl_jax.parts.server import optimizer
    >>> rule = with_level(optimizer(), 1.0, largest)
    >>> slot = rule.init({"params": {"w": jnp.zeros(1)}})
    >>> seen = Seen((), (), (), (), Tally(jnp.array([8.0, 6.0]), (), jnp.array([4.0, 1.0])))
    >>> float(rule.learn(slot, None, seen, jnp.ones(2, bool)).loss), rule.known(slot, jnp.arange(2)).tolist()
    (6.0, [1.0, 1.0])
    """

    def learn(slot: Level, plan: Plan, seen: Seen, ok: Array) -> Level:
        received = seen.received
        assert isinstance(received, Tally), "this server needs Weights(..., asks_received=True)"
        return slot._replace(
            inner=server.learn(slot.inner, plan, seen, ok),
            loss=jnp.where(ok.any(), of(received_losses(seen, ok), received.examples, ok), slot.loss),
        )

    def update(slot: Level, *rest: PyTree) -> tuple[Level, PyTree]:
        inner, variables = server.update(slot.inner, *rest)
        return slot._replace(inner=inner), variables

    return Server(
        lambda variables: Level(server.init(variables), jnp.float32(start)),
        update,
        lambda slot: server.context(slot.inner),
        {name: _inside(model) for name, model in server.models.items()},
        lambda slot, variables: {**server.info(slot.inner, variables), "level_of_loss": slot.loss},
        lambda slot, ids: jnp.broadcast_to(slot.loss, ids.shape),
        learn,
    )


def _inside(model: Callable[[PyTree, PyTree], PyTree]) -> Callable[[PyTree, PyTree], PyTree]:
    return lambda slot, variables: model(slot.inner, variables)


def largest(losses: Array, examples: Array, ok: Array) -> Array:
    """The largest loss, at least 1e-6.

    >>> float(largest(jnp.array([1.0, 3.0, 0.0]), jnp.ones(3), jnp.array([True, True, False])))
    3.0
    """
    return jnp.maximum(jnp.where(ok, losses, 0).max(), 1e-6)


def tilted_mean(tilt: float, by_examples: bool) -> Callable[[Array, Array, Array], Array]:
    """``(1 / tilt) log(sum_k s_k exp(tilt F_k) / sum_k s_k)``, TERM's objective; the plain mean where tilt is 0.

    >>> round(float(tilted_mean(1.0, True)(jnp.array([0.0, 2.0]), jnp.array([3.0, 1.0]), jnp.array([True, True]))), 4)
    0.9545
    """

    def of(losses: Array, examples: Array, ok: Array) -> Array:
        share = jnp.where(ok, examples if by_examples else 1.0, 0.0)
        share = share / jnp.maximum(share.sum(), 1e-30)
        return jax.nn.logsumexp(tilt * losses, b=share) / tilt if tilt else (share * losses).sum()

    return of


class Agnostic(NamedTuple):
    """AFL's server."""

    inner: PyTree
    weights: Array  #: [N] on the simplex
    average: PyTree  #: of the models after each round
    rounds: Array  #: int32 scalar, rounds in which somebody replied


def agnostic(server: Server, clients: int, rate: float) -> Server:
    """``server`` that keeps a weight lambda_k of every client and moves them towards the largest losses.

    After a round ``lambda <- projection onto the simplex of (lambda + rate * F)``, with F_k the loss of the model that
    client k was sent, and 0 of clients that did not take part. ``average`` is evaluated too, the mean of the models
    after all rounds so far, which is the model that the theory speaks of.

    Args:
      server: what is done with the mean.
      clients: N, in the population.
      rate: of the weights, 1 / loss, > 0.

    Source: Mohri, Sivek, Suresh, ICML 2019, algorithm 1.

    >>> from hetfl_jax.parts.server import optimizer
    >>> rule = agnostic(optimizer(), 4, 0.1)
    >>> rule.known(rule.init({"params": {"w": jnp.zeros(1)}}), jnp.array([2, 0])).tolist()
    [0.25, 0.25]
    """

    def init(variables: PyTree) -> Agnostic:
        even = jnp.full(clients, 1 / clients, jnp.float32)
        return Agnostic(server.init(variables), even, variables["params"], jnp.int32(0))

    def update(
        slot: Agnostic, variables: PyTree, mean: PyTree, coverage: PyTree, any_ok: Array, extra: PyTree = ()
    ) -> tuple[Agnostic, PyTree]:
        inner, after = server.update(slot.inner, variables, mean, coverage, any_ok, extra)
        rounds = slot.rounds + any_ok
        part = jnp.where(any_ok, 1 / jnp.maximum(rounds, 1), 0)
        average = jax.tree.map(lambda a, p: a + part * (p - a), slot.average, after["params"])
        return slot._replace(inner=inner, average=average, rounds=rounds), after

    def learn(slot: Agnostic, plan: Plan, seen: Seen, ok: Array) -> Agnostic:
        loss = jnp.zeros(clients, jnp.float32).at[plan.ids].add(received_losses(seen, ok))
        weights = jnp.where(ok.any(), afl_step(slot.weights, loss, rate), slot.weights)
        return slot._replace(inner=server.learn(slot.inner, plan, seen, ok), weights=weights)

    def info(slot: Agnostic, variables: PyTree) -> dict[str, Array]:
        numbers = {"largest_weight": slot.weights.max(), "clients_with_weight": (slot.weights > 0).sum()}
        return {**server.info(slot.inner, variables), **numbers}

    models = {name: _inside(model) for name, model in server.models.items()}
    return Server(
        init, update, lambda slot: server.context(slot.inner),
        {**models, "average": lambda slot, variables: {"params": slot.average}}, info,
        lambda slot, ids: slot.weights[ids], learn,
    )  # fmt: skip

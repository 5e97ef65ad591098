"""AFL and TERM against their equations, over width and depth; q-FFL with losses that overflow; what replies weigh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.random import CLIENT, purpose_key
from hetfl_jax.core.types import Shard, Tally
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import afl, fedavg, ifca, qffl, term
from hetfl_jax.models.families import trained
from hetfl_jax.models.windows import flat, spread
from hetfl_jax.parts import fair, merge, select
from hetfl_jax.parts.compose import Sent, Slots
from tests.helpers import context, exits_family, mlp_family, sgd, toy_population, worst

pytestmark = pytest.mark.slow
RUN = executor("bucketed")


def servers(algorithm, population, rounds):
    """The server before and after each round."""
    key, store = jax.random.key(7), device_store()
    state, step = start(algorithm, store, 12, key), make_round(algorithm, RUN, store)
    found = [jax.device_get(state.server)]
    for _ in range(rounds):
        state, _ = step(state, population, key)
        found.append(jax.device_get(state.server))
    return found


def changes_of(family, population):
    """A function of (model, round): loss of the model and change of every client at its level, by FedAvg's client."""
    plainly = fedavg.make(family, sgd(), cohort=12)

    def one(model, round, client, level):
        sent = Sent(model, {})
        key = jax.random.fold_in(purpose_key(jax.random.key(7), CLIENT, round), client)
        shard = Shard(population.x, population.y, population.rows, population.offset[client],
                      population.size[client], population.classes[client])  # fmt: skip
        total = plainly.client(context(level, shard, key=key, sent=sent)).total
        loss = plainly.judge(sent, level, shard)
        delta = jax.tree.map(lambda d: d / total.weight.sum(), total.delta)
        return loss.loss / loss.examples, plainly.widen(total._replace(delta=delta), level).delta

    step = jax.jit(one, static_argnums=3)

    def of(model, round):
        found = [step(model, round, jnp.int32(c), int(population.level[c])) for c in range(12)]
        return np.array([float(loss) for loss, _ in found]), [delta for _, delta in found]

    return of


def check_mean(family, population, before, after, weights, deltas):
    """The server moved by the mean, entry by entry over the clients that hold and train it, with these weights."""
    total = jax.tree.map(lambda *d: sum(w * v for w, v in zip(weights, d)), *deltas)
    per_level = jnp.array([sum(w for w, at in zip(weights, population.level) if at == n) for n in range(family.levels)])
    moved = flat(jax.tree.map(jnp.subtract, after.variables, before.variables))
    for path, above in flat(total).items():
        below = spread(family, path, per_level * trained(family, path, False))
        np.testing.assert_allclose(moved[path], above / jnp.where(below > 0, below, 1), atol=5e-6)


EVERYBODY = Slots(select=select.uniform(12))


def test_two_rounds_of_afl_over_widths_are_its_equations():
    family, population = mlp_family(), toy_population()
    of = changes_of(family, population)
    rule = afl.make(family, sgd(), cohort=12, clients=12, weight_rate=2.0, slots=EVERYBODY)
    before, after, again = servers(rule, population, 2)
    loss, deltas = of(before.variables, 0)
    even = np.full(12, 1 / 12)
    check_mean(family, population, before, after, even, deltas)
    weights = np.asarray(fair.project_to_simplex(jnp.asarray(even + 2 * loss)))
    np.testing.assert_allclose(after.slot.weights, weights, atol=1e-5)
    assert 0 < (weights == 0).sum() < 11, "some clients left the sum"
    check_mean(family, population, after, again, weights, of(after.variables, 1)[1])
    average = jax.tree.map(lambda a, b: (a + b) / 2, after.variables, again.variables)["params"]
    assert worst(again.slot.average, average) < 1e-6


def test_a_round_of_term_over_depths_is_its_equation():
    tilt = -3.0
    family, population = exits_family(({"depth": 2}, {"depth": 1})), toy_population()
    before, after = servers(term.make(family, sgd(), cohort=12, tilt=tilt, slots=EVERYBODY), population, 1)
    loss, deltas = changes_of(family, population)(before.variables, 0)
    share = np.asarray(population.size) / population.size.sum()
    weights = np.asarray(fair.tilted_weights(jnp.asarray(loss), tilt, jnp.asarray(share)))
    check_mean(family, population, before, after, weights, deltas)
    assert float(after.slot.loss) == pytest.approx(np.log((share * np.exp(tilt * loss)).sum()) / tilt, rel=1e-4)


def test_a_tilt_of_zero_weighs_as_fedavg():
    shard = type("S", (), {"size": jnp.int32(7)})()
    told = context(0, shard, known=jnp.float32(3))._replace(received=Tally(jnp.float32(9), None, jnp.float32(7)))
    assert [float(w) for w in fair.tilted(0.0)(told, {})] == [7, 7]
    assert [float(w) for w in fair.tilted(0.0, by_examples=False)(told, {})] == [1, 1]


def test_weights_whose_powers_overflow_are_those_of_float64():
    """A loss of 600 to the 15th is 5e41: divided by the losses of the round before it is a number like any other."""
    rng = np.random.default_rng(0)
    loss, norm = rng.uniform(300, 600, 6), rng.uniform(1, 9, 6)
    change = rng.normal(size=(6, 4))
    h = 15 * loss**14 * norm / 0.01 + loss**15 / 0.1
    wanted = (loss[:, None] ** 15 / 0.1 * change).sum(0) / h.sum()

    def pair(of, value, square, known):

        told = context(0, type("S", (), {"size": jnp.int32(4)})(), known=jnp.float32(known))
        told = told._replace(received=Tally(jnp.float32(4 * value), None, jnp.float32(4)))
        return of(told, {"params": jnp.array([np.sqrt(square)], jnp.float32)})

    rule = fair.q_ffl(15.0, 0.1)
    above, below = zip(*(pair(rule, f, s, loss.max()) for f, s in zip(loss, norm)))
    found = (np.array(above)[:, None] * change).sum(0) / np.sum(below)
    np.testing.assert_allclose(found, wanted, rtol=2e-4)
    assert all(np.isfinite(pair(rule, f, s, 1.0)).all() for f, s in zip(loss, norm)), "also before anything is known"
    tilted = [pair(fair.tilted(2.0), f, 1.0, loss.max())[0] for f in (500.0, 520.0, 540.0)]
    assert np.isfinite(tilted).all()


def test_what_a_selection_says_stands_in_the_place_of_the_methods_own_count():
    shard = type("S", (), {"size": jnp.int32(7), "classes": jnp.ones(3, bool)})()
    told, received = context(0, shard), Tally(jnp.float32(14), None, jnp.float32(7))
    for rule in (merge.BY_EXAMPLES, merge.BY_COUNT):
        assert [float(w) for w in rule.of(told._replace(share=jnp.float32(0.25)), {})] == [0.25, 0.25]
    weighed = told._replace(received=received, known=jnp.float32(2))
    for rule in (fair.agnostic, fair.tilted(1.0, by_examples=False), fair.q_ffl(1.0, 0.1)):
        once = rule(weighed, {"params": jnp.ones(2)})
        thrice = rule(weighed._replace(share=jnp.float32(3)), {"params": jnp.ones(2)})
        np.testing.assert_allclose(thrice, 3 * np.array(once), rtol=1e-6)


def test_agnostic_weights_are_of_one_model():
    with pytest.raises(ValueError, match="needs one model and a judge"):
        ifca.make(mlp_family(), sgd(), cohort=4, clusters=2, over="afl", clients=12)


def test_values_out_of_range_are_named():
    for make, message in (
        (lambda: afl.make(mlp_family(), sgd(), cohort=2, clients=3, weight_rate=0.0),
         "weight_rate 0.0, allowed > 0 (method.args.weight_rate)"),
        (lambda: term.make(mlp_family(), sgd(), cohort=2, tilt=float("inf")),
         "tilt inf, allowed any finite number (method.args.tilt)"),
        (lambda: qffl.make(mlp_family(), sgd(), cohort=2, q=-0.5), "q -0.5, allowed >= 0 (method.args.q)"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:  # noqa: PT011
            make()
        assert str(error.value) == message

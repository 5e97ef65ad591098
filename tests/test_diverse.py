"""DivFL as a selection: what it asks, what it costs, whom it takes, and what a round weighs; its memory at the door."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core import bits, machine
from hetfl_jax.core.types import Needs, Population, Price
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg
from hetfl_jax.models.costs import costs
from hetfl_jax.parts import diverse, divfl, merge, objective
from hetfl_jax.parts.compose import Slots
from hetfl_jax.run import ledger, selections
from tests.contract import EXECUTORS, play
from tests.helpers import mlp_family, sgd, toy_population

pytestmark = pytest.mark.slow
SIZES = np.array([5, 1, 20, 3, 9, 40, 2, 8, 12, 7])
KEY = jax.random.key(0)
EMPTY = merge.Total({}, jnp.zeros(2), jnp.zeros((2, 3)), {})


def clients(sizes=SIZES):
    return Population(None, None, None, None, jnp.asarray(sizes), None, None)


class Asked:
    """An ``ask`` that answers with prescribed rows and writes down whom it asked."""

    def __init__(self, rows):
        self.rows, self.calls = rows, []

    def gradients(self, ids, valid=None, of=None, numbers=0):
        self.calls.append(jnp.zeros(len(self.rows), bool).at[ids].max(valid))
        found = jax.vmap(of)(self.rows[ids])
        return jax.tree.map(lambda v: jnp.where(valid.reshape(-1, *[1] * (v.ndim - 1)), v, 0), found)


def chooser(rule):
    """A compiled ``(state, rows, sizes) -> (cohort, state, who was asked, call by call)``."""

    @jax.jit
    def step(state, rows, sizes):
        ask = Asked(rows)
        return *rule.choose(KEY, jnp.int32(0), state, clients(sizes), ask), ask.calls

    def choose(state, rows, sizes=SIZES):
        cohort, state, calls = step(state, jnp.asarray(rows, jnp.float32), jnp.asarray(sizes))
        return cohort, state, [np.flatnonzero(call).tolist() for call in calls]

    return choose, rule.init(10)


def rows_of(seed=0, parameters=6):
    return np.random.default_rng(seed).normal(size=(10, parameters)).astype(np.float32)


def apart(rows):
    return np.sqrt(np.square(rows[:, None] - rows[None]).sum(-1))


def test_stale_gradients_come_once_from_all_and_then_from_the_cohort():
    rows = rows_of()
    choose, state = chooser(diverse.divfl(3, 6))
    first, state, asked = choose(state, rows)
    wanted = divfl.greedy(divfl.distances(jnp.asarray(rows)), 3)
    assert first.ids.tolist() == wanted.ids.tolist()
    assert asked == [list(range(10)), []]
    assert float(state.represented) == pytest.approx(float(wanted.cost[-1]) / 10, rel=1e-5)
    later = rows_of(1)
    second, state, asked = choose(state, later)
    assert second.ids.tolist() == first.ids.tolist(), "chosen from the rows of before"
    assert asked == [[], sorted(first.ids.tolist())]
    rows[np.asarray(first.ids)] = later[np.asarray(first.ids)]
    np.testing.assert_array_equal(state.table, rows)
    np.testing.assert_allclose(state.distance, apart(rows.astype(np.float64)), atol=1e-5)
    choose, _ = chooser(diverse.divfl(3, 6, gradients="full"))
    found, _, asked = choose(state, later)
    assert found.ids.tolist() == divfl.greedy(divfl.distances(jnp.asarray(later)), 3).ids.tolist()
    assert asked == [list(range(10))]


def test_of_duplicates_one_is_taken_and_everybody_is_a_cohort():
    rows = np.repeat(rows_of()[:3], [4, 4, 2], axis=0)
    choose, state = chooser(diverse.divfl(3, 6))
    found, state, _ = choose(state, rows)
    assert sorted(np.searchsorted([4, 8], found.ids, side="right").tolist()) == [0, 1, 2]
    assert float(state.represented) == pytest.approx(0, abs=1e-5)
    choose, state = chooser(diverse.divfl(10, 6, by="clusters"))
    found, _, _ = choose(state, rows_of())
    assert sorted(found.ids.tolist()) == list(range(10))
    np.testing.assert_allclose(found.share, 1)


def test_who_is_away_or_not_finite_is_not_taken_nor_represented():
    rows = rows_of()
    rows[3] = np.nan
    morning = np.where(np.arange(10) < 5, SIZES, 0)
    choose, state = chooser(diverse.divfl(5, 6, by="clusters"))
    found, state, _ = choose(state, rows, morning)
    assert sorted(found.ids[found.valid].tolist()) == [0, 1, 2, 4]
    assert np.isfinite(state.table).all()
    assert float(found.share.sum()) == pytest.approx(4)
    found, state, asked = choose(state, rows, SIZES - morning)
    assert sorted(found.ids.tolist()) == [5, 6, 7, 8, 9]
    assert asked == [[5, 6, 7, 8, 9], []]
    rows[3] = 0.0
    found, _, asked = choose(state, rows, morning)
    assert asked == [[3], [0, 1, 2, 4]], "who has not answered is asked again"
    assert found.valid.all()


def test_shares_of_the_cohort():
    rows = np.array([[0.0], [0.1], [0.2], [8.5], *[[9.1]] * 6])
    for by, wanted in (("clusters", [1.4, 0.6]), ("examples", [1.8, 0.2])):
        choose, state = chooser(diverse.divfl(2, 1, by=by))
        found, _, _ = choose(state, rows)
        assert found.ids.tolist() == [4, 1]
        np.testing.assert_allclose(found.share, wanted, rtol=1e-5)


def test_a_projection_shows_its_error():
    rows = rows_of(parameters=600)
    rule = diverse.divfl(3, 600, dimensions=100, stochastic=0.5)
    choose, state = chooser(rule)
    found, state, _ = choose(state, rows)
    small = np.asarray(divfl.project(jax.random.key(0), jnp.asarray(rows), 100))
    np.testing.assert_allclose(state.table, small, rtol=1e-5, atol=1e-5)
    off = np.linalg.norm(small, axis=1) / np.linalg.norm(rows, axis=1) - 1
    numbers = rule.info(state)
    assert float(numbers["projection_error"]) == pytest.approx(np.sqrt(np.square(off).mean()), rel=1e-3)
    assert 0.02 < np.sqrt(np.square(off).mean()) < 0.15
    assert len(set(found.ids.tolist())) == 3
    assert "projection_error" not in diverse.divfl(3, 600).info(state)


def test_a_round_asks_at_the_clients_own_levels_and_counts_it():
    """Rows are gradients of the clients' mean losses; the model is received once."""
    family, population = mlp_family(), toy_population()
    rule = diverse.divfl(3, 83, by="clusters")
    algorithm = fedavg.make(family, sgd(), cohort=3, slots=Slots(select=rule, clients=12))
    start = algorithm.init(jax.random.key(0))[0]
    run = executor(*EXECUTORS["sharded8"])
    state, infos, _ = play(algorithm._replace(init=lambda key: (start, {})), run, population, rounds=2)

    @partial(jax.jit, static_argnums=0)
    def gradient(level, rows, valid):
        def loss(variables):
            logits = algorithm.predict(variables, level, population.x[rows])[-1]
            return objective.mean_cross_entropy(logits, population.y[rows], valid)

        own = jax.grad(loss)(algorithm.model(start, level))
        whole = algorithm.widen(EMPTY._replace(delta=own), level).delta
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(whole)])

    size, level = np.asarray(population.size), np.asarray(population.level)
    place = np.asarray(population.offset)[:, None] + np.minimum(np.arange(size.max()), size[:, None] - 1)
    rows, valid = np.asarray(population.rows)[place], np.arange(size.max()) < size[:, None]
    exact = [np.asarray(gradient(int(level[c]), rows[c], valid[c])) for c in range(12)]
    picks = divfl.greedy(divfl.distances(jnp.asarray(np.stack(exact))), 3)
    assert infos[0].items.ids.tolist() == picks.ids.tolist()
    absent = [c for c in range(12) if c not in infos[1].items.ids]
    np.testing.assert_allclose(state.server.select.table[np.array(absent)], np.stack(exact)[absent], atol=1e-5)
    price, chosen = costs(family), infos[1].items.ids
    for info, asked in zip(infos, (np.arange(12), chosen)):
        spent = ledger.spent(info, price)
        cohort = info.items.ids
        assert spent.down_bits == 8 * price.bytes[level[asked]].sum()
        assert spent.up_bits == 8 * price.bytes[level[asked]].sum() + 8 * price.bytes[level[cohort]].sum()
        trained = 2 * size[cohort] @ price.macs[level[cohort]]
        assert spent.client_macs == 3 * (trained + size[asked] @ price.macs[level[asked]])
    assert (bits.total(infos[1].items.seen.down) == 0).all()


def test_what_does_not_fit_is_one_line_and_what_fits_is_said(monkeypatch):
    needs = diverse.divfl(10, 8_000).needs(50_000)
    assert needs.bytes == 2 * 4 * 50_000 * 58_000
    rule = fedavg.make(mlp_family(), sgd(), cohort=3)
    made = rule._replace(price=lambda: Price(np.zeros(2), np.zeros(2), needs=needs))
    monkeypatch.setattr(machine, "device_memory", lambda: 10**9)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        selections.check_memory(made)
    assert str(error.value) == (
        "the selection needs 23,200.0 MB for 50,000 x 8,000 gradients and their 50,000 x 50,000 distances, the device "
        "has 1,000.0 MB: use select.args.dimensions=512 (20,204.8 MB) or power_of_choice with kind=rpow (0.2 MB) "
        "(select.name)"
    )
    monkeypatch.setattr(machine, "device_memory", lambda: 10**12)
    assert selections.check_memory(made) == needs
    assert selections.sentences(needs)[0].startswith("needs 23,200.0 MB at the server for 50,000 x 8,000 gradients")
    assert selections.sentences(Needs(10, "two numbers", "uniform")) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cohort": 0}, "cohort of 0 clients, allowed >= 1 (select.args.cohort)"),
        ({"gradients": "old"}, "gradients 'old', allowed stale, full (select.args.gradients)"),
        ({"by": "size"}, "weights by 'size', allowed method, examples, alike, clusters (select.args.by)"),
        ({"stochastic": 2.0}, "stochastic 2.0, allowed 0..1 (select.args.stochastic)"),
        ({"dimensions": 6}, "6 dimensions, allowed 0..5 (select.args.dimensions)"),
    ],
)
def test_a_value_out_of_range_is_named(given, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        diverse.divfl(**{"cohort": 2, "parameters": 6, **given})
    assert str(error.value) == message

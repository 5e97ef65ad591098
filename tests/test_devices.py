"""Devices, budgets and the clock: a table by hand, identities, files, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Devices, Population
from hetfl_jax.data import devices as profiles
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import Packing, device_store, host_store
from hetfl_jax.methods import fedavg, scaffold
from hetfl_jax.models.costs import costs
from hetfl_jax.models.windows import memory_extents
from hetfl_jax.parts import afford, choose, explore, pace, select, simulate
from hetfl_jax.parts import online as presence
from hetfl_jax.run import ledger
from tests.contract import BY_NAME, EXECUTORS, begun, play
from tests.helpers import mlp_family, sgd, toy_population, worst

THREE = ({"width": 1.0}, {"width": 0.5}, {"width": 0.25})
#: MAC/s, bits down and up a second
FIVE = np.array([(4320, 1000, 1000), (432, 1000, 500), (43.2, np.inf, np.inf), (1e12, 100, 100), (432, 2000, 250)])
#: seconds of 10 examples, twice forward and backward, by hand. An MLP of 6-8-3, 6-4-3 or 6-2-3 has 72, 36 or 18
#: multiply-adds and 83, 43 or 23 numbers: 20 * (1 + 2) * 72 = 4320, 2160, 1080 MACs and 2656, 1376, 736 bits one way.
BY_HAND = np.array([
    (1 + 2.656 + 2.656, 0.5 + 1.376 + 1.376, 0.25 + 0.736 + 0.736),
    (10 + 2.656 + 5.312, 5 + 1.376 + 2.752, 2.5 + 0.736 + 1.472),
    (100.0, 50.0, 25.0),
    (26.56 + 26.56, 13.76 + 13.76, 7.36 + 7.36),
    (10 + 1.328 + 10.624, 5 + 0.688 + 5.504, 2.5 + 0.368 + 2.944),
])  # fmt: skip


def equal_sizes(clients=5, levels=3, level=None):
    """Clients of 10 examples."""
    pop = toy_population(clients=clients, levels=levels)
    size = jnp.full(clients, 10, jnp.int32)
    rows = jnp.arange(clients * 10) % pop.x.shape[0]
    level = jnp.zeros(clients, jnp.int32) if level is None else jnp.asarray(level, jnp.int32)
    return pop._replace(rows=rows, size=size, offset=10 * jnp.arange(clients), level=level)


def with_devices(pop: Population, table=None, **more):
    """A population with devices, by default all alike."""
    clients = pop.size.shape[0]
    table = np.tile([4320.0, 1000.0, 1000.0], (clients, 1)) if table is None else table
    speed, down, up = (jnp.asarray(column, jnp.float32) for column in table.T)
    return pop._replace(devices=Devices(speed, down, up, **more))


def clocked(algorithm, family, settings=None, **rule):
    settings = sgd() if settings is None else settings
    return simulate.simulated(algorithm, pace.Rule(costs(family).macs, algorithm.price(), settings, **rule))


def test_the_table_by_hand_before_a_round():
    family = mlp_family(THREE)
    price = fedavg.make(family, sgd(), cohort=5).price()
    found = afford.round_seconds(costs(family), price, sgd(), np.full(5, 10), *FIVE.T)
    np.testing.assert_allclose(found, BY_HAND, rtol=1e-6)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_table_by_hand_in_a_round(level):
    family = mlp_family(THREE)
    algorithm = clocked(fedavg.make(family, sgd(), cohort=5), family)
    pop = with_devices(equal_sizes(level=[level] * 5), FIVE)
    _, infos, _ = play(algorithm, executor("bucketed"), pop, rounds=2)
    for number, info in enumerate(infos, 1):
        items = info.items
        np.testing.assert_allclose(items.seconds, BY_HAND[items.ids, level], rtol=1e-5)
        assert info.numbers["round_seconds"] == pytest.approx(BY_HAND[:, level].max(), rel=1e-5)
        assert info.numbers["simulated_seconds"] == pytest.approx(number * BY_HAND[:, level].max(), rel=1e-5)
        spent, names = ledger.spent(info, costs(family)), ("a", "b", "c")
        per_level = ledger.by_level(info.items, costs(family), names)
        assert sum(per_level["level_seconds"].values()) == pytest.approx(BY_HAND[:, level].sum(), rel=1e-5)
        assert sum(per_level["level_macs"].values()) == spent.client_macs == 5 * (4320, 2160, 1080)[level]
        assert sum(per_level["level_bytes"].values()) == (spent.down_bits + spent.up_bits) / 8


def test_the_clock_goes_on_after_a_year():
    """A millisecond is lost in a float32 of a year; the clock keeps what it cannot hold."""
    family, year = mlp_family(({"width": 1.0},)), 3.2e7
    algorithm = clocked(fedavg.make(family, sgd(), cohort=2), family)
    first = algorithm.init

    def after_a_year(key):
        state, memory = first(key)
        return state._replace(seconds=state.seconds + year), memory

    pop = with_devices(equal_sizes(levels=1), np.tile([4_320_000.0, np.inf, np.inf], (5, 1)))
    state, _, _ = play(algorithm._replace(init=after_a_year), executor("bucketed"), pop, rounds=5)
    assert float(state.server.seconds) == year
    assert float(state.server.rest) == pytest.approx(0.005, rel=1e-5)


def test_budgets_by_hand():
    family, settings = mlp_family(THREE), sgd()
    price, known = fedavg.make(family, settings, cohort=5).price(), costs(mlp_family(THREE))
    memory = afford.training_memory(family, settings)
    assert memory.parameters.tolist() == memory.gradients.tolist() == memory.optimizer.tolist() == [332, 172, 92]
    twice = afford.training_memory(family, sgd(batch_size=8)).activations
    assert (memory.activations >= 4 * 4 * np.array([6 + 8 + 3, 6 + 4 + 3, 6 + 2 + 3])).all()
    assert (1.7 * memory.activations < twice).all()
    assert (twice <= 2 * memory.activations).all()

    def levels(memory_mb=np.inf, **budget):
        found = afford.afforded(afford.Budget(**budget), known, price, memory, BY_HAND, np.full(5, memory_mb))
        return [int(level) if able else None for level, able in zip(found.level, found.able)], found

    assert levels()[0] == [0] * 5
    assert levels(seconds=10.0)[0] == [0, 1, None, None, 2]
    assert levels(megabytes=2 * 172e-6)[0] == [1] * 5
    assert levels(memory_mb=float(memory.all[2]) / 1e6)[0] == [2] * 5
    assert levels(memory_mb=1.0, seconds=30.0, megabytes=300e-6)[0] == [2] * 5
    said = afford.sentences(levels(seconds=10.0)[1], afford.Budget(seconds=10.0), ("a", "b", "c"))
    assert said[0] == "the largest level within 10 s and the device's memory"
    assert said[-1] == "2 clients can afford no level and never take part: 2, 3"
    said = afford.sentences(levels(seconds=5.0)[1], afford.Budget(seconds=5.0), ("a", "b", "c"))
    assert "no client can afford level a: what no other level has is never trained" in said
    with pytest.raises(ValueError, match="no client can afford any level: the smallest takes"):
        levels(seconds=1.0)
    with pytest.raises(ValueError, match=re.escape("max_mb -1, allowed > 0 (capacity.max_mb)")):
        levels(megabytes=-1.0)


@pytest.mark.parametrize("name", ["scaffold", "ifca", "splitmix", "lag"])
def test_time_changes_no_method_and_equal_devices_take_equal_times(name):
    """An infinite deadline is no deadline, to rounding; memory, banks and several items a client included."""
    row = BY_NAME[name]
    family, settings = row.family(), row.settings() if name != "lag" else sgd(batch_size=11, epochs=1)
    plain = row.make(family, row.settings(), cohort=5, **row.kwargs)
    pop = toy_population(image=row.image)
    pop = with_devices(pop._replace(size=jnp.full_like(pop.size, 3), level=pop.level * (family.levels > 1)))
    wanted, _, _ = play(plain, executor("bucketed"), pop)
    algorithm = clocked(plain, family, settings, deadline=1e30)
    state, infos, _ = play(algorithm, executor("bucketed"), pop)
    assert worst((state.server.server, state.memory, 0), (wanted.server, wanted.memory, 0)) < 1e-6
    for info in infos:
        items = info.items
        for level in np.unique(items.level[items.valid]):
            times = items.seconds[items.valid & (items.level == level)]
            np.testing.assert_allclose(times, times[0], rtol=1e-5)
        by_client = np.bincount(items.ids[items.valid], items.seconds[items.valid])
        assert info.numbers["round_seconds"] == pytest.approx(by_client.max(), rel=1e-4)
        assert info.numbers["late"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"cfl", "scaffold", "ifca", "splitmix", "lag"}))
def test_every_method_can_be_timed(name):
    row = BY_NAME[name]
    family = row.family()
    algorithm = clocked(row.make(family, row.settings(), cohort=5, **row.kwargs), family, deadline=5.0, first=4)
    pop = with_devices(toy_population(image=row.image))

    def first_round():
        return play_shapes(algorithm, pop)

    state, info = jax.eval_shape(first_round)
    assert info.numbers["round_seconds"].shape == state.server.seconds.shape == ()


def play_shapes(algorithm, pop):
    """One round, for ``jax.eval_shape``."""
    state = start(algorithm, device_store(), pop.size.shape[0], jax.random.key(0))
    return make_round(algorithm, executor("bucketed"), device_store())(state, pop, jax.random.key(0))


def test_a_method_with_work_between_rounds_is_refused():
    row = BY_NAME["cfl"]
    made = row.make(row.family(), row.settings(), cohort=5, **row.kwargs)
    with pytest.raises(ValueError, match=re.escape("works on the host between rounds: need none (devices.name)")):
        clocked(made, row.family())


def test_a_deadline_of_0_leaves_the_model_and_counts_everybody():
    family = mlp_family()
    algorithm = clocked(
        scaffold.make(family, sgd(momentum=0.0), cohort=5, clients=12), family, sgd(momentum=0.0), deadline=0.0
    )
    pop = with_devices(toy_population())
    state, infos, _ = play(algorithm, executor("bucketed"), pop)
    assert worst(state.server.server, begun(algorithm, pop).server.server) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state.memory))
    for info in infos:
        assert info.numbers["late"] == 5
        assert info.numbers["failed"] == info.numbers["round_seconds"] == 0
        assert ledger.failed_ids(info.items) == []
        assert ledger.spent(info, costs(family)).client_macs > 0


@pytest.mark.parametrize("how", ["bucketed", "vmapped", "sharded8"])
def test_late_replies_are_as_if_the_client_were_absent(how):
    """The mean of those in time, their memory alone, the deadline as the round's length; under every executor."""
    family, settings = mlp_family(THREE), sgd(momentum=0.0)
    base = scaffold.make(family, settings, cohort=5, clients=5)
    pop = with_devices(equal_sizes(), FIVE)
    run = executor(*EXECUTORS[how]) if how in EXECUTORS else executor(how)
    state, infos, _ = play(clocked(base, family, settings, deadline=60.0), run, pop, rounds=1)
    items = infos[0].items
    # twice the numbers travel: 2 * 53.12 s are too many for client 3, and client 2 computes for 100 s
    assert sorted(items.ids[items.late].tolist()) == [2, 3]
    assert infos[0].numbers["round_seconds"] == 60.0

    def plan(*args):
        planned = base.plan(*args)
        return planned._replace(valid=(planned.ids != 2) & (planned.ids != 3))

    wanted, _, _ = play(base._replace(plan=plan), executor("bucketed"), pop, rounds=1)
    assert worst(state.server.server, wanted.server) < 1e-6
    assert worst(state.memory, wanted.memory) < 1e-6


@pytest.mark.slow
def test_memory_on_the_host_is_left_alone_likewise(tmp_path):
    family, settings, key = mlp_family(THREE), sgd(momentum=0.0), jax.random.key(7)
    base = scaffold.make(family, settings, cohort=5, clients=5)
    algorithm, pop = clocked(base, family, settings, deadline=60.0), with_devices(equal_sizes(), FIVE)
    wanted, _, _ = play(algorithm, executor("bucketed"), pop, rounds=1)
    one = jax.eval_shape(algorithm.init, key)[1]
    store = host_store(tmp_path, Packing(np.zeros(5, int), memory_extents(family, one)))
    state, info = make_round(algorithm, executor("bucketed"), store)(start(algorithm, store, 5, key), pop, key)
    assert info.numbers["late"] == 2
    assert worst(store.gather((), np.arange(5)), wanted.memory) < 1e-6
    assert worst(state.server, wanted.server) < 1e-6


def test_the_first_replies_are_the_fastest_clients():
    family = mlp_family(THREE)
    pop = with_devices(equal_sizes(), FIVE)
    algorithm = clocked(fedavg.make(family, sgd(), cohort=5), family, first=2)
    _, infos, _ = play(algorithm, executor("bucketed"), pop, rounds=1)
    items = infos[0].items
    assert sorted(items.ids[items.ok].tolist()) == [0, 1]
    assert infos[0].numbers["late"] == 3
    assert infos[0].numbers["round_seconds"] == pytest.approx(17.968, rel=1e-5)


def test_waits_are_of_the_round_and_client_and_their_mean_is_known():
    family = mlp_family(THREE)
    algorithm = clocked(fedavg.make(family, sgd(), cohort=5), family, shift=0.5, spread=0.5)
    pop = with_devices(equal_sizes(), np.tile([4320.0, np.inf, np.inf], (5, 1)))
    server = algorithm.init(jax.random.key(0))[0]
    keys = jax.random.split(jax.random.key(1), 400)
    plans = jax.vmap(lambda key: algorithm.plan(key, jnp.int32(0), server, pop, None))(keys)
    times = np.asarray(4320 / plans.known.speed).ravel()
    assert times.min() >= 0.5
    assert times.mean() == pytest.approx(1, abs=5 * 0.5 / np.sqrt(times.size))
    again = algorithm.plan(keys[0], jnp.int32(0), server, pop, None)
    assert worst(again.known.speed, plans.known.speed[0]) == 0


def times_of(*spans, period=100.0):
    known = profiles.times([list(own) for own in spans], np.full(len(spans), period))
    return tuple(jnp.asarray(v, jnp.float32) for v in known)


def test_only_clients_that_are_online_are_chosen_and_who_leaves_is_late():
    """Five clients of 6.312 s: two from 0 on, one of which leaves too soon, two from 50 on, one all the time."""
    family, pop = mlp_family(THREE), equal_sizes()
    online = times_of([(0, 3)], [(0, 40)], [(50, 60)], [(50, 90)], [(0, 100)])
    algorithm = clocked(fedavg.make(family, sgd(), cohort=5), family)
    _, infos, _ = play(algorithm, executor("bucketed"), with_devices(pop, online=online), rounds=8)
    first, second = infos[0].items, infos[1].items
    assert sorted(first.ids[first.valid].tolist()) == [0, 1, 4]
    assert first.ids[first.late].tolist() == [0]
    assert infos[0].numbers["round_seconds"] == pytest.approx(6.312, rel=1e-5)
    assert sorted(second.ids[second.valid].tolist()) == [1, 4]
    later = infos[7].items  # 7 * 6.312 = 44.2
    assert sorted(later.ids[later.valid].tolist()) == [4]


def test_a_round_without_anybody_lasts_until_somebody_comes():
    family, pop = mlp_family(THREE), equal_sizes()
    online = times_of(*[[(20, 60)]] * 4, [(0, 5)])
    able = jnp.array([True, True, True, True, False])
    algorithm = clocked(fedavg.make(family, sgd(), cohort=5), family)
    _, infos, _ = play(algorithm, executor("bucketed"), with_devices(pop, online=online, able=able), rounds=2)
    assert not infos[0].items.valid.any()
    assert infos[0].numbers["round_seconds"] == 20
    assert sorted(infos[1].items.ids[infos[1].items.valid].tolist()) == [0, 1, 2, 3]


def test_an_interval_over_midnight_goes_on():
    online = times_of([(0, 10), (80, 100)], [(0, 100)], [(80, 100)])
    known = Devices(jnp.ones(3), jnp.ones(3), jnp.ones(3), online=online)
    assert presence.leaving(known, jnp.arange(3), jnp.float32(190.0)).tolist() == [20.0, float("inf"), 10.0]
    assert float(presence.coming(known._replace(able=jnp.array([True, False, True])), jnp.float32(30.0))) == 50


def test_a_survey_takes_the_time_of_its_slowest_answer():
    """Power-of-Choice asks three clients, who have the model then; the round is the answer and the training."""
    family = mlp_family(THREE)
    from hetfl_jax.parts.compose import Slots

    rule = choose.power_of_choice(2, 5)
    algorithm = clocked(fedavg.make(family, sgd(), cohort=2, slots=Slots(select=rule, clients=5)), family)
    pop = with_devices(equal_sizes())
    _, infos, _ = play(algorithm, executor("bucketed"), pop, rounds=2)
    # asked: 10 forward passes and 32 bits up; 2.656 s down; trained: 1 s and 2.656 s up
    asked = 2.656 + 10 * 72 / 4320 + 0.032
    assert infos[1].numbers["round_seconds"] == pytest.approx(asked + 1 + 2.656, rel=1e-5)


def test_selections_know_how_fast_clients_are():
    """Oort with devices is Oort with their durations; ``in_time`` passes over slow clients."""
    seconds = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0])
    pop = equal_sizes()
    fast = with_devices(pop, seconds=seconds)
    state = explore.Known(jnp.ones(5), jnp.ones(5, jnp.int32), jnp.int32(1))
    keys = jax.random.split(jax.random.key(0), 200)

    def drawn(rule, people):
        return jax.vmap(lambda key: rule.choose(key, jnp.int32(3), state, people, None)[0].ids)(keys)

    given = dict(explored=0.0, least=0.0, cut=0.0)
    told = explore.oort(1, 9, durations=seconds.tolist(), preferred=2.2, **given)
    known = explore.oort(1, 9, by_speed=True, preferred=2.2, **given)
    assert (drawn(told, pop) == drawn(known, fast)).all()
    by_quantile = explore.oort(1, 9, by_speed=True, threshold=0.3, **given)  # 2 + 0.2 * 2 = 2.4
    assert (drawn(by_quantile, fast) == drawn(explore.oort(1, 9, by_speed=True, preferred=2.4, **given), fast)).all()
    assert np.mean(drawn(known, fast) >= 3) < 0.1 < np.mean(drawn(explore.oort(1, 9, **given), pop) >= 3)
    chosen = drawn(choose.in_time(select.uniform(2), 4.0), fast)
    assert sorted(set(chosen.ravel().tolist())) == [0, 1, 2]
    with pytest.raises(ValueError, match="in_time of clients without devices"):
        drawn(choose.in_time(select.uniform(2), 4.0), pop)
    with pytest.raises(ValueError, match="by_speed of clients without devices"):
        drawn(known, pop)


def test_uniform_among_those_who_are_there_is_uniform():
    pop = with_devices(equal_sizes(clients=8), here=jnp.arange(8) % 2 == 0)
    rule = select.uniform(2)
    keys = jax.random.split(jax.random.key(0), 2000)
    ids = np.asarray(jax.vmap(lambda key: rule.choose(key, 0, (), pop, None)[0].ids)(keys))
    assert set(ids.ravel().tolist()) == {0, 2, 4, 6}
    assert (ids[:, 0] != ids[:, 1]).all()
    counts = np.bincount(ids.ravel(), minlength=8)[::2]
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3, "0.1% of chi-square with 3 degrees"

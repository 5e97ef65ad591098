"""FedBuff: the synchronous round as its special case, the order of arrivals by hand, staleness, what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Devices
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg, fedpaq, heterofl, ifca, scaffold
from hetfl_jax.models.costs import costs
from hetfl_jax.parts import choose
from hetfl_jax.parts.buffered import buffered
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.pace import Rule
from hetfl_jax.parts.simulate import simulated
from tests.contract import EXECUTORS, play
from tests.helpers import mlp_family, sgd, toy_population, worst
from tests.test_devices import clocked, equal_sizes, with_devices

ONE = ({"width": 1.0},)


def rule_of(algorithm, family, settings, **more):
    return Rule(costs(family).macs, algorithm.price(), settings, **more)


def unlike(pop, seed=0):
    """A population of devices of unlike speed."""
    speed = np.exp(np.random.default_rng(seed).normal(7, 1, pop.size.shape[0]))
    return with_devices(pop, np.stack([speed, *np.full((2, speed.size), 1e4)], 1))


METHODS = {
    "fedavg": lambda family, settings: fedavg.make(family, settings, cohort=4),
    "fedavg_adam": lambda family, settings: fedavg.make(
        family, settings, cohort=4, server_optimizer={"name": "adam", "learning_rate": 0.01}
    ),
    "heterofl": lambda family, settings: heterofl.make(family, settings, cohort=4, proportions=(1, 1)),
    "scaffold": lambda family, settings: scaffold.make(family, settings, cohort=4, clients=12),
}


@pytest.mark.parametrize(
    ("name", "how"), [("fedavg_adam", "bucketed"), ("heterofl", "vmapped"), ("scaffold", "sharded8")]
)
def test_with_as_many_clients_at_work_as_replies_it_is_the_synchronous_round(name, how):
    family, settings, pop = mlp_family(), sgd(momentum=0.0), unlike(toy_population())
    run = executor(*EXECUTORS[how]) if how in EXECUTORS else executor(how)
    base = METHODS[name](family, settings)
    rounds = clocked(base, family, settings)
    steps = buffered(base, rule_of(base, family, settings), pop, concurrency=4, refill="after_step", max_staleness=0)
    wanted, wanted_infos, _ = play(rounds, run, pop)
    state, infos, compilations = play(steps, run, pop)
    assert worst((state.server.server, state.memory), (wanted.server.server, wanted.memory)) < 1e-6
    assert compilations == [1] * 3
    for info, reference in zip(infos, wanted_infos):
        assert sorted(info.items.ids.tolist()) == sorted(reference.items.ids.tolist())
        assert info.numbers["staleness"] == info.numbers["late"] == 0
        for number in ("train_loss", "round_seconds", "simulated_seconds"):
            assert info.numbers[number] == pytest.approx(reference.numbers[number], rel=1e-5)


def by_hand(seconds, concurrency, step, steps, at_once):
    """Events in plain Python: (ids, staleness, time) of every step; the selection takes idle clients by their ids."""
    at_work, now, out, version = {}, 0.0, [], 0
    idle = list(range(len(seconds)))

    def start(now):
        client = idle.pop(0)
        at_work[client] = (now + seconds[client], version)

    for version in range(steps):
        idle.sort()
        while len(at_work) < concurrency:
            start(now)
        done = []
        for k in range(step):
            client = min(at_work, key=lambda c: at_work[c][0])
            now, since = at_work.pop(client)
            done.append((client, version - since))
            if at_once and k < step - 1:
                start(now)
        out.append((done, now))
        idle += [client for client, _ in done]
    return out


@pytest.mark.parametrize(("refill", "begun"), [("at_once", 0.0), ("after_step", 0.0), ("at_once", 1e7)])
def test_arrivals_are_those_of_an_event_queue(refill, begun):
    """A selection that takes idle clients by their ids, against events one after the other in plain Python.

    Also of clients that take milliseconds after four months, when float32 counts in steps of a second.
    """
    from hetfl_jax.core.types import Cohort
    from hetfl_jax.parts.select import stateless

    def lowest(key, population):
        here = population.devices.here
        ids = jnp.argsort(~here, stable=True)[:2].astype(jnp.int32)
        return Cohort(ids, here[ids])

    seconds = np.array([3.1, 7.3, 2.2, 11.93, 5.9, 1.45, 13.6, 4.7, 6.85])  # no two are done at once
    seconds = seconds / 1000 if begun else seconds
    pop = equal_sizes(clients=9, levels=1)
    pop = with_devices(pop, np.stack([20 * 3 * 72 / seconds, *np.full((2, 9), np.inf)], 1))
    family = mlp_family(ONE)
    base = fedavg.make(family, sgd(), cohort=2, slots=Slots(select=stateless(lowest)))
    algorithm = buffered(base, rule_of(base, family, sgd()), pop, concurrency=5, refill=refill)
    first = algorithm.init

    def later(key):
        state, memory = first(key)
        return state._replace(seconds=state.seconds + begun), memory

    state, infos, _ = play(algorithm._replace(init=later), executor("bucketed"), pop, rounds=7)
    wanted = by_hand(seconds, 5, 2, 7, refill == "at_once")
    assert float(state.server.seconds) - begun + float(state.server.rest) == pytest.approx(wanted[-1][1], rel=1e-5)
    passed = np.cumsum([info.numbers["round_seconds"] for info in infos])
    for info, took, (done, now) in zip(infos, passed, wanted):
        assert info.items.ids.tolist() == [client for client, _ in done]
        assert took == pytest.approx(now, rel=1e-5)
        assert info.numbers["simulated_seconds"] == pytest.approx(begun + now, rel=1e-5)
        assert info.numbers["staleness"] == np.mean([late for _, late in done])
        np.testing.assert_allclose(info.items.seconds, seconds[info.items.ids], rtol=1e-5)
    assert max(late for done, _ in wanted for _, late in done) >= 2


def test_a_stale_reply_comes_from_the_old_model_and_counts_less():
    """A client of 10 s beside one of 4 s, one reply a step: it is two steps late and counts ``1 / sqrt(3)``."""
    from hetfl_jax.core.types import Cohort
    from hetfl_jax.parts.select import stateless

    def lowest(key, population):
        ids = jnp.argsort(~population.devices.here, stable=True)[:1].astype(jnp.int32)
        return Cohort(ids, population.devices.here[ids])

    seconds = np.array([10.0, 4.0, 3.0])
    pop = equal_sizes(clients=3, levels=1)
    pop = with_devices(pop, np.stack([20 * 3 * 72 / seconds, *np.full((2, 3), np.inf)], 1))
    family, settings = mlp_family(ONE), sgd()
    base = fedavg.make(family, settings, cohort=1, slots=Slots(select=stateless(lowest)))
    found = {}
    for exponent in (0.0, 0.5):
        algorithm = buffered(base, rule_of(base, family, settings), pop, concurrency=2, exponent=exponent)
        found[exponent] = [play(algorithm, executor("bucketed"), pop, rounds=n) for n in (0, 1, 2, 3)]
    # at 4 s client 1, at 8 s again, at 10 s client 0, which began with the first model
    infos = found[0.5][3][1]
    assert [info.items.ids.tolist() for info in infos] == [[1], [1], [0]]
    assert [float(info.numbers["staleness"]) for info in infos] == [0.0, 0.0, 2.0]
    weights = [jax.tree.leaves(state.server.server.variables) for state, _, _ in found[0.5]]
    plain = [jax.tree.leaves(state.server.server.variables) for state, _, _ in found[0.0]]
    for n in (0, 1, 2):
        assert worst(weights[n], plain[n]) == 0
    moved = [[after - before for after, before in zip(w[3], w[2])] for w in (weights, plain)]
    assert worst(moved[0], [v / np.sqrt(3.0) for v in moved[1]]) < 1e-6
    assert max(float(np.abs(v).max()) for v in moved[1]) > 1e-3
    lost = buffered(base, rule_of(base, family, settings), pop, concurrency=2, max_staleness=1)
    state, infos, _ = play(lost, executor("bucketed"), pop, rounds=3)
    assert worst(state.server.server.variables, found[0.5][2][0].server.server.variables) == 0
    assert infos[2].numbers["late"] == 1


def test_nobody_is_at_work_twice_and_everybody_who_is_online_comes():
    pop = unlike(toy_population())
    online = jnp.arange(12) != 5
    pop = pop._replace(devices=pop.devices._replace(able=online))
    family = mlp_family()
    base = heterofl.make(family, sgd(), cohort=3, proportions=(1, 1))
    algorithm = buffered(base, rule_of(base, family, sgd(), shift=0.5, spread=0.5), pop, concurrency=8)
    state, infos, _ = play(algorithm, executor("bucketed"), pop, rounds=20)
    seen = np.concatenate([info.items.ids for info in infos])
    assert all(len(set(info.items.ids.tolist())) == 3 for info in infos)
    assert set(seen.tolist()) == set(range(12)) - {5}
    work = state.server.work
    assert work.there.sum() == 7  # the place of the last that was done is taken with the next model
    assert len(set(work.ids[work.there].tolist())) == 7
    times = [float(info.numbers["simulated_seconds"]) for info in infos]
    assert times == sorted(times)
    assert sum(float(info.numbers["round_seconds"]) for info in infos) == pytest.approx(times[-1], rel=1e-4)


def test_selections_with_a_memory_go_on():
    from hetfl_jax.parts import explore

    pop = unlike(toy_population())
    pop = pop._replace(devices=pop.devices._replace(seconds=1e3 / pop.devices.speed))
    family = mlp_family()
    slots = Slots(select=explore.oort(3, 8, by_speed=True), clients=12)
    base = fedavg.make(family, sgd(), cohort=3, slots=slots)
    algorithm = buffered(base, rule_of(base, family, sgd()), pop, concurrency=6)
    state, infos, _ = play(algorithm, executor("bucketed"), pop, rounds=4)
    came = np.unique(np.concatenate([info.items.ids for info in infos]))
    assert np.flatnonzero(state.server.server.select.last > 0).tolist() == came.tolist()


@pytest.mark.parametrize(
    ("make", "given", "line"),
    [
        (METHODS["fedavg"], {"concurrency": 3}, "concurrency 3 below the 4 replies of a step (devices.concurrency)"),
        (METHODS["fedavg"], {"concurrency": -1}, "concurrency -1, allowed >= 1 (devices.concurrency)"),
        (METHODS["fedavg"], {"exponent": -1.0}, "staleness_exponent -1, allowed >= 0 (devices.staleness_exponent)"),
        (METHODS["fedavg"], {"max_staleness": -1}, "max_staleness -1, allowed >= 0 (devices.max_staleness)"),
        (METHODS["fedavg"], {"refill": "later"}, "refill 'later' is not one of at_once, after_step (devices.refill)"),
        (METHODS["fedavg"], {"deadline": 3.0}, "a deadline or first replies without rounds: need concurrency 0"),
        (lambda f, s: ifca.make(f, s, cohort=4, clusters=2), {}, "this method plans more than who takes part"),
        (lambda f, s: fedpaq.make(f, s, cohort=4), {}, "this method plans more than who takes part: need rounds"),
        (
            lambda f, s: fedavg.make(f, s, cohort=4, slots=Slots(select=choose.power_of_choice(4, 6), clients=12)),
            {},
            "a selection that asks clients, in an asynchronous run: need another one (select.name)",
        ),
    ],
)
def test_what_does_not_compose_is_one_line(make, given, line):
    family, settings, pop = mlp_family(), sgd(), unlike(toy_population())
    base = make(family, settings)
    rule = rule_of(base, family, settings, **{k: given[k] for k in given if k == "deadline"})
    more = {"concurrency": 8} | {k: v for k, v in given.items() if k != "deadline"}
    with pytest.raises(ValueError, match=re.escape(line)):
        buffered(base, rule, pop, **more)


def test_a_population_without_devices_is_refused():
    family, settings, pop = mlp_family(), sgd(), toy_population()
    base = METHODS["fedavg"](family, settings)
    with pytest.raises(ValueError, match="the population has no devices"):
        buffered(base, rule_of(base, family, settings), pop, concurrency=8)
    with pytest.raises(ValueError, match="the population has no devices"):
        play(simulated(base, rule_of(base, family, settings)), executor("bucketed"), pop, rounds=1)
    assert isinstance(unlike(pop).devices, Devices)

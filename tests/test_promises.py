"""What every round promises: failures, padding, absent clients, banks, surveys, and what crosses devices."""

import math
import re
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.jaxprs import computed_bytes
from hetfl_jax.core.types import Info
from hetfl_jax.engine import rounds
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import fedavg
from tests.contract import COHORT, EXECUTORS, algorithm_of, first_of, play, play_row, visits
from tests.helpers import mlp_family, sgd, toy_population, worst

pytestmark = pytest.mark.slow


def shown(**arrays):
    return Info((), (), {}, arrays)


def test_what_a_client_computes_grows_with_its_batch():
    """So that a large batch makes small chunks; what a loop stacks counts, its body once."""
    step = lambda x, w: jax.grad(lambda w: (jnp.tanh(x @ w) @ w.T).sum())(w)  # noqa: E731
    small, large = (computed_bytes(step, jnp.ones((n, 30)), jnp.ones((30, 40))) for n in (100, 1000))
    assert 7 < large / small < 10
    looped = lambda x, w: jax.lax.fori_loop(0, 7, lambda i, w: w - step(x, w), w)  # noqa: E731
    assert small < computed_bytes(looped, jnp.ones((100, 30)), jnp.ones((30, 40))) < 2 * small


def poisoned(population, client):
    """The population with one client's features made NaN."""
    rows = population.rows[population.offset[client] : population.offset[client] + population.size[client]]
    return population._replace(x=population.x.at[rows].set(jnp.nan))


def cohort_of(algorithm, population, round=0):
    key = rounds.purpose_key(jax.random.key(7), rounds.PLAN, round)
    state = start(algorithm, device_store(), population.size.shape[0], jax.random.key(7))
    return algorithm.plan(key, jnp.int32(round), state.server, population, None)


@pytest.mark.parametrize("how", ["vmapped", "sharded8"])
@pytest.mark.parametrize("name", ["heterofl_dynamic", "private_memory"])
def test_a_client_that_is_not_finite_is_left_out_counted_and_named(name, how):
    population = toy_population()
    bad = int(cohort_of(algorithm_of(name), population).ids[2])
    state, infos, _ = play_row(name, how, poisoned(population, bad), rounds=1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert infos[0].numbers["failed"] == 1
    assert infos[0].numbers["clients"] == COHORT - 1
    items = infos[0].items
    assert items.ids[items.valid & ~items.ok].tolist() == [bad]
    for leaf in jax.tree.leaves(state.memory):
        assert (leaf[bad] == 0).all()


@pytest.mark.parametrize("name", ["fedavg_adam", "heterofl_dynamic", "private_memory"])
def test_a_round_in_which_every_client_fails_changes_nothing(name):
    population = toy_population()
    population = population._replace(x=jnp.full_like(population.x, jnp.nan))
    state, infos, _ = play_row(name, "bucketed_each", population, rounds=1)
    for old, new in zip(jax.tree.leaves(first_of(name)[:2]), jax.tree.leaves(state[:2]), strict=True):
        np.testing.assert_array_equal(old, new)
    assert infos[0].numbers["clients"] == 0
    assert infos[0].numbers["failed"] == COHORT


@pytest.mark.parametrize("how", ["bucketed3", "sharded8"])
def test_padding_adds_nothing_even_if_it_is_nan(how):
    """A cohort with items that are not valid equals the cohort without them, also when their data is NaN."""
    family, population = mlp_family(), toy_population()
    whole = visits(family, sgd(), cohort=4)
    ids = cohort_of(whole, population).ids
    ghost = int(next(i for i in range(12) if i not in ids))

    def padded_plan(*args):
        plan = whole.plan(*args)
        extra = [jnp.concatenate([v, jnp.array([fill] * 2, v.dtype)])
                 for v, fill in ((plan.ids, ghost), (plan.valid, False), (plan.level, 0))]  # fmt: skip
        return plan._replace(ids=extra[0], valid=extra[1], level=extra[2])

    run = executor(*EXECUTORS[how])
    wanted, _, _ = play(whole, run, population, rounds=1)
    found, infos, _ = play(whole._replace(plan=padded_plan), run, poisoned(population, ghost), rounds=1)
    assert worst(found, wanted) < 1e-6
    assert infos[0].numbers["failed"] == 0


@pytest.mark.parametrize("how", ["chunked3", "bucketed_each", "sharded8"])
def test_memory_of_absent_clients_and_dead_entries_survives(how):
    population = toy_population()
    state, _, _ = play_row("private_memory", how, population, rounds=1)
    plan = cohort_of(algorithm_of("private_memory"), population)
    kernel = state.memory["seen"]["params"]["dense_0"]["kernel"]
    for client in range(12):
        if client not in plan.ids:
            assert (kernel[client] == 0).all()
        elif population.level[client] == 1:
            assert (kernel[client][:, 4:] == 0).all()
            assert (kernel[client][:, :4] != 0).any()


def test_debugging_names_the_first_client_that_is_not_finite():
    algorithm = fedavg.make(mlp_family(), sgd(), cohort=COHORT)
    population = toy_population()
    bad = int(cohort_of(algorithm, population).ids[1])
    with pytest.raises(FloatingPointError, match=f"client {bad} at level"):
        play(algorithm, executor("debugging"), poisoned(population, bad), rounds=1)


def test_members_of_a_bank_get_their_own_row():
    """Replies are added to the row of the member that they trained; two members, chosen by the client's id."""

    def client(context):
        return base.client(context)._replace(member=context.shard.offset % 2)

    base = fedavg.make(mlp_family(), sgd(), cohort=6)

    def server(state, plan, sent, total, report, ok):
        return state, shown(rows=total.weight, offset=toy.offset[plan.ids])

    toy = toy_population()
    bank = base._replace(members=2, client=client, server=server)
    found = {}
    for how in ("vmapped", "bucketed_each", "sharded8"):
        _, infos, _ = play(bank, executor(*EXECUTORS[how]), toy, rounds=1)
        found[how] = infos[0].arrays["rows"]
        odd = np.asarray(infos[0].arrays["offset"]) % 2 == 1
        sizes = np.asarray(toy.size)[np.asarray(cohort_of(bank, toy).ids)]
        np.testing.assert_allclose(found[how].sum(1), [sizes[~odd].sum(), sizes[odd].sum()], err_msg=how)


def test_survey_asks_through_the_executor():
    family, population = mlp_family(), toy_population()
    base = fedavg.make(family, sgd(), cohort=3)
    for how in ("vmapped", "bucketed3", "sharded8"):

        def plan(key, round, server, population, survey):
            sizes = survey(lambda key, sent, level, shard: sent * shard.size, jnp.int32(2), jnp.arange(12))
            return base.plan(key, round, server, population, survey)._replace(ticket=jnp.broadcast_to(sizes[:3], (3,)))

        def server(state, plan, sent, total, report, ok):
            return state, shown(asked=plan.ticket)

        _, infos, _ = play(base._replace(plan=plan, server=server), executor(*EXECUTORS[how]), population, rounds=1)
        np.testing.assert_array_equal(infos[0].arrays["asked"], 2 * population.size[:3])


def collectives(text):
    """Bytes of each collective operation in a compiled program, by kind; of an all-gather what it gathers."""
    found = defaultdict(list)
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for dtype, shape, kind in re.findall(rf"= (\w+)\[([\d,]*)\]\S* ({kinds})(?:-start)?\(", text):
        size = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        found[kind].append(size)
    return found


def test_what_crosses_devices_is_one_sum_of_totals_and_the_rows_of_the_cohort():
    """One all-reduce of the total's size; memory split by client id, its rows moved by two collectives of theirs."""
    algorithm, devices = visits(mlp_family(), sgd(), cohort=8), 8
    run, population, key = executor("bucketed", 1, devices), toy_population(), jax.random.key(7)
    state, population, key = run.place((start(algorithm, device_store(), 12, key), population, key))
    moved = rounds.moved_bytes(run, algorithm, state, population, key)
    found = collectives(rounds.program(make_round(algorithm, run, device_store()), state, population, key))
    assert found["all-reduce"] == [moved["totals"]]
    assert [size * devices for size in found["reduce-scatter"]] == [moved["memory to clients"]]
    assert moved["memory back"] in found["all-gather"]
    found["all-gather"].remove(moved["memory back"])
    assert sum(found["all-gather"]) < 8 * 4 * 24, "only reports and item numbers are left"
    assert not found["all-to-all"] + found["collective-permute"]
    for leaf in jax.tree.leaves(state.memory):
        assert leaf.addressable_shards[0].data.shape[0] == 16 // devices


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nope",), "'nope' is not one of vmapped, chunked, bucketed, debugging"),
        (("bucketed", -1), "clients_per_chunk -1, allowed >= 0"),
        (("bucketed", 1, 9), "9 devices, allowed 1..8"),
    ],
)
def test_executor_errors(args, message):
    with pytest.raises(ValueError, match=message):
        executor(*args)


def test_buckets_must_name_every_level_once():
    algorithm = fedavg.make(mlp_family(), sgd(), cohort=2)
    with pytest.raises(ValueError, match=r"need each of the levels 0\.\.1 once"):
        play(algorithm, executor("bucketed", 1, 1, ((0,), (0, 1))), toy_population(), rounds=1)

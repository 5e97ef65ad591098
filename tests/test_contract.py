"""The contract table: every method x executor x family. Adding a method is adding a row."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.jaxprs import computed_bytes
from hetfl_jax.core.types import Algorithm, Info
from hetfl_jax.engine import rounds, runners
from hetfl_jax.engine.chunks import clients_at_once
from hetfl_jax.engine.executors import Executor, executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import (
    afl,
    cfl,
    depthfl,
    fedavg,
    feddyn,
    fedpaq,
    fedprox,
    fjord,
    heterofl,
    ifca,
    inclusivefl,
    lag,
    qffl,
    scaffold,
    sheterofl,
    splitmix,
    term,
)
from hetfl_jax.parts import drift, select
from hetfl_jax.parts.adversary import pgd
from hetfl_jax.parts.compose import Slots, compose
from tests.helpers import conv_family, exits_family, image_family, mlp_family, sgd, toy_population, worst

pytestmark = pytest.mark.slow


def visits(family, settings, *, cohort):
    """FedAvg whose clients pull towards a private average of what they saw: a drift with memory, at every level."""

    def gradient(gradient, params, context):
        return jax.tree.map(lambda g, d: g - 0.1 * d, gradient, context.memory["seen"]["params"])

    def update(after, context, steps):
        before = drift.received(context)
        seen = jax.tree.map(lambda d, p, r: d + p - r, context.memory["seen"]["params"], after, before)
        return {"seen": {"params": seen}}, {}

    rule = drift.Drift(lambda params: {"seen": {"params": jax.tree.map(jnp.zeros_like, params)}}, gradient, update)
    return compose(family, local=settings, select=select.uniform(cohort), drift=rule)


def shown(**arrays):
    return Info((), (), {}, arrays)


def lazily(family, settings, *, cohort):
    """LAG, in which all clients take part, on a net without hidden layers."""
    family = exits_family(ONE, hidden=())
    settings = sgd(batch_size=11, epochs=1, momentum=0.0, learning_rate=0.01, full_batch=True)
    return lag.make(family, settings, clients=12, window=2)


class Row(NamedTuple):
    name: str
    make: object
    kwargs: dict
    family: object = mlp_family
    image: bool = False
    settings: object = sgd


ONE = ({"width": 1.0},)
TIERS = ({"width": 1.0, "tiers": 2}, {"width": 0.5, "tiers": 1})

ROWS = [
    Row("fedavg", fedavg.make, {}),
    Row("fedavg_adam", fedavg.make, {"server_optimizer": {"name": "adam", "learning_rate": 0.01}}),
    Row("fedprox", fedprox.make, {"proximal_weight": 0.1}),
    Row("heterofl_dynamic", heterofl.make, {"proportions": (1, 1)}),
    Row("heterofl_fixed", heterofl.make, {"proportions": (1, 1), "assignment": "fixed"}),
    Row("private_memory", visits, {}),
    Row("heterofl_conv", heterofl.make, {"proportions": (1, 1)}, lambda: conv_family(norm="bn"), True),
    Row("fedavg_tracked_bn", fedavg.make, {}, lambda: conv_family(norm="bn_tracked"), True),
    Row("feddyn", feddyn.make, {"clients_per_level": (6, 6), "feddyn_alpha": 0.1, "keep_models": True}),
    Row("scaffold", scaffold.make, {"clients": 12}, settings=lambda: sgd(momentum=0.0)),
    Row("depthfl", depthfl.make, {"clients_per_level": (6, 6)}, lambda: exits_family()),
    Row("inclusivefl", inclusivefl.make, {}, lambda: exits_family(({"depth": 3}, {"depth": 2}), hidden=(8, 8, 8))),
    Row("ifca", ifca.make, {"clusters": 2, "restarts": 2, "restart_rounds": 1}),
    Row("qffl", qffl.make, {"q": 1.0}),
    Row("afl", afl.make, {"clients": 12}),
    Row("term", term.make, {"tilt": 2.0}),
    Row("fjord", fjord.make, {"clients_per_level": (6, 6)}, lambda: mlp_family(TIERS, norm="bn_tiers")),
    Row("fjord_efd", fjord.make, {"clients_per_level": (6, 6), "dropout": "both", "distill": False}),
    Row("cfl", cfl.make, {"clients": 12, "eps1": 1e-9, "eps2": 1e-9, "max_clusters": 2}),
    Row("lag", lazily, {}),
    Row("fedpaq", fedpaq.make, {"levels": 3}),
    Row("splitmix", splitmix.make, {"clients": 12, "base_width": 0.25, "budgets": "4-2-1"}, lambda: mlp_family(ONE)),
    Row("sheterofl", sheterofl.make, {"multiplicity": True}),
    Row(
        "fedavg_adversary",
        fedavg.make,
        {"slots": Slots(adversary=pgd(steps=2))},
        lambda: image_family(norm="bn_dual"),
        True,
    ),
]

BY_NAME = {row.name: row for row in ROWS}

EXECUTORS = {
    "vmapped": ("vmapped", 0, 1),
    "chunked3": ("chunked", 3, 1),
    "bucketed_each": ("bucketed", 1, 1),
    "debugging": ("debugging",),
    "bucketed3": ("bucketed", 3, 1),
    "bucketed_shared": ("bucketed", 1, 1, ((0, 1),)),
    "sharded8": ("bucketed", 1, 8),
    "sharded4_chunks": ("chunked", 2, 4),
}
COHORT, ROUNDS = 5, 3


def play(algorithm: Algorithm, run, population, rounds=ROUNDS):
    """Final state and the info of each round, with the number of compilations after each."""
    store = device_store()
    key = jax.random.key(7)
    state, population, key = run.place((start(algorithm, store, population.size.shape[0], key), population, key))
    step = make_round(algorithm, run, store)
    infos, compilations = [], []
    for _ in range(rounds):
        state, info = step(state, population, key)
        infos.append(jax.device_get(info._replace(device=0, ran=0)))
        compilations.append(step._cache_size() if run.jit else 0)
    clients = population.size.shape[0]
    state = jax.device_get(state)
    # Over devices the rows are padded to equal blocks.
    return state._replace(memory=jax.tree.map(lambda rows: rows[:clients], state.memory)), infos, compilations


@pytest.fixture(scope="module")
def references():
    """What one item at a time at true shapes says, once a row."""
    made = {}

    def of(row):
        if row.name not in made:
            algorithm = row.make(row.family(), row.settings(), cohort=COHORT, **row.kwargs)
            made[row.name] = (algorithm, *play(algorithm, executor("bucketed"), toy_population(image=row.image))[:2])
        return made[row.name]

    return of


# Compilation is what a cell costs, so a row runs where it differs from the others: masked inside a vmap if its client
# code is its own, over devices if what it sends or keeps is. IFCA and CFL run over devices in test_bank.
UNDER = {
    "fedavg": ("vmapped", "sharded8"),
    "fedavg_adam": ("sharded8",),
    "fedprox": ("vmapped",),
    "heterofl_dynamic": ("vmapped", "sharded8"),
    "heterofl_fixed": ("vmapped",),
    "private_memory": tuple(EXECUTORS),
    "heterofl_conv": ("vmapped",),
    "fedavg_tracked_bn": ("sharded8",),
    "feddyn": ("sharded8",),
    "scaffold": ("sharded8",),
    "depthfl": ("vmapped", "sharded8"),
    "inclusivefl": ("sharded8",),
    "ifca": ("vmapped",),
    "cfl": ("vmapped",),
    "qffl": ("vmapped", "sharded8"),
    "afl": ("sharded8",),
    "term": ("vmapped",),
    "fjord": ("vmapped", "sharded8"),
    "fjord_efd": ("vmapped",),
    "lag": ("vmapped", "sharded8"),
    "fedpaq": ("vmapped",),
    "splitmix": ("vmapped", "sharded8"),
    "sheterofl": ("vmapped",),
    "fedavg_adversary": ("vmapped",),
}
CELLS = [
    pytest.param(row, how, id=f"{row.name}-{how}", marks=[pytest.mark.as_users] * (row.name == "heterofl_conv"))
    for row in ROWS
    for how in UNDER[row.name]
    if how != "bucketed_each"  # the reference
]


@pytest.mark.parametrize(("row", "how"), CELLS)
def test_same_answer_under_every_executor(row, how, references):
    algorithm, wanted, wanted_infos = references(row)
    state, infos, compilations = play(algorithm, executor(*EXECUTORS[how]), toy_population(image=row.image))
    assert worst(state, wanted) < 1e-5
    for info, reference in zip(infos, wanted_infos):
        assert worst(info, reference) < 1e-4
    assert compilations == [int(how != "debugging")] * ROUNDS
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("row", [BY_NAME["heterofl_dynamic"], BY_NAME["private_memory"]], ids=lambda row: row.name)
def test_same_answer_in_chunks_of_the_size_that_fits(row, references, monkeypatch):
    """The default of accelerators: a device with room for two clients of the larger level at a time."""
    algorithm, wanted, _ = references(row)
    chosen = []

    def sizes(asked, slots, buckets, each, memory):
        chosen.append(clients_at_once(asked, slots, buckets, each, memory=2 * each))
        return chosen[-1]

    monkeypatch.setattr(runners, "clients_at_once", sizes)
    state, _, compilations = play(algorithm, Executor(runners.bucketed(0)), toy_population())
    assert chosen[-2:] == [2, 2]
    assert worst(state, wanted) < 1e-5
    assert compilations == [1] * ROUNDS


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
@pytest.mark.parametrize("row", [BY_NAME["heterofl_dynamic"], BY_NAME["private_memory"]], ids=lambda row: row.name)
def test_a_client_that_is_not_finite_is_left_out_counted_and_named(row, how):
    algorithm = row.make(row.family(), row.settings(), cohort=COHORT, **row.kwargs)
    population = toy_population()
    bad = int(cohort_of(algorithm, population).ids[2])
    run = executor(*EXECUTORS[how])
    state, infos, _ = play(algorithm, run, poisoned(population, bad), rounds=1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert infos[0].numbers["failed"] == 1
    assert infos[0].numbers["clients"] == COHORT - 1
    items = infos[0].items
    assert items.ids[items.valid & ~items.ok].tolist() == [bad]
    for leaf in jax.tree.leaves(state.memory):
        assert (leaf[bad] == 0).all()


@pytest.mark.parametrize(
    "row", [BY_NAME["fedavg_adam"], BY_NAME["heterofl_dynamic"], BY_NAME["private_memory"]], ids=lambda row: row.name
)
def test_a_round_in_which_every_client_fails_changes_nothing(row):
    algorithm = row.make(row.family(), row.settings(), cohort=COHORT, **row.kwargs)
    population = toy_population()
    population = population._replace(x=jnp.full_like(population.x, jnp.nan))
    before = jax.device_get(start(algorithm, device_store(), population.size.shape[0], jax.random.key(7)))
    state, infos, _ = play(algorithm, executor("bucketed"), population, rounds=1)
    for old, new in zip(jax.tree.leaves(before[:2]), jax.tree.leaves(state[:2]), strict=True):
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
    algorithm = visits(mlp_family(), sgd(), cohort=COHORT)
    population = toy_population()
    state, _, _ = play(algorithm, executor(*EXECUTORS[how]), population, rounds=1)
    plan = cohort_of(algorithm, population)
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

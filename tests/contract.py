"""The contract table: every method with a family and settings. Adding a method is adding a row; see test_contract."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Algorithm
from hetfl_jax.engine.executors import executor
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
from tests.helpers import conv_family, exits_family, image_family, mlp_family, sgd, toy_population


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


def begun(algorithm: Algorithm, population):
    """The state before the first round."""
    return start(algorithm, device_store(), population.size.shape[0], jax.random.key(7))


def play(algorithm: Algorithm, run, population, rounds=ROUNDS, first=None, step=None):
    """Final state and the info of each round after ``first``, with the number of compilations after each."""
    first = begun(algorithm, population) if first is None else first
    first = jax.tree.map(jnp.copy, first)  # a round reuses the buffers of its state
    state, population, key = run.place((first, population, jax.random.key(7)))
    step = step or make_round(algorithm, run, device_store())
    infos, compilations = [], []
    for _ in range(rounds):
        state, info = step(state, population, key)
        infos.append(jax.device_get(info._replace(device=0, ran=0)))
        compilations.append(step._cache_size() if run.jit else 0)
    clients = population.size.shape[0]
    state = jax.device_get(state)
    # Over devices the rows are padded to equal blocks.
    return state._replace(memory=jax.tree.map(lambda rows: rows[:clients], state.memory)), infos, compilations


@cache
def algorithm_of(name):
    row = BY_NAME[name]
    return row.make(row.family(), row.settings(), cohort=COHORT, **row.kwargs)


@cache
def first_of(name):
    return begun(algorithm_of(name), toy_population(image=BY_NAME[name].image))


@cache
def step_of(name, how):
    return make_round(algorithm_of(name), executor(*EXECUTORS[how]), device_store())


def play_row(name, how, population=None, rounds=ROUNDS):
    """``play`` of a row; its programs are compiled once, whoever plays it."""
    population = toy_population(image=BY_NAME[name].image) if population is None else population
    return play(
        algorithm_of(name), executor(*EXECUTORS[how]), population, rounds, first_of(name), step_of(name, how)
    )  # fmt: skip


@cache
def wanted_of(name):
    """What one item at a time at true shapes says: (state, infos)."""
    return play_row(name, "bucketed_each")[:2]

"""The contract: every row of the table gives the same answer under every executor."""

import jax
import numpy as np
import pytest

from hetfl_jax.engine import runners
from hetfl_jax.engine.chunks import clients_at_once
from hetfl_jax.engine.executors import Executor
from tests.contract import EXECUTORS, ROUNDS, ROWS, algorithm_of, first_of, play, play_row, wanted_of
from tests.helpers import toy_population, worst

pytestmark = pytest.mark.slow

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
    pytest.param(row.name, how, id=f"{row.name}-{how}", marks=[pytest.mark.as_users] * (row.name == "heterofl_conv"))
    for row in ROWS
    for how in UNDER[row.name]
    if how != "bucketed_each"  # the reference
]


@pytest.mark.parametrize(("name", "how"), CELLS)
def test_same_answer_under_every_executor(name, how):
    wanted, wanted_infos = wanted_of(name)
    state, infos, compilations = play_row(name, how)
    assert worst(state, wanted) < 1e-5
    for info, reference in zip(infos, wanted_infos):
        assert worst(info, reference) < 1e-4
    assert compilations == [int(how != "debugging")] * ROUNDS
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["heterofl_dynamic", "private_memory"])
def test_same_answer_in_chunks_of_the_size_that_fits(name, monkeypatch):
    """The default of accelerators: a device with room for two clients of the larger level at a time."""
    chosen = []

    def sizes(asked, slots, buckets, each, memory):
        chosen.append(clients_at_once(asked, slots, buckets, each, memory=2 * each))
        return chosen[-1]

    monkeypatch.setattr(runners, "clients_at_once", sizes)
    run = Executor(runners.bucketed(0))
    state, _, compilations = play(algorithm_of(name), run, toy_population(), first=first_of(name))
    assert chosen[-2:] == [2, 2]
    assert worst(state, wanted_of(name)[0]) < 1e-5
    assert compilations == [1] * ROUNDS

"""CFL: what it coincides with, how it splits and places clients, and its bipartitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.clusters import bipartition, splitting
from hetfl_jax.clusters.report import matched
from hetfl_jax.engine import execute
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import cfl, fedavg
from tests.contract import EXECUTORS, play
from tests.helpers import mlp_family, sgd, toy_population, worst
from tests.test_bank import CFL, member, two_worlds

pytestmark = pytest.mark.slow


def test_cfl_that_never_splits_is_fedavg():
    rule = cfl.make(mlp_family(), sgd(), cohort=5, weighted=True, **CFL | dict(eps1=1e-9, eps2=1e-9))
    plain = play(fedavg.make(mlp_family(), sgd(), cohort=5), executor("bucketed"), toy_population())[0]
    state, infos, _ = play(rule, executor("bucketed"), toy_population())
    assert worst(member(state, 0), plain.server.variables) < 1e-6
    assert infos[-1].arrays["count"] == 1


SPLITTING = dict(clients=12, eps1=0.8, eps2=0.9, max_clusters=3, first_round=2)


@pytest.mark.parametrize("how", ["bucketed_each", "sharded8"])
def test_cfl_finds_the_two_groups_and_never_recompiles(how):
    pop, group = two_worlds()
    algorithm = cfl.make(mlp_family(), sgd(learning_rate=0.2), cohort=12, **SPLITTING)
    state, infos, compilations = play(algorithm, executor(*EXECUTORS[how]), pop, rounds=6)
    route = state.server.route
    assert int(route.count) == 2
    assert matched(route.table, group) == 1.0
    assert compilations == [1] * 6
    assert infos[-1].numbers["train_loss"] < 0.5 * infos[2].numbers["train_loss"]
    born = int(route.born[1])
    side = route.side[1]
    assert born >= 2
    np.testing.assert_array_equal(side == 1, route.table == 1)
    assert ((side >= 0) == True).all()  # noqa: E712


def test_cfl_places_absent_and_new_clients_by_the_tree():
    pop, group = two_worlds()
    training = sgd(learning_rate=0.1, keep_momentum=True)
    algorithm = cfl.make(mlp_family(), training, cohort=8, **SPLITTING)
    state, _, _ = play(algorithm, executor("bucketed"), pop, rounds=5)
    assert matched(state.server.route.table, group) == 1.0, "those who were absent at the split were asked"

    def ask(fn, sent, ids):
        return execute.survey(executor("bucketed"), fn, sent, pop, jnp.asarray(ids), jax.random.key(3))

    placed = splitting.place_by_tree(algorithm.between.base, state.server, ask, np.arange(12))
    np.testing.assert_array_equal(placed, state.server.route.table)


def test_cfl_with_a_client_momentum_splits_on_the_very_updates_of_the_round():
    """The round that is run again sees the momentum that the first run saw."""
    pop, group = two_worlds()
    training = sgd(learning_rate=0.1, momentum=0.5, keep_momentum=True)
    algorithm = cfl.make(mlp_family(), training, cohort=12, **SPLITTING)
    first_time = []

    def needed(info):
        first_time.append(float(info.numbers["train_loss"]))
        return algorithm.between.needed(info)

    watched = algorithm._replace(between=algorithm.between._replace(needed=needed))
    state, infos, _ = play(watched, executor("bucketed"), pop, rounds=5)
    assert matched(state.server.route.table, group) == 1.0
    np.testing.assert_allclose([info.numbers["train_loss"] for info in infos], first_time, rtol=1e-6)
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(state.memory))


def test_the_gap_test_keeps_a_cluster_whole():
    pop, _ = two_worlds()
    rule = SPLITTING | dict(gamma_max=0.999)
    state, infos, _ = play(cfl.make(mlp_family(), sgd(learning_rate=0.2), cohort=12, **rule), executor("bucketed"), pop)
    assert infos[-1].arrays["fires"][0]
    assert int(state.server.route.count) == 1


def test_similarity_is_free_of_scale_and_rotation():
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(9, 30)).astype(np.float32)
    turn, _ = np.linalg.qr(rng.normal(size=(30, 30)))
    gram = {n: np.asarray(bipartition.gram(jnp.asarray(u, jnp.float32)), np.float64)
            for n, u in (("plain", updates), ("scaled", 3 * updates), ("turned", updates @ turn))}  # fmt: skip
    similar = {n: bipartition.similarity(g) for n, g in gram.items()}
    np.testing.assert_allclose(similar["turned"], similar["plain"], atol=1e-5)
    np.testing.assert_allclose(similar["scaled"], similar["plain"], atol=1e-5)
    np.testing.assert_allclose(bipartition.norms(gram["turned"]), bipartition.norms(gram["plain"]), rtol=1e-5)
    np.testing.assert_allclose(bipartition.norms(gram["scaled"])[1], 3 * bipartition.norms(gram["plain"])[1], rtol=1e-5)
    for linkage in bipartition.LINKAGES:
        cuts = [bipartition.bipartition(s, linkage).second.tolist() for s in similar.values()]
        assert cuts[0] == cuts[1] == cuts[2]


def test_a_zero_update_still_gives_two_groups():
    updates = jnp.asarray(np.vstack([np.zeros(4), np.eye(4)]), jnp.float32)
    gram = np.asarray(bipartition.gram(updates), np.float64)
    cut = bipartition.bipartition(bipartition.similarity(gram))
    assert len(cut.first) + len(cut.second) == 5
    assert min(len(cut.first), len(cut.second)) >= 1

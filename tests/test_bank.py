"""Several models behind one method: IFCA and its bank, what they must coincide with and must leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.clusters.report import matched
from hetfl_jax.data import partition
from hetfl_jax.data.population import population
from hetfl_jax.data.views import renamings, rotations
from hetfl_jax.engine import rounds
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import cfl, depthfl, fedavg, ifca
from hetfl_jax.parts.bank import alike
from tests.contract import EXECUTORS, play
from tests.helpers import exits_family, mlp_family, sgd, toy_population, worst

pytestmark = pytest.mark.slow

CFL = dict(clients=12, eps1=1.0, eps2=1.0, max_clusters=4)


def member(state, number):
    return jax.tree.map(lambda v: v[number], state.server.members.variables)


def started(algorithm):
    """The server before the rounds of ``play``."""
    return jax.device_get(rounds.start(algorithm, rounds.device_store(), 12, jax.random.key(7)).server)


@pytest.fixture(scope="module")
def plain():
    return play(fedavg.make(mlp_family(), sgd(), cohort=5), executor("bucketed"), toy_population())[0]


@pytest.mark.parametrize("how", ["vmapped", "sharded8"])
def test_ifca_of_one_cluster_is_fedavg(how, plain):
    one = ifca.make(mlp_family(), sgd(), cohort=5, clusters=1, weighted=True)
    assert worst(member(play(one, executor(*EXECUTORS[how]), toy_population())[0], 0), plain.server.variables) < 1e-6


def test_ifca_over_one_level_of_heterofl_is_ifca():
    """With all classes everywhere and one level, HeteroFL inside is plain averaging."""
    family, pop = mlp_family(({"width": 1.0},)), toy_population(levels=1)
    pop = pop._replace(level=pop.level * 0, classes=jnp.ones_like(pop.classes))
    inside = ifca.make(family, sgd(), cohort=6, clusters=2, over="heterofl", proportions=(1,))
    plainly = ifca.make(family, sgd(), cohort=6, clusters=2)
    found, wanted = (play(a, executor("bucketed"), pop)[0] for a in (inside, plainly))
    assert worst(found.server.members.variables, wanted.server.members.variables) < 1e-6


def test_ifca_of_one_cluster_of_depthfl_is_depthfl():
    """FedDyn's private memory, what is sent besides the model and the server's own sums go through the bank."""
    family, told = exits_family(), {"clients_per_level": (6, 6)}
    one = ifca.make(family, sgd(), cohort=5, clusters=1, over="depthfl", **told)
    alone = depthfl.make(family, sgd(), cohort=5, **told)
    found, wanted = (play(a, executor("bucketed"), toy_population())[0] for a in (one, alone))
    assert worst(jax.tree.map(lambda v: v[0], found.server.members), wanted.server) < 1e-6
    assert worst(found.memory, wanted.memory) < 1e-6


def test_two_clusters_of_depthfl_with_feddyn():
    """The two worlds are told apart by clients of two depths, and a client's memory is its own in either."""
    pop, groups = two_worlds()
    family = exits_family(levels=({"depth": 2}, {"depth": 1}))
    told = {"over_args": {"clients_per_level": (3, 3)}, "clients_per_level": (6, 6)}
    rule = ifca.make(family, sgd(), cohort=12, clusters=2, over="depthfl", restarts=3, min_share=0.4, **told)
    state, infos, compilations = play(rule, executor(*EXECUTORS["sharded8"]), pop, rounds=8)
    assert matched(infos[-1].arrays["member"][np.argsort(infos[-1].arrays["member_ids"])][-12:], groups) == 1
    assert infos[-1].numbers["train_loss"] < infos[0].numbers["train_loss"]
    assert set(compilations) == {1}
    assert all(float(np.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(state.memory))


def swapped(algorithm, order):
    """The same method from its starts in another order."""

    def init(key):
        state, memory = algorithm.init(key)
        return state._replace(members=jax.tree.map(lambda v: v[jnp.array(order)], state.members)), memory

    return algorithm._replace(init=init)


def test_permuting_the_starts_permutes_the_result():
    algorithm = ifca.make(mlp_family(), sgd(), cohort=8, clusters=3)
    order = [2, 0, 1]
    first, infos, _ = play(algorithm, executor("bucketed"), toy_population())
    second, others, _ = play(swapped(algorithm, order), executor("bucketed"), toy_population())
    for new, old in enumerate(order):
        assert worst(member(second, new), member(first, old)) < 1e-6
    for info, other in zip(infos, others):
        np.testing.assert_array_equal(np.array(order)[other.arrays["member"]], info.arrays["member"])


def test_equal_starts_are_one_model_and_are_noticed():
    """Everybody ties and takes the first; on data that can be learnt it stays the better one."""
    pop, _ = two_worlds(names=((0, 1, 2),))
    algorithm = swapped(ifca.make(mlp_family(), sgd(), cohort=5, clusters=2, weighted=True), [0, 0])
    state, infos, _ = play(algorithm, executor("bucketed"), pop)
    assert all((info.arrays["member"] == 0).all() for info in infos)
    wanted = play(fedavg.make(mlp_family(), sgd(), cohort=5), executor("bucketed"), pop)[0]
    assert worst(member(state, 0), wanted.server.variables) < 1e-6
    assert alike(algorithm.init(jax.random.key(0))[0])
    assert not alike(ifca.make(mlp_family(), sgd(), cohort=5, clusters=2).init(jax.random.key(0))[0])


@pytest.mark.parametrize("averaging", ifca.AVERAGING)
def test_a_model_that_nobody_takes_stays_bit_for_bit(averaging):
    given = ifca.make(
        mlp_family(), sgd(), cohort=4, clusters=3, averaging=averaging,
        server_optimizer={"name": "adam", "learning_rate": 0.01},
    )  # fmt: skip

    def init(key):
        state, memory = given.init(key)
        useless = jax.tree.map(lambda v: v.at[1].set(100.0 * v[1] + 50), state.members.variables)
        return state._replace(members=state.members._replace(variables=useless)), memory

    algorithm = given._replace(init=init)
    before = started(algorithm)
    state, infos, _ = play(algorithm, executor("bucketed"), toy_population())
    assert not any((info.arrays["member"] == 1).any() for info in infos)
    rows = zip(jax.tree.leaves(before.members), jax.tree.leaves(state.server.members), strict=True)
    for old, new in rows:
        np.testing.assert_array_equal(old[1], new[1])


def test_gradient_averaging_divides_by_all_participants():
    """From one step each, its change is the share of the cluster times that of model averaging."""
    pop = toy_population()
    pop = pop._replace(level=pop.level * 0)
    found = {}
    for averaging in ifca.AVERAGING:
        algorithm = ifca.make(mlp_family(), sgd(steps=1), cohort=8, clusters=2, averaging=averaging)
        state, infos, _ = play(algorithm, executor("bucketed"), pop, rounds=1)
        change = jax.tree.map(jnp.subtract, state.server.members.variables, started(algorithm).members.variables)
        found[averaging] = change
        share = np.bincount(infos[0].arrays["member"], minlength=2) / 8
    scaled = jax.tree.map(lambda v: v * share.reshape(-1, *[1] * (v.ndim - 1)), found["models"])
    assert 0 < share[0] < 1
    assert worst(found["gradients"], scaled) < 1e-6


@pytest.mark.parametrize("how", ["vmapped"])
def test_restarts_are_those_starts_alone_and_the_best_goes_on(how):
    """Two starts in one program, each as if alone; after the choice the other is no longer trained."""
    pop, rounds = toy_population(), 4
    both = ifca.make(mlp_family(), sgd(shuffle=False), cohort=6, clusters=2, restarts=2, restart_rounds=2)
    state, infos, compilations = play(both, executor(*EXECUTORS[how]), pop, rounds=rounds)
    leader = int(state.server.route.leader)
    assert bool(state.server.route.decided)
    assert compilations == [1] * rounds
    assert [info.numbers["clients"] for info in infos] == [12, 12, 12, 6]
    alone = ifca.make(mlp_family(), sgd(shuffle=False), cohort=6, clusters=2)
    rows = [2 * leader, 2 * leader + 1]

    def init(key):
        start, memory = both.init(key)
        one, _ = alone.init(key)
        return one._replace(members=jax.tree.map(lambda v: v[jnp.array(rows)], start.members)), memory

    wanted, _, _ = play(alone._replace(init=init), executor(*EXECUTORS[how]), pop, rounds=rounds)
    for number, row in enumerate(rows):
        assert worst(member(state, row), member(wanted, number)) < 1e-6
        assert worst(both.model(state.server, 0, number), member(wanted, number)) < 1e-6


def test_a_start_is_rejected_before_training_if_a_model_gets_too_few():
    pop = toy_population()
    algorithm = ifca.make(mlp_family(), sgd(), cohort=8, clusters=2, restarts=4, min_share=0.25)
    start = started(algorithm)
    state, infos, _ = play(algorithm, executor("bucketed"), pop, rounds=2)
    assert infos[0].numbers["clients"] == 8, "the starts that were rejected are not trained"
    share = np.bincount(infos[0].arrays["member"][infos[0].arrays["member"] >= 0], minlength=2) / 8
    leader = int(state.server.route.leader)
    assert share.min() >= 0.25 or leader == 0
    for row in set(range(8)) - {2 * leader, 2 * leader + 1}:
        for old, new in zip(jax.tree.leaves(start.members), jax.tree.leaves(state.server.members), strict=True):
            np.testing.assert_array_equal(old[row], new[row])


def test_a_model_that_nobody_takes_has_no_momentum_of_former_rounds():
    """Divided by all participants, its mean change is 0 and not nothing; a momentum must not go on from there."""
    args = dict(averaging="gradients", server_optimizer={"name": "momentum"})
    algorithm = ifca.make(mlp_family(), sgd(), cohort=3, clusters=3, **args)
    run, store, pop, key = executor("bucketed"), rounds.device_store(), toy_population(), jax.random.key(7)
    state = rounds.start(algorithm, store, 12, key)
    step, chosen_before, left_alone = rounds.make_round(algorithm, run, store), set(), 0
    for _ in range(6):
        before = jax.device_get(state.server.members)
        state, info = step(state, pop, key)
        chosen = set(info.arrays["member"].tolist())
        for row in chosen_before - chosen:
            left_alone += 1
            for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.server.members), strict=True):
                np.testing.assert_array_equal(old[row], new[row])
        chosen_before |= chosen
    assert left_alone >= 2


def test_layers_that_are_all_shared_make_gradient_averaging_of_one_model():
    """The mean over all participants, however many models there are."""
    pop, found = toy_population(), {}
    pop = pop._replace(level=pop.level * 0)
    for k in (1, 3):
        shared = ("dense_0", "head")
        algorithm = ifca.make(mlp_family(), sgd(steps=1), cohort=8, clusters=k, averaging="gradients", shared=shared)

        def init(key, init=algorithm.init, k=k):
            state, memory = init(key)
            first = jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), state.members)
            return state._replace(members=first), memory

        found[k] = play(algorithm._replace(init=init), executor("bucketed"), pop, rounds=2)[0]
    assert worst(member(found[3], 2), member(found[1], 0)) < 1e-6
    assert worst(member(found[3], 2), started(algorithm).members.variables) > 1e-3


def test_a_model_that_is_lost_costs_no_client_its_reply():
    """A member that diverged is nobody's choice, and the others go on."""
    algorithm = ifca.make(mlp_family(), sgd(), cohort=6, clusters=3)

    def init(key):
        state, memory = algorithm.init(key)
        lost = jax.tree.map(lambda v: v.at[0].set(jnp.nan).at[1].set(3e38), state.members.variables)
        return state._replace(members=state.members._replace(variables=lost)), memory

    _, infos, _ = play(algorithm._replace(init=init), executor("bucketed"), toy_population())
    assert [info.numbers["failed"] for info in infos] == [0, 0, 0]
    assert all((info.arrays["member"] == 2).all() for info in infos)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_shared_representation_is_one_for_all_clusters(freeze):
    pop = toy_population()
    algorithm = ifca.make(mlp_family(), sgd(), cohort=8, clusters=2, shared=("dense_0",), freeze_shared=freeze)
    start = started(algorithm)
    state, infos, _ = play(algorithm, executor("bucketed"), pop)
    assert len(set(infos[0].arrays["member"].tolist())) == 2
    first, second = (member(state, number)["params"] for number in range(2))
    assert worst(first["dense_0"], second["dense_0"]) == 0
    assert worst(first["head"], second["head"]) > 1e-3
    moved = worst(first["dense_0"], jax.tree.map(lambda v: v[0], start.members.variables["params"]["dense_0"]))
    assert (moved == 0) if freeze else (moved > 1e-3)


def test_a_warm_start_takes_all_layers_but_those_drawn_anew(tmp_path):
    family = mlp_family()
    saved = fedavg.make(family, sgd(), cohort=2).init(jax.random.key(5))[0].variables["params"]
    file = tmp_path / "level_a.npz"
    np.savez(file, **{f"params/{a}/{b}": v for a, leaves in saved.items() for b, v in leaves.items()})
    state, _ = ifca.make(family, sgd(), cohort=4, clusters=2, warm_start=str(file)).init(jax.random.key(0))
    params = state.members.variables["params"]
    for number in range(2):
        assert worst(jax.tree.map(lambda v, n=number: v[n], params["dense_0"]), saved["dense_0"]) == 0
    assert not np.allclose(params["head"]["kernel"][0], params["head"]["kernel"][1])


def two_worlds(clients=12, n=20, names=((0, 1, 2), (1, 2, 0))):
    """Clients whose second half calls the classes by other names."""
    rng = np.random.default_rng(1)
    centre = rng.normal(size=(3, 6)) * 2
    y = rng.integers(0, 3, clients * n)
    x = (centre[y] + rng.normal(size=(y.size, 6)) * 0.3).astype(np.float32)
    group = np.arange(clients) * len(names) // clients
    views, size = renamings(6, np.array(names)), np.full(clients, n)
    return population(x, y, np.arange(y.size), size, levels=2, classes=3, view=group, views=views), group


def test_views_turn_images_and_rename_classes():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (4, 3, 3, 2)).astype(np.uint8), np.array([0, 1, 2, 0])
    turned = population(x, y, np.arange(4), np.array([2, 2]), view=np.array([0, 1]), views=rotations(3, (0, 1), 3))
    part = partition.per_group(4, 2, 1, seed=0)
    assert sorted(part.rows.tolist()) == [0, 1, 2, 3]
    shard = rounds.shards(turned, jnp.int32(1))._replace(x=turned.x, y=turned.y, rows=turned.rows, views=turned.views)
    from hetfl_jax.core.shards import examples

    seen, labels = examples(shard, jnp.array([2, 3]))
    np.testing.assert_array_equal(seen, np.rot90(x[2:], axes=(1, 2)))
    np.testing.assert_array_equal(labels, y[2:])
    with pytest.raises(ValueError, match=r"views 0\.\.2, allowed 0\.\.1"):
        population(x, y, np.arange(4), np.array([2, 2]), view=np.array([0, 2]), views=rotations(3, (0, 1), 3))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (ifca, dict(clusters=0), "0 clusters, allowed 1..5"),
        (ifca, dict(clusters=6), "6 clusters, allowed 1..5"),
        (ifca, dict(clusters=2, restarts=0), "0 restarts, 3 rounds, allowed >= 1 and >= 0"),
        (ifca, dict(clusters=2, restarts=2, restart_rounds=-1), "2 restarts, -1 rounds"),
        (
            ifca,
            dict(clusters=2, restarts=2, over="depthfl", clients_per_level=(6, 6)),
            "2 restarts of clients with memory",
        ),
        (ifca, dict(clusters=2, over="heterofl", proportions=(1, 1), weighted=True), "weighted with over='heterofl'"),
        (ifca, dict(clusters=2, over="feddyn.x"), "method 'feddyn.x' inside IFCA"),
        (ifca, dict(clusters=2, shared=("head",), server_optimizer={"name": "adam"}), "a server that keeps .*count"),
        (ifca, dict(clusters=2, averaging="both"), "'both' is not one of models, gradients"),
        (ifca, dict(clusters=2, min_share=0.6), "min_share 0.6"),
        (ifca, dict(clusters=2, shared=("nope",)), "layer 'nope' is not one of dense_0, head"),
        (ifca, dict(clusters=2, over="nope"), "method 'nope' inside IFCA"),
        (ifca, dict(clusters=2, over="feddyn"), r"clients_per_level \(\): need 2 numbers"),
        (cfl, CFL | dict(eps1=0.0), r"eps1 0.0 and eps2 1.0: need 0 < eps1 <= eps2"),
        (cfl, CFL | dict(eps1=2.0), r"eps1 2.0 and eps2 1.0: need 0 < eps1 <= eps2"),
        (cfl, CFL | dict(gamma_max=1.0), "gamma_max 1.0"),
        (cfl, CFL | dict(linkage="ward"), "'ward' is not one of complete, single"),
        (cfl, CFL | dict(max_clusters=13), "13 clusters, allowed 1..12"),
        (cfl, CFL | dict(min_clients=2), "min_clients 2, allowed >= 3"),
        (cfl, CFL | dict(clients=10_000_000), "the updates of all splits need up to"),
    ],
)
def test_mistakes_are_named(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make.make(mlp_family(), sgd(), cohort=5, **changes)


def test_models_are_first_trained_by_forced_groups():
    """For two rounds every client trains the model of its share, whatever its loss; then it chooses."""
    pop, groups = two_worlds()
    given = dict(cohort=12, clusters=2, clients=12)
    rule = ifca.make(mlp_family(), sgd(), forced_rounds=2, **given)
    _, infos, _ = play(rule, executor("bucketed"), pop)
    taken = [dict(zip(info.arrays["member_ids"].tolist(), info.arrays["member"].tolist())) for info in infos]
    assert taken[0] == taken[1]
    assert sorted(taken[0].values()) == [0] * 6 + [1] * 6
    assert matched(np.array([taken[0][client] for client in range(12)]), groups) < 1
    free = play(ifca.make(mlp_family(), sgd(), **given), executor("bucketed"), pop)[1]
    assert (free[0].arrays["member"] != infos[0].arrays["member"]).any()
    with pytest.raises(ValueError, match="forced_rounds 2 with 3 restarts"):
        ifca.make(mlp_family(), sgd(), forced_rounds=2, restarts=3, **given)

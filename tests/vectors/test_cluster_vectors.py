"""IFCA and CFL against numbers of the official code."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.clusters import bipartition
from hetfl_jax.clusters.report import matched
from hetfl_jax.core.types import Plan, Seen, Shard, State, Tally
from hetfl_jax.data import partition
from hetfl_jax.data.population import population
from hetfl_jax.data.views import rotations
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round
from hetfl_jax.engine.runners import add_reply
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import cfl, ifca
from hetfl_jax.models import MLP, families
from hetfl_jax.parts import merge, objective
from hetfl_jax.parts.bank import Noted, Report
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.local import local
from hetfl_jax.run.evaluate import tallies
from tests.helpers import context
from tests.vectors.discover import FOLDER, of_kind, read

pytestmark = pytest.mark.vectors


def mlp_params(z, prefix, suffix=""):
    """Official arrays W1, b1, W2, b2 as the tree of ``MLP``."""
    w1, b1, w2, b2 = (jnp.asarray(z[f"{prefix}_{name}{suffix}"]) for name in ("W1", "b1", "W2", "b2"))
    return {"dense_0": {"kernel": w1, "bias": b1}, "head": {"kernel": w2, "bias": b2}}


def worst_of(found, wanted):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def clients_of(x, y, **options):
    """A population of equal clients from arrays [m, n, ...]."""
    m, n = y.shape
    return population(x.reshape(m * n, *x.shape[2:]), y.ravel(), np.arange(m * n), np.full(m, n), **options)


def server_with(algorithm, variables):
    """A bank's state with these models, leaves [k, ...]."""
    state, _ = algorithm.init(jax.random.key(0))
    return state._replace(members=state.members._replace(variables=variables))


def losses(algorithm, server, data, batch):
    """Of every model on every client, [N, k]; one model has no axis of its own."""
    seen = jax.jit(lambda server, data: tallies(algorithm, executor("bucketed"), server, 0, data, batch))(server, data)
    return jax.tree.map(lambda v: np.asarray(v).reshape(data.size.shape[0], -1), seen)


def rounds_of(algorithm, server, data, rounds):
    """States after each round."""
    step = make_round(algorithm, executor("bucketed"), device_store())
    state = State(jax.tree.map(jnp.copy, server), (), jnp.int32(0))  # a round reuses its state's buffers
    for _ in range(rounds):
        state, info = step(state, data, jax.random.key(0))
        state = jax.tree.map(jnp.copy, state)
        yield jax.device_get(state.server), jax.device_get(info)


@pytest.mark.parametrize("name", of_kind("cluster/ifca_mlp_*"))
def test_model_averaging(name):
    """In float64: one of the files is so steep that any two float32 programs differ by its tolerance."""
    with jax.enable_x64(True):
        _model_averaging(read(name))


def _model_averaging(z):
    given = json.loads(str(z["settings"]))
    k, m, n = given["p"], given["m"], given["n"]
    fam = families.family(MLP(hidden=(given["h"],)), [dict(width=1.0)], jnp.zeros((1, 784)))
    training = local(learning_rate=given["lr"], batch_size=n, epochs=given["tau"], full_batch=True)
    algorithm = ifca.make(fam, training, cohort=m, clusters=k)
    train, test = clients_of(z["x_train"], z["y_train"], classes=10), clients_of(z["x_test"], z["y_test"], classes=10)
    server = server_with(algorithm, {"params": jax.tree.map(lambda v: v.astype(jnp.float64), mlp_params(z, "init"))})

    def check(server, number):
        found = losses(algorithm, server, train, n)
        np.testing.assert_allclose(found.loss / n, z[f"loss_train_r{number}"], rtol=2e-5, atol=2e-6)
        np.testing.assert_array_equal(found.loss.argmin(1), z[f"assign_r{number}"])
        best = np.take_along_axis(found.correct, found.loss.argmin(1)[:, None], 1)
        assert best.sum() / (m * n) == pytest.approx(float(z[f"acc_train_r{number}"]), abs=1e-9)
        if f"correct_train_r{number}" in z:
            np.testing.assert_array_equal(found.correct, z[f"correct_train_r{number}"])

    check(server, 0)
    sent = algorithm.send(server, jnp.int32(0))
    one = jax.jit(lambda shard: algorithm.client(context(0, shard, sent=sent)))
    for client in range(m):
        shard = Shard(train.x, train.y, train.rows, train.offset[client], train.size[client], train.classes[client])
        reply = one(shard)
        assert int(reply.member) == z["assign_r0"][client]
        start = jax.tree.map(lambda v, member=reply.member: v[member], server.members.variables["params"])
        after = jax.tree.map(jnp.add, start, reply.total.delta["params"])
        assert worst_of(after, jax.tree.map(lambda v, i=client: v[i], mlp_params(z, "client", "_r1"))) < 5e-6

    before = server
    for number, (after, info) in enumerate(rounds_of(algorithm, server, train, 3), 1):
        wanted = mlp_params(z, "global", f"_r{number}")
        assert worst_of(after.members.variables["params"], wanted) < (5e-6 if number == 1 else 1e-5)
        empty = set(range(k)) - set(info.arrays["member"].tolist())
        assert empty == set(range(k)) - set(z[f"assign_r{number - 1}"].tolist())
        for old, new in zip(jax.tree.leaves(before.members), jax.tree.leaves(after.members), strict=True):
            for member in empty:
                np.testing.assert_array_equal(np.asarray(old)[member], new[member])
        check(after, number)
        found = losses(algorithm, after, test, n)
        np.testing.assert_allclose(found.loss / n, z[f"loss_test_r{number}"], rtol=2e-5, atol=2e-6)
        chosen = found.loss.argmin(1)
        np.testing.assert_array_equal(chosen, z[f"assign_test_r{number}"])
        accuracy = np.take_along_axis(found.correct, chosen[:, None], 1).sum() / found.examples[:, 0].sum()
        assert accuracy == pytest.approx(float(z[f"acc_test_r{number}"]), abs=1e-7)
        before = after


class Linear(nn.Module):
    """One weight vector, no intercept."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, use_bias=False, name="theta")(x)


@pytest.mark.parametrize("name", of_kind("cluster/ifca_synth_*"))
def test_gradient_averaging(name):
    z = read(name)
    given = json.loads(str(z["settings"]))
    m, k, n, rate = given["m"], given["p"], given["n"], given["lr"]
    fam = families.family(Linear(), [{}], jnp.zeros((1, given["d"])))
    algorithm = ifca.make(
        fam, local(learning_rate=rate, batch_size=n, full_batch=True), cohort=m, clusters=k, averaging="gradients",
        slots=Slots(objective=objective.squared_error()),
    )  # fmt: skip
    data = clients_of(z["X"], z["y"])
    server = server_with(algorithm, {"params": {"theta": {"kernel": jnp.asarray(z["theta_init"])[..., None]}}})
    sent = algorithm.send(server, jnp.int32(0))
    one = jax.jit(lambda shard: algorithm.client(context(0, shard, sent=sent)))
    every = []
    for client in range(m):
        shard = Shard(data.x, data.y, data.rows, data.offset[client], data.size[client], data.classes[client])
        reply = one(shard)
        every.append(reply.report.judged.loss / n)
        gradient = reply.total.delta["params"]["theta"]["kernel"][:, 0] / -rate
        np.testing.assert_allclose(gradient, z["grad_r0"][client, int(reply.member)], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.stack(every), z["loss_r0"], rtol=1e-5, atol=1e-5)
    path = z["traj_minloss_mindist"]
    for number, (after, info) in enumerate(rounds_of(algorithm, server, data, len(path))):
        theta = after.members.variables["params"]["theta"]["kernel"][..., 0]
        distance = np.linalg.norm(theta[:, None] - z["theta_true"], axis=-1).min(1).mean()
        assert distance == pytest.approx(path[number, 1], abs=1e-4)
        if f"counts_r{number}" in z:
            np.testing.assert_array_equal(np.bincount(info.arrays["member"], minlength=k), z[f"counts_r{number}"])
            order = np.argsort(info.arrays["member_ids"])
            np.testing.assert_array_equal(info.arrays["member"][order], z[f"assign_r{number}"])
            np.testing.assert_allclose(theta, z[f"theta_r{number + 1}"], atol=2e-5)
    np.testing.assert_allclose(theta, z["theta_final"], atol=1e-4)
    closest = np.linalg.norm(theta[:, None] - z["theta_true"], axis=-1).argmin(1)
    np.testing.assert_array_equal(closest, z["final_closest"])


def stacked_family(leaves):
    """A family whose parameters are leaves of these shapes."""

    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name, shape in leaves.items():
                self.param(name, nn.initializers.zeros, shape)
            return jnp.zeros((x.shape[0], 1))

    return families.family(Holder(), [{}], jnp.zeros((1, 1)))


def nobody(count):
    """A plan of ``count`` items of which only the number matters."""
    zero = jnp.zeros(count, jnp.int32)
    return Plan(jnp.arange(count), jnp.ones(count, bool), zero)


@pytest.mark.parametrize("name", of_kind("cluster/ifca_weighted_agg*"))
def test_weighted_aggregation(name):
    z = read(name)
    names = sorted(key.removeprefix("init_") for key in z if key.startswith("init_"))
    fam = stacked_family({leaf: z[f"init_{leaf}"].shape[1:] for leaf in names})
    k, clients = z["init_0"].shape[0], len(z["group"])
    algorithm = ifca.make(fam, local(learning_rate=0.1, batch_size=1), cohort=clients, clusters=k, weighted=True)
    start = {"params": {leaf: jnp.asarray(z[f"init_{leaf}"]) for leaf in names}}
    server = server_with(algorithm, start)
    rule = merge.overlap_mean(fam)
    total = None
    for client, group in enumerate(z["group"]):
        delta = {"params": {leaf: z[f"client_{leaf}"][client] - z[f"init_{leaf}"][group] for leaf in names}}
        shard = Shard(None, None, None, 0, jnp.int32(z["num_samples"][client]), jnp.ones(1, bool))
        lifted = rule.lift(delta, context(0, shard))
        total = jax.tree.map(lambda t: jnp.zeros((k, *t.shape)), lifted) if total is None else total
        total = add_reply(lifted, jnp.int32(group), total)
    ones = [Tally(*(jnp.ones(shape) for _ in Tally._fields)) for shape in ((clients,), (clients, k))]
    no_cost = [jnp.zeros((clients, *shape), jnp.int32) for shape in ((2, 1), (3,), (3,))]
    report = Report(Seen(ones[0], *no_cost), jnp.asarray(z["group"], jnp.int32), ones[1])
    plan = nobody(clients)._replace(notes=Noted((), server.route))
    sent = algorithm.send(server, jnp.int32(0))
    after, _ = algorithm.server(server, plan, sent, total, report, jnp.ones(clients, bool))
    for leaf in names:
        np.testing.assert_allclose(after.members.variables["params"][leaf], z[f"agg_{leaf}"], rtol=1e-6, atol=1e-7)
        for empty in set(range(k)) - set(z["group"].tolist()):
            np.testing.assert_array_equal(after.members.variables["params"][leaf][empty], z[f"init_{leaf}"][empty])


@pytest.mark.parametrize("name", of_kind("cluster/ifca_data*"))
def test_rotations_and_partitions(name):
    z = read(name)
    side = z["img"].shape[1]
    turns = sorted(int(m[1]) for m in (re.fullmatch(r"rot(\d)_flat", key) for key in z) if m)
    views = rotations(side, turns, classes=10)
    for row, turn in enumerate(turns):
        turned = z["img"].reshape(-1, side * side)[:, np.asarray(views.pixels[row])]
        np.testing.assert_array_equal(turned, z[f"rot{turn}_flat"])
    clients, n = z["part_small_idx"].shape
    groups = z["part_small_cluster"].max() + 1
    small = partition.per_group(clients * n // groups, clients, groups, seed=0)
    np.testing.assert_array_equal(small.rows.reshape(clients, n), z["part_small_idx"])
    test = partition.per_group(clients * n // groups, clients, groups, seed=0, shuffle=False)
    np.testing.assert_array_equal(test.rows.reshape(clients, n), z["part_small_test_idx"])
    for key in (key for key in z if re.fullmatch(r"part_full\d+_cluster_counts", key)):
        m, counts = int(re.search(r"\d+", key)[0]), z[key]
        full = partition.per_group(60_000, m, len(counts), seed=0)
        rows = full.rows.reshape(m, -1)
        prefix = key.removesuffix("_cluster_counts") + "_seed0_"
        np.testing.assert_array_equal(np.bincount(np.arange(m) * len(counts) // m), counts)
        for excerpt in (other for other in z if other.startswith(prefix)):
            what = re.search(r"(first|client)(\d+)$", excerpt)
            wanted = rows[: int(what[2])] if what[1] == "first" else rows[int(what[2])]
            np.testing.assert_array_equal(wanted, z[excerpt])


@pytest.mark.parametrize("name", of_kind("cluster/ifca_rotmnist_*"))
@pytest.mark.as_users
def test_rotated_mnist_follows_the_official_run(name):
    """Two rounds here; ``python -m experiments.ifca_rotated_mnist.peer`` goes through all."""
    peer = pytest.importorskip("experiments.ifca_rotated_mnist.peer")
    rows = peer.follow(FOLDER / f"{name}.npz", rounds=2)
    for row in rows[1:]:
        assert row["accuracy"] == pytest.approx(row["official accuracy"], abs=0.003)
        assert row["loss"] == pytest.approx(row["official loss"], rel=5e-4)
        off = np.abs(np.subtract(row["counts"], row["official counts"])).max()
        assert off <= (2 if row["round"] == 0 else 0)
    assert rows[-1]["recovery"] == 1.0


def same_partition(found, wanted):
    """Equal as unordered partitions."""
    return {frozenset(np.flatnonzero(found == c)) for c in np.unique(found)} == {
        frozenset(np.flatnonzero(wanted == c)) for c in np.unique(wanted)
    }


@pytest.mark.parametrize("name", [p for p in of_kind("cluster/cfl_*") if "recursion" not in p.values[0]])
def test_one_split(name):
    z = read(name)
    gram = np.asarray(bipartition.gram(jnp.asarray(z["updates"])), np.float64)
    similar = bipartition.similarity(gram)
    np.testing.assert_allclose(similar, z["similarity"], atol=2e-6)
    mean, most = bipartition.norms(gram)
    assert most == pytest.approx(float(z["max_norm"]), rel=1e-6)
    assert mean == pytest.approx(float(z["mean_norm"]), rel=2e-6, abs=1e-6)
    clients = len(similar)
    fires = mean < z["eps1"] and most > z["eps2"] and clients > 2
    assert fires == bool(z["would_split"])
    tied = (np.diag(z["similarity"]) < 0.5).any()
    if not tied:
        for linkage in bipartition.LINKAGES:
            cut = bipartition.bipartition(similar, linkage)
            side = np.isin(np.arange(clients), cut.second)
            assert same_partition(side, z[f"bipartition_{linkage}"])
            assert cut.cross == pytest.approx(float(z[f"alpha_cross_max_{linkage}"]), abs=2e-6)
            assert cut.gamma == pytest.approx(float(z[f"gamma_{linkage}"]), abs=2e-6)
    # The same through a server: one round that does not split, and one that must.
    for key, eps1 in (("W_after_nosplit", 1e-9), ("W_after_split", 1e9)):
        if key in z and not (tied and key == "W_after_split"):
            np.testing.assert_allclose(served(z, eps1), z[key], atol=1e-6, err_msg=key)


def served(z, eps1):
    """Everybody's model after one round of CFL in which client i replies with ``updates[i]``."""
    updates = jnp.asarray(z["updates"])
    clients, size = updates.shape
    fam = stacked_family({"w": (size,)})
    algorithm = cfl.make(
        fam, local(learning_rate=0.1, batch_size=1), cohort=clients, clients=clients, eps1=eps1, eps2=eps1,
        gamma_max=0.0, first_round=0, max_clusters=2,
    )  # fmt: skip

    def replying(inner):
        def client(context):
            reply, shard = inner(context), context.shard
            delta = {"params": {"w": updates[shard.offset]}}
            total = reply.total._replace(delta=delta)
            full = total if reply.report.total != () else ()
            norm = jnp.linalg.norm(updates[shard.offset])
            return reply._replace(total=total, report=reply.report._replace(norm=norm, total=full))

        return client

    between = algorithm.between
    collecting = between.collecting._replace(client=replying(between.collecting.client))
    # eps2 = eps1 = 1e9 would never be exceeded by a norm: the decision is forced, the cut is what is tested.
    forced = between._replace(needed=lambda info: eps1 > 1, collecting=collecting._replace(server=force(collecting)))
    algorithm = algorithm._replace(client=replying(algorithm.client), between=forced)
    server = server_with(algorithm, {"params": {"w": jnp.tile(jnp.asarray(z["W_before"])[:1], (2, 1))}})
    data = population(np.zeros((clients, 1)), np.zeros(clients, int), np.arange(clients), np.ones(clients, int))
    (after, _), *_ = rounds_of(algorithm, server, data, 1)
    return after.members.variables["params"]["w"][after.route.table]


def force(collecting):
    def server(state, *rest):
        state, (*collected, fires) = collecting.server(state, *rest)
        return state, (*collected, fires.at[0].set(True))

    return server


@pytest.mark.parametrize("name", of_kind("cluster/cfl_recursion_*"))
def test_recursion_with_global_numbers(name):
    z = read(name)
    similar = np.asarray(z["similarity"], np.float64)
    gram = np.asarray(bipartition.gram(jnp.asarray(z["updates"])), np.float64)
    np.testing.assert_allclose(bipartition.similarity(gram), similar, atol=2e-6)
    clusters = [np.arange(len(similar))]
    for level in range(1, int(z["n_levels"]) + 1):
        clusters = bipartition.split(similar, clusters, float(z["gamma_max"]), "complete")
        label = np.empty(len(similar), int)
        for number, members in enumerate(clusters):
            label[members] = number
        assert same_partition(label, z[f"labels_level{level}"]), level
    assert matched(label, z["true_cluster"]) == 1.0

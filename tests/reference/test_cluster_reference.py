"""Clusters against plain NumPy: whole rounds of IFCA on a linear net, CFL's criteria and its cut."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.clusters import bipartition, report
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import ifca
from hetfl_jax.models import build, families
from tests.contract import play
from tests.helpers import sgd, toy_population
from tests.reference.test_local_reference import cross_entropy

ROUNDS = 2


def data_of(pop, client):
    rows = np.asarray(pop.rows)[int(pop.offset[client]) :][: int(pop.size[client])]
    return np.asarray(pop.x, float)[rows], np.asarray(pop.y)[rows]


@pytest.mark.parametrize(("averaging", "weighted"), [("models", True), ("gradients", False)])
def test_rounds_of_ifca(averaging, weighted):
    """Algorithm 1: ``a_i = argmin_j F_i(theta_j)``; option II, the mean of its clients; option I, divided by all."""
    pop = toy_population(levels=1)
    fam = families.family(build("linear", classes=3), [{}], jnp.zeros((1, 6)))
    epochs = 1 if averaging == "gradients" else 3
    settings = sgd(momentum=0.0, clip_norm=0.0, epochs=epochs, batch_size=11, full_batch=True, learning_rate=0.3)
    algorithm = ifca.make(fam, settings, cohort=12, clusters=3, averaging=averaging, weighted=weighted)
    first = jax.device_get(algorithm.init(jax.random.fold_in(jax.random.key(7), 0))[0].members.variables)
    head = first["params"]["head"]
    models = [(head["kernel"][j].astype(float), head["bias"][j].astype(float)) for j in range(3)]
    state, infos, _ = play(algorithm, executor("bucketed"), pop, rounds=ROUNDS)
    for info in infos:
        sums, weight = [[0.0, 0.0] for _ in models], np.zeros(3)
        chosen = {}
        for client in range(12):
            x, y = data_of(pop, client)
            own = int(np.argmin([cross_entropy(w, b, x, y)[0] for w, b in models]))
            w, b = models[own]
            for _ in range(epochs):
                _, gw, gb = cross_entropy(w, b, x, y)
                w, b = w - 0.3 * gw, b - 0.3 * gb
            counts = len(y) if weighted else 1.0
            sums[own] = [sums[own][0] + counts * (w - models[own][0]), sums[own][1] + counts * (b - models[own][1])]
            weight[own] += counts
            chosen[client] = own
        below = np.full(3, weight.sum()) if averaging == "gradients" else np.maximum(weight, 1e-9)
        models = [(w + s[0] / n, b + s[1] / n) for (w, b), s, n in zip(models, sums, below)]
        assert {int(c): int(m) for c, m in zip(info.arrays["member_ids"], info.arrays["member"])} == chosen
    found = state.server.members.variables["params"]["head"]
    for j, (w, b) in enumerate(models):
        np.testing.assert_allclose(found["kernel"][j], w, atol=2e-5)
        np.testing.assert_allclose(found["bias"][j], b, atol=2e-5)


@pytest.mark.parametrize("seed", range(4))
def test_similarities_and_norms(seed):
    rng = np.random.default_rng(seed)
    updates = {"a": rng.normal(size=(6, 3, 2)), "b": rng.normal(size=(6, 4))}
    rows = np.concatenate([updates["a"].reshape(6, -1), updates["b"]], 1)
    gram = np.asarray(bipartition.gram(jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), updates)), np.float64)
    similar = bipartition.similarity(gram)
    for i, j in combinations(range(6), 2):
        cosine = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
        assert similar[i, j] == pytest.approx(cosine, abs=1e-5)
    mean, largest = bipartition.norms(gram)
    assert mean == pytest.approx(np.linalg.norm(rows.mean(0)), rel=1e-4)
    assert largest == pytest.approx(max(np.linalg.norm(row) for row in rows), rel=1e-5)


def merged_by_hand(similar, method):
    """Agglomerative clustering by loops, until two groups are left."""
    groups = [{i} for i in range(len(similar))]
    worst = max if method == "complete" else min
    while len(groups) > 2:
        pairs = combinations(range(len(groups)), 2)
        far = {(a, b): worst(1 - similar[i, j] for i in groups[a] for j in groups[b]) for a, b in pairs}
        a, b = min(far, key=far.get)
        groups[a] |= groups.pop(b)
    return {frozenset(group) for group in groups}


@pytest.mark.parametrize("method", bipartition.LINKAGES)
@pytest.mark.parametrize("seed", range(6))
def test_the_cut(seed, method):
    """Both linkages by hand; single linkage has the least largest similarity across of all cuts, the paper's rule."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(7, 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similar = rows @ rows.T
    cut = bipartition.bipartition(similar, method)
    assert {frozenset(cut.first.tolist()), frozenset(cut.second.tolist())} == merged_by_hand(similar, method)
    assert 0 in cut.first
    across = max(similar[i, j] for i in cut.first for j in cut.second)
    assert cut.cross == pytest.approx(across)
    assert cut.gamma == pytest.approx(np.sqrt((1 - across) / 2))
    if method == "single":
        sides = [set(side) | {0} for k in range(6) for side in combinations(range(1, 7), k)]
        best = min(max(similar[i, j] for i in side for j in range(7) if j not in side) for side in sides)
        assert cut.cross == pytest.approx(best)


def test_who_is_in_the_right_cluster():
    """The best one-to-one matching, by trying all of them."""
    from itertools import permutations

    rng = np.random.default_rng(0)
    for _ in range(20):
        cluster, truth = rng.integers(0, 3, 12), rng.integers(0, 3, 12)
        best = max(np.mean(np.array(order)[cluster] == truth) for order in permutations(range(3)))
        assert report.matched(cluster, truth) == pytest.approx(best)

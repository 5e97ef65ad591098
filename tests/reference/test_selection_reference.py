"""Selection and fairness parts against plain NumPy, written from the equations, on random inputs."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.fairness import fairness
from hetfl_jax.core.types import ClientContext, Tally
from hetfl_jax.data.synthetic import linear_clients
from hetfl_jax.parts import choose, divfl, fair

SEEDS = range(4)


def gradients(seed, clients=9, parameters=6):
    """Rows far from the origin, in clusters: what makes differences of squares lose digits."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(3, parameters)) * 5 + 20
    return centre[rng.integers(3, size=clients)] + rng.normal(size=(clients, parameters))


def apart(rows):
    return np.sqrt(np.square(rows[:, None] - rows[None]).sum(-1))


def objective(distance, picks):
    return distance[:, list(picks)].min(1).sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_distances(seed):
    rows = gradients(seed, 30, 50).astype(np.float32)
    exact = apart(rows.astype(np.float64))
    found = np.asarray(divfl.distances(jnp.asarray(rows)))
    assert np.abs(found - exact).max() < 1e-5 * exact.max()
    assert (np.diag(found) == 0).all()
    assert (found == found.T).all() or np.abs(found - found.T).max() < 1e-5 * exact.max()


@pytest.mark.parametrize("seed", SEEDS)
def test_refreshed_rows_are_as_if_all_were_computed_anew(seed):
    rng = np.random.default_rng(seed)
    table = jnp.asarray(gradients(seed, 12), jnp.float32)
    ids, rows = jnp.asarray(rng.permutation(12)[:4]), jnp.asarray(gradients(seed + 9, 4), jnp.float32)
    ok = jnp.asarray([True, False, True, True])
    rows = rows.at[1].set(jnp.nan)
    new, distance = divfl.refreshed(table, divfl.distances(table), ids, rows, ok)
    expected = np.asarray(table).copy()
    expected[np.asarray(ids)[np.asarray(ok)]] = rows[ok]
    np.testing.assert_array_equal(new, expected)
    np.testing.assert_allclose(distance, apart(expected.astype(np.float64)), atol=1e-4)
    assert (jnp.diag(distance) == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_greedy_pick_is_the_best_of_all(seed):
    """Brute force of each step, and the bound of the greedy against the best of all sets."""
    distance = apart(gradients(seed))
    picks = divfl.greedy(jnp.asarray(distance, jnp.float32), 4)
    chosen = []
    for client, cost in zip(picks.ids.tolist(), picks.cost.tolist()):
        costs = {j: objective(distance, [*chosen, j]) for j in range(9) if j not in chosen}
        assert costs[client] <= min(costs.values()) * (1 + 1e-5)
        chosen.append(client)
        assert cost == pytest.approx(objective(distance, chosen), rel=1e-5)
    best = min(objective(distance, s) for s in combinations(range(9), 4))
    phantom = 9 * distance.max()  # a client that is as far from all as any two are
    assert phantom - picks.cost[-1] >= (1 - np.exp(-1)) * (phantom - best)


def test_greedy_takes_everybody_once_and_stops():
    distance = divfl.distances(jnp.asarray(gradients(0), jnp.float32))
    picks = divfl.greedy(distance, 9)
    assert sorted(picks.ids.tolist()) == list(range(9))
    assert picks.cost[-1] == 0
    some = jnp.arange(9) % 3 > 0
    picks = divfl.greedy(distance.at[0].set(jnp.nan).at[:, 0].set(jnp.nan), 9, valid=some)
    assert sorted(picks.ids[picks.valid].tolist()) == [1, 2, 4, 5, 7, 8]
    assert picks.valid.tolist() == [True] * 6 + [False] * 3
    alone = divfl.greedy(distance[1:3][:, 1:3], 1)
    assert alone.cost[0] == pytest.approx(float(distance[1, 2]))
    with pytest.raises(ValueError, match=r"cohort of 10 clients, allowed 1..9 \(select.args.cohort\)"):
        divfl.greedy(distance, 10)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_stochastic_greedy_looks_at_some(seed):
    distance = apart(gradients(seed, 20))
    among = divfl.some_remaining(jax.random.key(seed), 5)
    picks = divfl.greedy(jnp.asarray(distance, jnp.float32), 5, among)
    taken = np.zeros(20, bool)
    chosen = []
    for step, client in enumerate(picks.ids.tolist()):
        looked_at = np.asarray(among(step, jnp.asarray(taken)))
        assert len(set(looked_at.tolist())) == 5
        assert not taken[looked_at].any()
        costs = {j: objective(distance, [*chosen, j]) for j in looked_at.tolist()}
        assert costs[client] <= min(costs.values()) * (1 + 1e-5)
        chosen.append(client)
        taken[client] = True
    everybody = divfl.greedy(jnp.asarray(distance, jnp.float32), 20, among)
    assert sorted(everybody.ids.tolist()) == list(range(20))


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_of_picks(seed):
    distance, size = apart(gradients(seed)), np.arange(1, 10)
    ids = [7, 2, 4]
    near = np.bincount(distance[:, ids].argmin(1), minlength=3)
    found = [
        np.asarray(divfl.shares(by, jnp.asarray(size), jnp.asarray(distance), jnp.asarray(ids))) for by in divfl.BY
    ]
    for weights, expected in zip(found, (size[ids] / size[ids].sum(), np.full(3, 1 / 3), near / 9)):
        np.testing.assert_allclose(weights, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="weights by 'n', allowed examples, alike, clusters"):
        divfl.shares("n", jnp.asarray(size), jnp.asarray(distance), jnp.asarray(ids))


def test_a_projection_keeps_distances_within_its_error():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(30, 700)), jnp.float32)
    exact = divfl.distances(rows)
    for dimensions in (64, 256):
        small = divfl.project(jax.random.key(3), rows, dimensions)
        largest, typical = divfl.projection_error(exact, divfl.distances(small))
        expected = np.sqrt(0.5 / dimensions)
        assert 0.6 * expected < typical < 1.6 * expected
        assert typical < largest < 6 * expected
        one = divfl.project(jax.random.key(3), rows[4], dimensions)
        # The same projection for all, whoever computes it; a product of many rows sums in another order.
        np.testing.assert_allclose(one, small[4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(divfl.distances(divfl.project(jax.random.key(0), rows, 700)), exact, rtol=1e-4)
    with pytest.raises(ValueError, match="projection to 0 dimensions, allowed >= 1"):
        divfl.project(jax.random.key(0), rows, 0)


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0, 5.0])
def test_q_ffl_is_a_step_of_the_overall_mean(q):
    """The weights against the equation in w: the same next model."""
    rng = np.random.default_rng(int(10 * q))
    loss, lr = rng.uniform(0.1, 3, 5), 0.05
    w, local = rng.normal(size=7), rng.normal(size=(5, 7))
    g = (w - local) / lr
    h = q * loss ** (q - 1) * np.square(g).sum(1) + loss**q / lr
    expected = w - (loss[:, None] ** q * g).sum(0) / h.sum()
    for scale in (1.0, loss.max()):
        above, below = fair.numerator_and_denominator(
            jnp.asarray(loss), jnp.asarray(np.square(g).sum(1)), q, lr, scale=scale
        )
        found = w + (np.asarray(above)[:, None] * (local - w)).sum(0) / np.asarray(below).sum()
        np.testing.assert_allclose(found, expected, atol=2e-6)
    fixed = fair.numerator_and_denominator(jnp.asarray(loss), 0.0, q, lr, scale=2.0, fixed_step=True)
    found = w + (np.asarray(fixed[0])[:, None] * (local - w)).sum(0) / np.asarray(fixed[1]).sum()
    np.testing.assert_allclose(found, w - lr * (loss[:, None] ** q * g).mean(0), atol=1e-5)


def test_q_ffl_as_weights_of_a_reply():
    delta = {"params": {"kernel": jnp.array([[0.3, -0.4]]), "bias": jnp.array([1.2])}, "statistics": jnp.ones(3)}

    def context(loss):
        return ClientContext(None, None, 0, None, (), None, (), Tally(jnp.float32(loss), None, jnp.float32(4)))

    above, below = fair.q_ffl(2.0, 0.1)(context(8.0), delta)
    norm = 1.3**2 / 0.01
    assert float(above) == pytest.approx(4 / 0.1, rel=1e-5)
    assert float(below) == pytest.approx(2 * 2 * norm + 4 / 0.1, rel=1e-5)
    # Of equal changes everybody gets the same weight; a loss of 0 does not stop a round.
    with_floor = fair.q_ffl(0.1, 0.1)(context(0.0), delta)[1]
    without = fair.q_ffl(0.1, 0.1, floor=0.0)(context(0.0), delta)[1]
    assert with_floor < 1e-2 * without
    # A traced q gives the same numbers.
    traced = jax.jit(lambda q: fair.q_ffl(q, 0.1)(context(8.0), delta))(2.0)
    np.testing.assert_allclose(traced, (above, below), rtol=1e-5)
    for given, message in (
        ((-1.0, 0.1), "q -1.0, allowed >= 0 (method.args.q)"),
        ((float("nan"), 0.1), "q nan, allowed >= 0 (method.args.q)"),
        ((1.0, 0.0), "learning_rate 0.0, allowed > 0 (method.args.learning_rate)"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            fair.q_ffl(*given)
        assert str(error.value) == message


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_projection_is_the_nearest_point(scale):
    """x is nearest iff it is on the simplex and (v - x) . (y - x) <= 0 for every corner y."""
    rng = np.random.default_rng(int(scale))
    for number in (1, 2, 7, 100):
        for _ in range(20):
            v = rng.normal(size=number) * scale
            x = np.asarray(fair.project_to_simplex(jnp.asarray(v, jnp.float32)), np.float64)
            assert x.min() >= 0
            assert x.sum() == pytest.approx(1, abs=1e-5)
            corners = np.eye(number) - x
            assert (corners @ (v - x)).max() <= 1e-4 * scale
    inside = jnp.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(fair.project_to_simplex(inside), inside, atol=1e-7)


@pytest.mark.parametrize("tilt", [-3.0, 0.0, 0.5, 200.0])
def test_tilted_weights_are_those_of_the_tilted_loss(tilt):
    loss, share = jnp.array([0.2, 1.0, 3.0]), jnp.array([0.5, 0.3, 0.2])
    expected = jax.grad(lambda f: jax.nn.logsumexp(tilt * f, b=share) / tilt)(loss) if tilt else share
    np.testing.assert_allclose(fair.tilted_weights(loss, tilt, share), expected, atol=1e-6)
    assert fair.tilted_weights(loss, tilt).argmax() == (0 if tilt <= 0 else 2)


@pytest.mark.parametrize("clients", [1, 4, 10, 57])
def test_figures_of_fairness(clients):
    rng = np.random.default_rng(clients)
    examples = rng.integers(1, 50, clients)
    accuracy = rng.binomial(examples, 0.6) / examples
    accuracy[0] = 0.5
    found = fairness(accuracy, examples)
    count = max(1, int(0.1 * clients))
    assert found["mean_over_examples"] == pytest.approx(sum(accuracy * examples) / sum(examples))
    assert found["variance"] == pytest.approx(1e4 * np.var(accuracy))
    assert found["worst_tenth"] == pytest.approx(sum(sorted(accuracy)[:count]) / count)
    assert found["best_tenth"] == pytest.approx(sum(sorted(accuracy)[::-1][:count]) / count)
    assert 1 / found["cosine"] ** 2 - 1 == pytest.approx(np.var(accuracy) / accuracy.mean() ** 2, abs=1e-12)
    assert np.cos(np.radians(found["angle"])) == pytest.approx(found["cosine"])
    part = accuracy / accuracy.sum()
    assert found["kl"] == pytest.approx(sum(p * np.log(clients * p) for p in part if p > 0), abs=1e-12)


def test_figures_of_fairness_at_the_edges():
    same = fairness(np.full(7, 0.3), np.ones(7))
    assert (same["cosine"], same["angle"]) == (1, 0) or same["angle"] < 1e-5
    nothing = fairness(np.zeros(3), np.ones(3))
    assert np.isnan([nothing["cosine"], nothing["angle"], nothing["kl"]]).all()
    assert nothing["variance"] == 0
    for accuracy, examples in (([], []), ([0.5], [1, 2]), ([0.5], [0])):
        with pytest.raises(ValueError, match="examples"):
            fairness(np.array(accuracy), np.array(examples))


def test_the_losses_of_candidates_in_any_order():
    """Picks are the first m of a stable sort downwards, ties and infinities included."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids, score = rng.permutation(30)[:12], np.round(rng.exponential(size=12), 1)
        score[rng.random(12) < 0.2] = np.inf
        expected = [int(i) for _, i in sorted(zip(score, ids), key=lambda pair: -pair[0])][:5]
        assert choose.largest(jnp.asarray(ids), jnp.asarray(score), 5).ids.tolist() == expected


def test_a_hybrid_network_is_iid_first():
    drawn = list(linear_clients(8, 3, sigma=1.0, hybrid=5))
    label_count = [len(np.unique(y)) for _, y in drawn]
    assert np.mean(label_count[:5]) > np.mean(label_count[5:])
    assert all(np.abs(x.mean(0)).max() < 0.6 for x, _ in drawn[:5])
    assert all(np.abs(x.mean(0)).max() > 0.9 for x, _ in drawn[5:])
    everybody = list(linear_clients(4, 3, sigma=1.0, hybrid=50))
    same = list(linear_clients(4, 3, sigma=1.0, iid=True))
    for one, other in zip(everybody, same):
        np.testing.assert_array_equal(one[0], other[0])
    for given in ({"hybrid": -1}, {"hybrid": 2, "iid": True}, {"sigma": float("nan")}):
        with pytest.raises(ValueError, match=r"\(data.options\)"):
            linear_clients(4, 0, **given)

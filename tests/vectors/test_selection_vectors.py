"""Selection, fairness and Synthetic(alpha, beta) against numbers of the papers' official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.absent import HIGHEST
from hetfl_jax.core.fairness import fairness
from hetfl_jax.core.types import Plan, Population, Seen, Tally
from hetfl_jax.data import synthetic
from hetfl_jax.parts import choose, divfl, fair
from tests.vectors.discover import of_kind, read

pytestmark = pytest.mark.vectors


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def softmax_regression(classes):
    """(mean loss, parameters after full-batch steps) of a flat vector: weights row by row, then the bias."""

    def loss(w, x, y, mask):
        kernel, bias = w[:-classes].reshape(-1, classes), w[-classes:]
        log_p = jax.nn.log_softmax(x @ kernel + bias)
        return -(mask * jnp.take_along_axis(log_p, y[:, None], 1)[:, 0]).sum() / mask.sum()

    def train(w, x, y, mask, rate, steps):
        for _ in range(steps):
            w = w - rate * jax.grad(loss)(w, x, y, mask)
        return w

    return loss, train


def q_step(w, change, loss, norm, q, rate, scale=1.0, fixed_step=False):
    above, below = fair.numerator_and_denominator(loss, norm, q, rate, scale=scale, fixed_step=fixed_step)
    return w + jnp.tensordot(above, change, 1) / below.sum(), below


def each_rate_and_q(z):
    return [(i, j, float(r), float(q)) for i, r in enumerate(z["lrs"]) for j, q in enumerate(z["qs"])]


@pytest.mark.parametrize("name", of_kind("selection/qffl_aggregate*"))
def test_a_step_of_q_ffl(name, float64):
    z = read(name)
    w, change, loss = jnp.asarray(z["w0"]), jnp.asarray(z["w_local"] - z["w0"]), jnp.asarray(z["losses"])
    some = len(loss) - 1  # the loss of the last client is 0
    gradient = jnp.asarray(z["sgd_grads"][:some])
    for i, j, rate, q in each_rate_and_q(z):
        norm = jnp.square(change / rate).sum(1)
        new, h = q_step(w, change, loss, norm, q, rate)
        np.testing.assert_allclose(h, z["h"][i, j], rtol=1e-10)
        np.testing.assert_allclose(new, z["new_w"][i, j], rtol=1e-10, atol=1e-12)
        above, _ = fair.numerator_and_denominator(loss, norm, q, rate)
        np.testing.assert_allclose(-above[:, None] * change, z["delta"][i, j], rtol=1e-10, atol=1e-12)
        new, h = q_step(w, change[:some], loss[:some], norm[:some], q, rate, scale=1.7)
        np.testing.assert_allclose(h * 1.7**q, z["h_nozero"][i, j], rtol=1e-10)
        np.testing.assert_allclose(new, z["new_w_nozero"][i, j], rtol=1e-10, atol=1e-12)
        for fixed in (False, True):
            norm = jnp.square(gradient).sum(1)
            new, h = q_step(w, -rate * gradient, loss[:some], norm, q, rate, fixed_step=fixed)
            np.testing.assert_allclose(h, z["sgd_h"][int(fixed), i, j], rtol=1e-10)
            np.testing.assert_allclose(new, z["sgd_new_w"][int(fixed), i, j], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", of_kind("selection/qffl_aggregate*"))
def test_a_step_of_q_ffl_in_float32(name):
    z = read(name)
    w, local, loss = (jnp.asarray(z[key], jnp.float32) for key in ("w0", "w_local", "losses"))
    for i, j, rate, q in each_rate_and_q(z):
        norm = jnp.square((local - w) / rate).sum(1)
        new, _ = q_step(w, local - w, loss, norm, q, rate, scale=loss.max())
        np.testing.assert_allclose(new, z["new_w"][i, j], atol=5e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("name", of_kind("selection/qffl_end_to_end*"))
def test_rounds_of_q_ffl(name, dtype, tolerance):
    z = read(name)
    with jax.enable_x64(dtype == "float64"):
        x, mask, test = (jnp.asarray(z[key], dtype) for key in ("X", "mask", "Xtest"))
        y, rate = jnp.asarray(z["Y"]), float(z["lr"])
        runs = sorted(key[:-4] for key in z if key.endswith("_sel"))
        classes = z[f"{runs[0]}_w"].shape[1] // (x.shape[2] + 1)
        loss, train = softmax_regression(classes)

        @jax.jit
        def one_round(w, ids, q, local):
            here = x[ids], y[ids], mask[ids]
            value = jax.vmap(loss, (None, 0, 0, 0))(w, *here)
            steps = int(z["local_steps"])
            trained = jax.vmap(lambda *data: train(w, *data, rate, steps) - w)(*here)
            gradient = jax.vmap(lambda *data: -rate * jax.grad(loss)(w, *data))(*here)
            change = jnp.where(local, trained, gradient)
            norm = jnp.square(change / rate).sum(1)
            return q_step(w, change, value, norm, q, rate, scale=value.max())[0]

        assert runs
        for run in runs:
            kind, q = run.split("_")[:2]
            w = jnp.zeros(z[f"{run}_w"].shape[1], dtype)
            for ids, expected in zip(z[f"{run}_sel"], z[f"{run}_w"]):
                w = one_round(w, jnp.asarray(ids), float(q[1:]), kind == "avg")
                np.testing.assert_allclose(w, expected, atol=tolerance)
            logits = test @ w[:-classes].reshape(-1, classes) + w[-classes:]
            accuracy = (logits.argmax(-1) == jnp.asarray(z["Ytest"])).mean(1)
            np.testing.assert_allclose(accuracy, z[f"{run}_acc"], atol=1e-6)


def sets_of(z):
    return sorted(key[:-2] for key in z if key.endswith("_G"))


def check_picks(z, case, picks, relative):
    """Each pick is one of the best, given the official picks before it; see the file's note on ties."""
    official, cost = z[f"{case}_greedy_order"], z[f"{case}_step_cost"]
    picks = np.asarray(picks)
    for step, client in enumerate(picks):
        if (picks[:step] != official[:step]).any():
            return  # another pick of a tie: from here on the file says nothing of single picks
        best = cost[step].min()
        assert z[f"{case}_tie"][step, client] or cost[step, client] <= best * (1 + relative)


def same_up_to_a_tie(distance, picks, official, relative):
    """Whether all picks are the official ones; the first other one has to be as good."""
    nearest = np.full(len(distance), np.inf)
    for client, other in zip(picks, official):
        costs = [np.minimum(nearest, distance[:, j]).sum() for j in (client, other)]
        assert costs[0] <= costs[1] * (1 + max(relative, 1e-9))
        if client != other:
            return False
        nearest = np.minimum(nearest, distance[:, client])
    return True


@pytest.mark.parametrize(("dtype", "relative"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("name", of_kind("selection/divfl_greedy*"))
def test_greedy_picks(name, dtype, relative):
    z = read(name)
    assert sets_of(z)
    with jax.enable_x64(dtype == "float64"):
        for case in sets_of(z):
            official = z[f"{case}_greedy_order"]
            given = jnp.asarray(z[f"{case}_D"], dtype)
            own = divfl.distances(jnp.asarray(z[f"{case}_G"], dtype))
            np.testing.assert_allclose(own, given, atol=float(given.max()) * (1e-6 if dtype == "float64" else 1e-5))
            for distance in (given, own):
                picks = divfl.greedy(distance, len(official))
                assert picks.valid.all()
                check_picks(z, case, picks.ids, 1e-5 if distance is own else relative)
                if (picks.ids == official).all():
                    near = 1e-6 if distance is own else relative
                    np.testing.assert_allclose(picks.cost, z[f"{case}_cost_greedy"], rtol=max(near, relative))
            place = divfl.nearest_pick(given, jnp.asarray(official))
            np.testing.assert_allclose(
                jnp.take_along_axis(given, jnp.asarray(official)[place][:, None], 1)[:, 0],
                jnp.take_along_axis(given, jnp.asarray(z[f"{case}_assign"])[:, None], 1)[:, 0], rtol=relative,
            )  # fmt: skip
            share = divfl.shares("clusters", jnp.ones(len(given)), given, jnp.asarray(official))
            np.testing.assert_allclose(share * len(given), z[f"{case}_cluster_sizes"], atol=1e-4)
            lists, order = jnp.asarray(z[f"{case}_stoch_R"]), z[f"{case}_stoch_order"]
            some = divfl.greedy(given, len(lists), lambda step, taken: lists[step])  # noqa: B023
            if same_up_to_a_tie(z[f"{case}_D"], some.ids.tolist(), order.tolist(), relative):
                np.testing.assert_allclose(some.cost[-1], z[f"{case}_cost_stoch"], rtol=relative)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("name", of_kind("selection/divfl_end_to_end*"))
def test_rounds_of_divfl(name, dtype, tolerance):
    """The table, its distances, the picks and the model of every round, from the selections of the file."""
    z = read(name)
    runs = sorted(key[:-4] for key in z if key.endswith("_sel"))
    assert runs
    with jax.enable_x64(dtype == "float64"):
        x, mask = (jnp.asarray(z[key], dtype) for key in ("X", "mask"))
        y, n = jnp.asarray(z["Y"]), jnp.asarray(z["n"])
        rate, steps, classes = float(z["lr"]), int(z["local_steps"]), z[f"{runs[0]}_w"].shape[1] // (x.shape[2] + 1)
        loss, train = softmax_regression(classes)
        gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, 0)))
        trained = jax.jit(jax.vmap(lambda w, *data: train(w, *data, rate, steps), (None, 0, 0, 0)))
        distances, refreshed = jax.jit(divfl.distances), jax.jit(divfl.refreshed)
        pick = jax.jit(divfl.greedy, static_argnums=1)
        for run in runs:
            selected, number = z[f"{run}_sel"], z[f"{run}_sel"].shape[1]
            w = jnp.zeros(z[f"{run}_w"].shape[1], dtype)
            table = gradients(w, x, y, mask)
            distance = distances(table)
            for t, ids in enumerate(selected):
                if number == 1 and t:
                    table = gradients(w, x, y, mask)
                    distance = distances(table)
                np.testing.assert_allclose(table, z[f"{run}_G"][t], atol=tolerance)
                exact = jnp.asarray(z[f"{run}_D"][t], dtype)
                np.testing.assert_allclose(distance, exact, atol=1e-6 if dtype == "float64" else 1e-5)
                greedy = pick(distance, number)
                given = jnp.minimum.reduce(distance[:, jnp.asarray(ids)], 1).sum()
                # The official lazy greedy breaks ties otherwise, which may change later picks.
                assert set(greedy.ids.tolist()) == set(ids.tolist()) or abs(greedy.cost[-1] - given) <= 0.02 * given
                ids = jnp.asarray(ids)
                here = x[ids], y[ids], mask[ids]
                table, distance = refreshed(table, distance, ids, gradients(w, *here))
                w = jnp.tensordot(divfl.shares("examples", n, distance, ids).astype(dtype), trained(w, *here), 1)
                np.testing.assert_allclose(w, z[f"{run}_w"][t], atol=tolerance)


def everybody(n):
    return Population(None, None, None, None, jnp.asarray(n, jnp.int32), None, None)


@pytest.mark.parametrize("name", of_kind("selection/power_of_choice*"))
def test_picks_of_power_of_choice(name, float64):
    z = read(name)
    for kind, value in (("pow", "loss"), ("rpow", "stale")):
        number = z[f"pick_{kind}"].shape[1]
        found = jax.vmap(lambda ids, score: choose.largest(ids, score[ids], number))(  # noqa: B023
            jnp.asarray(z[f"cand_{kind}"]), jnp.asarray(z[value])
        )
        assert found.valid.all()
        np.testing.assert_array_equal(found.ids, z[f"pick_{kind}"])


@pytest.mark.parametrize("name", of_kind("selection/power_of_choice*"))
def test_how_often_clients_are_candidates_and_chosen(name):
    z = read(name)
    d, m, draws = z["cand_pow"].shape[1], z["pick_pow"].shape[1], int(z["incl_trials"])
    clients = len(z["n"])
    np.testing.assert_allclose(z["p"], z["n"] / z["n"].sum(), rtol=1e-12)

    def same(found, expected, own, theirs):
        error = np.sqrt(expected * (1 - expected) * (1 / own + 1 / theirs))
        assert (np.abs(found - expected) <= 4 * error + 2 / theirs).all()

    def share(ids):
        return np.bincount(np.asarray(ids).ravel(), minlength=clients) / len(ids)

    keys = jax.random.split(jax.random.key(11), draws)
    drawn = jax.jit(jax.vmap(lambda key: choose.draw_without_replacement(key, jnp.asarray(z["n"]), d)))(keys)
    same(share(drawn), z["incl_freq"], draws, draws)
    same(share(drawn[:, :1]), z["first_freq"], draws, draws)
    loss = jnp.asarray(z["loss"][0], jnp.float32)
    rule = choose.power_of_choice(m, d)

    def ask(ids, level=None, examples=0, valid=None):
        return Tally(loss[ids], jnp.zeros(ids.shape), jnp.ones(ids.shape))

    chosen = jax.jit(jax.vmap(lambda key: rule.choose(key, 1, (), everybody(z["n"]), ask)[0].ids))(keys[:20_000])
    same(share(chosen), z["sel_freq_loss0"], 20_000, 20_000)


@pytest.mark.parametrize("name", of_kind("selection/power_of_choice*"))
def test_the_table_of_stale_losses(name):
    z = read(name)
    rule = choose.power_of_choice(z["sm_sel"].shape[1], len(z["n"]), kind="rpow")
    state = rule.init(len(z["n"]))
    times = np.zeros(len(z["n"]))
    for ids, loss, table, frequency in zip(z["sm_sel"], z["sm_loss"], z["sm_state"], z["sm_freq"]):
        there = jnp.ones(ids.shape, bool)
        tally = Tally(jnp.asarray(loss, jnp.float32) * 8, jnp.zeros(ids.shape), jnp.full(ids.shape, 8.0))
        plan = Plan(jnp.asarray(ids), there, jnp.zeros(ids.shape, jnp.int32))
        state = rule.update(state, plan, Seen(tally, None, None, None), there)
        np.testing.assert_allclose(state, np.where(np.isinf(table), HIGHEST, table), rtol=1e-6)
        times[ids] += 1
        np.testing.assert_array_equal(times, frequency)


@pytest.mark.parametrize("name", of_kind("selection/fairness_metrics*"))
def test_figures_of_fairness(name):
    z = read(name)
    names = {
        "mean_over_clients": "mean", "mean_over_examples": "weighted_avg", "variance": "var1e4",
        "worst_tenth": "worst10", "best_tenth": "best10", "cosine": "cos", "angle": "angle_deg", "kl": "kl_uniform",
    }  # fmt: skip
    cases = [key[:-4] for key in z if key.endswith("_acc")]
    assert cases
    for case in cases:
        found = fairness(z[f"{case}_acc"], z[f"{case}_n"])
        assert set(found) == set(names)
        for ours, theirs in names.items():
            expected = float(z[f"{case}_{theirs}"])
            if np.isfinite(expected):  # worst and best of fewer than 10 clients are NaN in the original
                assert found[ours] == pytest.approx(expected, rel=1e-12, abs=1e-12), (case, ours)


#: alpha, beta, sigma and further settings of the published sets
SETS = {
    "s11": {},
    "s55": {"alpha": 0.5, "beta": 0.5},
    "s00": {"alpha": 0.0, "beta": 0.0},
    "iid": {"sigma": 1.0, "iid": True},
    "hyb": {"sigma": 1.0, "hybrid": 50},
}


@pytest.mark.parametrize("name", of_kind("selection/synthetic_alpha_beta*"))
def test_the_very_numbers_of_the_generator(name):
    z = read(name)
    cases = [key.split("_")[1] for key in z if key.startswith("exact_") and key.endswith("_n")]
    assert cases
    for case in cases:
        exact = {key.removeprefix(f"exact_{case}_"): z[key] for key in z if key.startswith(f"exact_{case}_")}
        drawn = list(synthetic.linear_clients(len(exact["n"]), 1, **SETS[case]))
        assert [len(y) for _, y in drawn] == exact["n"].tolist()
        few, some = exact["x_first3"].shape[1], exact["y_first20"].shape[1]
        np.testing.assert_allclose([x[:few] for x, _ in drawn], exact["x_first3"], atol=1e-12, rtol=1e-12)
        np.testing.assert_array_equal([y[:some] for _, y in drawn], exact["y_first20"])
        np.testing.assert_allclose([x.sum() for x, _ in drawn], exact["xsum"], atol=1e-9, rtol=1e-9)
        classes = exact["yhist"].shape[1]
        np.testing.assert_array_equal([np.bincount(y, minlength=classes) for _, y in drawn], exact["yhist"])


def statistics(drawn, classes):
    """n, label entropy, classes present and largest share of each client; variance within clients by dimension."""
    count = np.stack([np.bincount(y, minlength=classes) for _, y in drawn])
    share = count / count.sum(1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
    within = np.median([x.var(0) for x, _ in drawn], 0)
    return count.sum(1), entropy, (count > 0).sum(1), share.max(1), within


@pytest.mark.parametrize("name", of_kind("selection/synthetic_alpha_beta*"))
def test_networks_look_like_the_published_ones(name):
    z = read(name)
    classes = int(z["classes"])
    cases = [key.removesuffix("_label_entropy") for key in z if key.endswith("_label_entropy")]
    assert cases
    for case in cases:
        kind, clients = case.split("_")
        networks = [
            statistics(list(synthetic.linear_clients(int(clients), seed, **SETS[kind])), classes) for seed in range(20)
        ]
        for place, figure in enumerate(("label_entropy", "n_classes", "max_share"), 1):
            mean = np.mean([network[place].mean() for network in networks])
            assert mean == pytest.approx(z[f"{case}_{figure}"].mean(), rel=0.2), (case, figure)
        within = np.mean([network[4] for network in networks], 0)
        np.testing.assert_allclose(within, z[f"{case}_within_var_by_dim_median"], rtol=0.2)
        np.testing.assert_allclose(within, z["cov_diag"], rtol=0.2)


@pytest.mark.parametrize("name", of_kind("selection/synthetic_alpha_beta*"))
def test_amounts_of_data(name):
    """Quantiles over many clients; share of the largest tenth and Gini coefficient over networks of 100."""
    z = read(name)
    for sigma in (1, 2):
        n = np.sort(synthetic.sizes(np.random.RandomState(3), 400_000, sigma).reshape(-1, 100), 1)
        quantiles = np.quantile(n, [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
        tolerance = [0.05] * 6 + [0.25]
        assert (np.abs(quantiles / z[f"nk_quantiles_sigma{sigma}"] - 1) <= tolerance).all()
        total = n.sum(1)
        gini = (n * (2 * np.arange(1, 101) - 101)).sum(1) / (100 * total)
        for figure, of_network in (("top10share", n[:, 90:].sum(1) / total), ("gini", gini)):
            found = np.quantile(of_network, [0.1, 0.5, 0.9])
            np.testing.assert_allclose(found, z[f"nk_{figure}_sigma{sigma}"], rtol=0.1, err_msg=figure)

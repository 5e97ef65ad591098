"""LAG against a plain NumPy version from the paper's equations, on workers of unequal smoothness."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.data.population import population
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import lag
from hetfl_jax.models import build, families
from hetfl_jax.parts import convex, objective
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.local import local

pytestmark = pytest.mark.slow
WORKERS, FEATURES, WINDOW, ROUNDS = 6, 8, 4, 40


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        zeros = nn.initializers.zeros
        return nn.Dense(1, use_bias=False, kernel_init=zeros, param_dtype=x.dtype, name="head")(x)


def problem():
    """``X_m = c_m v_m v_m' + I``, ``c_m = 1.3^m``, v_m orthonormal: ``X_m'X_m`` has ``(c_m + 1)^2`` on top."""
    rng = np.random.default_rng(1)
    v = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0]
    c = 1.3 ** np.arange(WORKERS)
    x = np.stack([c[m] * np.outer(v[:, m], v[:, m]) + np.eye(FEATURES) for m in range(WORKERS)])
    return x, rng.normal(size=(WORKERS, FEATURES)), (c + 1) ** 2


def by_hand(rule, rate, xi, smooth, lc_start, turns):
    """Iterates and masks of ``min sum_m ||X_m theta - y_m||^2``."""
    x, y, _ = problem()
    theta, steps = np.zeros(FEATURES), []
    sent = np.full((WORKERS, FEATURES), float(lc_start))
    points = np.zeros((WORKERS, FEATURES))
    found, masks = [], []
    for k in range(ROUNDS):
        found.append(theta.copy())
        gradients = np.stack([2 * x[m].T @ (x[m] @ theta - y[m]) for m in range(WORKERS)])
        threshold = xi * sum(steps[-WINDOW:]) / (rate * WORKERS) ** 2
        if rule == "wk":
            fires = ((gradients - sent) ** 2).sum(1) > threshold
        elif rule == "ps":
            fires = smooth**2 * ((theta - points) ** 2).sum(1) > threshold
        else:
            fires = np.full(WORKERS, True) if rule == "gd" else np.arange(WORKERS) == turns[k]
        if lc_start and k < WINDOW:
            fires = np.zeros(WORKERS, bool)
        elif k == 0 and not lc_start:
            fires = np.ones(WORKERS, bool)
        sent[fires], points[fires] = gradients[fires], theta
        step = rate * sent.sum(0) / (WORKERS if rule.endswith("iag") else 1)
        theta = theta - step
        steps.append((step**2).sum())
        masks.append(fires)
    return np.array(found), np.array(masks)


def by_library(rule, rate, smooth, **args):
    x, y, _ = problem()
    people = population(x.reshape(-1, FEATURES), y.ravel(), np.arange(y.size), np.full(WORKERS, FEATURES))
    people = people._replace(y=jnp.asarray(y.ravel()))
    fam = families.family(Linear(), [{}], jnp.zeros((1, FEATURES)))
    settings = local(learning_rate=rate, batch_size=FEATURES, full_batch=True)
    slots = Slots(objective=objective.squared_error())
    algorithm = lag.make(
        fam, settings, clients=WORKERS, rule=rule, window=WINDOW, smoothness=tuple(smooth), slots=slots, **args
    )
    key = jax.random.key(0)
    step = make_round(algorithm, executor("bucketed"), device_store())

    def one(state, _):
        after, info = step(state, people, key)
        kernel = state.server.variables["params"]["head"]["kernel"][:, 0]
        return after, (kernel, (info.items.seen.up > 0).any(-1))

    return jax.device_get(jax.lax.scan(one, start(algorithm, device_store(), WORKERS, key), length=ROUNDS)[1])


@pytest.mark.parametrize(
    ("rule", "lc_start"), [("wk", False), ("wk", True), ("ps", False), ("gd", False), ("cyclic_iag", False)]
)
def test_iterates_and_uploads_of_every_rule(rule, lc_start):
    smooth = 2 * problem()[2]
    rate = 1 / (2 * np.linalg.eigvalsh(sum(v.T @ v for v in problem()[0]))[-1])
    xi = {"wk": 1 / WINDOW, "ps": 10 / WINDOW}.get(rule, 0.0)
    turns = np.arange(ROUNDS) % WORKERS
    theta, masks = by_hand(rule, rate, xi, smooth, lc_start, turns)
    with jax.enable_x64(True):
        ours, fired = by_library(rule, rate, smooth, lc_start=lc_start)
    np.testing.assert_array_equal(fired, masks)
    np.testing.assert_allclose(ours, theta, rtol=1e-9, atol=1e-13)
    if rule in ("wk", "ps"):
        assert 0 < masks[1:].sum() < WORKERS * ROUNDS / 2, "lazy"
        assert masks[:, -1].sum() > masks[:, 0].sum(), "the worker of the largest smoothness sends most often"


def test_a_worker_is_drawn_in_proportion_to_its_smoothness():
    smooth = 2 * problem()[2]
    rate = 1 / (2 * np.linalg.eigvalsh(sum(v.T @ v for v in problem()[0]))[-1])
    with jax.enable_x64(True):
        ours, fired = by_library("num_iag", rate, smooth)
    assert fired[0].all()
    assert (fired[1:].sum(1) == 1).all()
    theta, _ = by_hand("num_iag", rate, 0.0, smooth, False, fired.argmax(1))
    np.testing.assert_allclose(ours, theta, rtol=1e-9, atol=1e-13)
    counts, share = fired[1:].sum(0), smooth / smooth.sum()
    assert (np.abs(counts - share * (ROUNDS - 1)) <= 4 * np.sqrt(share * (1 - share) * ROUNDS)).all()


def test_smoothness_of_linear_and_logistic_workers():
    x, y, largest = problem()
    people = population(x.reshape(-1, FEATURES), y.ravel(), np.arange(y.size), np.full(WORKERS, FEATURES))
    fam = families.family(Linear(), [{}], jnp.zeros((1, FEATURES)))
    np.testing.assert_allclose(convex.smoothness(fam, people, squares=True, l2=0.5), 2 * largest + 0.5, rtol=1e-3)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 5)).astype(np.float32)
    labels, size = rng.integers(0, 2, 30), np.array([10, 20])
    people = population(features, labels, np.arange(30), size)
    fam = families.family(build("logistic", bias=False), [{}], jnp.zeros((1, 5)))
    wanted = [np.linalg.eigvalsh(part.T @ part)[-1] / 4 for part in np.split(features.astype(float), [10])]
    np.testing.assert_allclose(convex.smoothness(fam, people), wanted, rtol=1e-3)

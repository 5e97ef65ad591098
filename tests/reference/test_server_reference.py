"""What the server does with a mean, over several rounds, against plain NumPy written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Plan, Seen, Tally
from hetfl_jax.parts import fair, losses, server
from tests.helpers import mlp_family

SHAPE = (3, 4)
ROUNDS = 3


def rounds(seed):
    """(start, means, coverages): an entry of coverage 0 was held by nobody."""
    rng = np.random.default_rng(seed)
    held = rng.random((ROUNDS, *SHAPE)) < 0.7
    means = rng.normal(size=(ROUNDS, *SHAPE)) * held
    return rng.normal(size=SHAPE), means, held * rng.integers(1, 9, (ROUNDS, *SHAPE))


def tree(value):
    return {"params": {"w": jnp.asarray(value, jnp.float32)}}


def played(rule, seed, extra=lambda t: ()):
    """The library's variables and slot after all rounds."""
    start, means, coverages = rounds(seed)
    variables = tree(start)
    slot = rule.init(variables)
    for t in range(ROUNDS):
        slot, variables = rule.update(slot, variables, tree(means[t]), tree(coverages[t]), jnp.asarray(True), extra(t))
    return np.asarray(variables["params"]["w"]), slot


def adam(g, m, v, t, w, rate, yogi=False):
    m = 0.9 * m + 0.1 * g
    v = v - 0.001 * np.sign(v - g**2) * g**2 if yogi else 0.999 * v + 0.001 * g**2
    return m, v, w - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + (1e-3 if yogi else 1e-8))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adagrad", "adam", "yogi"])
def test_an_optimizer_on_the_pseudo_gradient(name):
    """FedOpt: ``g = -mean``; entries that nobody held keep value and moments."""
    w, means, coverages = rounds(0)
    m = np.zeros(SHAPE)
    v = np.full(SHAPE, {"adagrad": 0.1, "yogi": 1e-6}.get(name, 0.0))
    m += 1e-6 if name == "yogi" else 0
    for t in range(ROUNDS):
        g, held = -means[t], coverages[t] > 0
        if name == "sgd":
            new = (m, v, w - 0.3 * g)
        elif name == "momentum":
            new = (g + 0.9 * m, v, w - 0.3 * (g + 0.9 * m))
        elif name == "adagrad":
            new = (m, v + g**2, w - 0.3 * g / np.sqrt(v + g**2 + 1e-7))
        else:
            new = adam(g, m, v, t + 1, w, 0.3, name == "yogi")
        m, v, w = (np.where(held, after, before) for after, before in zip(new, (m, v, w)))
    found, _ = played(server.optimizer(name, 0.3), 0)
    np.testing.assert_allclose(found, w, atol=2e-5)


@pytest.mark.parametrize("limit", [0.0, 0.05])
def test_feddyns_server(limit):
    """``m <- m + (coverage / N) mean``, ``w <- w + mean + m``; m waits where it would grow beyond its limit."""
    family, clients = mlp_family(({"width": 1.0},)), 20
    path = ("params", "dense_0", "kernel")
    shape = tuple(family.windows[path].extents[0])
    rng = np.random.default_rng(1)
    w, m = {p: rng.normal(size=tuple(win.extents[0])) for p, win in family.windows.items()}, {}
    m = {p: np.zeros_like(v) for p, v in w.items()}
    rule = server.feddyn(family, (clients,), max_correction=limit)
    nested = lambda flat: {"params": {a: {b: jnp.asarray(flat["params", a, b], jnp.float32)  # noqa: E731
                                          for _, c, b in flat if c == a} for _, a, _ in flat}}  # fmt: skip
    variables = nested(w)
    slot = rule.init(variables)
    for _ in range(ROUNDS):
        mean = {p: rng.normal(size=v.shape) for p, v in w.items()}
        count = float(rng.integers(1, 9))
        moved = {p: m[p] + count / clients * mean[p] for p in w}
        size = lambda values: np.sqrt(sum((v**2).sum() for v in values.values()))  # noqa: E731
        if not limit or size(moved) <= limit * size(w):
            m = moved
        w = {p: w[p] + mean[p] + m[p] for p in w}
        covered = nested({p: np.full(v.shape, count) for p, v in w.items()})
        slot, variables = rule.update(slot, variables, nested(mean), covered, jnp.asarray(True))
    assert variables["params"]["dense_0"]["kernel"].shape == shape
    for p in w:
        np.testing.assert_allclose(variables["params"][p[1]][p[2]], w[p], atol=2e-5)
        np.testing.assert_allclose(slot[p[1]][p[2]], m[p], atol=2e-5)


def test_scaffolds_server():
    """``w <- w + rate mean``, ``c <- c + sum of variate changes / N``."""
    rng = np.random.default_rng(2)
    changes = rng.normal(size=(ROUNDS, *SHAPE))
    found, slot = played(server.scaffold(12, 0.5), 2, extra=lambda t: tree(changes[t]))
    start, means, _ = rounds(2)
    np.testing.assert_allclose(found, start + 0.5 * means.sum(0), atol=1e-5)
    np.testing.assert_allclose(slot["w"], changes.sum(0) / 12, atol=1e-5)


def nearest_on_the_simplex(v):
    """By bisection: ``max(v - tau, 0)`` sums to 1."""
    low, high = v.min() - 1, v.max()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if np.maximum(v - tau, 0).sum() > 1 else (low, tau)
    return np.maximum(v - low, 0)


def test_afls_weights_and_the_mean_of_all_models():
    """``lambda <- projection(lambda + rate F)``, F of the participants alone; ``average`` is that of all models."""
    clients, rng = 6, np.random.default_rng(3)
    rule = losses.agnostic(server.optimizer(), clients, 0.4)
    start, means, coverages = rounds(3)
    variables, weights, models = tree(start), np.full(clients, 1 / clients), []
    slot, w = rule.init(variables), start
    for t in range(ROUNDS):
        ids, loss = rng.permutation(clients)[:4], rng.random(4) * 3
        ok = np.array([True, True, False, True])
        found = rule.known(slot, jnp.asarray(ids))
        np.testing.assert_allclose(found, weights[ids], atol=1e-6)
        slot, variables = rule.update(slot, variables, tree(means[t]), tree(coverages[t]), jnp.asarray(True))
        plan = Plan(jnp.asarray(ids), jnp.ones(4, bool), jnp.zeros(4, int))
        seen = Seen((), (), (), (), Tally(jnp.asarray(5 * loss, jnp.float32), (), jnp.full(4, 5.0)))
        slot = rule.learn(slot, plan, seen, jnp.asarray(ok))
        heard = np.zeros(clients)
        heard[ids[ok]] = loss[ok]
        weights = nearest_on_the_simplex(weights + 0.4 * heard)
        w = w + means[t]
        models.append(w)
    np.testing.assert_allclose(slot.weights, weights, atol=1e-5)
    np.testing.assert_allclose(slot.average["w"], np.mean(models, 0), atol=1e-5)


def test_tilted_weights_of_a_reply():
    """TERM: ``n_k exp(t F_k)`` up to a factor that all share, and its objective as the number that is taken off."""
    rng = np.random.default_rng(4)
    loss, size = rng.random(5) * 4, rng.integers(1, 20, 5)
    level = losses.tilted_mean(2.0, True)(jnp.asarray(loss), jnp.asarray(size, jnp.float32), jnp.ones(5, bool))
    share = size / size.sum()
    assert float(level) == pytest.approx(np.log((share * np.exp(2 * loss)).sum()) / 2, rel=1e-5)
    wanted = size * np.exp(2 * loss)
    found = jax.vmap(lambda f, n: n * jnp.exp(2 * (f - level)))(jnp.asarray(loss), jnp.asarray(size))
    np.testing.assert_allclose(found / found.sum(), wanted / wanted.sum(), rtol=1e-4)
    np.testing.assert_allclose(
        fair.tilted_weights(jnp.asarray(loss), 2.0, jnp.asarray(size)), wanted / wanted.sum(), rtol=1e-4
    )

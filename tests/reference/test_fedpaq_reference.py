"""FedPAQ against a plain NumPy version: local steps, the low-precision quantiser, the mean, and the time of a round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.random import CLIENT, INIT, purpose_key
from hetfl_jax.data.population import population
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import fedpaq
from hetfl_jax.models import build, families, windows
from hetfl_jax.parts.local import local
from tests.reference.draws import uniform_of, words_of

pytestmark = pytest.mark.slow
KEY, CLIENTS, FEATURES, CLASSES, TAU, RATE, ROUNDS = jax.random.key(4), 8, 5, 3, 3, 0.2, 3
SIZE = np.array([4, 6, 3, 5, 4, 4, 6, 3])


def data():
    rng = np.random.default_rng(0)
    n = SIZE.sum()
    return rng.normal(size=(n, FEATURES)).astype(np.float32), rng.integers(0, CLASSES, n)


def trained(theta, x, y):
    """tau full-batch steps of softmax regression."""
    w, b = (theta[path].copy() for path in (("head", "kernel"), ("head", "bias")))
    for _ in range(TAU):
        z = x @ w + b
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(y)), y] -= 1
        w, b = w - RATE * x.T @ p / len(y), b - RATE * p.mean(0)
    return {("head", "bias"): b, ("head", "kernel"): w}


def quantised(x, s, uniform):
    """``||x|| sign(x) xi``, xi the lower or the upper neighbour of ``s |x| / ||x||``, over s."""
    norm = np.sqrt((x**2).sum())
    exact = s * np.abs(x) / norm
    low = np.floor(exact)
    return norm * np.sign(x) * (low + (exact - low > uniform)) / s


def uniforms(key, shapes):
    key = jax.random.fold_in(key, (1 << 19) + 1)
    return {path: uniform_of(words_of(key, i, shape)) for i, (path, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("levels", [0, 1, 5])
def test_rounds(levels):
    x, y = data()
    people = population(x, y, np.arange(len(y)), SIZE, classes=CLASSES)
    fam = families.family(build("linear", classes=CLASSES), [{}], jnp.zeros((1, FEATURES)))
    settings = local(learning_rate=RATE, batch_size=int(SIZE.max()), full_batch=True, epochs=TAU)
    clock = {"shift": 0.25, "scale": 4 / 3, "bandwidth": 50.0}
    algorithm = fedpaq.make(fam, settings, cohort=4, levels=levels, **clock)
    store = device_store()
    state, step = start(algorithm, store, CLIENTS, KEY), make_round(algorithm, executor("bucketed"), store)
    theta = windows.flat(algorithm.init(purpose_key(KEY, INIT))[0].variables["params"])
    theta = {path: np.asarray(leaf, np.float64) for path, leaf in theta.items()}
    offset, time, waits = np.cumsum(SIZE) - SIZE, 0.0, []
    for round in range(ROUNDS):
        state, info = step(state, people, KEY)
        ids = np.asarray(info.items.ids)
        assert len(set(ids.tolist())) == 4
        deltas = []
        for client in ids:
            rows = slice(offset[client], offset[client] + SIZE[client])
            after = trained(theta, x[rows], y[rows])
            delta = {path: after[path] - theta[path] for path in theta}
            if levels:
                key = jax.random.fold_in(purpose_key(KEY, CLIENT, round), client)
                random = uniforms(key, {path: leaf.shape for path, leaf in theta.items()})
                delta = {path: quantised(delta[path], levels, random[path]) for path in theta}
            deltas.append(delta)
        theta = {path: leaf + np.mean([d[path] for d in deltas], 0) for path, leaf in theta.items()}
        found = windows.flat(state.server.variables["params"])
        for path, leaf in theta.items():
            np.testing.assert_allclose(found[path], leaf, atol=1e-5, err_msg=f"round {round}")
        bits = 18 * 32 if not levels else 18 * (1 + int(np.ceil(np.log2(levels + 1)))) + 2 * 32
        upload = 4 * bits / clock["bandwidth"]
        assert info.numbers["upload_time"] == pytest.approx(upload)
        compute, most = float(info.numbers["compute_time"]), TAU * SIZE[ids].max()
        assert compute > most * clock["shift"], "the shift alone"
        waits.append(compute / most)
        time += upload + compute
        assert info.numbers["simulated_time"] == pytest.approx(time, rel=1e-5)
    assert len(set(waits)) == ROUNDS

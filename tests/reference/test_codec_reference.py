"""Codecs against plain NumPy versions in float64, written from the papers' equations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core import bits
from hetfl_jax.core.types import ClientContext
from hetfl_jax.models import build, families, windows
from hetfl_jax.parts import codec as codecs
from tests.reference.draws import uniform_of, words_of

KEY = jax.random.key(11)


def family():
    levels = ({"width": 1.0}, {"width": 0.5})
    return families.family(build("mlp", hidden=(12, 8), classes=5), levels, jnp.zeros((1, 7)))


def changes(fam, seed, level):
    rng = np.random.default_rng(seed)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.1, jnp.float32)  # noqa: E731
    return jax.tree.map(draw, fam.shapes[level]["params"])


def encode(codec, delta, level, memory=None, key=KEY):
    run = lambda d, m: codec.encode(key, d, ClientContext(key, jnp.int32(0), level, None, (), (), {}), m)  # noqa: E731
    sent, memory, count = jax.jit(run)(delta, memory or {})
    return windows.flat(sent), memory, int(bits.total(np.asarray(count)))


def words(fam, level, key=KEY):
    """A leaf's random words, cut to the level."""
    own, full = windows.flat(fam.shapes[level]["params"]), windows.flat(fam.shapes[0]["params"])
    drawn = {path: words_of(key, i, leaf.shape) for i, (path, leaf) in enumerate(full.items())}
    return {path: word[tuple(map(slice, own[path].shape))] for path, word in drawn.items()}


def uniforms(fam, level):
    return {path: uniform_of(word) for path, word in words(fam, level).items()}


def numbers(tree):
    return {path: np.asarray(leaf, np.float64) for path, leaf in windows.flat(tree).items()}


def same(got, want, atol=1e-6):
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-5, atol=atol, err_msg=str(path))


def elias_omega(n):
    """The code itself, as text."""
    code = "0"
    while n > 1:
        code = f"{n:b}{code}"
        n = len(f"{n:b}") - 1
    return code


def message(levels, signs):
    """Alistarh et al. 2017, appendix: distance, sign and level of each entry that is not 0."""
    code, last = "", -1
    for place in np.flatnonzero(levels):
        code += elias_omega(place - last) + ("1" if signs[place] < 0 else "0") + elias_omega(int(levels[place]))
        last = place
    return code


@pytest.mark.parametrize(
    ("scope", "scaling", "s", "level"),
    [
        ("tensor", "l2", 1, 0),
        ("tensor", "max", 7, 1),
        ("layer", "l2", 7, 1),
        ("layer", "shrunk", 1, 0),
        ("whole", "max", 1, 0),
        ("whole", "shrunk", 7, 1),
    ],
)
def test_qsgd(scope, scaling, s, level):
    fam = family()
    delta = changes(fam, 1, level)
    x, u = numbers(delta), uniforms(fam, level)
    group = {"tensor": lambda p: p, "layer": lambda p: p[:1], "whole": lambda p: ()}[scope]
    want, length = {}, 0
    for name in dict.fromkeys(map(group, x)):
        paths = [path for path in x if group(path) == name]
        vector = np.concatenate([x[path].ravel() for path in paths])
        scale = np.abs(vector).max() if scaling == "max" else np.sqrt((vector**2).sum())
        d, levels = len(vector), []
        factor = 1 / (1 + min(d / s**2, math.sqrt(d) / s)) if scaling == "shrunk" else 1
        for path in paths:
            a = s * np.abs(x[path]) / scale
            low = np.minimum(np.floor(a), s - 1)
            xi = (low + (u[path] < a - low)) / s
            want[path] = factor * scale * np.sign(x[path]) * xi
            levels.append(np.round(xi * s).astype(int).ravel())
        length += 32 + len(message(np.concatenate(levels), vector))
    got, _, count = encode(codecs.qsgd(fam, s, scope, scaling, "elias"), delta, level)
    same(got, want)
    assert count == length


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("b", [1, 4])
def test_uniform(level, b):
    fam = family()
    delta = changes(fam, 2, level)
    x, u = numbers(delta), uniforms(fam, level)
    want = {}
    for path, leaf in x.items():
        steps, low, high = 2**b - 1, leaf.min(), leaf.max()
        place = (leaf - low) / (high - low) * steps
        below = np.minimum(np.floor(place), steps - 1)
        want[path] = low + (high - low) * (below + (u[path] < place - below)) / steps
    same(encode(codecs.uniform(fam, b), delta, level)[0], want)


@pytest.mark.parametrize("level", [0, 1])
def test_signs_and_the_largest(level):
    fam = family()
    delta = changes(fam, 3, level)
    x = numbers(delta)
    same(encode(codecs.signs(fam), delta, level)[0], {p: np.abs(v).mean() * np.sign(v) for p, v in x.items()})
    want = {}
    for path, leaf in x.items():
        k = math.ceil(leaf.size / 4)
        kept = np.argsort(-np.abs(leaf).ravel(), kind="stable")[:k]
        want[path] = np.zeros(leaf.size)
        want[path][kept] = leaf.ravel()[kept]
        want[path] = want[path].reshape(leaf.shape)
    same(encode(codecs.top_k(fam, 0.25), delta, level)[0], want)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("unbiased", [True, False])
def test_random_entries(level, unbiased):
    fam = family()
    delta = changes(fam, 4, level)
    x = numbers(delta)
    word = words(fam, level)
    got = encode(codecs.random_k(fam, 0.4, unbiased), delta, level)[0]
    for path, leaf in x.items():
        k, kept = math.ceil(0.4 * leaf.size - 1e-9), np.asarray(got[path]) != 0
        order = np.argsort(-(word[path] // 4).ravel(), kind="stable")
        assert sorted(np.flatnonzero(kept).tolist()) == sorted(order[:k].tolist())
        np.testing.assert_allclose(got[path][kept], leaf[kept] * (leaf.size / k if unbiased else 1), rtol=1e-6)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("unbiased", [True, False])
def test_drive(level, unbiased):
    fam = family()
    delta = changes(fam, 5, level)
    x = numbers(delta)
    turns = {path: np.where(word >= 2**31, 1.0, -1.0) for path, word in words(fam, level).items()}
    want = {}
    for path, leaf in x.items():
        m = 2 ** math.ceil(math.log2(leaf.size))
        hadamard = np.ones((1, 1))
        while len(hadamard) < m:
            hadamard = np.kron(hadamard, [[1, 1], [1, -1]])
        rotation = hadamard / np.sqrt(m) * np.pad(turns[path].ravel(), (0, m - leaf.size), constant_values=1)
        vector = np.pad(leaf.ravel(), (0, m - leaf.size))
        z = rotation @ vector
        scale = (vector @ vector) / np.abs(z).sum() if unbiased else np.abs(z).sum() / m
        want[path] = (scale * rotation.T @ np.where(z < 0, -1, 1))[: leaf.size].reshape(leaf.shape)
    same(encode(codecs.drive(fam, unbiased), delta, level)[0], want)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("rank", [1, 2])
def test_power_sgd_over_rounds(level, rank):
    fam = family()
    codec = codecs.error_feedback(codecs.low_rank(fam, rank))
    memory = codec.init(changes(fam, 0, 0))
    memory = {name: windows.narrow(fam, part, level) for name, part in memory.items()}
    q, error = {}, {}
    for path, leaf in numbers(changes(fam, 6, level)).items():
        if leaf.ndim == 2 and rank * sum(leaf.shape) < leaf.size:
            q[path] = np.asarray(windows.flat(memory["factor"]["rows"])[path], np.float64)[:, : leaf.shape[1]].T
    for turn in range(4):
        delta = changes(fam, 6 + turn, level)
        got, memory, _ = encode(codec, delta, level, memory)
        want = {}
        for path, leaf in numbers(delta).items():
            wanted = want[path] = leaf + error.get(path, 0)
            if path in q:
                p = np.linalg.qr(wanted @ q[path])[0]
                q[path] = wanted.T @ p
                want[path] = p @ q[path].T
            error[path] = wanted - want[path]
        same(got, want, 1e-5)
        same(windows.flat(memory["error"]["params"]), error, 1e-5)


def test_ef21_over_rounds():
    fam = family()
    codec = codecs.error_feedback(codecs.signs(fam), ef21=True)
    memory = codec.init(changes(fam, 0, 0))
    estimate = {path: np.zeros(leaf.shape) for path, leaf in windows.flat(fam.shapes[0]["params"]).items()}
    for turn in range(4):
        delta = changes(fam, turn, 0)
        got, memory, _ = encode(codec, delta, 0, memory)
        for path, leaf in numbers(delta).items():
            rest = leaf - estimate[path]
            estimate[path] = estimate[path] + np.abs(rest).mean() * np.sign(rest)
        same(got, estimate)

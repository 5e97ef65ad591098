"""Stochastic quantisers against the public code of FedLab (largest entry) and FedML (norm), with its random numbers."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import ClientContext
from hetfl_jax.models import families
from hetfl_jax.parts import codec, sparse
from tests.vectors.discover import of_kind, read

pytestmark = pytest.mark.vectors

KIND = "selection/qsgd_*"
CLOSE = 1e-5  # of a fraction and a random number, where float32 may round the other way


class One(nn.Module):
    """A net with one leaf of any shape."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x, *, train=False, valid=None, capacity=None):
        leaf = self.param("leaf", nn.initializers.zeros_init(), self.shape)
        return jnp.zeros((x.shape[0], 1)) + leaf.sum()


def quantised(monkeypatch, x, random, levels, scaling):
    """What the codec sends of ``x`` with the given random numbers."""
    fam = families.family(One(tuple(x.shape)), [{}], jnp.zeros((1, 1)))
    values = jnp.broadcast_to(jnp.asarray(random, jnp.float32), x.size).reshape(x.shape)
    monkeypatch.setattr(sparse.Part, "uniform", lambda part: values)
    key = jax.random.key(0)
    delta = {"leaf": jnp.asarray(x, jnp.float32)}
    sent = codec.qsgd(fam, levels, scaling=scaling).encode(
        key, delta, ClientContext(key, jnp.int32(0), 0, None, (), (), {}), {}
    )[0]["leaf"]
    monkeypatch.undo()
    return np.asarray(sent)


def cases(z, pattern):
    """(prefix, number) of all arrays whose name fits."""
    found = [re.fullmatch(pattern, name) for name in z]
    return [(match[1], int(match[2])) for match in found if match]


@pytest.mark.parametrize("name", of_kind(KIND))
def test_levels_of_the_largest_entry(name, monkeypatch):
    z = read(name)
    for prefix, bits in cases(z, r"(.+)_b(\d+)_r"):
        x, s, norm = z[f"{prefix}_x"], 2**bits, z[f"{prefix}_b{bits}_norm"].item()
        for of, random in ((f"{prefix}_b{bits}", z[f"{prefix}_b{bits}_r"]), (f"{prefix}_b{bits}_det", 1.0)):
            if f"{of}_level" not in z:
                continue
            uniform = jnp.broadcast_to(jnp.asarray(random, jnp.float32), x.size).reshape(x.shape)
            level = sparse.stochastic_levels(jnp.asarray(x), jnp.float32(norm), s, uniform)
            np.testing.assert_array_equal(level, z[f"{of}_level"].reshape(x.shape), err_msg=of)
            sent = quantised(monkeypatch, x, random, s, "max")
            np.testing.assert_allclose(sent, z[f"{of}_dq"].reshape(x.shape), rtol=1e-6, err_msg=of)
        np.testing.assert_array_equal(x > 0, z[f"{prefix}_b{bits}_sign"].reshape(x.shape))


@pytest.mark.parametrize("name", of_kind(KIND))
def test_mean_and_variance_of_the_largest_entry(name):
    z = read(name)
    for _, bits in cases(z, r"(stat)_b(\d+)_mean"):
        x, mean, variance = z["gauss_x"].ravel(), z[f"stat_b{bits}_mean"], z[f"stat_b{bits}_theory_var"]
        up = fractions(x, np.abs(x).max(), 2**bits)[1]
        np.testing.assert_allclose((np.abs(x).max() / 2**bits) ** 2 * up * (1 - up), variance, rtol=1e-4, atol=1e-9)
        error = np.sqrt(variance / z["stat_trials"])
        assert (np.abs(mean - x) <= 5 * error + 1e-6 * np.abs(x).max()).all()
        np.testing.assert_allclose(z[f"stat_b{bits}_var"].sum(), variance.sum(), rtol=0.02)


@pytest.mark.parametrize("name", of_kind(KIND))
def test_zero_stays_zero(name, monkeypatch):
    z = read(name)
    if "zero_dq" in z:
        sent = quantised(monkeypatch, np.zeros(z["zero_dq"].shape), 0.5, 4, "max")
        np.testing.assert_array_equal(sent, z["zero_dq"])


@pytest.mark.parametrize("name", of_kind(KIND))
def test_levels_of_the_norm(name, monkeypatch):
    z = read(name)
    for prefix, s in cases(z, r"(.+)_s(\d+)_q"):
        x, random = z[f"{prefix}_x"], z[f"{prefix}_r"]
        norm = np.sqrt((x**2).sum())
        fraction = s * np.abs(x) / norm % 1
        for scaling, key in (("l2", f"{prefix}_s{s}_q"), ("shrunk", f"{prefix}_s{s}_q_biased")):
            for row, want in enumerate(z.get(key, ())[:8]):
                got = quantised(monkeypatch, x, random[row], s, scaling)
                flipped = np.abs(got - want) > 1e-5 * norm / s
                assert (np.abs(fraction - random[row])[flipped] < CLOSE).all(), key
                np.testing.assert_allclose(got[~flipped], want[~flipped], rtol=1e-5, atol=1e-7 * norm, err_msg=key)
        levels = sparse.stochastic_levels(*map(jnp.float32, (x, norm)), s, jnp.asarray(random, jnp.float32))
        want = np.abs(z[f"{prefix}_s{s}_q"]) / norm * s
        assert (np.abs(fraction - random)[np.abs(levels - want) > 1e-3] < CLOSE).all()


@pytest.mark.parametrize("name", of_kind(KIND))
def test_variance_and_share_of_the_norm(name):
    z = read(name)
    for prefix, s in cases(z, r"(.+)_s(\d+)_theory_relvar"):
        x = z[f"{prefix}_x"]
        norm = np.sqrt((x**2).sum())
        low, up = fractions(x, norm, s)
        want = z[f"{prefix}_s{s}_theory_relvar"]
        np.testing.assert_allclose((up * (1 - up)).sum() / s**2, want, rtol=1e-4)
        np.testing.assert_allclose(z[f"{prefix}_s{s}_relvar"], want, rtol=0.02)
        np.testing.assert_allclose(np.where(low > 0, 1, up).mean(), z[f"{prefix}_s{s}_nnz_frac"], atol=5e-3)


def fractions(x, scale, s):
    """The level below and the probability of the one above, read off the quantiser's levels."""
    values, top = jnp.asarray(x, jnp.float32), jnp.float32(scale)
    low = np.asarray(sparse.stochastic_levels(values, top, s, jnp.float32(1)), np.float64)
    exact = np.abs(x) / scale * s
    assert (exact - low >= -1e-4).all()
    assert (exact - low <= 1 + 1e-4).all()
    return low, np.clip(exact - low, 0, 1)

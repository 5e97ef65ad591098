"""The keyed permutation: a permutation for every size, and uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from hetfl_jax.core.random import permute, words


def test_it_is_a_permutation_at_every_size():
    run = jax.jit(lambda key, size: permute(key, jnp.minimum(jnp.arange(64), size - 1), size))
    for size in range(1, 65):
        assert sorted(run(jax.random.key(size), size)[:size].tolist()) == list(range(size))


@pytest.mark.parametrize("size", [3, 4, 7, 14])
def test_every_item_is_equally_often_at_every_place(size):
    """Chi-square of item x place counts over 20,000 keys, at the 1e-4 level."""
    keys = jax.random.split(jax.random.key(size), 20_000)
    order = np.asarray(jax.vmap(lambda key: permute(key, jnp.arange(size), size))(keys))
    counts = np.stack([np.bincount(order[:, place], minlength=size) for place in range(size)])
    expected = len(keys) / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(1 - 1e-4, (size - 1) ** 2)


def test_pairs_are_uniform_too():
    """The first two places over 40,000 keys: every ordered pair of 6 equally often."""
    keys = jax.random.split(jax.random.key(0), 40_000)
    first = np.asarray(jax.vmap(lambda key: permute(key, jnp.arange(2), 6))(keys))
    counts = np.bincount(first[:, 0] * 6 + first[:, 1], minlength=36)
    counts = counts[np.flatnonzero(~np.eye(6, dtype=bool).ravel())]
    expected = len(keys) / 30
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-4, 29)


def test_a_cohort_of_a_million_clients_is_distinct_and_spread():
    ids = np.asarray(permute(jax.random.key(3), jnp.arange(1000), 1_000_000))
    assert len(set(ids.tolist())) == 1000
    assert abs(ids.mean() - 5e5) < 5 * 1e6 / np.sqrt(12 * 1000)


def test_a_permutation_of_one():
    """All constants: XLA's CPU compiler does not get through the shuffle itself."""
    assert jax.jit(lambda key: permute(key, jnp.arange(1), 1))(jax.random.key(0)).tolist() == [0]


def test_words_are_uniform_and_independent_of_their_neighbours():
    """Every bit, and pairs of high bytes of neighbours and of two keys, by chi-square at the 1e-4 level."""
    index = jnp.arange(1 << 18, dtype=jnp.uint32)
    one, other = (np.asarray(words(jax.random.key(seed), index)) for seed in (1, 2))
    share = np.unpackbits(one.view(np.uint8).reshape(-1, 4), axis=1).mean(0)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(index.size)
    for first, second in ((one[::2], one[1::2]), (one[::784], one[1::784]), (one, other)):
        size = min(first.size, second.size)
        side = 8 if size < 10_000 else 64
        pair = (first[:size] >> 16).astype(np.int64) * side // 2**16 * side + (second[:size] >> 16) * side // 2**16
        counts, expected = np.bincount(pair, minlength=side**2), size / side**2
        assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-4, side**2 - 1)

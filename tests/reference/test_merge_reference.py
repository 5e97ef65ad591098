"""How replies become means, against loops over entries and clients in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Population
from hetfl_jax.methods.sheterofl import by_widths
from hetfl_jax.models import windows
from hetfl_jax.parts import merge, sharing
from tests.helpers import context, exits_family, mlp_family

CLIENTS = 5


def replies(family, seed, classes=3):
    """Random changes of clients of random levels, sizes and classes, each of the narrow shape of its level."""
    rng = np.random.default_rng(seed)
    found = []
    for client in range(CLIENTS):
        level = int(rng.integers(family.levels)) if client else 0
        delta = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), family.shapes[level])
        held = rng.random(classes) < 0.7
        found.append((level, int(rng.integers(1, 20)), held, delta))
    return found


def merged(family, rule, found):
    """(mean, coverage) as the library adds and settles them."""
    total = None
    for level, size, held, delta in found:
        shard = Population(None, None, None, None, jnp.int32(size), None, jnp.asarray(held))
        lifted = rule.lift(delta, context(level, shard))
        wide = lifted._replace(delta=windows.widen(family, lifted.delta, level))
        total = wide if total is None else jax.tree.map(jnp.add, total, wide)
    mean, coverage = rule.settle(total)
    return windows.flat(mean), windows.flat(coverage)


def entries(family, path, found, weight, counts=lambda path, level: True, rows=False):
    """Loops: the weighted mean of every entry over the clients that hold it, and the sum of their weights."""
    window, shape = family.windows[path], tuple(family.windows[path].extents[0])
    mean, cover = np.zeros(shape), np.zeros(shape)
    for place in np.ndindex(*shape):
        above = below = 0.0
        for level, size, held, delta in found:
            if any(at >= extent for at, extent in zip(place, window.extents[level])):
                continue
            if not counts(path, level) or (rows and window.class_axis >= 0 and not held[place[window.class_axis]]):
                continue
            w = weight(level, size)
            above, below = above + w * float(windows.flat(delta)[path][place]), below + w
        mean[place], cover[place] = (above / below if below else 0.0), below
    return mean, cover


def same(family, rule, found, **how):
    mean, coverage = merged(family, rule, found)
    for path in family.windows:
        wanted, below = entries(family, path, found, **how)
        np.testing.assert_allclose(mean[path], wanted, atol=1e-5, err_msg=str(path))
        np.testing.assert_allclose(coverage[path], below, atol=1e-5, err_msg=str(path))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("by_examples", [True, False])
def test_every_entry_is_the_mean_of_those_that_hold_it(seed, by_examples):
    """FedAvg by examples, HeteroFL by counts: ``sum_k w_k m_k d_k / sum_k w_k m_k``, entry by entry."""
    family = mlp_family(({"width": 1.0}, {"width": 0.5}, {"width": 0.25}))
    rule = merge.overlap_mean(family, by_examples=by_examples)
    same(family, rule, replies(family, seed), weight=lambda level, size: size if by_examples else 1.0)


@pytest.mark.parametrize("seed", range(2))
def test_rows_of_a_class_count_for_the_clients_that_hold_it(seed):
    """HeteroFL's classifier."""
    family = mlp_family()
    rule = merge.overlap_mean(family, by_examples=False, class_rows=True)
    same(family, rule, replies(family, seed), weight=lambda level, size: 1.0, rows=True)


@pytest.mark.parametrize("seed", range(2))
def test_an_exit_counts_for_the_clients_that_train_it(seed):
    """DepthFL with one exit trained: exit i of depth d counts only for clients of depth i; layers for all owners."""
    family = exits_family(({"depth": 3}, {"depth": 2}, {"depth": 1}), hidden=(8, 8, 8))

    def counts(path, level):
        if not path[1].startswith("head"):
            return True
        return int(path[1].rpartition("_")[2]) == 2 - level

    same(family, merge.overlap_mean(family), replies(family, seed), weight=lambda level, size: size, counts=counts)
    every = merge.overlap_mean(family, own_exit=False)
    same(family, every, replies(family, seed), weight=lambda level, size: size)


def test_a_client_counts_once_for_every_width_it_trains():
    """SHeteroFL's multiplicity."""
    family = mlp_family(({"width": 1.0}, {"width": 0.5}, {"width": 0.25}))
    rule = by_widths(family, multiplicity=True)
    same(family, rule, replies(family, 0), weight=lambda level, size: size * (3 - level))


@pytest.mark.parametrize("rows", [False, True])
def test_means_of_stacks(rows):
    family, rng = mlp_family(), np.random.default_rng(1)
    found = sorted(replies(family, 1), key=lambda reply: reply[0])
    by_level = [[reply for reply in found if reply[0] == level] for level in range(family.levels)]
    stacks = [jax.tree.map(lambda *d: jnp.stack(d), *(reply[3] for reply in group)) for group in by_level]
    weights = [jnp.asarray(rng.random(len(group)), jnp.float32) for group in by_level]
    held = [jnp.asarray([reply[2] for reply in group]) for group in by_level] if rows else None
    mean, coverage = (windows.flat(tree) for tree in merge.mean_of_stacks(family, stacks, weights, held))
    named = [(level, i, h, d) for level, group in enumerate(by_level) for i, (_, _, h, d) in enumerate(group)]
    for path in family.windows:
        weigh = lambda level, i: float(weights[level][i])  # noqa: E731
        wanted, below = entries(family, path, named, weigh, rows=rows)
        np.testing.assert_allclose(mean[path], wanted, atol=1e-5)
        np.testing.assert_allclose(coverage[path], below, atol=1e-5)


def layered(seed, models=3, depth=4):
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.normal(size=(models, 3)), jnp.float32)  # noqa: E731
    return {**{f"dense_{i}": {"kernel": draw()} for i in range(depth)}, "embedding": {"kernel": draw()},
            "head": {"kernel": draw()}}  # fmt: skip


@pytest.mark.parametrize("examples", [(3.0, 5.0, 2.0), (0.0, 4.0, 1.0), (0.0, 0.0, 6.0)])
def test_models_of_unlike_depth_share_all_but_their_last_layer(examples):
    """InclusiveFL: shared layers become means over the models that have them, by examples."""
    depths, models = (4, 3, 1), layered(0)
    found = sharing.share(models, jnp.asarray(examples), depths)
    for name, leaf in models.items():
        before = np.asarray(leaf["kernel"], float)
        layer = int(name.split("_")[1]) if name.startswith("dense") else None
        own = [t for t, d in enumerate(depths) if (layer is None or layer < d - 1) and name != "head"]
        total = sum(examples[t] for t in own)
        after = before.copy()
        if total > 0:
            for t in own:
                after[t] = sum(examples[j] * before[j] for j in own) / total
        np.testing.assert_allclose(found[name]["kernel"], after, atol=1e-6, err_msg=name)


def test_the_last_layer_learns_from_the_next_larger_model():
    """InclusiveFL's momentum distillation: ``m_s = mean_{j = L_s - 1 .. L_s' - 1} G^s'_j``."""
    depths, beta = (4, 2, 1), 0.3
    gradients = layered(2)
    taught = sharing.momentum(gradients, depths)
    g = {i: np.asarray(gradients[f"dense_{i}"]["kernel"], float) for i in range(4)}
    wanted = [np.zeros(3), np.mean([g[1][0], g[2][0], g[3][0]], 0), np.mean([g[0][1], g[1][1]], 0)]
    np.testing.assert_allclose(taught["dense"]["kernel"], wanted, atol=1e-6)
    mixed = sharing.mix(gradients, taught, beta, depths, jnp.asarray([False, True, True]))
    for t, depth in ((1, 2), (2, 1)):
        last = beta * wanted[t] + (1 - beta) * g[depth - 1][t]
        np.testing.assert_allclose(mixed[f"dense_{depth - 1}"]["kernel"][t], last, atol=1e-6)
    np.testing.assert_array_equal(mixed["dense_3"]["kernel"], gradients["dense_3"]["kernel"])

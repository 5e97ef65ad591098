"""Split-Mix's parts and whole rounds against plain NumPy, written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Plan
from hetfl_jax.data import domains
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import splitmix
from hetfl_jax.models import build, families
from hetfl_jax.models.dual import DualNorm
from hetfl_jax.parts.adversary import Attack, Pixels, attacked
from hetfl_jax.parts.budgets import schedule
from hetfl_jax.parts.rotation import Rotation, rotation, turns
from tests.contract import play
from tests.helpers import sgd, toy_population


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_rounds_of_a_linear_net():
    """Two rounds of full-batch steps; who trains what is read from the rounds themselves."""
    pop = toy_population()
    pop = pop._replace(level=pop.level * 0)
    fam = families.family(build("linear", classes=3), [{}], jnp.zeros((1, 6)))
    settings = sgd(momentum=0.0, clip_norm=0.0, epochs=2, batch_size=11, full_batch=True, learning_rate=0.3)
    algorithm = splitmix.make(fam, settings, cohort=6, clients=12, base_width=0.25, budgets="4-2-1")
    start = jax.device_get(
        algorithm.init(jax.random.fold_in(jax.random.key(7), 0))[0].members.variables["params"]["head"]
    )
    state, infos, _ = play(algorithm, executor("bucketed"), pop, rounds=2)
    bases = [(start["kernel"][b].astype(float), start["bias"][b].astype(float)) for b in range(4)]
    x, y = np.asarray(pop.x, float), np.asarray(pop.y)
    budget = np.repeat([1, 2, 4], 4)
    for info in infos:
        items = info.items
        pairs = [(int(c), int(b)) for c, b, v in zip(items.ids, info.arrays["member"], items.valid) if v]
        assert len(set(pairs)) == len(pairs)
        for client in {c for c, _ in pairs}:
            assert sum(c == client for c, _ in pairs) == budget[client]
        after = []
        for base, (kernel, bias) in enumerate(bases):
            sums, total = [0.0, 0.0], 0.0
            for client in (c for c, b in pairs if b == base):
                rows = np.asarray(pop.rows)[int(pop.offset[client]) :][: int(pop.size[client])]
                w, c = kernel.copy(), bias.copy()
                for _ in range(2):
                    d = (softmax(x[rows] @ w + c) - np.eye(3)[y[rows]]) / len(rows)
                    w, c = w - 0.3 * x[rows].T @ d, c - 0.3 * d.sum(0)
                sums, total = [sums[0] + len(rows) * w, sums[1] + len(rows) * c], total + len(rows)
            after.append((sums[0] / total, sums[1] / total) if total else (kernel, bias))
        bases = after
    found = state.server.members.variables["params"]["head"]
    for base, (kernel, bias) in enumerate(bases):
        np.testing.assert_allclose(found["kernel"][base], kernel, atol=1e-5)
        np.testing.assert_allclose(found["bias"][base], bias, atol=1e-5)
    for tier, count in enumerate((4, 2, 1)):
        logits = algorithm.predict(algorithm.model(state.server, tier), tier, pop.x[:5])[-1]
        wanted = np.mean([x[:5] @ kernel + bias for kernel, bias in bases[:count]], 0)
        np.testing.assert_allclose(logits, wanted, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_turns_are_those_of_a_list_with_a_pointer(size):
    """A shuffled list of all members; the next client takes what is under the pointer."""
    rng, key = np.random.default_rng(size), jax.random.key(size)
    state, used = Rotation(jnp.arange(size, dtype=jnp.int32), jnp.int32(size)), []
    for number in range(5):
        valid = jnp.asarray(rng.random(7) < 0.7)
        found, state = turns(jax.random.fold_in(key, number), state, valid)
        used += np.asarray(found)[np.asarray(valid)].tolist()
        assert 0 <= int(state.pointer) < max(size, 1)
        left = np.asarray(state.order)[: int(state.pointer)].tolist()
        assert used[len(used) - len(left) :] == left, "the order that is kept is the one that goes on"
    for first in range(0, len(used) - size + 1, size):
        assert sorted(used[first : first + size]) == list(range(size))


def test_other_members_are_uniform_and_never_the_first():
    route = rotation(4, schedule("4-2", 0.25, 8))
    ids = jnp.arange(8)
    planned, _ = jax.jit(jax.vmap(lambda k: route.plan(k, route.init(), Plan(ids, ids >= 0, 0 * ids), None)))(
        jax.random.split(jax.random.key(0), 600)
    )
    second = np.asarray(planned.ticket)[np.asarray(planned.valid)].reshape(600, -1)[:, 4:].reshape(-1, 2)
    assert (second[:, 0] != second[:, 1]).all()
    apart = np.bincount((second[:, 1] - second[:, 0]) % 4, minlength=4)[1:] / len(second)
    np.testing.assert_allclose(apart, 1 / 3, atol=0.03)


@pytest.mark.parametrize(
    ("text", "clients", "bases"),
    [
        ("8-4-2-1", 50, [1] * 13 + [2] * 12 + [4] * 13 + [8] * 12),
        ("8-2-1-1", 7, None),
        ("8-4-8d3-2", 10, None),
        ("4-2-4d3-1", 9, None),
    ],
)
def test_budgets_are_those_of_the_rule(text, clients, bases):
    """Client i of K has ratio number ``floor(S i / K)`` of the sorted ones."""
    ratios = sorted(int((part.split("d") + ["1"])[1]) / int(part.split("d")[0]) for part in text.split("-"))
    wanted = [round(8 * ratios[len(ratios) * i // clients]) for i in range(clients)]
    assert bases is None or wanted == bases
    found = schedule(text, 0.125, clients)
    assert found.of(jnp.arange(clients)).tolist() == wanted
    assert sorted(schedule(text, 0.125, clients, "shuffled").of(jnp.arange(clients)).tolist()) == sorted(wanted)
    assert found.most_pairs(3) == sum(sorted(wanted)[-3:])


def test_an_attack_on_a_linear_net():
    """Seven steps by hand; pixels are normalised, so that one of them is wider than the other in the net's input."""
    rng = np.random.default_rng(0)
    x = rng.random((4, 2, 2, 2))
    mean, std = np.array([0.3, 0.6]), np.array([0.5, 0.2])
    w, y, valid = rng.normal(size=(8, 3)), np.array([0, 2, 1, 1]), np.array([True, True, True, False])
    delta = np.clip(x + rng.uniform(-0.03, 0.03, x.shape), 0, 1) - x
    pixels = Pixels(jnp.asarray(-mean / std, jnp.float32), jnp.asarray((1 - mean) / std, jnp.float32))
    attack = Attack(epsilon=0.03, step=0.01)
    found = attacked(
        lambda v: v.reshape(len(v), -1) @ jnp.asarray(w, jnp.float32), jnp.asarray((x - mean) / std, jnp.float32),
        jnp.asarray(y), jnp.asarray(valid), jax.random.key(0), attack, pixels, jnp.asarray(delta / std, jnp.float32),
    )  # fmt: skip
    for _ in range(7):
        logits = ((x + delta - mean) / std).reshape(4, -1) @ w
        gradient = (((softmax(logits) - np.eye(3)[y]) * valid[:, None]) @ w.T).reshape(x.shape) / std
        delta = np.clip(delta + 0.01 * np.sign(gradient), -0.03, 0.03)
        delta = np.clip(x + delta, 0, 1) - x
    np.testing.assert_allclose(np.asarray(found) * std + mean, x + delta, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_norm_of_two_branches(share):
    rng = np.random.default_rng(1)
    x, scale, bias, mean = (rng.normal(size=s) for s in ((6, 3), (2, 3), (2, 3), (2, 3)))
    var = rng.random((2, 3)) + 0.5
    y = [(x - mean[b]) / np.sqrt(var[b] + 1e-5) * scale[b] + bias[b] for b in (0, 1)]
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}
    variables = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), variables)
    x32 = jnp.asarray(x, jnp.float32)
    found = DualNorm().apply(variables, x32, train=False, noise=jnp.float32(share))
    np.testing.assert_allclose(found, (1 - share) * y[0] + share * y[1], atol=1e-5)
    if share in (0, 1):  # a single branch, and the other one stays as it is
        row = int(share)
        np.testing.assert_allclose(DualNorm().apply(variables, x32, train=False, noise=share), y[row], atol=1e-5)
        out, after = DualNorm().apply(
            variables, x32, train=True, noise=share, valid=jnp.arange(6) < 4, mutable=["batch_stats"]
        )
        some = x[:4]
        wanted = (x - some.mean(0)) / np.sqrt(some.var(0) + 1e-5) * scale[row] + bias[row]
        np.testing.assert_allclose(out, wanted, atol=1e-5)
        stats = after["batch_stats"]
        np.testing.assert_allclose(stats["mean"][row], 0.9 * mean[row] + 0.1 * some.mean(0), atol=1e-6)
        np.testing.assert_allclose(stats["var"][row], 0.9 * var[row] + 0.1 * some.var(0, ddof=1), atol=1e-6)
        np.testing.assert_array_equal(stats["mean"][1 - row], variables["batch_stats"]["mean"][1 - row])


def test_changes_of_images():
    rng = np.random.default_rng(2)
    x = rng.integers(0, 256, (3, 6, 6, 1)).astype(np.uint8)
    of = lambda kind, argument="": domains.CHANGES[kind][0](x, argument or domains.CHANGES[kind][1], rng)  # noqa: E731
    np.testing.assert_array_equal(of("plain"), x)
    np.testing.assert_array_equal(of("inverted"), 255 - x)
    for degrees, turns_ in (("90", 1), ("180", 2), ("270", 3)):
        np.testing.assert_array_equal(of("rotated", degrees), np.rot90(x, turns_, (1, 2)))
    small = x.reshape(3, 3, 2, 3, 2, 1).mean((2, 4))
    np.testing.assert_allclose(domains.resized(x, (3, 3)), small, atol=0.51)
    assert np.abs(of("downscaled", "2").astype(float).mean((1, 2)) - x.mean((1, 2))).max() < 12
    noise = domains.CHANGES["noisy"][0](np.full((4, 50, 50, 1), 128, np.uint8), "0.1", rng).astype(float) - 128
    np.testing.assert_allclose(noise.std(), 25.5, rtol=0.05)


def test_images_blended_with_patches_of_others(tmp_path):
    others = np.random.default_rng(3).integers(0, 256, (5, 9, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "others.npz", x_train=others)
    x = np.random.default_rng(4).integers(0, 256, (20, 4, 4, 1)).astype(np.uint8)
    found = domains.CHANGES["blended"][0](x, str(tmp_path / "others.npz"), np.random.default_rng(0))
    patches = {
        p.tobytes() for image in others for i in range(6) for j in range(5) for p in [image[i : i + 4, j : j + 4]]
    }
    assert found.shape == (20, 4, 4, 3)
    for image, blend in zip(x.astype(int), found.astype(int)):
        # |image - patch| leaves two candidates a pixel; one combination of them is a patch
        candidates = [
            np.frombuffer(p, np.uint8).reshape(4, 4, 3).astype(int) for p in patches
        ]  # fmt: skip
        assert any((np.abs(image - patch) == blend).all() for patch in candidates)

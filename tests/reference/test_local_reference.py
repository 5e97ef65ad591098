"""Local training of a linear net and local losses, against plain NumPy written from the equations."""

import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Batch, Shard
from hetfl_jax.methods.sheterofl import all_widths
from hetfl_jax.models import build, families
from hetfl_jax.models.families import view
from hetfl_jax.parts import drift, objective
from hetfl_jax.parts.compose import Sent
from hetfl_jax.parts.local import local, train
from tests.helpers import context, loss_of

ROWS, FEATURES, CLASSES = 11, 6, 3


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def client(seed, numbers=False):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
    y = rng.normal(size=ROWS).astype(np.float32) if numbers else rng.integers(0, 2, ROWS)
    held = np.array([True, True, False])
    shard = Shard(jnp.asarray(x), jnp.asarray(y), jnp.arange(ROWS), jnp.int32(0), jnp.int32(ROWS), jnp.asarray(held))
    return x.astype(float), y, held, shard


def tree(w, b):
    return {"params": {"head": {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.asarray(b, jnp.float32)}}}


def start(seed, classes=CLASSES):
    rng = np.random.default_rng(seed + 100)
    return rng.normal(size=(FEATURES, classes)), rng.normal(size=classes)


def run(seed, settings, rule=None, goal=None, memory=None, sent=None, numbers=False, round=0):
    """The library's local training from ``start``; its kernel and bias, and what else it returns."""
    outputs = 1 if numbers else CLASSES
    fam = families.family(build("linear", classes=outputs), [{}], jnp.zeros((1, FEATURES)))
    variables = tree(*start(seed, outputs))
    told = context(0, client(seed, numbers)[3], sent=Sent(variables, sent or {}), memory=memory or {},
                   round=jnp.int32(round))  # fmt: skip
    done = train(settings, view(fam, variables, 0), fam.prepare, goal or objective.cross_entropy(),
                 rule or drift.none(), told)  # fmt: skip
    return done.variables["params"]["head"], done


def batches(epochs, size):
    """Rows of each step, unshuffled; the last batch of an epoch is short."""
    return [range(i, min(i + size, ROWS)) for _ in range(epochs) for i in range(0, ROWS, size)]


def cross_entropy(w, b, x, y):
    """Mean loss and gradients of softmax regression."""
    p = softmax(x @ w + b)
    d = (p - np.eye(p.shape[1])[y]) / len(y)
    return -np.log(p[np.arange(len(y)), y]).mean(), x.T @ d, d.sum(0)


def stepped(seed, steps, rate, *, gradient=cross_entropy, extra=lambda w, b: (0.0, 0.0), clip=0.0, decay=0.0,
            momentum=0.0, numbers=False):  # fmt: skip
    """SGD: gradient + extra, clipped to a norm, plus decay, through momentum, times the rate."""
    x, y, _, _ = client(seed, numbers)
    w, b = start(seed, 1 if numbers else CLASSES)
    mw, mb = 0.0, 0.0
    for rows in steps:
        _, gw, gb = gradient(w, b, x[list(rows)], y[list(rows)])
        ew, eb = extra(w, b)
        gw, gb = gw + ew, gb + eb
        norm = np.sqrt((gw**2).sum() + (gb**2).sum())
        scale = min(1.0, clip / norm) if clip else 1.0
        gw, gb = scale * gw + decay * w, scale * gb + decay * b
        mw, mb = gw + momentum * mw, gb + momentum * mb
        w, b = w - rate * mw, b - rate * mb
    return w, b


def near(found, wanted, atol=2e-5):
    np.testing.assert_allclose(found["kernel"], wanted[0], atol=atol)
    np.testing.assert_allclose(found["bias"], wanted[1], atol=atol)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", [{}, {"momentum": 0.9}, {"weight_decay": 0.01, "clip_norm": 0.5, "momentum": 0.5}])
def test_sgd(seed, how):
    settings = local(learning_rate=0.2, batch_size=4, epochs=3, shuffle=False, **how)
    wanted = stepped(seed, batches(3, 4), 0.2, clip=how.get("clip_norm", 0), decay=how.get("weight_decay", 0),
                     momentum=how.get("momentum", 0))  # fmt: skip
    found, done = run(seed, settings)
    near(found, wanted)
    assert int(done.tally.examples) == 3 * ROWS


def test_a_number_of_steps_and_the_whole_batch():
    near(run(0, local(learning_rate=0.2, batch_size=4, steps=4, shuffle=False))[0], stepped(0, batches(2, 4)[:4], 0.2))
    full = local(learning_rate=0.2, batch_size=ROWS, epochs=3, full_batch=True)
    near(run(0, full)[0], stepped(0, [range(ROWS)] * 3, 0.2))


def test_the_rate_of_a_round():
    """Milestones, decay and warm-up: ``0.2 * 0.1^(passed) * 0.9^t * min(1, (t + 1) / w)``."""
    settings = local(learning_rate=0.2, batch_size=4, shuffle=False, milestones=(2, 4), decay_factor=0.1,
                     round_decay=0.9, warmup_rounds=3)  # fmt: skip
    for t, passed in ((0, 0), (1, 0), (2, 1), (3, 1), (5, 2)):
        rate = 0.2 * 0.1**passed * 0.9**t * min(1, (t + 1) / 3)
        assert float(settings.learning_rate(jnp.int32(t))) == pytest.approx(rate, rel=1e-5)
    near(run(1, settings, round=3)[0], stepped(1, batches(1, 4), 0.2 * 0.1 * 0.9**3))


@pytest.mark.parametrize("seed", range(3))
def test_the_proximal_term(seed):
    """FedProx: ``grad F + mu (w - w_received)``, inside the clipping."""
    w0, b0 = start(seed)
    settings = local(learning_rate=0.2, batch_size=4, epochs=2, shuffle=False, clip_norm=0.7)
    wanted = stepped(seed, batches(2, 4), 0.2, extra=lambda w, b: (0.5 * (w - w0), 0.5 * (b - b0)), clip=0.7)
    near(run(seed, settings, drift.proximal(0.5))[0], wanted)


@pytest.mark.parametrize("mean_examples", [0.0, 22.0])
def test_feddyn_of_a_client(mean_examples):
    """``min F(w) + a <s, w> + a / 2 ||w - w_received||^2``, then ``s <- s + w - w_received``."""
    rng = np.random.default_rng(3)
    sw, sb = rng.normal(size=(FEATURES, CLASSES)), rng.normal(size=CLASSES)
    w0, b0 = start(0)
    alpha = 0.3 * (mean_examples / ROWS if mean_examples else 1)
    settings = local(learning_rate=0.1, batch_size=4, epochs=2, shuffle=False)
    wanted = stepped(0, batches(2, 4), 0.1, extra=lambda w, b: (alpha * (sw + w - w0), alpha * (sb + b - b0)))
    found, done = run(0, settings, drift.feddyn(0.3, mean_examples), memory={"sum": tree(sw, sb)})
    near(found, wanted)
    near(done.memory["sum"]["params"]["head"], (sw + wanted[0] - w0, sb + wanted[1] - b0))


def test_scaffold_of_a_client():
    """``w <- w - rate (g + c - c_k)``; ``c_k' = c_k - c + (w_received - w) / (steps rate)``; sent is ``c_k' - c_k``."""
    rng = np.random.default_rng(4)
    own, common = [(rng.normal(size=(FEATURES, CLASSES)), rng.normal(size=CLASSES)) for _ in range(2)]
    w0, b0 = start(0)
    settings = local(learning_rate=0.1, batch_size=4, epochs=2, shuffle=False)
    wanted = stepped(0, batches(2, 4), 0.1, extra=lambda w, b: (common[0] - own[0], common[1] - own[1]))
    rule = drift.scaffold(settings.learning_rate)
    found, done = run(0, settings, rule, memory={"variate": tree(*own)}, sent=tree(*common))
    near(found, wanted)
    steps = len(batches(2, 4))
    moved = [(before - after) / (steps * 0.1) - c for before, after, c in zip((w0, b0), wanted, common)]
    near(done.memory["variate"]["params"]["head"], [o + m for o, m in zip(own, moved)], atol=2e-4)
    near(done.extra["params"]["head"], moved, atol=2e-4)


def test_the_gradient_of_a_sum():
    """LAG: ``n grad F + l2 w``."""
    settings = local(learning_rate=0.01, batch_size=ROWS, full_batch=True)

    def summed(w, b, x, y):
        loss, gw, gb = cross_entropy(w, b, x, y)
        return loss, len(y) * gw + 0.3 * w, len(y) * gb + 0.3 * b

    near(run(0, settings, drift.summed(0.3))[0], stepped(0, [range(ROWS)], 0.01, gradient=summed))


def masked(keeps):
    """Cross-entropy with the logits of classes set to zero that ``keeps(labels)`` does not name."""

    def gradient(w, b, x, y):
        keep = keeps(y)
        p = softmax(np.where(keep, x @ w + b, 0.0))
        d = np.where(keep, p - np.eye(CLASSES)[y], 0.0) / len(y)
        return 0.0, x.T @ d, d.sum(0)

    return gradient


def test_logits_of_absent_classes_are_zero():
    """HeteroFL asks what the client holds, Split-Mix what the batch holds."""
    settings = local(learning_rate=0.2, batch_size=4, epochs=2, shuffle=False)
    held = masked(lambda y: np.array([True, True, False]))
    near(run(0, settings, goal=objective.masked_cross_entropy())[0], stepped(0, batches(2, 4), 0.2, gradient=held))
    seen = masked(lambda y: np.isin(np.arange(CLASSES), y))
    small = local(learning_rate=0.2, batch_size=2, epochs=2, shuffle=False)
    found = run(0, small, goal=objective.batch_masked_cross_entropy())[0]
    near(found, stepped(0, batches(2, 2), 0.2, gradient=seen))


def test_squares():
    """``mean (f(x) - y)^2``."""

    def squares(w, b, x, y):
        d = 2 * ((x @ w + b)[:, 0] - y)[:, None] / len(y)
        return 0.0, x.T @ d, d.sum(0)

    settings = local(learning_rate=0.05, batch_size=4, epochs=2, shuffle=False)
    found = run(0, settings, goal=objective.squared_error(), numbers=True)[0]
    near(found, stepped(0, batches(2, 4), 0.05, gradient=squares, numbers=True))


@pytest.mark.parametrize("active", [3, 2])
@pytest.mark.parametrize("train_all", [True, False])
def test_exits_teach_each_other(active, train_all):
    """DepthFL, equation 1, by loops; ``c(t) = exp(-5 (1 - t / R)^2)``."""
    rng = np.random.default_rng(active)
    z, y, valid = rng.normal(size=(3, 5, 4)), rng.integers(0, 4, 5), np.array([1, 1, 1, 0, 1], bool)
    t, ramp_rounds, heat = 4, 10, 2.0
    total, students = 0.0, range(active) if train_all else [active - 1]
    for i in students:
        total += np.mean([-np.log(softmax(z[i, r])[y[r]]) for r in np.flatnonzero(valid)])
        taught = 0.0
        for j in range(active):
            if j != i:
                q, p = softmax(z[j] / heat) + 1e-7, softmax(z[i] / heat)
                taught += heat**2 * (q * (np.log(q) - np.log(p))).sum(-1)[valid].mean()
        total += np.exp(-5 * (1 - t / ramp_rounds) ** 2) / max(active - 1, 1) * taught
    goal = objective.all_exits(ramp_rounds=ramp_rounds, temperature=heat, train_all=train_all)
    exists = np.arange(3) < active
    found = loss_of(goal, jnp.asarray(z, jnp.float32), jnp.asarray(exists), jnp.asarray(y), jnp.asarray(valid), round=t)
    assert float(found) == pytest.approx(total, rel=1e-5)


def test_all_widths_up_to_the_clients_own():
    """SHeteroFL: the sum of the losses of the client's width and of all narrower ones."""
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(3, 5, 4)), rng.integers(0, 4, 5)
    each = [-np.log(softmax(z[level])[np.arange(5), y]).mean() for level in range(3)]
    forward = lambda x, level: (jnp.asarray(z[level], jnp.float32)[None], np.ones(1, bool), {})  # noqa: E731
    for own in range(3):
        batch = Batch(None, jnp.asarray(y), jnp.ones(5, bool))
        assert float(all_widths(3).loss(forward, batch, context(own))[0]) == pytest.approx(sum(each[own:]), rel=1e-5)

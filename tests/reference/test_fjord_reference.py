"""FjORD from the paper's equations in NumPy, client by client, batch by batch and shell by shell; an LSTM by gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.random import CLIENT, purpose_key
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fjord
from hetfl_jax.models import LSTM, families, windows
from hetfl_jax.parts import ordered
from tests.contract import COHORT, play
from tests.helpers import mlp_family, sgd, toy_population, worst
from tests.test_promises import cohort_of

HIDDEN, RATES = 8, (1.0, 0.6, 0.25)  #: 8, 5 and 2 units
WIDTHS = [int(np.ceil(round(rate * HIDDEN, 6))) for rate in RATES]
BATCH, LR, DECAY = 4, 0.1, 0.01


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gradient(w, x, width, target):
    """Of the mean cross-entropy against ``target`` [B, C] of the sub-net with ``width`` units, at full shape."""
    a, b, c, d = (w[k] for k in ("w1", "b1", "w2", "b2"))
    h = np.maximum(x @ a[:, :width] + b[:width], 0)
    z = h @ c[:width] + d
    dz = (softmax(z) - target) / len(x)
    dh = dz @ c[:width].T * (h > 0)
    g = {k: np.zeros_like(v) for k, v in w.items()}
    g["w1"][:, :width], g["b1"][:width] = x.T @ dh, dh.sum(0)
    g["w2"][:width], g["b2"] = h.T @ dz, dz.sum(0)
    return g, z


def trained(w, x, y, own, drawn, alpha, distill):
    """Batches in the stored order; ``drawn`` has the level of each. One step on the sum of both gradients."""
    w, truth = {k: v.copy() for k, v in w.items()}, np.eye(3)[y]
    for step, start in enumerate(range(0, len(x), BATCH)):
        rows = slice(start, start + BATCH)
        if distill:
            g, teacher = gradient(w, x[rows], WIDTHS[own], truth[rows])
            for share, target in ((alpha, softmax(teacher)), (1 - alpha, truth[rows])):
                more, _ = gradient(w, x[rows], WIDTHS[drawn[step]], target)
                g = {k: g[k] + share * more[k] for k in g}
        else:
            g, _ = gradient(w, x[rows], WIDTHS[drawn[step]], truth[rows])
        # All that the client holds decays, drawn or not; what lies beyond its own width is nobody's concern.
        w = {k: v - LR * (g[k] + DECAY * v) for k, v in w.items()}
    return w


def averaged(before, replies):
    """Equation 2, a shell after the other, the innermost first: ``replies`` are (weights, level, examples)."""
    after, inner = {k: v.copy() for k, v in before.items()}, 0
    for level in reversed(range(len(WIDTHS))):
        shell, inner = slice(inner, WIDTHS[level]), WIDTHS[level]
        held = [(w, n) for w, own, n in replies if own <= level]
        for key, place in (("w1", (slice(None), shell)), ("b1", shell), ("w2", shell)):
            if held:
                after[key][place] = sum(n * w[key][place] for w, n in held) / sum(n for _, n in held)
    everybody = sum(n for *_, n in replies)
    after["b2"] = sum(n * w["b2"] for w, _, n in replies) / everybody
    return after


@pytest.mark.parametrize(("alpha", "distill"), [(1.0, True), (0.3, True), (1.0, False)])
def test_a_round_is_that_of_the_equations(alpha, distill):
    fam = mlp_family([{"width": rate} for rate in RATES])
    population = toy_population()
    population = population._replace(level=jnp.arange(12) % 3)
    settings = sgd(
        learning_rate=LR, batch_size=BATCH, epochs=1, momentum=0.0, clip_norm=0.0, weight_decay=DECAY, shuffle=False
    )  # fmt: skip
    algorithm = fjord.make(
        fam, settings, cohort=COHORT, clients_per_level=(4, 4, 4), distill=distill, alpha=alpha
    )  # fmt: skip
    start = play(algorithm, executor("bucketed"), population, rounds=0)[0].server.variables["params"]
    state, infos, _ = play(algorithm, executor("bucketed"), population, rounds=1)

    def tree(params):
        leaves = (params["dense_0"]["kernel"], params["dense_0"]["bias"], params["head"]["kernel"])
        named = dict(zip(("w1", "b1", "w2", "b2"), (*leaves, params["head"]["bias"])))
        return {k: np.asarray(v, np.float64) for k, v in named.items()}

    keys, replies, work = purpose_key(jax.random.key(7), CLIENT, 0), [], []
    for client in cohort_of(algorithm, population).ids.tolist():
        own, size = int(population.level[client]), int(population.size[client])
        key, steps = jax.random.fold_in(keys, client), range(-(-size // BATCH))
        of_step = [jax.random.fold_in(jax.random.fold_in(key, (1 << 20) + i), 2) for i in steps]
        drawn = [int(ordered.uniform_draw(k, own, 3)) for k in of_step]
        rows = np.asarray(population.rows[population.offset[client] :][:size])
        x, y = (np.asarray(v)[rows] for v in (population.x, population.y))
        replies.append((trained(tree(start), x.astype(np.float64), y, own, drawn, alpha, distill), own, size))
        sizes = [min(BATCH, size - BATCH * i) for i in steps]
        count = np.bincount(drawn, sizes, 3) + distill * np.eye(3)[own] * size
        work.append([count, count])
    wanted, found = averaged(tree(start), replies), tree(state.server.variables["params"])
    for key in wanted:
        np.testing.assert_allclose(found[key], wanted[key], atol=2e-6, err_msg=key)
    np.testing.assert_array_equal(infos[0].items.seen.work, work)


def test_an_lstm_keeps_the_leading_units_of_every_gate():
    """Level by level, dense and masked, against a loop over places and gates."""
    net, rng = LSTM(hidden=(6, 4), embedding=3, classes=5), np.random.default_rng(0)
    fam = families.family(net, [{"width": 1.0}, {"width": 0.5}], jax.ShapeDtypeStruct((1, 7), jnp.int32))
    variables = families.init(fam, jax.random.key(1))
    x = rng.integers(0, 5, (2, 7))
    x[1, 5:] = -1
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    for level in (0, 1):
        w = jax.tree.map(lambda v: np.asarray(v, np.float64), windows.narrow(fam, variables, level)["params"])
        below = np.zeros((2, 7, 3))
        below[:, 1:] = w["tokens"]["embedding"][np.maximum(x[:, :-1], 0)]
        for layer in (0, 1):
            names = ("input", "recurrent", "input_bias", "recurrent_bias")
            inputs, recurrent, a, b = (w[f"lstm_{layer}_{name}"] for name in names)
            h, c, out = np.zeros((2, a.shape[1])), np.zeros((2, a.shape[1])), []
            for place in range(7):
                i, f, g, o = (
                    below[:, place] @ inputs[:, gate] + a[gate] + h @ recurrent[:, gate] + b[gate] for gate in range(4)
                )
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                out.append(h)
            below = np.stack(out, 1)
        wanted = below @ w["head"]["kernel"] + w["head"]["bias"]
        view = families.view(fam, variables, level)
        np.testing.assert_allclose(view.apply(view.variables, jnp.asarray(x))[0][0], wanted, atol=1e-6)
        masked = families.view(fam, variables, windows.Within(0, jnp.int32(level)))
        np.testing.assert_allclose(masked.apply(masked.variables, jnp.asarray(x))[0][0], wanted, atol=1e-6)
    assert worst(view.variables["params"]["tokens"], variables["params"]["tokens"]) == 0, "the embedding is not cut"

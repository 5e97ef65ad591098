"""HeteroFL against numbers of the official code: cut, combine, forward, gradients, statistics, local training."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Shard, Within
from hetfl_jax.data.population import batches, population
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import heterofl
from hetfl_jax.models import families, windows
from hetfl_jax.parts import drift, merge, objective
from hetfl_jax.parts.local import local
from hetfl_jax.run.evaluate import with_statistics
from tests.helpers import context, loss_of, trained
from tests.vectors import official
from tests.vectors.discover import below, of_kind, read

pytestmark = pytest.mark.vectors


def shard_of(label_split, classes=10, x=None, y=None):
    held = np.zeros(classes, bool)
    held[np.asarray(label_split, int)] = True
    rows = 0 if y is None else len(y)
    return Shard(x, y, jnp.arange(rows), jnp.int32(0), jnp.int32(rows), jnp.asarray(held))


def assert_trees(found, wanted, atol, relative_to_largest=0.0):
    found, wanted = windows.flat(found), windows.flat(wanted)
    assert set(found) == set(wanted)
    for path, value in wanted.items():
        largest = float(np.abs(value).max())
        worst = float(np.abs(np.asarray(found[path]) - value).max())
        assert worst <= max(atol, relative_to_largest * largest), (path, worst)


def combine(fam, variables, replies):
    """(the global model after HeteroFL's aggregation of (level, classes held, given, returned), coverage)."""
    rule = merge.overlap_mean(fam, by_examples=False, class_rows=True)

    def lifted(reply):
        level, shard, given, returned = reply
        total = rule.lift(jax.tree.map(jnp.subtract, returned, given), context(level, shard))
        return total._replace(delta=windows.widen(fam, total.delta, level))

    # One program: op by op, dispatch is what this costs.
    @jax.jit
    def run(variables, given):
        totals = [lifted((level, shard, *pair)) for (level, shard, *_), pair in zip(replies, given)]
        mean, coverage = rule.settle(jax.tree.map(lambda *t: sum(t), *totals))
        return jax.tree.map(lambda v, m, c: jnp.where(c > 0, v + m, v), variables, mean, coverage), coverage

    return run(variables, [reply[2:] for reply in replies])


@pytest.mark.parametrize("name", of_kind("width/o1?_heterofl_*"))
def test_cut_and_combine(name):
    z = read(name)
    start = below(z, "global_in")
    image = (8, 8, next(iter(start.values())).shape[1])
    fam = official.family(start, z["hidden_size"], z["rates"], image)
    variables = {"params": official.to_tree(start)}
    replies = []
    for user in range(len(z["rates"])):
        given = windows.narrow(fam, variables, user + 1)
        assert_trees(given["params"], official.to_tree(below(z, f"user{user}/given")), 0)
        returned = {"params": official.to_tree(below(z, f"user{user}/returned"))}
        replies.append((user + 1, shard_of(z[f"user{user}/label_split"]), given, returned))
    combined, coverage = combine(fam, variables, replies)
    assert_trees(combined["params"], official.to_tree(below(z, "global_out")), 1e-6)
    count = windows.flat(official.to_tree(below(z, "derived_count")))
    for path, covered in windows.flat(coverage["params"]).items():
        np.testing.assert_array_equal(covered, count[path], err_msg=str(path))
        untouched = np.asarray(count[path]) == 0
        old = np.asarray(windows.flat(variables["params"])[path])
        new = np.asarray(windows.flat(combined["params"])[path])
        np.testing.assert_array_equal(new[untouched], old[untouched])


@pytest.mark.parametrize("name", of_kind("width/o2?_heterofl_*_forward"))
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_forward_loss_and_gradients(name, masked):
    z = read(name)
    x, y = official.images(z["x"]), jnp.asarray(z["y"].astype(np.int32))
    valid = jnp.ones(len(y), bool)
    cases = sorted({m[0] for m in (re.match(r"\w+/rate[^/]+/scale\d", key) for key in z) if m})
    assert cases
    for case in cases:
        norm, rate, scaler = case.split("/")
        start = below(z, f"{norm}/global")
        fam = official.family(
            start, z["hidden_size"], [float(rate[4:])], x.shape[1:], norm=norm, scaler=scaler == "scale1"
        )
        variables = {"params": official.to_tree(start)}
        shard = shard_of(z["label_split"])
        view = families.view(fam, variables, Within(0, jnp.int32(1)) if masked else 1)
        for mask in (0, 1):
            if f"{case}/mask{mask}/logits" not in z:
                continue
            goal = objective.masked_cross_entropy() if mask else objective.cross_entropy()

            def loss(params, goal=goal, view=view, shard=shard):
                exits, _ = view.apply({"params": params}, x, train=True, valid=valid)
                return loss_of(goal, exits, view.active, y, valid, shard), goal.local(exits, shard)[-1]

            # Not jitted: fused arithmetic moves a near tie of a max-pool in one of the cases.
            # Masked gradients equal dense ones in test_capacity, where nothing has to run op by op.
            wanted = {} if masked else below(z, f"{case}/mask{mask}/grad")
            params = view.variables["params"]
            with_gradient = jax.value_and_grad(loss, has_aux=True)
            (value, logits), gradient = with_gradient(params) if wanted else (loss(params), None)
            np.testing.assert_allclose(logits, z[f"{case}/mask{mask}/logits"], atol=1e-5, err_msg=case)
            np.testing.assert_allclose(value, z[f"{case}/mask{mask}/loss"], atol=1e-5, err_msg=case)
            if wanted:
                assert_trees(gradient, official.to_tree(wanted), 1e-5, 1e-4)
        exits, _ = view.apply(view.variables, x)
        np.testing.assert_allclose(exits[-1], z[f"{case}/eval_nomask_logits"], atol=1e-5, err_msg=case)


@pytest.mark.parametrize("name", of_kind("width/o2?_heterofl_sbn_*"))
@pytest.mark.parametrize("devices", [2])
def test_statistics_pass_and_evaluation(name, devices):
    z = read(name)
    start = below(z, "global")
    x, test_x = official.images(z["train_x"]), official.images(z["test_x"])
    hidden = [
        v.shape[0] for k, v in start.items() if re.fullmatch(r"blocks\.\d*[05]\.weight|layer\d\.0\.conv1\.weight", k)
    ]
    fam = official.family(start, np.array(hidden), [1.0], x.shape[1:])
    algorithm = heterofl.make(fam, local(learning_rate=0.1, batch_size=4), cohort=1, proportions=(1, 1))
    y = z["train_y"].astype(np.int32)
    pop = population(x, y, np.arange(len(y)), np.array([len(y)]), classes=10)
    size = int(z["batch_size"])
    data = batches(pop, size, order=np.arange(len(y)))
    run = executor("bucketed", 1, devices)
    data, variables = run.place((data, {"params": official.to_tree(start)}))
    variables = jax.jit(lambda v, d: with_statistics(algorithm, run, v, 0, d, size))(variables, data)
    assert_trees(variables["batch_stats"], official.to_tree(below(z, "stats")), 1e-5)
    held = shard_of(z["local_label_split"])
    logits = {
        "global": algorithm.predict(variables, 0, test_x)[-1],
        "local": algorithm.predict(variables, 0, test_x, held)[-1],
    }
    labels = {"global": z["test_y"].astype(int), "local": z["local_y"].astype(int)}
    for kind, found in logits.items():
        np.testing.assert_allclose(found, z[f"{kind}_logits"], atol=1e-4)
        value = objective.mean_cross_entropy(found, jnp.asarray(labels[kind]), jnp.ones(len(found), bool))
        np.testing.assert_allclose(value, z[f"{kind}_loss"], atol=1e-4)
    accuracy = 100 * float((logits["local"].argmax(-1) == labels["local"]).mean())
    assert accuracy == pytest.approx(float(z["local_accuracy_percent"]), abs=1e-4)


@pytest.mark.parametrize("name", of_kind("width/o2?_heterofl_local_train_*"))
def test_local_training_of_one_client(name):
    z = read(name)
    start = below(z, "global")
    x, y = official.images(z["x"]), z["y"].astype(np.int32)
    hidden = [
        v.shape[0] for k, v in start.items() if re.fullmatch(r"blocks\.\d*[05]\.weight|layer\d\.0\.conv1\.weight", k)
    ]
    fam = official.family(start, np.array(hidden), [float(z["rate"])], x.shape[1:])
    view = families.view(fam, {"params": official.to_tree(start)}, 1)
    assert_trees(view.variables["params"], official.to_tree(below(z, "given")), 0)
    shard = shard_of(z["label_split"], x=x, y=jnp.asarray(y))
    settings = local(
        learning_rate=float(z["lr"]),
        batch_size=int(z["batch_size"]),
        epochs=int(z["local_epochs"]),
        momentum=float(z["momentum"]),
        weight_decay=float(z["weight_decay"]),
        clip_norm=float(z["clip_norm"]),
        shuffle=False,
    )

    @jax.jit
    def after(steps):
        goal = objective.masked_cross_entropy()
        return trained(settings._replace(steps=steps), fam, view, 1, goal, drift.none(), shard)

    before = np.zeros(3)
    wanted = z["step_loss_acc_n"]
    for step, (loss, accuracy, count) in enumerate(wanted, 1):
        variables, seen, *_ = after(jnp.int32(step))
        new = np.array([float(v) for v in seen]) - before
        before += new
        assert new[2] == count
        assert new[0] / count == pytest.approx(loss, abs=1e-5)
        assert 100 * new[1] / count == pytest.approx(accuracy, abs=1e-3)
    whole, *_ = jax.jit(lambda: after.__wrapped__(0))()
    for tree in (variables, whole):
        assert_trees(tree["params"], official.to_tree(below(z, "returned")), 1e-5)

"""Split-Mix and SHeteroFL against numbers of the official code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hetfl_jax.core import tree
from hetfl_jax.core.types import Plan, Seen, Shard
from hetfl_jax.methods import sheterofl, splitmix
from hetfl_jax.models import families, windows
from hetfl_jax.models.dual import DualNorm
from hetfl_jax.parts import drift, objective
from hetfl_jax.parts.adversary import Attack, Pixels, attacked
from hetfl_jax.parts.bank import Noted, Report
from hetfl_jax.parts.budgets import Budgets
from hetfl_jax.parts.compose import Sent
from hetfl_jax.parts.local import Tally, local
from hetfl_jax.parts.rotation import rotation
from tests.helpers import context, loss_of, sgd, trained
from tests.vectors import splitmix as official
from tests.vectors.discover import below, of_kind, read
from tests.vectors.official import images
from tests.vectors.test_heterofl_vectors import assert_trees

pytestmark = pytest.mark.vectors


def of_base(arrays, number):
    return {name.split(".", 1)[1]: value for name, value in arrays.items() if name.startswith(f"{number}.")}


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def norm_of(arrays):
    if any("clean_bn" in name for name in arrays):
        return "bn_dual"
    return "bn_tracked" if any("running_mean" in name for name in arrays) else "bn_batch"


def made(fam, count, **more):
    """Split-Mix over ``count`` bases of a family, every number of them offered."""
    every = range(1, count + 1)
    return splitmix.make(
        fam, sgd(), cohort=3, clients=8, base_width=1 / count, budgets=f"{count}-1", bases=every, **more
    )  # fmt: skip


@pytest.mark.parametrize("name", of_kind("width/o4?_splitmix_ensemble_*"))
def test_bases_and_ensembles(name):
    z = read(name)
    start, width, count = below(z, "param"), float(z["width_scale"]), int(z["num_base"])
    width = width if norm_of(start) == "bn_batch" else 1.0  # running statistics go without rescaling
    x, labels = images(z["x"]), jnp.asarray(z["y"])
    fam = official.family(of_base(start, 0), x.shape[1:], width, norm=norm_of(start))
    nets = official.bases(start)
    assert len(nets) == count

    @jax.jit
    def logits(variables):
        forward = families.forward_at(fam, 0)
        return [jnp.stack([forward(one, x, train=train)[0][-1] for one in variables]) for train in (True, False)]

    each = dict(zip(("train", "eval"), logits(nets)))
    algorithm = made(fam, count)
    for mode, found in each.items():
        for base in range(count):
            np.testing.assert_allclose(found[base], z[f"{mode}/base{base}_logits"], atol=1e-5)
        for key in (k for k in z if k.startswith(f"{mode}/ensemble_") and k.endswith("_slice")):
            wanted = z[key.replace("slice", "logits")]
            np.testing.assert_allclose(found[z[key]].mean(0), wanted, atol=1e-5)
            if mode == "eval":
                some = stacked([nets[b] for b in z[key].tolist()])
                tier = count - len(z[key])
                np.testing.assert_allclose(algorithm.predict(some, tier, x)[-1], wanted, atol=1e-5)
    for key in (k for k in z if "_order" in k):
        size, order = key.split("ensemble_")[1].split("_logits")[0].split("_order")
        first = [int(b) for b in order][: int(size)]
        np.testing.assert_allclose(each["eval"][np.array(first)].mean(0), z[key], atol=1e-5)
    _check_starts(fam, below(z, "init"), width)
    _check_training(z, fam, nets, x, labels)


def _check_starts(fam, given, width):
    """All but the first layer within the bound of the full-width layer, the given numbers and ours, which reach it."""
    ours = jax.jit(lambda key: families.init(fam, key))(jax.random.key(0))["params"]
    theirs = official.to_tree(of_base(given, 0))["params"]
    first = {"conv_0", "stem"}
    for layer, leaves in theirs.items():
        if "kernel" not in leaves:
            continue
        fan_in = np.prod(leaves["kernel"].shape[:-1]) / (1 if layer in first else width)
        for params in (theirs, ours):
            kernel = np.abs(params[layer]["kernel"])
            reached = 0.8 / np.sqrt(fan_in) if kernel.size > 50 else 0
            assert reached < kernel.max() <= 1 / np.sqrt(fan_in) + 1e-7, layer
            if "bias" in leaves:
                assert np.abs(params[layer]["bias"]).max() <= 1 / np.sqrt(fan_in) + 1e-7, layer


def _check_training(z, fam, nets, x, labels):
    """Two steps of the chosen bases, each on its own loss: the batch, then the batch in reverse."""
    rate, momentum, decay = z["local_train/lr_momentum_wd"].tolist()
    batch = len(labels)
    two, after = jnp.concatenate([x, x[::-1]]), official.bases(below(z, "local_train/after"))
    shard = Shard(two, jnp.concatenate([labels, labels[::-1]]), jnp.arange(2 * batch), jnp.int32(0),
                  jnp.int32(2 * batch), jnp.ones(10, bool))  # fmt: skip
    settings = local(learning_rate=rate, momentum=momentum, weight_decay=decay, batch_size=batch, shuffle=False)

    @jax.jit
    def train(variables):
        view = families.view(fam, variables, 0)
        done = trained(settings, fam, view, 0, objective.cross_entropy(), drift.none(), shard)
        return done.variables, done.tally

    tallies = []
    for base in range(len(nets)):
        if base in z["local_train/selected"]:
            found, tally = train(nets[base])
            assert_trees(found["params"], after[base]["params"], 1e-4)
            tallies.append(tally)
        else:
            assert_trees(nets[base]["params"], after[base]["params"], 0)
    loss, accuracy = z["local_train/mean_loss_and_acc"]
    examples = sum(t.examples for t in tallies)
    np.testing.assert_allclose(sum(t.loss for t in tallies) / examples, loss, atol=1e-4)
    np.testing.assert_allclose(sum(t.correct for t in tallies) / examples, accuracy, atol=1e-6)


@pytest.mark.parametrize("name", of_kind("width/o4?_splitmix_aggregate*"))
def test_bases_are_means_of_those_who_trained_them(name):
    z = read(name)
    before = official.bases(below(z, "server_in"))
    count, weight = len(before), z["client_weight"]
    first = of_base(below(z, "server_in"), 0)
    image = (32, 32, 3) if official.kind(first) is official.PreResNet else (28, 28, 3)
    image = (256, 256, 3) if official.kind(first) is official.AlexNet else image
    fam = official.family(first, image, norm=norm_of(first))
    algorithm = made(fam, count)
    state = jax.jit(algorithm.init)(jax.random.key(0))[0]
    state = state._replace(members=state.members._replace(variables=stacked(before)))
    sent = algorithm.send(state, jnp.int32(0))
    items = [(c, int(b)) for c in range(len(weight)) for b in z[f"client{c}/bases"]]
    rule = sheterofl.merge.overlap_mean(fam)
    total = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), jax.eval_shape(
        rule.lift, before[0], context(0, Shard((), (), (), 0, jnp.float32(1), jnp.ones(10, bool)))))  # fmt: skip
    for client, base in items:
        own = {
            k.split(".", 1)[1]: v for k, v in below(z, f"client{client}/returned").items() if k.startswith(f"{base}.")
        }
        delta = jax.tree.map(jnp.subtract, official.to_tree(own), before[base])
        shard = Shard((), (), (), 0, jnp.float32(weight[client]), jnp.ones(10, bool))
        part = rule.lift(delta, context(0, shard))
        total = jax.tree.map(lambda t, d, b=base: t.at[b].add(d), total, part)
    ids, member = (jnp.asarray(v) for v in zip(*items))
    ok = jnp.ones(len(items), bool)
    one = Tally(*(jnp.ones(len(items)) for _ in range(3)))
    seen = seen_of(one, len(items))
    plan = Plan(ids, ok, 0 * ids, member, notes=Noted((), state.route))
    after, _ = jax.jit(algorithm.server)(state, plan, sent, total, Report(seen, member, one), ok)
    trained_bases = {b for _, b in items}
    for base, wanted in enumerate(official.bases(below(z, "server_out"))):
        found = tree.take(after.members.variables, base)
        for collection in wanted:
            assert_trees(found[collection], wanted[collection], 1e-6 if base in trained_bases else 0)


def seen_of(tally, items):
    zeros = jnp.zeros((items, 3), jnp.int32)
    return Seen(tally, jnp.zeros((items, 2, 1), jnp.int32), zeros, zeros)


@pytest.mark.parametrize("name", of_kind("width/o4?_splitmix_sheterofl_aggregate*"))
def test_sheterofl_counts_a_client_once_a_width(name):
    z = read(name)
    start, ratios = below(z, "server_in"), sorted(z["ratios"].tolist(), reverse=True)
    image = {official.DigitsCNN: 28, official.AlexNet: 256, official.PreResNet: 32}[official.kind(start)]
    fam = official.family(start, (image, image, 3), levels=[{"width": r} for r in ratios], norm=norm_of(start))
    clients = sorted({k.split("/")[0] for k in z if k.startswith("client")})
    before = official.to_tree(start)
    algorithm = sheterofl.make(fam, sgd(), cohort=3, multiplicity=True)
    state = jax.jit(algorithm.init)(jax.random.key(0))[0]._replace(variables=before)
    rule, total, covered = sheterofl.by_widths(fam, multiplicity=True), None, []
    for client in clients:
        level = ratios.index(float(z[f"{client}/trained_ratios"].max()))
        covered.append(level)
        assert fam.levels - level == len(z[f"{client}/trained_ratios"])
        returned = official.to_tree(below(z, f"{client}/returned"))
        delta = jax.tree.map(jnp.subtract, returned, families.view(fam, before, level).variables)
        shard = Shard((), (), (), 0, jnp.float32(z[f"{client}/weight"]), jnp.ones(10, bool))
        part = algorithm.widen(rule.lift(delta, context(level, shard))._replace(extra={}), level)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    items = len(clients)
    ok, ids = jnp.ones(items, bool), jnp.arange(items)
    plan = Plan(ids, ok, jnp.asarray(covered))
    seen = seen_of(Tally(*(jnp.ones(items) for _ in range(3))), items)
    total = jax.tree.map(lambda t: t[None], total)
    after, _ = jax.jit(algorithm.server)(state, plan, Sent(before), total, seen, ok)
    wanted = official.to_tree(below(z, "server_out"))
    assert_trees(after.variables["params"], wanted["params"], 1e-6)
    inside = windows.mask(fam, min(covered), before)
    for found, old, owned in zip(*(jax.tree.leaves(t) for t in (after.variables, before, inside))):
        np.testing.assert_array_equal(np.asarray(found)[~np.asarray(owned)], np.asarray(old)[~np.asarray(owned)])


@pytest.mark.parametrize("name", of_kind("width/o4?_splitmix_dbn_lambda*"))
def test_dual_norms_and_the_knob(name):
    z = read(name)
    for net in sorted({k.split("/")[0] for k in z if "/" in k}):
        if net in ("layer", "shared"):
            _check_norm(z, net)
        else:
            _check_knob(below(z, net))


def _check_norm(z, kind):
    rows = [{k: z.get(f"{kind}/{b}_bn.{k}") for k in ("weight", "bias", "running_mean", "running_var")}
            for b in ("clean", "noise")]  # fmt: skip
    both = lambda k: jnp.stack([jnp.asarray(r[k]) for r in rows])  # noqa: E731
    shared = kind == "shared"
    scale, bias = (jnp.asarray(z[f"shared/{k}"]) if shared else both(k) for k in ("weight", "bias"))
    variables = {"params": {"scale": scale, "bias": bias},
                 "batch_stats": {"mean": both("running_mean"), "var": both("running_var")}}  # fmt: skip
    x, norm = images(z.get(f"{kind}/x", z["layer/x"])), DualNorm(shared)
    for key in (k for k in z if k.startswith(f"{kind}/out_")):
        text = key.split("out_")[1].removeprefix("lambda")
        noise = {"clean": 0.0, "noise": 1.0}.get(text) if shared else float(text)
        for given in (noise, jnp.float32(noise)):
            found = norm.apply(variables, x, train=False, noise=given)
            np.testing.assert_allclose(found.transpose(0, 3, 1, 2), z[key], atol=1e-5)
    if after := below(z, f"{kind}/after_train_clean_x_noise_xplus1"):
        for noise, shift in ((0.0, 0.0), (1.0, 1.0)):
            _, stats = norm.apply(variables, x + shift, train=True, noise=noise, mutable=["batch_stats"])
            variables = {**variables, **stats}
        for row, branch in enumerate(("clean", "noise")):
            for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
                wanted = after[f"{branch}_bn.{theirs}"]
                np.testing.assert_allclose(variables["batch_stats"][ours][row], wanted, atol=1e-5)


def _check_knob(z):
    x, arrays = images(z["x"]), below(z, "param")
    nets = official.bases(arrays)
    fam = official.family(of_base(arrays, 0), x.shape[1:], norm="bn_dual")
    forward = jax.jit(lambda one, noise: families.forward_at(fam, 0)(one, x, noise=noise)[0][-1])
    for mix in ("deep_mix", "output_mix"):
        for key in (k for k in z if k.startswith(f"{mix}/")):
            count, share = int(key.split("/")[1].removeprefix("ens")), float(key.split("lambda")[1])
            if mix == "deep_mix":
                each = [forward(one, share) for one in nets[:count]]
            else:
                each = [(1 - share) * forward(one, 0.0) + share * forward(one, 1.0) for one in nets[:count]]
            np.testing.assert_allclose(sum(each) / count, z[key], atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", of_kind("width/o4?_splitmix_masked_ce*"))
def test_loss_of_the_classes_in_a_batch(name):
    z = read(name)
    labels, every = jnp.asarray(z["labels"], jnp.int32), jnp.ones(len(z["labels"]), bool)
    goal = objective.batch_masked_cross_entropy()
    loss, gradient = jax.value_and_grad(lambda v: loss_of(goal, v[None], np.ones(1, bool), labels, every))(
        jnp.asarray(z["logits"])
    )
    np.testing.assert_allclose(loss, z["loss"], atol=1e-6)
    np.testing.assert_allclose(gradient, z["grad"], atol=1e-6)
    plain = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(z["logits"]), labels).mean()
    np.testing.assert_allclose(plain, z["plain_ce"], atol=1e-6)


@pytest.mark.parametrize("name", of_kind("width/o4?_splitmix_pgd*"))
def test_the_attack_on_an_ensemble(name):
    z = read(name)
    x, arrays, labels = images(z["x"]), below(z, "param"), jnp.asarray(z["y"], jnp.int32)
    nets = official.bases(arrays)
    fam = official.family(of_base(arrays, 0), x.shape[1:], norm=norm_of(arrays))

    def logits(x, count):
        some = made(fam, len(nets))
        return some.predict(stacked(nets[:count]), len(nets) - count, x)[-1]

    # The file does not say how many of its bases were attacked.
    found = {n: np.abs(logits(x, n) - z["clean_logits"]).max() for n in range(1, len(nets) + 1)}
    count = min(found, key=found.get)
    assert found[count] < 1e-5
    attack = Attack(float(z["eps"]), float(z["eps_iter"]), int(z["nb_iter"]))
    pixels = Pixels(jnp.zeros(x.shape[-1]), jnp.ones(x.shape[-1]))
    adversarial = jax.jit(lambda x, start: attacked(
        lambda x: logits(x, count), x, labels, jnp.ones(len(labels), bool), jax.random.key(0), attack, pixels, start
    ))(x, images(z["delta0"]))  # fmt: skip
    close = np.abs(np.asarray(adversarial).transpose(0, 3, 1, 2) - z["x_adv"]) <= 1e-5
    assert close.mean() >= 0.99
    np.testing.assert_allclose(logits(adversarial, count), z["adv_logits"], atol=1e-3)


def _firsts(found, size):
    """Every member comes once before any comes again."""
    for start in range(0, len(found) - size + 1, size):
        assert sorted(found[start : start + size]) == list(range(size))
    assert len(set(found[len(found) // size * size :])) == len(found) % size


@pytest.mark.parametrize("name", of_kind("width/o4?_splitmix_base_sampling_trace*"))
def test_bases_come_in_turn(name):
    """What holds for the official trace holds for ours, with the same budgets."""
    z = read(name)
    trace, budget = z["round_client_bases"], z["budget"]
    size, clients, rounds = int(trace[:, 2:].max()) + 1, len(budget), int(trace[:, 0].max()) + 1
    wanted = [int(b * size + 1e-9) for b in budget]
    route = rotation(size, Budgets(tuple(wanted), tuple(range(1, clients + 1))))
    state, ours = route.init(), []

    @jax.jit
    def plan(key, state):
        ids = jnp.arange(clients)
        return route.plan(key, state, Plan(ids, ids >= 0, 0 * ids), None)

    for number in range(rounds):
        planned, state = plan(jax.random.key(number), state)
        for client in range(clients):
            mine = np.asarray(planned.ticket)[(np.asarray(planned.ids) == client) & np.asarray(planned.valid)]
            ours.append([number, client, *mine, *[-1] * (trace.shape[1] - 2 - len(mine))])
    for rows in (trace, np.asarray(ours)):
        chosen = [[b for b in row[2:] if b >= 0] for row in rows]
        assert [len(c) for c in chosen] == [wanted[row[1]] for row in rows]
        assert all(len(set(c)) == len(c) for c in chosen)
        _firsts([c[0] for c in chosen], size)


@pytest.mark.parametrize("name", of_kind("width/o4?_splitmix_lr*"))
def test_rates_of_rounds(name):
    for key, wanted in read(name).items():
        rule, rate = key.removeprefix("f64_").rsplit("_lr", 1)
        given = {"schedule": "cosine", "rounds": int(rule.removeprefix("cos"))} if rule.startswith("cos") else {
            "milestones": tuple(map(int, rule.split("_")[1:]))}  # fmt: skip
        with jax.enable_x64():
            schedule_of = local(learning_rate=float(rate), batch_size=1, **given).learning_rate
            found = jax.jit(jax.vmap(schedule_of))(jnp.arange(len(wanted)))
        np.testing.assert_allclose(found, wanted, rtol=1e-9)

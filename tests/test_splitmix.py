"""Split-Mix as a method: identities, modes of its norms, attacks, domains, what is kept, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core import tree
from hetfl_jax.core.shards import shards
from hetfl_jax.core.types import Batch
from hetfl_jax.data.sources import Source
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg, sheterofl, splitmix
from hetfl_jax.models import build, families, windows
from hetfl_jax.models.costs import costs
from hetfl_jax.parts import objective
from hetfl_jax.parts.adversary import adversarial, pgd, pixels_of
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.local import client_statistics
from hetfl_jax.run.config import changed, load_config
from hetfl_jax.run.export import _restored as restored
from hetfl_jax.run.export import export_level, load_exported
from hetfl_jax.run.given import Own
from hetfl_jax.run.lab import prepare
from hetfl_jax.run.train import train
from tests.contract import ONE, play
from tests.helpers import context, image_family, mlp_family, sgd, toy_population, worst

pytestmark = pytest.mark.slow


def alone(population):
    """Everybody at the one level there is."""
    return population._replace(level=population.level * 0, levels=population.levels[:1])


def made(fam=None, **more):
    given = {"cohort": 5, "clients": 12, "base_width": 0.25, "budgets": "4-2-1"} | more
    return splitmix.make(fam or mlp_family(ONE), sgd(), **given)


@pytest.fixture(scope="module")
def plain():
    """FedAvg, which several methods are in their simplest case."""
    algorithm = fedavg.make(mlp_family(ONE), sgd(), cohort=5)
    return play(algorithm, executor("bucketed"), alone(toy_population()))[0].server.variables


def test_one_base_of_width_1_is_fedavg(plain):
    found, _, compilations = play(made(base_width=1.0, budgets="1"), executor("bucketed"), toy_population())
    assert worst(jax.tree.map(lambda v: v[0], found.server.members.variables), plain) < 1e-7
    assert compilations == [1, 1, 1]


def test_eight_bases_are_one_program_and_equal_bases_are_one():
    algorithm = made(base_width=0.125, budgets="8-4-2-1", bases=range(1, 9))
    state, infos, compilations = play(algorithm, executor("bucketed"), toy_population())
    assert compilations == [1, 1, 1]
    assert [tier.name for tier in algorithm.tiers][::7] == ["x1", "x0.125"]
    one = costs(mlp_family(ONE))
    assert [(t.macs, t.parameters, t.models) for t in algorithm.tiers] == [
        (n * one.macs[0], n * one.parameters[0], n) for n in range(8, 0, -1)
    ]
    members = state.server.members.variables
    equal = jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), members)
    x = toy_population().x[:4]
    each = [algorithm.predict(tree.take(equal, slice(n)), 8 - n, x) for n in (1, 3, 8)]
    assert worst(each[1], each[0]) < 1e-6 > worst(each[2], each[0])
    spread = algorithm.predict(members, families.Within(0, jnp.int32(5)), x)
    assert worst(spread, algorithm.predict(tree.take(members, slice(3)), 5, x)) < 1e-6
    budget = np.repeat([1, 2, 4, 8], 3)
    for info in infos:
        assert np.bincount(info.items.ids[info.items.valid]).max() <= 8
        assert all((info.items.ids[info.items.valid] == c).sum() in (0, budget[c]) for c in range(12))


def loss_and_gradient(fam, goal, variables, batch, level=0):
    """Of a single step, in training."""
    view = families.view(fam, variables, level)
    variables = view.variables

    def loss(params):
        options = {"train": True, "valid": batch.valid, "key": jax.random.key(1)}
        run = families.Forward(view, {**variables, "params": params}, options)
        return goal.loss(run, batch, context(level))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def test_sheterofl_trains_all_widths_up_to_the_clients_own(plain):
    found, _, _ = play(sheterofl.make(mlp_family(ONE), sgd(), cohort=5), executor("bucketed"), alone(toy_population()))
    assert worst(found.server.variables, plain) < 1e-7
    fam, pop = mlp_family(), toy_population()
    variables = families.init(fam, jax.random.key(0))
    batch = Batch(pop.x[:6], pop.y[:6], jnp.arange(6) < 5)
    (loss, aux), gradient = loss_and_gradient(fam, sheterofl.all_widths(2), variables, batch)
    plainly = objective.cross_entropy()
    each = [loss_and_gradient(fam, plainly, variables, batch, level) for level in (0, 1)]
    np.testing.assert_allclose(loss, each[0][0][0] + each[1][0][0], rtol=1e-6)
    wide = windows.widen(fam, {"params": each[1][1]}, 1)["params"]
    assert worst(gradient, jax.tree.map(jnp.add, each[0][1], wide)) < 1e-6
    assert aux.work.tolist() == [[5, 5], [5, 5]]
    (_, small), _ = loss_and_gradient(fam, sheterofl.all_widths(2), variables, batch, 1)
    assert small.work.tolist() == [[0, 5], [0, 5]]
    assert small.correct == each[1][0][1].correct


def test_training_against_an_attack():
    """Weight 0 is plain training; weight 1 sees attacked images alone; between them both losses count."""
    fam = image_family(ONE, norm="bn_dual")
    variables = jax.jit(lambda key: families.init(fam, key))(jax.random.key(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.random((6, 8, 8, 1)), jnp.float32)
    batch = Batch(x, jnp.arange(6) % 3, jnp.arange(6) < 5)
    plain = objective.cross_entropy()
    attack = dict(epsilon=0.1, step=0.05, steps=3)
    goals = {weight: adversarial(plain, pgd(weight=weight, **attack), fam) for weight in (0.0, 0.5, 1.0)}
    assert goals[0.0] is plain
    found = {weight: loss_and_gradient(fam, goal, variables, batch) for weight, goal in goals.items()}
    (clean, aux), gradient = found[0.0]
    (noisy, _), noisy_gradient = found[1.0]
    (both, mixed), mixed_gradient = found[0.5]
    assert noisy > clean + 0.01
    np.testing.assert_allclose(both, (clean + noisy) / 2, rtol=1e-5)
    half = jax.tree.map(lambda a, b: (a + b) / 2, gradient, noisy_gradient)
    assert worst(mixed_gradient, half) < 1e-6
    for layer in ("norm_0",):
        assert not np.asarray(gradient[layer]["scale"][1]).any(), "the noise branch is not trained by clean images"
        assert np.asarray(mixed_gradient[layer]["scale"]).all(1).all()
        moved = np.asarray(mixed.stats[layer]["mean"]) != np.asarray(variables["batch_stats"][layer]["mean"])
        assert moved.all(1).all()
        np.testing.assert_allclose(mixed.stats[layer]["mean"][0], aux.stats[layer]["mean"][0], rtol=1e-6)
    # two passes forward and backward, and three steps of the attack, each as two forward passes
    assert mixed.work.tolist() == [[5 * (2 + 2 * 3)], [5 * 2]]


def test_lambda_0_and_1_are_single_branches_of_an_ensemble():
    fam = image_family(ONE, norm="bn_dual")
    slots = Slots(adversary=pgd(weight=0.0, steps=2, epsilon=0.2, step=0.1, knobs=(0.0, 0.4, 1.0)))
    algorithm = made(fam, slots=slots)
    assert [(q.name, q.further) for q in algorithm.questions] == [("", ()), ("robust", ("lambda0.4", "lambda1"))]
    keys = iter(jax.random.split(jax.random.key(0), 99))
    shapes = jax.eval_shape(algorithm.init, jax.random.key(0))[0].members.variables
    members = jax.tree.map(lambda s: jnp.abs(jax.random.normal(next(keys), s.shape)) + 0.1, shapes)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)), jnp.uint8)
    batch = Batch(x, jnp.arange(5) % 3, jnp.ones(5, bool))
    clean, robust = (jax.jit(lambda v, q=q: q.read(v, 0, batch, None))(members) for q in algorithm.questions)
    for name, noise in (("", 0.0), ("lambda1", 1.0)):
        forward, pixels = families.forward_at(fam, 0), fam.prepare(x, None)
        each = [forward(tree.take(members, b), pixels, noise=noise) for b in range(4)]
        np.testing.assert_allclose(clean[name], np.mean([e[0][-1] for e in each], 0), rtol=1e-4, atol=1e-5)
    for name, logits in robust.items():
        loss = [float(objective.mean_cross_entropy(z, batch.labels, batch.valid)) for z in (clean[name], logits)]
        assert loss[1] > loss[0], name


def test_the_robust_config_is_judged_at_every_knob(tmp_path):
    lab = prepare(load_config("splitmix_digits:quick,robust", "method.args.bases=(8,1)", f"run.folder={tmp_path}"))
    start = jax.eval_shape(lab.start)
    names = {f"{before}accuracy" for before in ("", "lambda0.2_", "lambda0.5_", "lambda0.8_", "lambda1_")}
    for number in (0, 1):
        scores = jax.eval_shape(lambda server, n=number: lab.evaluate(n, 1, server, ()), start.server)
        assert names <= set(scores)


def test_pixels_lie_where_they_are_normalised_to():
    mean, std = np.array([0.2, 0.5]), np.array([0.5, 0.25])
    prepare = lambda x, key: (x.astype(jnp.float32) / 255 - mean) / std  # noqa: E731
    fam = families.family(build("linear"), [{}], jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.uint8), prepare)
    found = pixels_of(fam)
    np.testing.assert_allclose(found.low, -mean / std, rtol=1e-6)
    np.testing.assert_allclose(found.high, (1 - mean) / std, rtol=1e-6)


# ---- runs ---------------------------------------------------------------------------------------------------------


def digits(tmp_path, **blocks):
    given = {
        "data": dict(domains=("plain", "inverted"), split="domains", clients=4, examples=160),
        "family": dict(net="mlp", hidden=(32,), mix="w0.25x1", norm="bn_batch"),
        "method": dict(name="splitmix", args=dict(cohort=4, budgets="4-2")),
        "train": dict(rounds=2, learning_rate=0.1, batch_size=20),
        "run": dict(folder=str(tmp_path), eval_every=2, checkpoint_every=1, eval_batch_size=20),
    }
    return changed(**{block: {**given.get(block, {}), **blocks.get(block, {})} for block in {*given, *blocks}})


def test_a_checkpoint_has_the_pointer_and_gives_any_width(tmp_path):
    config = digits(
        tmp_path,
        method=dict(name="splitmix", args=dict(cohort=3, budgets="4-2", bases=(4, 2))),
        train=dict(rounds=2, learning_rate=0.1, batch_size=20),
    )
    whole = train(config, quiet=True)
    assert [row["level"] for row in whole.table] == ["x1", "x0.5"]
    assert whole.table[0]["parameters"] == 2 * whole.table[1]["parameters"]
    route = restored(whole.folder, 2)[1].server.route
    assert int(route.pointer) == 2, "three clients a round, two rounds, four bases"
    assert sorted(route.order.tolist()) == [0, 1, 2, 3]
    net, variables = load_exported(export_level(whole.folder, "x0.5", output=tmp_path / "half.npz"))
    assert net["models"] == 2
    assert net["hidden"] == [8]
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], whole.params["head"]["bias"][:2])
    with pytest.raises(ValueError, match=r"tier 'x0.75' is not one of x1, x0.5 of .* \(--tier\)"):
        export_level(whole.folder, "x0.75")


def test_padding_stays_out_of_the_statistics_of_a_test_batch():
    """Batch statistics in evaluation: 12 test rows in batches of 20 or alone give the same answer."""
    fam = mlp_family(ONE, norm="bn_batch")
    algorithm = fedavg.make(fam, sgd(), cohort=2)
    pop = alone(toy_population())
    variables = algorithm.init(jax.random.key(0))[0].variables
    rows, size = pop.rows[: int(pop.size[0])], int(pop.size[0])
    padded = jnp.concatenate([pop.x[rows], pop.x[rows][-1:].repeat(4, 0)])
    found = algorithm.predict(variables, 0, padded, None, jnp.arange(size + 4) < size)[-1, :size]
    assert worst(found, algorithm.predict(variables, 0, pop.x[rows])[-1]) < 1e-5
    assert worst(found, algorithm.predict(variables, 0, padded)[-1, :size]) > 1e-3


def test_local_norms_stay_on_the_client(tmp_path):
    fam = mlp_family(ONE, norm="bn_tracked")
    algorithm = made(fam, local_norms=True)
    state, infos, _ = play(algorithm, executor("bucketed"), toy_population(), rounds=1)
    norm = state.server.members.variables
    assert not any(np.ptp(leaf) for leaf in jax.tree.leaves((norm["params"]["norm_0"], norm["batch_stats"])))
    assert set(state.memory["own"]["params"]) == {"norm_0"}
    whole = sum(leaf.size for leaf in jax.tree.leaves(fam.shapes[0]))
    down = infos[0].items.seen.down[infos[0].items.valid, 0]
    assert (down == 32 * (whole - 4 * 8)).all(), "four vectors of 8 do not travel"
    np.testing.assert_array_equal(infos[0].items.seen.up, infos[0].items.seen.down)
    lab = prepare(digits(tmp_path, family=dict(norm="bn_tracked"), **args(local_norms=True)))
    state, _ = lab.step(lab.start(), lab.population, lab.key)
    found = jax.device_get(lab.evaluate(0, 0, state.server, state.memory))
    members = jax.device_get(state.server.members.variables)
    fed = lab.federation
    for client in range(4):
        rows = slice(4 * client, 4 * client + 4)
        own = tree.take(jax.device_get(state.memory)["own"], rows)
        variables = {"params": {**members["params"], **own["params"]}, "batch_stats": own["batch_stats"]}
        test = np.asarray(fed.test.rows)[int(fed.test.offset[fed.test_batches + client]) :][: int(fed.test.size[-1])]
        logits = fed.algorithm.predict(variables, 0, fed.train.x[test])[-1]
        hits = float((logits.argmax(-1) == fed.train.y[test]).mean())
        np.testing.assert_allclose(found["client_accuracy"][client], hits, atol=1e-6)
    np.testing.assert_allclose(found["accuracy"], np.mean(found["client_accuracy"]), rtol=1e-6)


def test_post_average_is_the_mean_over_a_clients_batches(tmp_path):
    fam, pop = mlp_family(ONE, norm="bn"), alone(toy_population())
    algorithm = fedavg.make(fam, sgd(), cohort=2)
    variables = algorithm.init(jax.random.key(0))[0].variables
    shard = jax.tree.map(lambda v: v[0], shards(pop, jnp.arange(1)))._replace(x=pop.x, y=pop.y, rows=pop.rows, views=())
    seen = []

    def collect(x, valid):
        seen.append(valid)
        return algorithm.statistics(variables, 0, x, valid)

    size = int(pop.size[0])
    found = client_statistics(collect, shard, size, 3)
    x = np.asarray(pop.x)[np.asarray(pop.rows)[:size]]
    z = x @ np.asarray(variables["params"]["dense_0"]["kernel"]) + np.asarray(variables["params"]["dense_0"]["bias"])
    np.testing.assert_allclose(found["norm_0"]["mean"], z.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["norm_0"]["var"], z.var(0, ddof=1), rtol=1e-4)
    lab = prepare(digits(tmp_path, family=dict(norm="bn"), **args(post_average=2)))
    scores = jax.eval_shape(lambda s: lab.evaluate(0, 0, s.server, ()), lab.start())
    assert scores["client_accuracy"].shape == (4,)


def test_bases_in_the_order_of_their_validation_accuracy(tmp_path):
    config = digits(tmp_path, data=dict(examples=400, validation=0.3), **args(order_by_validation=True))
    lab = prepare(config)
    state = lab.start()
    fed, test = lab.federation, lab.federation.test
    first = int(test.offset[fed.test_batches])
    rows = np.asarray(test.rows)[first : int(test.offset[fed.test_batches + fed.validation_batches])]
    members = state.server.members.variables

    predict = jax.jit(lambda one, x: fed.algorithm.predict(one, 0, x)[-1].argmax(-1))

    def hits(base):
        one = jax.tree.map(lambda v: v[base : base + 1], members)
        parts = [rows[i : i + 20] for i in range(0, len(rows), 20)]
        return sum(int((predict(one, fed.train.x[p]) == fed.train.y[p]).sum()) for p in parts)

    scores = [hits(base) for base in range(4)]
    after = lab.ordered(state.server).members.variables
    order = np.argsort(-np.array(scores), kind="stable")
    assert worst(after, jax.tree.map(lambda v: v[order], members)) == 0


def test_domains_are_equal_groups_of_clients(tmp_path):
    x = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1).repeat(2, 1).repeat(2, 2)
    y = np.arange(40) % 4
    second = np.full((30, 3, 3, 3), 200, np.uint8)
    np.savez(tmp_path / "other.npz", x_train=second, y_train=np.arange(30) % 4, x_test=second, y_test=np.arange(30) % 4)
    names = ("plain", "inverted", f"npz:{tmp_path}/other.npz")
    config = digits(tmp_path, data=dict(domains=names, clients=6, examples=0))
    fed = prepare(config, Own(data=Source(x, y, x[:20], y[:20]))).federation
    pool, part = np.asarray(fed.train.x), fed.partition
    assert pool.shape == (3 * 20 + 3 * 10, 2, 2, 3), "grey images become RGB, the larger set is resized and cut"
    assert part.size.tolist() == [10] * 6
    assert part.test_size.tolist() == [5] * 6
    values = [pool[part.rows[10 * c : 10 * c + 10], 0, 0, 0] for c in range(6)]
    assert all((v < 40).all() for v in values[:2])
    assert all((v >= 216).all() for v in values[2:4])
    assert all((v == 200).all() for v in values[4:])
    plain, inverted = (set(np.concatenate(v).tolist()) for v in (values[:2], values[2:4]))
    assert not plain & {255 - v for v in inverted}, "each image is in one domain"
    own = np.asarray(fed.test.rows)[int(fed.test.offset[-6]) :].reshape(6, 5)
    assert [int(pool[rows, 0, 0, 0].min() > 100) for rows in own] == [0, 0, 1, 1, 1, 1]


def args(name="splitmix", **more):
    return dict(
        method=dict(name=name, args=dict(cohort=4, **({"budgets": "4-2"} if name == "splitmix" else {}) | more))
    )


def attack(**more):
    return dict(adversary=dict(name="pgd", args=more))


REFUSED = [
    (args(budgets="8-4"), "budget 1/8 in '8-4' is below one base net of width 1/4"),
    (args(budgets="8d3-4"), "budget 3/8 in '8d3-4' is no multiple of the base width 1/4"),
    (args(budgets="2d3-4"), "budget 3/2 in '2d3-4', allowed at most 1"),
    (args(budgets="a-b"), "budgets 'a-b': allowed divisors such as 8-4-2-1"),
    (args(budget_order="x"), r"order 'x' is not one of clients, shuffled \(method.args.budget_order\)"),
    (args(bases=(5,)), r"5 bases, allowed 1..4 \(method.args.bases\)"),
    (args(post_average=2), "post_average 2: need 0, or >= 1 with norm bn"),
    (args(order_by_validation=True), "without a validation set: need data.validation > 0"),
    (args(local_norms=True) | dict(family=dict(norm="none")), "local norms of a net without norms"),
    (args("sheterofl") | dict(family=dict(mix="a1-b1", norm="bn_tracked")), "sheterofl with running statistics"),
    (dict(family=dict(mix="a1-b1")), "splitmix over 2 levels: name the base net alone, as in w0.125x1"),
    (dict(family=dict(norm="bn_tracked", rescale="both")), "rescaling with norm 'bn_tracked': running statistics"),
    (dict(family=dict(net="tutorial_cnn", rescale="init")), "rescaling in net TutorialCNN, which has none"),
    (dict(family=dict(rescale="half")), "rescale 'half' is not one of none, init, layer, both"),
    (dict(adversary=dict(name="fgsm")), r"adversary 'fgsm' is not one of none, pgd \(adversary.name\)"),
    (attack(weight=1.5), r"weight 1.5 of noisy examples, allowed 0..1 \(adversary.args.weight\)"),
    (attack(knobs=(-0.1,)), "knob -0.1, the share of the noise branch: allowed 0..1"),
    (attack(knobs=(0.0, 0.5)), "with norm 'bn_batch', which has one branch: need bn_dual"),
    (attack() | dict(data=dict(augment="window:4")), "not normalised by one mean and std a channel"),
    (
        attack()
        | dict(data=dict(source="synthetic", domains=(), split="natural"), family=dict(net="linear", hidden=())),
        "an attack on inputs of -",
    ),
    (
        attack() | args("inclusivefl") | dict(family=dict(mix="3x1-2x1", hidden=(8, 8, 8))),
        "inclusivefl does not judge models",
    ),
    (dict(data=dict(domains=("plain", "blurred"))), "domain 'blurred' is not one of npz:<path>, plain, inverted"),
    (dict(data=dict(domains=("plain", "noisy:3"))), "domain 'noisy:3', allowed a number above 0, at most 1"),
    (dict(data=dict(clients=5)), "5 clients in 2 domains: need equally many in each"),
    (dict(capacity=dict(order="x")), r"order 'x' is not one of usual, smallest_first, shuffled, by_data, against_data"),
]


@pytest.mark.parametrize(("blocks", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_bad_input_is_one_line(blocks, message, tmp_path):
    with pytest.raises(ValueError, match=message) as found:
        prepare(digits(tmp_path, **blocks))
    assert "\n" not in str(found.value)


def test_an_attack_needs_pixels_in_0_to_1(tmp_path):
    x, y = np.linspace(-1, 2, 40 * 16).reshape(40, 4, 4, 1).astype(np.float32), np.arange(40) % 4
    config = digits(tmp_path, data=dict(domains=(), split="iid", clients=4), adversary=dict(name="pgd"))
    with pytest.raises(ValueError, match=r"an attack on inputs of -1..2: need pixels in 0..1"):
        prepare(config, Own(data=Source(x, y, x, y)))

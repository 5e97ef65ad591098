"""FjORD: sizes, what must coincide, statistics by rate, true widths against masks, the baselines, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Within
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg, fjord
from hetfl_jax.models import build, families
from hetfl_jax.models.costs import costs
from hetfl_jax.models.layers import random_units
from hetfl_jax.parts import drift, objective, ordered
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.select import own_level
from hetfl_jax.run import federation
from hetfl_jax.run.config import changed, complete
from hetfl_jax.run.lab import prepare
from hetfl_jax.run.mix import level_fields, parse_mix, uniform_tiers
from tests.contract import play
from tests.helpers import conv_family, exits_family, mlp_family, sgd, toy_population, trained, worst
from tests.vectors.test_depth_vectors import everything

pytestmark = pytest.mark.slow

FIVE = parse_mix(uniform_tiers(5))
THREE = [{"width": 1.0}, {"width": 0.6}, {"width": 0.25}]  # 8, 5 and 2 of 8 units


def at_five(net, example, norm="none", **fields):
    levels = [level_fields(FIVE, i, norm) for i in range(5)]
    return families.family(build(net, norm=norm, **fields), levels, example)


def test_the_sizes_of_the_published_nets():
    """Table 1b: parameters of the ResNet exactly, the others as they are printed there or follow from it."""
    resnet = at_five("resnet18", jnp.zeros((1, 32, 32, 3)), "bn_tiers")
    assert costs(resnet).parameters.tolist() == [11_173_962, 7_175_586, 4_049_352, 1_803_314, 457_578]
    assert (costs(resnet).macs / 1e6).round().tolist() == [555, 360, 203, 91, 23]
    first = [[s["params"][f"stage{i}_block0_1_conv"]["kernel"].shape[3] for i in range(4)] for s in resnet.shapes]
    assert first[::-1] == [
        [13, 26, 52, 103], [26, 52, 103, 205], [39, 77, 154, 308], [52, 103, 205, 410], [64, 128, 256, 512],
    ]  # fmt: skip
    cnn = at_five("lenet", jnp.zeros((1, 28, 28, 1)), hidden=(10, 20), classes=62)
    # The table counts the addition of a bias too.
    biases = [24 * 24 * s["params"]["conv_0"]["bias"].size + 8 * 8 * s["params"]["conv_1"]["bias"].size + 62
              for s in cnn.shapes]  # fmt: skip
    assert ((costs(cnn).macs + biases) / 1e3).round().tolist() == [491, 342, 218, 120, 47]
    lstm = at_five("lstm", jax.ShapeDtypeStruct((1, 20), jnp.int32), classes=80)
    assert costs(lstm).parameters.tolist() == [213_712, 141_212, 81_724, 39_824, 12_160]
    assert costs(lstm).macs[0] == 20 * (4 * 128 * (8 + 128) + 4 * 128 * 256 + 128 * 80), "of every place of a window"


def test_mixes_of_tiers():
    assert parse_mix(uniform_tiers(10)).widths == tuple(k / 10 for k in range(10, 0, -1))
    half = parse_mix(uniform_tiers(5, 0.5))
    assert np.divide(half.proportions, sum(half.proportions)).tolist() == [0.6, 0.1, 0.1, 0.1, 0.1]
    assert parse_mix(uniform_tiers(3)).widths[1] == pytest.approx(2 / 3, abs=1e-6)
    assert uniform_tiers(1) == "w1x1"
    for count, scale in ((0, 1.0), (5, 0.0), (5, 1.5)):
        with pytest.raises(ValueError, match=rf"{count} tiers with drop scale {scale}: allowed"):
            uniform_tiers(count, scale)


@pytest.mark.parametrize("distill", [False, True])
def test_one_tier_is_fedavg(distill):
    """Student and teacher are one net then, and the second term has no gradient."""
    fam = mlp_family(THREE[:1])
    found = fjord.make(fam, sgd(), cohort=4, clients_per_level=(12,), distill=distill)
    population = toy_population()._replace(level=jnp.zeros(12, jnp.int32))
    states = [
        play(a, executor("bucketed"), population, rounds=2)[0] for a in (found, fedavg.make(fam, sgd(), cohort=4))
    ]
    assert worst(*(s.server.variables for s in states)) < 1e-6


def one_step(fam, level, goal, **settings):
    """The change of a client's parameters by one batch at rate 1."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)
    shard = everything(6, x, jnp.arange(6) % 3, 3)
    view = families.view(fam, families.init(fam, jax.random.key(3)), level)
    once = sgd(**{"learning_rate": 1.0, "batch_size": 6, "epochs": 1, "momentum": 0.0, "clip_norm": 0.0} | settings)
    done = jax.jit(lambda: trained(once, fam, view, level, goal, drift.none(), shard)._asdict())()
    return jax.tree.map(jnp.subtract, done["variables"], view.variables)["params"], view, done


def fixed(number):
    return lambda key, own, levels: jnp.int32(number)


def test_a_student_that_is_the_teacher_adds_nothing_and_alpha_0_is_labels_alone():
    fam = mlp_family(THREE)
    plain = [one_step(fam, 1, ordered.ordered_dropout(3, distill=False, draw=fixed(level)))[0] for level in (1, 2)]
    same = one_step(fam, 1, ordered.ordered_dropout(3, draw=fixed(1)))[0]
    assert worst(same, plain[0]) < 1e-6
    both = one_step(fam, 1, ordered.ordered_dropout(3, alpha=0.0, draw=fixed(2)))[0]
    assert worst(both, jax.tree.map(jnp.add, *plain)) < 1e-6
    hot = [one_step(fam, 1, ordered.ordered_dropout(3, temperature=t, draw=fixed(2)))[0] for t in (1.0, 3.0)]
    assert worst(*hot) > 1e-3


def test_entries_that_were_not_drawn_decay_and_those_beyond_the_client_are_not_there():
    goal = ordered.ordered_dropout(3, distill=False, draw=fixed(2))
    moved, view, done = one_step(mlp_family(THREE), 1, goal, learning_rate=0.5, weight_decay=0.1, steps=2)
    kernel = view.variables["params"]["dense_0"]["kernel"]
    assert kernel.shape == (6, 5)
    np.testing.assert_allclose((moved["dense_0"]["kernel"] + kernel)[:, 2:], 0.95**2 * kernel[:, 2:], rtol=1e-6)
    assert np.abs(moved["dense_0"]["kernel"] + 0.0975 * kernel)[:, :2].max() > 1e-3
    np.testing.assert_array_equal(done["work"], [[0, 0, 12]] * 2)


def test_a_rate_is_drawn_every_batch_among_those_that_a_client_affords():
    draws = np.stack([jax.vmap(lambda k: ordered.uniform_draw(k, own, 3))(jax.random.split(jax.random.key(0), 3000))  # noqa: B023
                      for own in range(3)])  # fmt: skip
    for own, found in enumerate(draws):
        share = np.bincount(found, minlength=3) / 3000
        np.testing.assert_allclose(share, np.where(np.arange(3) >= own, 1 / (3 - own), 0), atol=0.03)
    goal = ordered.ordered_dropout(3, distill=False)
    work = one_step(mlp_family(THREE), 0, goal, learning_rate=0.01, batch_size=1, epochs=30)[2]["work"]
    assert (np.asarray(work[0]) > 30).all(), "each of the three in some of the 180 batches"
    assert work[0].sum() == 180


def test_statistics_are_kept_by_tier_even_where_two_tiers_are_equally_wide():
    """Two levels of the same two channels: a batch at the smaller one moves row 0 alone, and evaluation reads it."""
    levels = [{"width": 1.0, "tiers": 2}, {"width": 0.9, "tiers": 1}]
    fam = mlp_family(levels, norm="bn_tiers")
    module = build("mlp", hidden=(2,), classes=3, norm="bn_tiers")
    fam = families.family(module, levels, jnp.zeros((1, 6)))
    assert fam.windows["batch_stats", "norm_0", "mean"].extents.tolist() == [[2, 2], [1, 2]]
    for distill, moved in ((False, [True, False]), (True, [True, True])):
        goal = ordered.ordered_dropout(2, distill=distill, draw=fixed(1))
        _, view, done = one_step(fam, 0, goal)
        stats, before = (v["batch_stats"]["norm_0"]["mean"] for v in (done["variables"], view.variables))
        assert (stats != before).all(1).tolist() == moved
    variables = families.init(fam, jax.random.key(0))
    variables["batch_stats"]["norm_0"]["mean"] = jnp.array([[5.0, 5.0], [0.0, 0.0]])
    x = jnp.ones((1, 6))
    logits = [families.view(fam, variables, level) for level in (0, 1, Within(0, jnp.int32(1)))]
    wide, narrow, masked = (view.apply(view.variables, x)[0] for view in logits)
    assert worst(narrow, masked) < 1e-6
    assert worst(wide, narrow) > 1e-2


def test_one_client_at_a_time_runs_true_widths_and_a_vmap_masks():
    fam = conv_family([{"width": w, "tiers": t} for w, t in ((1.0, 2), (0.5, 1))], norm="bn_tiers", scaler=False)
    view = families.view(fam, families.init(fam, jax.random.key(0)), 0)
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(3, 4, 8, 8, 1)), jnp.float32), jnp.asarray(rng.integers(0, 3, (3, 4)))

    def step(number, x, y):
        def loss(params):
            forward = families.Forward(view, {**view.variables, "params": params}, {"train": True})
            value, _, stats = forward.inside(x, number, ordered.of_labels, y, jnp.ones(4, bool))
            return value, stats

        return jax.value_and_grad(loss, has_aux=True)(view.variables["params"])

    numbers = jnp.array([0, 1, 1])
    one, many = (str(jax.make_jaxpr(f)(*a)) for f, a in (
        (step, (numbers[0], x[0], y[0])), (jax.vmap(step), (numbers, x, y))))  # fmt: skip
    assert "branches=" in one
    assert "f32[3,3,4,4]" in one, "the kernel of the narrow net's second layer"
    assert "branches=" not in many
    together = jax.jit(jax.vmap(step))(numbers, x, y)
    for i in range(3):
        alone = jax.jit(step)(numbers[i], x[i], y[i])
        assert worst(alone, jax.tree.map(lambda v: v[i], together)) < 1e-5  # noqa: B023


def test_random_dropout_leaves_as_many_units_as_a_client_affords():
    masks = jax.vmap(lambda k: random_units(k, 8, 5, 3))(jax.random.split(jax.random.key(0), 400))
    assert (masks.sum(1) == 3).all()
    assert not masks[:, 5:].any()
    np.testing.assert_allclose(masks[:, :5].mean(0), 0.6, atol=0.08)
    fam = mlp_family(THREE)
    for goal, level, own, kept in (
        (ordered.random_dropout([1.0, 0.6, 0.25]), 0, 2, 2),
        (ordered.random_dropout([1.0, 0.6, 0.25]), 0, 0, 8),
        (ordered.random_dropout([1.0, 0.6, 0.25], ordered=True, most=0.0), 2, 2, 2),
        (ordered.random_dropout([0.5, 0.3, 0.25], ordered=True, most=0.5), 2, 2, 2),
    ):
        wrapped = goal._replace(loss=lambda f, b, c, goal=goal, own=own: goal.loss(f, b, c._replace(ticket=own)))
        moved, *_ = one_step(fam, level, wrapped)
        assert int((moved["head"]["kernel"] != 0).any(1).sum()) <= kept
        assert int((moved["dense_0"]["kernel"] != 0).any(0).sum()) in range(1, kept + 1)


def test_the_baselines_run_above_a_clients_means():
    """eFD always at the widest level, which alone is offered; with ordered dropout one level above one's own."""
    fam, population = mlp_family(THREE), toy_population()._replace(level=jnp.arange(12) % 3)
    for dropout, level, drawn in (("random", [0, 0, 0], (12, 0, 0)), ("both", [0, 0, 1], (8, 4, 0))):
        algorithm = fjord.make(
            fam, sgd(), cohort=12, clients_per_level=(4, 4, 4), distill=False, dropout=dropout
        )  # fmt: skip
        state = jax.eval_shape(algorithm.init, jax.random.key(0))[0]
        plan = algorithm.plan(jax.random.key(0), jnp.int32(0), state, population, None)
        np.testing.assert_array_equal(plan.ticket, population.level[plan.ids])
        np.testing.assert_array_equal(plan.level, np.asarray(level)[np.asarray(plan.ticket)])
        assert algorithm.drawn == drawn
        assert [tier.name for tier in algorithm.tiers] == (["whole"] if dropout == "random" else [])


def make(levels=THREE, net=mlp_family, slots=None, **args):
    fam = net(levels) if net is mlp_family else net()
    return fjord.make(fam, sgd(), cohort=2, clients_per_level=(4,) * fam.levels, slots=slots, **args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(alpha=1.5), r"alpha 1.5, allowed 0..1 \(method.args.alpha\)"),
        (lambda: make(alpha=float("nan")), r"alpha nan, allowed 0..1"),
        (lambda: make(temperature=0.0), r"temperature 0.0, allowed > 0 and finite \(method.args.temperature\)"),
        (lambda: make(dropout="some"), r"dropout 'some' is not one of ordered, random, both \(method.args.dropout\)"),
        (lambda: make(dropout="random"), r"distill with dropout 'random': need false \(method.args.distill\)"),
        (
            lambda: make(dropout="both", distill=False, most_dropped=1.0),
            r"most_dropped 1.0, allowed 0 <= share < 1 \(method.args.most_dropped\)",
        ),
        (
            lambda: make(THREE[:1] + THREE[2:] + THREE[1:2]),
            r"widths 1, 0.25, 0.6: FjORD needs them to fall \(family.mix",
        ),
        (lambda: make(net=exits_family), r"FjORD needs levels of width alone, such as w1x1-w0.5x1 \(family.mix\)"),
        (
            lambda: make(net=lambda: conv_family(norm="bn_tracked")),
            r"norm 'bn_tracked' has one set of statistics for all rates: need bn_tiers \(family.norm\)",
        ),
        (
            lambda: make(dropout="both", distill=False, slots=Slots(capacity=own_level())),
            r"fjord with dropout=both fixes its capacity itself",
        ),
        (lambda: make(slots=Slots(objective=objective.cross_entropy())), "fixes its objective itself"),
        (lambda: parse_mix("w1.2x1-w1x1"), r"width 1.2 in mix .* allowed 0 < width <= 1 \(family.mix\)"),
        (lambda: parse_mix("w0.5x1-w0.8x1"), r"level 'w0.8' .* is above the global level 'w0.5'"),
        (lambda: build("lstm", norm="ln"), r"norm 'ln' of the LSTM, allowed none \(family.norm\)"),
    ],
)
def test_errors_before_anything_compiles(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def text(tmp_path, **more):
    train, test = np.random.default_rng(0).integers(0, 30, (2, 1500))
    np.savez(tmp_path / "text.npz", train=train, test=test)
    data = {"source": f"text:{tmp_path}/text.npz", "clients": 6, "options": {"length": 12, "rows": 6}, **more}
    family = {"net": "lstm", "hidden": (16,), "mix": "w1x1-w0.5x1"}
    return complete(changed(data=data, family=family, method={"name": "fjord", "args": {"cohort": 3}}))


def test_the_lstm_learns_text_by_fjord(tmp_path):
    """Traced alone: shapes of a round and of an evaluation; a window is one example of work, its places are labels."""
    lab = prepare(text(tmp_path))
    state = jax.eval_shape(lab.start)
    after, info = jax.eval_shape(lab.step, state, lab.population, lab.key)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert info.items.seen.work.shape == (3, 2, 2)
    with pytest.raises(ValueError, match=r"augmentation 'corrupt:0.15': net LSTM has no hidden token \(data.augment\)"):
        federation.build(text(tmp_path, augment="corrupt:0.15"))

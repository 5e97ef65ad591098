"""Methods that must coincide, and what the server must leave alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Shard
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import depthfl, fedavg, feddyn, fedprox, heterofl, ifca, inclusivefl, scaffold
from hetfl_jax.models import families, windows
from hetfl_jax.models.costs import costs
from hetfl_jax.parts import merge, select, server
from hetfl_jax.parts.local import local
from hetfl_jax.run import federation
from hetfl_jax.run.config import changed
from tests.contract import play
from tests.helpers import LEVELS, context, exits_family, mlp_family, sgd, toy_population, worst


def equal_clients(classes=3):
    """Equal sizes and all classes everywhere."""
    population = toy_population(clients=8, levels=1)
    size = jnp.full(8, 6, jnp.int32)
    return population._replace(
        size=size, offset=jnp.arange(8, dtype=jnp.int32) * 4, classes=jnp.ones((8, classes), bool), level=size * 0
    )


def final(algorithm, population):
    return play(algorithm, executor("bucketed"), population, rounds=3)[0].server.variables


def test_fedprox_without_a_proximal_weight_is_fedavg():
    fam = mlp_family()
    plain = final(fedavg.make(fam, sgd(), cohort=4), toy_population())
    assert worst(final(fedprox.make(fam, sgd(), cohort=4, proximal_weight=0.0), toy_population()), plain) == 0
    assert worst(final(fedprox.make(fam, sgd(), cohort=4, proximal_weight=1.0), toy_population()), plain) > 1e-4


def test_heterofl_with_one_level_equal_sizes_and_all_classes_is_fedavg():
    fam = mlp_family(LEVELS[:1])
    found = final(heterofl.make(fam, sgd(), cohort=4, proportions=(1,)), equal_clients())
    assert worst(found, final(fedavg.make(fam, sgd(), cohort=4), equal_clients())) < 1e-6


def test_depthfl_with_one_level_and_no_feddyn_is_fedavg():
    fam = exits_family(({"depth": 1},))
    found = final(depthfl.make(fam, sgd(), cohort=4, clients_per_level=(8,), feddyn=False), equal_clients())
    assert worst(found, final(fedavg.make(fam, sgd(), cohort=4), equal_clients())) < 1e-6


def test_the_first_round_of_feddyn_is_that_of_fedprox():
    """Before anybody has a sum only the quadratic term is left; the participants' mean is then FedProx's model."""
    fam, settings = mlp_family(LEVELS[:1]), sgd(clip_norm=0.0, momentum=0.0)
    dynamic = feddyn.make(fam, settings, cohort=4, clients_per_level=(8,), feddyn_alpha=0.5)
    state, _, _ = play(dynamic, executor("bucketed"), equal_clients(), rounds=1)
    prox = fedprox.make(fam, settings, cohort=4, proximal_weight=0.5)
    wanted, _, _ = play(prox, executor("bucketed"), equal_clients(), rounds=1)
    assert worst(dynamic.questions[1].variables(state.server, {}, 0), wanted.server.variables) < 1e-6
    moved = worst(state.server.variables, wanted.server.variables)
    assert moved > 1e-4, "the model that is sent has the correction on top"


def test_heterofl_assignments_agree_when_there_is_nothing_to_draw():
    fam = mlp_family(LEVELS[:1])
    dynamic = heterofl.make(fam, sgd(), cohort=4, proportions=(3,))
    fixed = heterofl.make(fam, sgd(), cohort=4, proportions=(3,), assignment="fixed")
    assert worst(final(dynamic, equal_clients()), final(fixed, equal_clients())) == 0


def test_the_order_of_clients_does_not_matter():
    """Randomness follows the client's id: permuting the items of a plan moves the result by rounding only."""
    base = heterofl.make(mlp_family(), sgd(), cohort=5, proportions=(1, 1))

    def reversed_plan(*args):
        plan = base.plan(*args)
        return plan._replace(ids=plan.ids[::-1], valid=plan.valid[::-1], level=plan.level[::-1])

    assert worst(final(base._replace(plan=reversed_plan), toy_population()), final(base, toy_population())) < 1e-6


def test_unchanged_copies_return_the_global_model_bit_for_bit():
    fam = mlp_family()
    variables = families.init(fam, jax.random.key(0))
    rule = merge.overlap_mean(fam, by_examples=False, class_rows=True)
    shard = Shard(None, None, None, 0, jnp.int32(5), jnp.array([True, True, False]))
    total = rule.lift(jax.tree.map(jnp.zeros_like, variables), context(0, shard))
    mean, coverage = rule.settle(total)
    for name in set(server.OPTIMIZERS) - {"yogi"}:  # Yogi's moments do not start at zero
        step = server.optimizer(name, 0.5)
        _, moved = step.update(step.init(variables), variables, mean, coverage, jnp.bool_(True))
        assert worst(moved, variables) == 0, name


@pytest.mark.parametrize("name", server.OPTIMIZERS)
def test_entries_that_nobody_held_keep_value_and_moments(name):
    """One client at the smaller level without class 2: the rest stays bit-identical under every server optimizer."""
    fam = mlp_family()
    variables = families.init(fam, jax.random.key(0))
    rule = merge.overlap_mean(fam, by_examples=False, class_rows=True)
    step = server.optimizer(name, 0.1)
    noise = jax.tree.map(lambda v: jax.random.normal(jax.random.key(1), v.shape), variables)
    everyone = Shard(None, None, None, 0, jnp.int32(5), jnp.ones(3, bool))
    slot, start = step.update(
        step.init(variables), variables, *rule.settle(rule.lift(noise, context(0, everyone))), jnp.bool_(True)
    )
    few = everyone._replace(classes=jnp.array([True, True, False]))
    small = rule.lift(windows.narrow(fam, noise, 1), context(1, few))
    mean, coverage = rule.settle(small._replace(delta=windows.widen(fam, small.delta, 1)))
    new_slot, moved = step.update(slot, start, mean, coverage, jnp.bool_(True))
    head = moved["params"]["head"]["kernel"] != start["params"]["head"]["kernel"]
    np.testing.assert_array_equal(head, jnp.outer(jnp.arange(8) < 4, jnp.array([True, True, False])))
    hidden = moved["params"]["dense_0"]["bias"] != start["params"]["dense_0"]["bias"]
    np.testing.assert_array_equal(hidden, jnp.arange(8) < 4)
    for old, new in zip(jax.tree.leaves(slot), jax.tree.leaves(new_slot), strict=True):
        if old.shape == (8, 3):
            np.testing.assert_array_equal(old[:, 2], new[:, 2])
            np.testing.assert_array_equal(old[4:], new[4:])


def test_a_class_that_nobody_holds_keeps_its_row():
    population = toy_population()
    population = population._replace(classes=population.classes.at[:, 2].set(False))
    algorithm = heterofl.make(mlp_family(), sgd(), cohort=5, proportions=(1, 1))
    rows = []
    for rounds in (1, 3):
        state, _, _ = play(algorithm, executor("bucketed"), population, rounds=rounds)
        rows.append(state.server.variables["params"]["head"]["kernel"])
    np.testing.assert_array_equal(rows[0][:, 2], rows[1][:, 2])
    assert (rows[0][:, :2] != rows[1][:, :2]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fedprox.make(mlp_family(), sgd(), cohort=4, proximal_weight=-1.0),
            "proximal weight -1.0, allowed >= 0",
        ),
        (lambda: fedavg.make(mlp_family(), sgd(), cohort=0), "cohort of 0 clients, allowed >= 1"),
        (lambda: heterofl.make(mlp_family(), sgd(), cohort=4, proportions=(1,)), "need 2 positive numbers"),
        (lambda: heterofl.make(mlp_family(), sgd(), cohort=4, proportions=(1, 1), assignment="x"), "'x' is not one of"),
        (lambda: server.optimizer("lion"), "'lion' is not one of sgd"),
        (lambda: server.optimizer("sgd", 0.0), "server learning rate 0.0, allowed > 0"),
        (lambda: sgd(batch_size=0), "batch_size 0, allowed >= 1"),
        (lambda: sgd(optimizer="lbfgs"), "'lbfgs' is not one of sgd, adam"),
        (lambda: sgd(learning_rate=float("nan")), "learning_rate nan"),
    ],
)
def test_errors_before_anything_compiles(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_participants_are_independent_given_that_somebody_takes_part():
    """Binomial counts without zero, and every client equally often."""
    clients, probability, draws = 12, 0.1, 4000
    choose = select.bernoulli(probability, clients)
    cohorts = jax.vmap(lambda key: choose.choose(key, 0, (), None, None)[0])(jax.random.split(jax.random.key(0), draws))
    count = np.asarray(cohorts.valid.sum(1))
    wanted = clients * probability / (1 - (1 - probability) ** clients)
    assert count.min() == 1
    assert count.mean() == pytest.approx(wanted, rel=0.03)
    often = np.bincount(np.asarray(cohorts.ids)[np.asarray(cohorts.valid)], minlength=clients) / draws
    np.testing.assert_allclose(often, wanted / clients, atol=0.02)
    with pytest.raises(ValueError, match="participation probability 0"):
        select.bernoulli(0.0, 3)


def depth_step(**changes):
    """One server step of FedDyn in which two of three deep clients of six take part and move every entry by one."""
    fam = exits_family()
    rule = server.feddyn(fam, (2, 4), **changes)
    variables = jax.tree.map(lambda s: jnp.ones(s.shape), fam.shapes[0])
    mean = jax.tree.map(jnp.ones_like, variables)
    coverage = jax.tree.map(lambda v: jnp.full(v.shape, 2.0), variables)
    return rule, variables, rule.update(rule.init(variables), variables, mean, coverage, jnp.bool_(True))


def test_the_denominator_of_feddyn_is_all_clients_or_the_owners_of_an_entry():
    for denominator, deep in (("all", 2 / 6), ("owners", 2 / 2)):
        _, _, (m, after) = depth_step(denominator=denominator)
        np.testing.assert_allclose(m["dense_1"]["bias"], deep, rtol=1e-6)
        np.testing.assert_allclose(m["dense_0"]["bias"], 2 / 6, rtol=1e-6)
        np.testing.assert_allclose(after["params"]["dense_1"]["bias"], 2 + deep, rtol=1e-6)


def test_feddyns_correction_stops_growing_at_its_bound_and_nan_changes_nothing():
    rule, variables, (m, after) = depth_step(max_correction=0.1)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(m)), "1/3 of the model's norm is too much"
    assert worst(after, jax.tree.map(lambda v: v + 1, variables)) == 0
    broken = jax.tree.map(lambda v: jnp.full_like(v, jnp.nan), variables)
    slot, kept = rule.update(m, variables, broken, variables, jnp.bool_(True))
    assert worst((slot, kept), (m, variables)) == 0


def test_an_exit_counts_only_for_the_clients_that_trained_it():
    """With ``own_exit`` the first exit is averaged over shallow clients alone; the trunk over all of them.

    Counted nevertheless, the deep client's exit has not changed, whatever a decay did to it.
    """
    fam = exits_family()
    shard = Shard(None, None, None, jnp.int32(0), jnp.int32(1), jnp.ones(3, bool))
    for how, wanted in (({}, 1.0), ({"own_exit": False}, 2.0), ({"count_untrained": True}, 0.5)):
        rule = merge.overlap_mean(fam, by_examples=False, **how)
        total = None
        for level, moved in ((0, 3.0), (1, 1.0)):
            delta = jax.tree.map(lambda s: jnp.full(s.shape, moved), fam.shapes[level])  # noqa: B023
            one = rule.lift(delta, context(level, shard))
            one = one._replace(delta=windows.widen(fam, one.delta, level))
            total = one if total is None else jax.tree.map(jnp.add, total, one)
        mean = rule.settle(total)[0]["params"]
        assert mean["head_0"]["bias"].tolist() == [wanted] * 3
        assert mean["dense_0"]["bias"].tolist() == [2.0] * 8
        assert mean["head_1"]["bias"].tolist() == [3.0] * 3


def test_decay_of_one_layer_leaves_the_others_alone():
    """A step of rate r without decay, then r x decay x kernel less in the layers that are named, and nowhere else."""
    params = {"a": {"kernel": jnp.full(3, 2.0), "bias": jnp.full(3, 4.0)}, "b": {"kernel": jnp.full(3, 8.0)}}
    gradient = jax.tree.map(jnp.ones_like, params)
    everywhere, one, both = (-0.14, -0.18, -0.26), (-0.14, -0.1, -0.1), (-0.14, -0.1, -0.26)
    for layers, wanted in (((), everywhere), (("a",), one), (("a", "b"), both)):
        rule = local(learning_rate=0.1, batch_size=1, weight_decay=0.2, decay_layers=layers).optimizer(0.1, 0.0)
        found, _ = rule.update(gradient, rule.init(params), params)
        values = {"/".join(path): float(leaf[0]) for path, leaf in windows.flat(found).items()}
        np.testing.assert_allclose([values[n] for n in ("a/kernel", "a/bias", "b/kernel")], wanted, rtol=1e-6)


def test_a_layer_to_decay_must_be_there():
    with pytest.raises(ValueError, match=r"layer 'dense_9' is not one of dense_0, .*train.decay_layers"):
        federation.local_training(changed(train=dict(decay_layers=("dense_9",))).train, mlp_family())


@pytest.mark.parametrize(
    ("fam", "message"),
    [
        (lambda: exits_family(({"depth": 2, "width": 1.0}, {"depth": 1, "width": 0.5})), "levels of several widths"),
        (lambda: families.family(Odd(), ({"depth": 2}, {"depth": 1}), jnp.zeros((1, 6))), "who has layer extra"),
    ],
)
def test_inclusivefl_refuses_what_it_would_share_wrongly(fam, message):
    with pytest.raises(ValueError, match=message):
        inclusivefl.make(fam(), sgd(), cohort=2, beta=0.0)


class Odd(nn.Module):
    """The deeper model has a layer whose name does not say which."""

    depth: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="dense_0")(x)
        first = nn.Dense(3, name="head_0")(x)
        if self.depth == 1:
            return first[None]
        return jnp.stack([first, nn.Dense(3, name="head_1")(nn.Dense(4, name="extra")(x))])


def test_scaffold_sends_twice_and_a_bank_of_it_too():
    fam = mlp_family()
    model = 8 * costs(fam).bytes
    settings = sgd(momentum=0.0)
    one = scaffold.make(fam, settings, cohort=4, clients=12).price()
    np.testing.assert_array_equal([one.down, one.up], [2 * model, 2 * model])
    two = ifca.make(fam, settings, cohort=4, clusters=2, over="scaffold", clients=12).price()
    np.testing.assert_array_equal([two.down, two.up], [4 * model, 2 * model])

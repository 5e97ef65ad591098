"""A choice by loss and amount of data, against NumPy; levels by amount; and the data that the study of it uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax import load_config
from hetfl_jax.core.absent import LOWEST
from hetfl_jax.core.types import Population, Tally
from hetfl_jax.data import amounts, sources, synthetic
from hetfl_jax.parts.value import correlation, loss_and_data, relative_to_level
from hetfl_jax.run.federation import build
from hetfl_jax.run.mix import assigned, parse_mix

CLIENTS, CANDIDATE, COHORT = 24, 12, 5
SIZE = np.random.default_rng(0).integers(1, 90, CLIENTS)
LEVEL = np.random.default_rng(1).integers(0, 3, CLIENTS)
LOSS = np.random.default_rng(2).uniform(0.1, 4, CLIENTS).astype(np.float32)
PEOPLE = Population(None, None, None, None, jnp.asarray(SIZE), jnp.asarray(LEVEL), None, levels=((),) * 3)


def ask(ids, level=None, examples=0, valid=None):
    return Tally(jnp.asarray(LOSS * SIZE)[ids], jnp.zeros(ids.shape), jnp.asarray(SIZE, jnp.float32)[ids])


def chosen(seed, **args):
    rule = loss_and_data(COHORT, CANDIDATE, **args)
    cohort, state = rule.choose(jax.random.key(seed), jnp.int32(3), rule.init(CLIENTS), PEOPLE, ask)
    return np.asarray(cohort.ids), state, rule


def candidates(seed):
    """The same candidates, whatever they are chosen by: all of them are taken where the cohort is as large."""
    rule = loss_and_data(CANDIDATE, CANDIDATE, loss=0.0)
    cohort, _ = rule.choose(jax.random.key(seed), jnp.int32(3), rule.init(CLIENTS), PEOPLE, ask)
    return np.asarray(cohort.ids)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("data", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("loss", "relative"), [(0.0, False), (1.0, False), (1.0, True), (2.0, False)])
def test_the_most_valuable_candidates_are_chosen(seed, data, loss, relative):
    drawn = candidates(seed)
    assert len(set(drawn.tolist())) == CANDIDATE
    value = LOSS[drawn].astype(float)
    if relative:
        value = value / np.array([value[LEVEL[drawn] == LEVEL[k]].mean() for k in drawn])
    value = value**loss * SIZE[drawn] ** data
    wanted = drawn[np.argsort(-value, kind="stable")[:COHORT]]
    ids, state, rule = chosen(seed, loss=loss, data=data, relative=relative)
    np.testing.assert_array_equal(ids, wanted)
    told = rule.info(state)
    assert float(told["largest_share"]) == pytest.approx(1 / COHORT)
    assert ("correlation_of_loss_and_level" in told) == (loss > 0), "who asks nobody knows no loss"
    if loss:
        seen = np.corrcoef(LOSS[drawn], LEVEL[drawn])[0, 1]
        assert float(told["correlation_of_loss_and_level"]) == pytest.approx(seen, abs=1e-5)


def test_every_client_is_a_candidate_equally_often():
    rule = jax.jit(lambda key: loss_and_data(3, 3, loss=0.0).choose(key, 0, None, PEOPLE, ask)[0].ids)
    times = np.bincount(np.concatenate([rule(jax.random.key(seed)) for seed in range(400)]), minlength=CLIENTS)
    assert np.abs(times - 50).max() < 5 * np.sqrt(50)


def test_candidates_by_data_come_in_proportion_to_it():
    rule = jax.jit(lambda key: loss_and_data(1, 1, loss=0.0, weighted=True).choose(key, 0, None, PEOPLE, ask)[0].ids)
    times = np.bincount(np.concatenate([rule(jax.random.key(seed)) for seed in range(600)]), minlength=CLIENTS)
    wanted = 600 * SIZE / SIZE.sum()
    assert (((times - wanted) ** 2 / wanted).sum()) < 60  # chi-square of 23 degrees, p < 1e-4


def test_a_client_without_a_loss_stays_without_one():
    relative = relative_to_level(jnp.array([2.0, LOWEST, 6.0]), jnp.zeros(3, int), 1)
    assert relative[0] == 0.5
    assert relative[2] == 1.5
    assert relative[1] == LOWEST
    assert float(correlation(jnp.ones(3), jnp.arange(3.0), jnp.ones(3, bool))) == 0.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(loss=-1.0), "loss -1.0, allowed >= 0 (select.args.loss)"),
        (dict(data=-0.5), "data -0.5, allowed >= 0 (select.args.data)"),
        (dict(loss=0.0, relative=True), "relative without a loss, allowed with loss > 0 (select.args.relative)"),
        (dict(candidates=2), "2 candidates, allowed >= 5, the cohort (select.args.candidates)"),
        (dict(cohort=0), "cohort of 0 clients, allowed >= 1 (select.args.cohort)"),
    ],
)
def test_what_does_not_fit_is_one_line(args, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        loss_and_data(**(dict(cohort=5, candidates=9) | args))
    assert str(error.value) == message


def test_more_candidates_than_clients_are_refused():
    rule = loss_and_data(2, CLIENTS + 1)
    with pytest.raises(ValueError, match=rf"{CLIENTS + 1} candidates, allowed 2..{CLIENTS} \(select.args.candidates\)"):
        rule.choose(jax.random.key(0), 0, rule.init(CLIENTS), PEOPLE, ask)


def test_levels_go_with_or_against_the_amount_of_data():
    mix, size = parse_mix("a1-b1-c2"), np.array([5, 90, 40, 7, 60, 20, 30, 50])
    by, against = (assigned(mix, 8, order, size) for order in ("by_data", "against_data"))
    assert by[np.argsort(-size)].tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    assert against[np.argsort(size)].tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    with pytest.raises(ValueError, match=r"without the clients' sizes \(capacity.order\)"):
        assigned(mix, 8, "by_data")


def test_an_order_that_nothing_follows_is_said():
    fed = build(load_config("heterofl_digits:quick", "capacity.order=by_data"))
    assert fed.notes[-1] == "levels are drawn in every round; capacity.order=by_data is not used"


def test_amounts_and_labels_are_independent():
    labels = np.random.default_rng(0).integers(0, 10, 40_000)
    part = amounts.lognormal_dirichlet(labels, 200, 0.3, seed=1)
    assert part.size.min() >= 20
    assert part.size.max() <= 600
    assert np.unique(part.rows).size == part.rows.size == part.size.sum()
    owner = np.repeat(np.arange(200), part.size)
    share = np.stack([np.bincount(labels[part.rows[owner == k]], minlength=10) / part.size[k] for k in range(200)])
    assert 0.4 < share.max(1).mean() < 0.75  # the mean of the largest of ten Dirichlet(0.3) shares is near 0.55
    assert abs(np.corrcoef(share.max(1), part.size)[0, 1]) < 0.2
    even = amounts.lognormal_dirichlet(labels, 200, 1000.0, seed=1)
    np.testing.assert_array_equal(even.size, part.size)
    with pytest.raises(ValueError, match=r"100 rows, the draws ask for \d+ \(data.clients\)"):
        amounts.lognormal_dirichlet(labels[:100], 20, 0.3, seed=1)
    with pytest.raises(ValueError, match=r"concentration 0.0, allowed > 0 \(data.concentration\)"):
        amounts.lognormal_dirichlet(labels, 20, 0.0, seed=1)


def test_a_class_that_runs_out_is_replaced_by_what_is_left():
    labels = np.repeat([0, 1], [40, 400])
    part = amounts.lognormal_dirichlet(labels, 3, 0.05, seed=0, least=60, most=80)
    assert np.unique(part.rows).size == part.size.sum()


def test_a_teacher_is_bent_by_each_client_as_far_as_asked():
    alike = list(synthetic.teacher_clients(3, 5, concept=0.0, covariate=0.0, least=200, most=200))
    again = list(synthetic.teacher_clients(3, 5, concept=3.0, covariate=0.0, least=200, most=200))
    for (x, y), (same, bent) in zip(alike, again):
        np.testing.assert_array_equal(x, same)
        assert 0.2 < (y != bent).mean() < 0.95
    source = sources.load("teacher", clients=4, seed=2, test=0.25)
    assert source.x_test.shape[0] == pytest.approx(0.25 * (len(source.y_train) + len(source.y_test)), rel=0.05)
    for options, message in (
        (dict(concept=-1.0), r"concept -1.0, allowed >= 0 \(data.options\)"),
        (dict(most=5), r"hidden 64, most 5: allowed >= 1, and at least least 20 \(data.options\)"),
        (dict(kind=1), r"option 'kind' is not one of covariate, concept, hidden, least, most, test of teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.load("teacher", clients=4, seed=2, **options)


@pytest.mark.parametrize("arg", ["rho=+1", "rho=-1,method=depthfl", "rho=0"])
def test_the_study_gives_capacity_by_amount(arg):
    fed = build(load_config(f"loss_and_data:{arg}"))
    size, level = np.asarray(fed.partition.size + fed.partition.test_size), np.asarray(fed.train.level)
    assert np.bincount(level).tolist() == [25] * 4
    by_level = [size[level == each].mean() for each in range(4)]
    if "+1" in arg:
        assert by_level == sorted(by_level, reverse=True)
    elif "-1" in arg:
        assert by_level == sorted(by_level)
    else:
        assert abs(np.corrcoef(size, level)[0, 1]) < 0.3

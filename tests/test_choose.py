"""Selections by data and loss: the laws they draw from, what they remember, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.absent import HIGHEST, LOWEST
from hetfl_jax.core.types import Plan, Population, Seen, Tally
from hetfl_jax.parts import choose, explore, select

SIZES = (5, 1, 20, 3, 9, 40, 2, 8, 12, 7)
LOSS = jnp.array([0.3, 0.9, 0.1, 0.7, 0.5, 0.2, 0.8, 0.4, 0.6, 1.0])
KEY = jax.random.key(0)


def clients(sizes=SIZES):
    return Population(None, None, None, None, jnp.array(sizes), None, None)


class Asked:
    """An ``ask`` that answers with prescribed mean losses and writes down what it was asked."""

    def __init__(self, loss=LOSS, sizes=SIZES):
        self.loss, self.sizes, self.calls = loss, jnp.array(sizes), []

    def __call__(self, ids, level=None, examples=0, valid=None):
        self.calls.append((ids, level, examples))
        number = self.sizes[ids] if not examples else jnp.minimum(self.sizes[ids], examples)
        return Tally(self.loss[ids] * number, jnp.zeros(ids.shape), number.astype(jnp.float32))


def rounds(rule, count, round, population=None, ask=None, state=None):
    """ids and valid [count, K] of one round under many keys."""
    population, ask = population or clients(), ask or Asked()
    state = rule.init(population.size.shape[0]) if state is None else state

    def one(key):
        cohort, _ = rule.choose(key, round, state, population, ask)
        return cohort.ids, cohort.valid

    keys = jax.random.split(jax.random.key(7), count)
    return map(np.asarray, jax.jit(jax.vmap(one))(keys))


def after(rule, state, ids, losses, examples=2.0, ok=True):
    """The state after items of these clients trained with these mean losses."""
    ids, losses = jnp.array(ids), jnp.array(losses, jnp.float32)
    number = jnp.broadcast_to(jnp.float32(examples), losses.shape)
    plan = Plan(ids, jnp.ones(ids.shape, bool), jnp.zeros(ids.shape, jnp.int32))
    seen = Seen(Tally(losses * number, losses, number), None, None, None)
    return rule.update(state, plan, seen, jnp.broadcast_to(jnp.asarray(ok), ids.shape))


def frequency(ids):
    return np.bincount(ids.ravel(), minlength=len(SIZES)) / ids.shape[0]


def close(found, expected, draws):
    """Shares of independent draws within 4.5 standard errors."""
    assert (np.abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9).all()


def test_a_draw_in_proportion_is_one():
    draws = 20_000
    keys = jax.random.split(KEY, draws)
    first = jax.vmap(lambda key: choose.draw_without_replacement(key, jnp.array(SIZES), 2))(keys)
    p = np.array(SIZES) / sum(SIZES)
    close(frequency(np.asarray(first[:, :1])), p, draws)
    second = p * [(p / (1 - p)).sum() - q / (1 - q) for q in p]  # another one first, then this one
    close(frequency(np.asarray(first[:, 1:])), second, draws)
    again = jax.vmap(lambda key: choose.draw_with_replacement(key, jnp.array(SIZES), 1))(keys)
    close(frequency(np.asarray(again)), p, draws)


def test_a_clients_draw_depends_on_the_key_and_its_id_only():
    """Noise is by client: more clients leave the order of the others as it is."""
    few = choose.draw_without_replacement(KEY, jnp.array(SIZES), 10)
    more = choose.draw_without_replacement(KEY, jnp.array(SIZES + (4,) * 90), 100)
    assert few.tolist() == [i for i in more.tolist() if i < 10]
    shorter = choose.draw_without_replacement(KEY, jnp.array(SIZES), 4)
    assert shorter.tolist() == few[:4].tolist()


def test_a_draw_from_many_clients_has_the_same_law():
    """Of 5,000, of which five hold most: how often they come, first and at all, and that nobody comes twice."""
    size = np.random.default_rng(1).integers(1, 4, 5000)
    size[:5], size[10:20] = [3000, 2000, 1000, 500, 200], 0
    draws, nobody = 4000, jnp.zeros(5000, bool)
    keys, weight = jax.random.split(KEY, draws), jnp.asarray(size)
    found = np.asarray(jax.jit(jax.vmap(lambda key: choose.draw_without_replacement(key, weight, 12)))(keys))
    noisy = lambda keys: jax.lax.map(lambda key: choose._by_noise(key, weight, nobody, 12), keys)  # noqa: E731
    other = np.asarray(jax.jit(noisy)(keys[:1000]))
    for client in range(5):
        close((found[:, 0] == client).mean(), size[client] / size.sum(), draws)
        shares = [(ids == client).any(1).mean() for ids in (found, other)]
        assert abs(shares[0] - shares[1]) < 4.5 * np.sqrt(0.25 * (1 / draws + 1 / 1000))
    assert all(len(set(ids)) == 12 for ids in found.tolist())
    assert not np.isin(found, np.arange(10, 20)).any()
    few = jnp.zeros(5000, jnp.int32).at[jnp.array([7, 9, 4000])].set(jnp.array([5, 1, 100_000]))
    ids = choose.draw_without_replacement(KEY, few, 12).tolist()
    assert ids[0] == 4000
    assert set(ids[1:3]) == {7, 9}
    assert len(set(ids)) == 12


def test_clients_without_examples_are_not_drawn():
    size = jnp.array([0, 3, 0, 0, 1])
    for seed in range(20):
        key = jax.random.key(seed)
        assert set(choose.draw_without_replacement(key, size, 2).tolist()) == {1, 4}
        assert set(choose.draw_with_replacement(key, size, 8).tolist()) <= {1, 4}


def test_ties_go_to_the_candidate_drawn_earlier():
    score = jnp.array([1.0, jnp.inf, 2.0, jnp.inf, 2.0, jnp.nan, -jnp.inf])
    best = choose.largest(jnp.array([6, 5, 4, 3, 2, 1, 0]), score, 7)
    assert best.ids[:5].tolist() == [5, 3, 4, 2, 6]
    assert best.valid.tolist() == [True] * 5 + [False] * 2


def test_as_many_candidates_as_clients_in_the_cohort_is_the_weighted_draw():
    plain = choose.weighted(4)
    for kind in ("pow", "cpow", "rpow", "adapow"):
        given = {"cpow": {"examples": 2}, "adapow": {"every": 3}}.get(kind, {})
        rule = choose.power_of_choice(4, 4, kind=kind, **given)
        for seed in range(5):
            key = jax.random.key(seed)
            found, _ = rule.choose(key, 1, rule.init(10), clients(), Asked())
            drawn, _ = plain.choose(key, 1, (), clients(), Asked())
            assert sorted(found.ids.tolist()) == sorted(drawn.ids.tolist())
            assert found.valid.all()


def test_a_cohort_of_all_clients_is_everybody():
    for rule in (
        choose.weighted(10), choose.power_of_choice(10, 10), choose.power_of_choice(10, 10, kind="rpow"),
        explore.active(10), explore.oort(10, 20),
    ):  # fmt: skip
        for round in (0, 5):
            ids, valid = rounds(rule, 3, round)
            assert (np.sort(ids, 1) == np.arange(10)).all()
            assert valid.all()


def test_all_candidates_and_the_largest_losses():
    found, _ = choose.power_of_choice(3, 10).choose(KEY, 1, (), clients(), Asked())
    assert found.ids.tolist() == [9, 1, 6]


def test_nan_is_never_chosen():
    loss = LOSS.at[jnp.array([9, 1])].set(jnp.nan)
    rule = choose.power_of_choice(3, 10)
    found, _ = rule.choose(KEY, 1, (), clients(), Asked(loss))
    assert found.ids.tolist() == [6, 3, 8]
    found, _ = rule.choose(KEY, 1, (), clients(), Asked(jnp.full(10, jnp.nan)))
    assert not found.valid.any()
    stale = choose.power_of_choice(10, 10, kind="rpow")
    found, _ = stale.choose(KEY, 1, stale.init(10).at[4].set(jnp.nan), clients(), Asked())
    assert found.ids[~found.valid].tolist() == [4]


@pytest.mark.parametrize("kind", ["pow", "rpow"])
def test_the_first_round_is_uniform_without_replacement(kind):
    ids, valid = rounds(choose.power_of_choice(3, 5, kind=kind), 8000, 0)
    assert valid.all()
    assert (np.diff(np.sort(ids, 1)) > 0).all()
    close(frequency(ids), 0.3, 8000)


def test_the_baseline_draws_with_replacement():
    rule = choose.random_with_replacement(6)
    assert rule.repeats
    ids, valid = rounds(rule, 4000, 0)
    assert valid.all()
    close(frequency(ids) / 6, 0.1, 24_000)
    ids, _ = rounds(rule, 4000, 3)
    close(frequency(ids) / 6, np.array(SIZES) / sum(SIZES), 24_000)
    cohort, _ = choose.random_with_replacement(40).choose(KEY, 1, (), clients(), Asked())
    pairs = set(zip(cohort.ids.tolist(), cohort.stream.tolist()))
    assert len(pairs) == 40  # each repetition has a stream of its own
    for client in set(cohort.ids.tolist()):
        streams = cohort.stream[cohort.ids == client].tolist()
        assert streams == list(range(len(streams)))


def test_what_is_asked():
    ask = Asked()
    choose.power_of_choice(2, 5, kind="cpow", examples=3, level=1).choose(KEY, 1, (), clients(), ask)
    ((ids, level, examples),) = ask.calls
    assert (ids.shape, level, examples) == ((5,), 1, 3)
    ask = Asked()
    rule = choose.power_of_choice(2, 5, kind="rpow")
    rule.choose(KEY, 1, rule.init(10), clients(), ask)
    assert not ask.calls


def test_the_score_does_not_change_the_candidates():
    asked = [Asked(), Asked()]
    for ask, given in zip(asked, ({}, {"kind": "cpow", "examples": 1})):
        choose.power_of_choice(2, 5, **given).choose(KEY, 4, (), clients(), ask)
    assert asked[0].calls[0][0].tolist() == asked[1].calls[0][0].tolist()


def test_the_table_of_stale_losses():
    rule = choose.power_of_choice(2, 10, kind="rpow")
    table = rule.init(10)
    assert (table == HIGHEST).all()
    table = after(rule, table, [3, 8], [0.5, 0.25])
    table = after(rule, table, [8, 1, 2], [2.0, 7.0, 1.0], ok=[True, False, True])
    assert table[jnp.array([1, 2, 3, 8])].tolist() == [HIGHEST, 1.0, 0.5, 2.0]
    found, _ = rule.choose(KEY, 3, table, clients(), Asked())
    assert not set(found.ids.tolist()) & {2, 3, 8}  # who never took part comes first
    full = jnp.where(table == HIGHEST, 0.0, table)
    found, _ = rule.choose(KEY, 3, full, clients(), Asked())
    assert found.ids.tolist() == [8, 2]
    # Two items of one client count by their examples.
    twice = after(rule, table, [5, 5], [1.0, 4.0], examples=[1.0, 3.0])
    assert twice[5] == 3.25


def test_the_schedule_of_candidates():
    """10, 5, 2, 2, ...: only the first candidates have a score, so the best of few is no better than a draw."""
    rule = choose.power_of_choice(2, 10, kind="adapow", every=3, shrink=2)
    order = choose.draw_without_replacement(jax.random.fold_in(KEY, choose.CANDIDATES), jnp.array(SIZES), 10)
    step = jax.jit(lambda round: rule.choose(KEY, round, (), clients(), Asked())[0].ids)
    for round, number in ((1, 10), (2, 10), (3, 5), (5, 5), (6, 2), (9, 2), (300, 2)):
        best = order[:number][jnp.argsort(-LOSS[order[:number]])][:2]
        assert step(round).tolist() == best.tolist()
    at_once = choose.power_of_choice(2, 10, kind="adapow", every=3)
    assert at_once.choose(KEY, 3, (), clients(), Asked())[0].ids.tolist() == step(9).tolist()


@pytest.mark.parametrize("inner", [choose.weighted(3), choose.power_of_choice(3, 4), explore.active(3)])
@pytest.mark.parametrize("round", [0, 1, 6])
def test_one_half_is_there_without_a_fifth(inner, round):
    ids, valid = rounds(choose.intermittent(inner, 0.2), 200, round)
    half = ids // 5
    assert (half[valid] == round % 2).all()
    assert valid.all()  # 4 of 5 are there
    assert len(np.unique(ids)) >= 4  # client 5 has a small loss and never comes by choice


def test_who_is_absent_is_not_valid_in_a_selection_that_asks_for_no_sizes():
    ids, valid = rounds(choose.intermittent(select.uniform(10), 0.2), 50, 1)
    assert (valid.sum(1) == 4).all()
    assert (ids[valid] >= 5).all()


def test_active_draws_by_value_and_explores():
    rule = explore.active(4, explored=0.5, sharpness=50.0)
    state = rule.init(10)
    ids, valid = rounds(rule, 4000, 0)
    assert valid.all()
    close(frequency(ids), 0.4, 4000)  # nobody has a value yet
    state = after(rule, state, [2, 5, 7], [0.1, 3.0, 2.0])
    _, kept = rule.choose(KEY, 1, state, clients(), Asked())
    assert jnp.flatnonzero(kept > LOWEST).tolist() == [2, 5, 7]  # the 7 smallest were none of them
    state = after(rule, kept, [0, 1], [0.5, 0.6])
    _, kept = rule.choose(KEY, 2, state, clients(), Asked())
    assert jnp.flatnonzero(kept > LOWEST).tolist() == [1, 5, 7]
    ids, valid = rounds(rule, 500, 2, state=state)
    assert valid.all()
    assert (np.diff(np.sort(ids, 1)) > 0).all()
    assert (frequency(ids)[[5, 7]] == 1).all()  # exp(50 * 2) beats exp(50 * 0.6)
    state = after(rule, state, [5], [jnp.nan])
    assert state[5] == LOWEST


def test_oort_prefers_large_data_and_loss_and_takes_new_clients():
    rule = explore.oort(4, 10, explored=0.5, least=0.0, decay=1.0, cut=1.0, bonus=0.0)
    ids, valid = rounds(rule, 50, 0)
    assert valid.all()
    assert frequency(ids)[[2, 5, 8]].tolist() == [1, 1, 1]  # nobody is known: capped size, then one of 9 examples
    assert frequency(ids)[4] == 1
    _, state = rule.choose(KEY, 0, rule.init(10), clients(), Asked())
    state = after(rule, state, [0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0])
    assert state.last.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    ids, _ = rounds(rule, 50, 1, state=state)
    # Values are min(n, 10) * loss = 5, 1, 10, 3: two of the best three, and two new ones.
    assert set(ids[:, :].ravel()) <= {0, 2, 3, 5, 8}
    assert frequency(ids)[[5, 8]].tolist() == [1, 1]


def test_oort_is_slow_to_take_slow_clients():
    given = {"explored": 0.0, "least": 0.0, "cut": 0.9, "bonus": 0.0}
    slow = [1.0] * 10
    slow[5] = 100.0
    state = explore.Known(jnp.ones(10), jnp.ones(10, jnp.int32), jnp.int32(1))
    fast, _ = explore.oort(1, 40, **given).choose(KEY, 1, state, clients(), Asked())
    rule = explore.oort(2, 40, clip=1.0, **given, durations=slow, preferred=2.0)
    ids, _ = rounds(rule, 50, 1, state=state)
    assert fast.ids.tolist() == [5]
    assert 5 not in ids


def test_oort_fills_the_cohort_from_the_other_kind():
    rule = explore.oort(4, 10, explored=1.0, decay=1.0)
    state = explore.Known(jnp.ones(10), jnp.ones(10, jnp.int32).at[3].set(0), jnp.int32(1))
    ids, valid = rounds(rule, 50, 4, state=state)
    assert valid.all()
    assert frequency(ids)[3] == 1  # the only new one
    everybody = explore.Known(jnp.ones(10), jnp.ones(10, jnp.int32), jnp.int32(1))
    ids, valid = rounds(explore.oort(10, 10, cut=0.0), 5, 4, state=everybody)
    assert (np.sort(ids, 1) == np.arange(10)).all()
    assert valid.all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: choose.weighted(0), "cohort of 0 clients, allowed >= 1 (select.args.cohort)"),
        (lambda: choose.random_with_replacement(0), "cohort of 0 clients, allowed >= 1 (select.args.cohort)"),
        (lambda: choose.power_of_choice(0, 3), "cohort of 0 clients, allowed >= 1 (select.args.cohort)"),
        (lambda: choose.power_of_choice(3, 2), "2 candidates, allowed >= 3, the cohort (select.args.candidates)"),
        (lambda: choose.power_of_choice(3, 3, kind="best"),
         "kind 'best', allowed pow, cpow, rpow, adapow (select.args.kind)"),
        (lambda: choose.power_of_choice(3, 3, kind="cpow"),
         "0 examples, allowed >= 1 with kind cpow (select.args.examples)"),
        (lambda: choose.power_of_choice(3, 3, examples=4),
         "4 examples, allowed 0 with kind pow (select.args.examples)"),
        (lambda: choose.power_of_choice(3, 3, kind="adapow"),
         "every 0 rounds, allowed >= 1 with kind adapow (select.args.every)"),
        (lambda: choose.power_of_choice(3, 3, kind="adapow", every=1, shrink=1.0),
         "shrink 1.0, allowed > 1 (select.args.shrink)"),
        (lambda: choose.intermittent(choose.weighted(2), 1.0), "absent 1.0, allowed 0 <= a < 1 (select.args.absent)"),
        (lambda: explore.active(2, dropped=1.0), "dropped 1.0, allowed 0 <= d < 1 (select.args.dropped)"),
        (lambda: explore.active(2, explored=float("nan")), "explored nan, allowed 0..1 (select.args.explored)"),
        (lambda: explore.oort(2, 0), "cap of 0 examples, allowed >= 1 (select.args.cap)"),
        (lambda: explore.oort(2, 9, least=1.5), "least 1.5, allowed 0..1 (select.args.least)"),
        (lambda: explore.oort(2, 9, durations=[1.0]), "preferred 0.0 seconds, allowed > 0 (select.args.preferred)"),
        (lambda: explore.oort(2, 9, durations=[-1.0], preferred=1.0),
         "a duration of -1.0 seconds, allowed > 0 (select.args.durations)"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (choose.weighted(11), "cohort of 11 clients, allowed 1..10 (select.args.cohort)"),
        (choose.power_of_choice(11, 12), "cohort of 11 clients, allowed 1..10 (select.args.cohort)"),
        (choose.power_of_choice(2, 11), "11 candidates, allowed 2..10 (select.args.candidates)"),
        (explore.active(11), "cohort of 11 clients, allowed 1..10 (select.args.cohort)"),
        (explore.oort(11, 5), "cohort of 11 clients, allowed 1..10 (select.args.cohort)"),
        (explore.oort(2, 5, durations=[1.0], preferred=1.0), "1 durations, allowed 10 (select.args.durations)"),
    ],
)
def test_a_value_beyond_the_population_is_named(rule, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        rule.choose(KEY, 0, rule.init(10), clients(), Asked())
    assert str(error.value) == message

"""Selections against plain NumPy: whom they may take, and with what chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.absent import HIGHEST, LOWEST
from hetfl_jax.core.types import Plan, Population, Seen, Tally
from hetfl_jax.parts import choose, explore, select

CLIENTS, COHORT = 20, 6


def people(size):
    return Population(None, None, None, None, jnp.asarray(size), jnp.zeros(len(size), int), None)


def draws(rule, state, population, number=300, round=3, ask=None):
    """Cohorts of many keys: ids [number, K] and valid."""
    one = jax.jit(jax.vmap(lambda key: rule.choose(key, jnp.int32(round), state, population, ask)[0]))
    cohort = one(jax.random.split(jax.random.key(0), number))
    return np.asarray(cohort.ids), np.asarray(cohort.valid)


def in_turn(weights, count):
    """[N] chance of being among ``count`` draws without replacement, exactly, by all orders."""
    chance = np.zeros(len(weights))

    def go(left, probability, count):
        if not count:
            return
        total = sum(weights[i] for i in left)
        for i in left:
            p = probability * weights[i] / total
            chance[i] += p
            go([j for j in left if j != i], p, count - 1)

    go([i for i in range(len(weights)) if weights[i] > 0], 1.0, count)
    return chance


def shares(ids, clients):
    return np.bincount(ids.reshape(-1), minlength=clients) / len(ids)


def within(found, wanted, number):
    """Five deviations of a share of ``number`` draws."""
    np.testing.assert_array_less(np.abs(found - wanted), 5 * np.sqrt(wanted * (1 - wanted) / number) + 1e-9)


def test_a_draw_in_proportion_to_examples_has_the_law_of_one_after_the_other():
    size = np.array([4, 1, 7, 0, 2, 9])
    ids, valid = draws(choose.weighted(3), (), people(size), 4000)
    assert valid.all()
    within(shares(ids, 6), in_turn(size.astype(float), 3), 4000)


def test_a_draw_with_replacement_is_in_proportion():
    size = np.array([4, 1, 7, 0, 2, 9])
    ids, _ = draws(choose.random_with_replacement(3), (), people(size), 4000)
    wanted = size / size.sum()
    np.testing.assert_allclose(shares(ids, 6) / 3, wanted, atol=5 * 0.5 / np.sqrt(3 * 4000))


def test_a_uniform_cohort_and_everyone():
    ids, _ = draws(select.uniform(COHORT), (), people(np.ones(CLIENTS, int)), 3000)
    assert all(len(set(row)) == COHORT for row in ids.tolist())
    within(shares(ids, CLIENTS), np.full(CLIENTS, COHORT / CLIENTS), 3000)
    assert draws(select.everyone(), (), people(np.ones(5, int)), 2)[0].tolist() == [[0, 1, 2, 3, 4]] * 2


def test_independent_participation_given_that_somebody_takes_part():
    """FedDyn's Bernoulli rule, by its law: ``P(count) = binomial / (1 - P(0))``, and all are alike."""
    from math import comb

    n, p, number = 6, 0.3, 6000
    ids, valid = draws(select.bernoulli(p, n), (), people(np.ones(n, int)), number)
    counts = np.bincount(valid.sum(1), minlength=n + 1) / number
    wanted = np.array([0.0] + [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(1, n + 1)]) / (1 - (1 - p) ** n)
    within(counts, wanted, number)
    taking = np.bincount(ids[valid], minlength=n) / number
    within(taking, np.full(n, p / (1 - (1 - p) ** n)), number)


def test_active_fl():
    """The smallest values are dropped; a share is drawn by ``exp(a v)``, the rest uniformly among the others."""
    rng = np.random.default_rng(0)
    value = rng.random(6) * 3
    dropped, sharpness, explored = 0.34, 1.2, 0.34
    rule = explore.active(3, dropped=dropped, sharpness=sharpness, explored=explored)
    ids, _ = draws(rule, jnp.asarray(value, jnp.float32), people(np.ones(6, int)), 4000)
    kept = np.argsort(value)[int(dropped * 6) :]
    weights = np.where(np.isin(np.arange(6), kept), np.exp(sharpness * value), 0.0)
    by_value = int((1 - explored) * 3 + 1e-9)
    # The chance of all pairs of first draws, then the last one uniformly among the clients that are left.
    chance, total = np.zeros(6), weights.sum()
    for i in kept:
        assert by_value == 1
        p = weights[i] / total
        chance[i] += p
        for j in range(6):
            chance[j] += 0 if j == i else p * 2 / 5
    within(shares(ids, 6), chance, 4000)


def test_power_of_choice_takes_the_largest_losses_among_its_candidates():
    """pow-d by brute force: the candidates of a key, then the largest of their losses, ties to the earlier."""
    rng = np.random.default_rng(1)
    size, loss = rng.integers(1, 9, CLIENTS), np.round(rng.random(CLIENTS), 1).astype(np.float32)
    population, d = people(size), 9
    ask = lambda ids, level, examples, valid: Tally(jnp.asarray(loss)[ids] * 4, (), jnp.full(ids.shape, 4.0))  # noqa: E731
    rule = choose.power_of_choice(COHORT, d)
    for seed in range(10):
        key = jax.random.key(seed)
        candidates = choose.draw_without_replacement(jax.random.fold_in(key, choose.CANDIDATES), population.size, d)
        order = sorted(range(d), key=lambda place: (-loss[int(candidates[place])], place))
        wanted = [int(candidates[place]) for place in order[:COHORT]]
        assert rule.choose(key, jnp.int32(2), (), population, ask)[0].ids.tolist() == wanted


def test_what_is_remembered_of_a_round():
    """rpow's table: the mean loss of a client's latest training, kept for those that were not there or failed."""
    rule = choose.power_of_choice(3, 5, kind="rpow")
    table = rule.init(8)
    assert (np.asarray(table) == HIGHEST).all()
    plan = Plan(jnp.asarray([4, 1, 6]), jnp.ones(3, bool), jnp.zeros(3, int))
    seen = Seen(Tally(jnp.asarray([8.0, 6.0, 9.0]), (), jnp.asarray([4.0, 3.0, 9.0])), (), (), ())
    after = np.asarray(rule.update(table, plan, seen, jnp.asarray([True, False, True])))
    wanted = np.full(8, HIGHEST, np.float32)
    wanted[[4, 6]] = 2.0, 1.0
    np.testing.assert_array_equal(after, wanted)
    assert np.float32(LOWEST) < 0


@pytest.mark.parametrize("seed", range(3))
def test_oort(seed):
    """Who may be taken by value, by loops over the description; new clients by their examples."""
    rng = np.random.default_rng(seed)
    size, loss = rng.integers(1, 30, CLIENTS), rng.random(CLIENTS).astype(np.float32) * 3
    last = np.where(rng.random(CLIENTS) < 0.6, rng.integers(1, 5, CLIENTS), 0)
    seconds = rng.random(CLIENTS) * 4 + 0.5
    now, cap, cut, explored = 6, 15, 0.8, 0.5
    rule = explore.oort(COHORT, cap, explored=explored, decay=1.0, least=0.2, cut=cut, durations=seconds.tolist(),
                        preferred=2.0)  # fmt: skip
    state = explore.Known(jnp.asarray(loss), jnp.asarray(last, jnp.int32), jnp.int32(0))
    ids, valid = draws(rule, state, people(size), 60, round=now - 1)
    assert valid.all()
    new = [k for k in range(CLIENTS) if last[k] == 0]
    known = [k for k in range(CLIENTS) if last[k] > 0]
    by_value = min(max(int(COHORT * (1 - explored) + 1e-6), COHORT - len(new)), len(known))
    speed = np.minimum(1, 2.0 / seconds) ** 2
    value = values_by_hand(size, loss, last, now, cap, speed)
    ranked = sorted(known, key=lambda k: -value[k])
    least = cut * value[ranked[by_value]] if by_value < len(ranked) else -np.inf
    allowed = {k for k in known if value[k] >= least - 1e-6}
    largest = sorted(new, key=lambda k: -min(size[k], cap))[: COHORT - by_value]
    floor = min(min(size[k], cap) for k in largest)
    for row in ids:
        assert len(set(row.tolist())) == COHORT
        mine = [k for k in row if last[k] > 0]
        assert len(mine) == by_value
        assert set(mine) <= allowed
        assert all(min(size[k], cap) >= floor for k in row if last[k] == 0)


def values_by_hand(size, loss, last, now, cap, speed, clip=0.98, bonus=0.1):
    raw = [min(size[k], cap) * loss[k] for k in range(len(size))]
    there = sorted(raw[k] for k in range(len(size)) if last[k] > 0)
    low, place = there[0], clip * (len(there) - 1)
    below = int(place)
    high = there[below] + (place - below) * (there[min(below + 1, len(there) - 1)] - there[below])
    value = {}
    for k in range(len(size)):
        if last[k] > 0:
            scaled = (min(raw[k], high) - low) / (high - low)
            value[k] = (scaled + np.sqrt(bonus * np.log(now) / last[k])) * speed[k]
    return value

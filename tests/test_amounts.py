"""Splits by a power law, and clients' own validation and test rows as a run uses them."""

import numpy as np
import pytest

from hetfl_jax.data import amounts
from hetfl_jax.data.partition import Partition, hold_out_own
from hetfl_jax.run.config import changed, complete
from hetfl_jax.run.federation import build
from tests.helpers import DATA, need

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 2000))


def clients_of(part):
    return np.split(part.rows, np.cumsum(part.size)[:-1])


@pytest.mark.parametrize("deal", [amounts.lognormal_counts, amounts.lognormal_shares])
def test_clients_hold_neighbouring_classes_and_no_row_twice(deal):
    part = deal(LABELS, 50, 3, 4)
    assert np.unique(part.rows).size == part.rows.size == part.size.sum()
    for client, rows in enumerate(clients_of(part)):
        assert set(LABELS[rows]) == {(client + j) % 10 for j in range(3)}
    same, other = deal(LABELS, 50, 3, 4), deal(LABELS, 50, 3, 5)
    np.testing.assert_array_equal(part.rows, same.rows)
    assert part.size.tolist() != other.size.tolist()


def test_numbers_of_rows_follow_their_laws():
    """Medians over many draws: floor((e^4 + 5) / 3) = 19 rows of a class; shares of the rest that sum to it."""
    labels = np.repeat(np.arange(10), 40_000)
    part = amounts.lognormal_counts(labels, 2000, 1, 0)
    assert np.median(part.size) == pytest.approx(19, abs=1)
    assert np.quantile(part.size, 0.84) == pytest.approx((np.exp(5) + 5) / 3, rel=0.1)
    assert part.size.min() >= 2
    part = amounts.lognormal_shares(LABELS, 200, 2, 0)
    count = np.stack([np.bincount(LABELS[rows], minlength=10) for rows in clients_of(part)])
    assert count[count > 0].min() >= 5
    assert ((2000 - count.sum(0) >= 0) & (2000 - count.sum(0) <= 40)).all(), "only what rounding leaves is nobody's"
    rest = np.log(np.maximum(count[count > 0] - 5, 0.5))
    assert 1.2 < np.percentile(rest, 84) - np.percentile(rest, 50) < 2.8, "one deviation of LogNormal(0, 2) is 2"


def test_a_client_has_few_hands():
    writer = np.random.default_rng(1).integers(0, 300, LABELS.size)
    known = amounts.lognormal_counts(LABELS, 30, 3, 0, writer)
    mixed = amounts.lognormal_counts(LABELS, 30, 3, 0)
    hands = [np.mean([np.unique(writer[rows]).size / rows.size for rows in clients_of(p)]) for p in (known, mixed)]
    assert hands[0] < 0.75 * hands[1]


@pytest.mark.parametrize(
    ("deal", "message"),
    [
        (lambda: amounts.lognormal_counts(LABELS, 3000, 3, 0), r"class 0 has 2000 rows, the draws ask for \d+ "),
        (lambda: amounts.lognormal_shares(LABELS, 2500, 2, 0), r"class 0 has 2000 rows for 500 clients of 5 \(data.cl"),
        (lambda: amounts.lognormal_shares(LABELS, 9, 11, 0), r"11 classes a client, allowed 1..10 \(data.classes_per"),
        (lambda: amounts.lognormal_counts(LABELS, 0, 1, 0), r"0 clients, allowed >= 1 \(data.clients\)"),
        (lambda: amounts.hold_out_validation(Partition(np.arange(4), np.array([4])), 1.0, 0),
         r"own_validation 1.0, allowed 0 <= f < 1 \(data.own_validation\)"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(deal, message):
    with pytest.raises(ValueError, match=message):
        deal()


def test_every_client_is_cut_in_eight_one_and_one():
    part = Partition(np.arange(130), np.array([100, 20, 9, 1]))
    part = amounts.hold_out_validation(hold_out_own(part, 0.1, 3), 0.1, 3)
    assert part.size.tolist() == [80, 16, 9, 1]
    assert part.test_size.tolist() == [10, 2, 0, 0]
    assert part.validation.size == 12
    parts = np.concatenate([part.rows, part.test_index, part.validation])
    assert sorted(parts.tolist()) == list(range(130))
    assert (part.rows[:80] < 100).all()


def synthetic(**data):
    given = dict(source="synthetic", clients=8, split="natural", test_fraction=0.1, seed=3) | data
    return complete(changed(data=given, family=dict(net="linear"), method=dict(args=dict(cohort=2))))


def test_a_run_is_scored_on_the_clients_own_rows():
    options = dict(sigma=0.1, test=0.0, seed=7)
    fed = build(synthetic(options=options, tested_on="clients", own_validation=0.1))
    part, batch = fed.partition, 100
    assert fed.test_batches == -(-part.test_index.size // batch)
    assert fed.validation_batches == -(-part.validation.size // batch)
    tested = fed.test.rows[: part.test_index.size]
    assert sorted(tested.tolist()) == sorted(part.test_index.tolist())
    whole = part.size + part.test_size
    assert part.size.sum() + part.test_size.sum() + part.validation.size == len(fed.labels)
    assert (np.abs(part.test_size / whole - 0.11) < 0.02).all()
    other = build(synthetic(options=options, tested_on="clients", own_validation=0.1, seed=4))
    np.testing.assert_array_equal(fed.labels, other.labels), "the data have a seed of their own"
    assert part.rows.tolist() != other.partition.rows.tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dict(options=dict(test=0.0)), "synthetic with test=0 has no test set: need tested_on=clients"),
        (dict(tested_on="mine"), "tested_on 'mine' is not one of source, clients (data.tested_on)"),
        (dict(tested_on="clients", test_fraction=0.0), "tested_on 'clients', who have no test rows: need own_test or"),
        (dict(own_validation=1.5), "own_validation 1.5, allowed 0 <= f < 1 (data.own_validation)"),
        (dict(options=dict(test=1.0)), "test 1.0, allowed 0 <= share < 1 (data.options)"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(data, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build(synthetic(**({"options": dict(sigma=0.1)} | data)))
    assert str(error.value).startswith(message)


def test_digits_by_writers_in_a_power_law(monkeypatch):
    need("mnist_writers.npz")
    monkeypatch.setenv("HETFL_DATA", str(DATA))
    data = dict(source="npz:mnist.npz", writers="mnist_writers.npz:writer_train", split="lognormal_counts",
                clients=200, classes_per_client=3, own_test=0.2)  # fmt: skip
    fed = build(complete(changed(data=data, family=dict(net="linear"))))
    assert fed.partition.size.size == 200
    size = fed.partition.size + fed.partition.test_size
    assert 60 < size.mean() < 130  # the original: mean 92
    assert size.std() > 50

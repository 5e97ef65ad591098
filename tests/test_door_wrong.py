"""What the door of data, splits and populations refuse: each with one line that names value and key."""

import numpy as np
import pytest

from hetfl_jax.data import levels, partition
from hetfl_jax.data.door import admit, check_outputs, check_scaling, sample
from hetfl_jax.data.partition import Partition
from hetfl_jax.data.population import batches, population
from hetfl_jax.data.sources import Source
from tests.doors import LINE, flat, pictures


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


ROWS, Y = np.zeros((20, 4)), np.arange(20) % 3
IMAGES = np.full((20, 5, 5, 1), 90)
PART = Partition(np.arange(20), np.array([12, 8]))
POP = {"x": ROWS, "y": Y, "index": np.arange(20), "size": np.array([12, 8])}


def pop(**change):
    given = POP | change
    return population(given.pop("x"), given.pop("y"), given.pop("index"), given.pop("size"), **given)


def ordinary(**change):
    return Source(ROWS, Y, ROWS, Y)._replace(**change)


WRONG = [
    # the door: labels
    (lambda: admit(flat(Y * 0.1)), r"y_train row 1 has 0.1: .*need objective.name=squared_error"),
    (lambda: admit(ordinary(y_test=Y + 0.5)), r"y_test row 0 has 0.5: classes are whole numbers"),
    (lambda: admit(flat(changed(Y.astype(float), 7, np.nan))), "y_train row 7 has NaN"),
    (lambda: admit(flat(changed(Y.astype(float), 7, -np.inf))), "y_train row 7 has -inf"),
    (lambda: admit(flat(changed(Y.astype(float), 7, 1e300))), r"y_train row 7 has 1e\+300: labels are at most 2\^53"),
    (lambda: admit(flat(np.array(["a", None, "b"], object))), "y_train row 1 is None, a NoneType: need numbers or"),
    (lambda: admit(flat(np.array(["a", 3], object))), "y_train row 1 is 3, a int: need numbers or text, all alike"),
    (lambda: admit(flat(np.array([10**30, 1], object))), "y_train has whole numbers beyond 64 bits"),
    (lambda: admit(flat(Y.astype(complex))), "y_train has dtype complex128: need numbers, bool or text"),
    (lambda: admit(flat(Y.astype("M8[s]"))), r"y_train has dtype datetime64\[s\]"),
    (lambda: admit(ordinary(y_test=Y.astype(str))._replace(y_test=np.full(20, "cat"))), "y_train holds numbers; y_te"),
    (lambda: admit(flat(np.eye(20)[:, :5])), r"y_train has shape \(20, 5\), row 5 is not one-hot"),
    (lambda: admit(flat(np.full((20, 2), 0.5))), "row 0 is not one-hot"),
    (lambda: admit(ordinary(y_train=np.eye(3)[Y], y_test=np.eye(4)[Y])), r"y_train \(20, 3\), y_test \(20, 4\) do not"),
    (lambda: admit(flat(np.zeros((20, 2, 2), int))), r"y_train has shape \(20, 2, 2\): need one label a row"),
    (lambda: admit(ordinary(y_train=3)), "y_train is 3: need an array with a row for each example"),
    (lambda: admit(ordinary(y_train=[[1], [2, 3]])), "y_train is a list of uneven rows"),
    (lambda: admit(flat(np.full(20, "cat")), regression=True), "y_train has shape .20,., dtype <U3: a regression"),
    (lambda: admit(flat(np.zeros((20, 2))), regression=True), "a regression needs one number a row"),
    (lambda: admit(flat(changed(Y * 0.5, 4, np.inf)), regression=True), "y_train row 4 has inf: need finite"),
    # the door: rows
    (lambda: admit(ordinary(y_train=Y[:19])), "x_train has 20 rows, y_train has 19: need as many"),
    (lambda: admit(ordinary(x_test=ROWS[:3])), "x_test has 3 rows, y_test has 20: need as many"),
    (lambda: admit(ordinary(x_test=ROWS[:0], y_test=Y[:0])), "the test set is empty: x_test has 0 rows"),
    (lambda: admit(ordinary(x_train=ROWS[:0], y_train=Y[:0])), "the train set is empty"),
    (lambda: admit(ordinary(x_train=None)), "the train set has no x_train"),
    (lambda: admit(ordinary(y_test=None)), "the test set has no y_test"),
    (lambda: admit(ordinary(x_validation=ROWS)), "the validation set has no y_validation"),
    (
        lambda: admit(ordinary(x_test=ROWS[:, :3])),
        r"x_test has rows of shape \(3,\), x_train of \(4,\): need them alike",
    ),
    (lambda: admit(ordinary(writer=np.arange(15))), r"writer has 15 client ids for 20 training rows.*\(data.writers\)"),
    (lambda: admit(ordinary(writer=np.arange(25))), "writer has 25 client ids for 20 training rows: need one each"),
    (lambda: admit(ordinary(writer=np.zeros((20, 2)))), r"writer has shape \(20, 2\): need one client id"),
    (lambda: admit(ordinary(writer=changed(np.zeros(20), 3, np.nan))), "writer row 3 has NaN: need a client id"),
    # the door: values
    (lambda: admit(ordinary(x_train=changed(ROWS, (17, 2), np.nan))), "x_train row 17 has NaN: need finite numbers"),
    (lambda: admit(ordinary(x_test=changed(ROWS, (5, 0), np.inf))), "x_test row 5 has inf: need finite numbers"),
    (lambda: admit(ordinary(x_train=changed(ROWS, 9, 1e39))), r"x_train row 9 has 1e\+39: need finite numbers"),
    (lambda: admit(ordinary(x_train=ROWS.astype(str), x_test=ROWS.astype(str))), "x_train is text: need numbers"),
    (lambda: admit(ordinary(x_train=ROWS[:, 0], x_test=ROWS[:, 0])), r"x_train has shape \(20,\): need rows of values"),
    (lambda: admit(ordinary(x_train=ROWS[:, :0], x_test=ROWS[:, :0])), r"x_train has shape \(20, 0\)"),
    (lambda: admit(pictures(changed(IMAGES, 3, 256))), "x_train row 3 has 256: integers of images are pixels 0..255"),
    (lambda: admit(pictures(IMAGES, changed(IMAGES, 2, -1))), "x_test row 2 has -1: integers of images are pixels"),
    (lambda: admit(pictures(IMAGES, IMAGES / 255)), "x_train has int64; x_test has float64: need integers or floats"),
    (lambda: admit(pictures(IMAGES * 1.0)), r"x_train has floats of 90..90: floats of images mean 0..1"),
    (lambda: admit(pictures(IMAGES), mean=(0.5,)), r"std \(\) for images of 1 channels: need 1 entry \(data.std\)"),
    (lambda: admit(pictures(ROWS), images=True), r"the net wants images \[M, H, W, C\]: x.reshape\(-1, 2, 2, 1\)"),
    (lambda: admit(Source(*[changed(np.ones((3, 2), int), 1, -2)] * 4)), "x_train row 1 has -2: token ids are -1"),
    (lambda: admit(Source(*[np.full((3, 2), -1)] * 4)), "x_train has no token"),
    # what goes with it
    (lambda: check_scaling((0.5, 0.5), (0.5,), 3), "mean .* for images of 3 channels: need 1 or 3 entries .data.mean"),
    (lambda: check_scaling((0.5,), (0.5, 0.0, 1.0), 3), r"std \(0.5, 0.0, 1.0\): need finite numbers > 0 \(data.std\)"),
    (lambda: check_scaling((np.nan,), (0.5,), 1), r"mean \(nan,\): need finite numbers \(data.mean\)"),
    (lambda: check_scaling(("x",), (0.5,), 1), r"mean \('x',\): need numbers"),
    (lambda: check_outputs(Y, 2), r"labels go up to 2, the net has 2 outputs: need at least 3 \(family.outputs\)"),
    (lambda: sample(ordinary(), -1), r"examples -1: need a whole number >= 0 \(data.examples\)"),
    (lambda: sample(ordinary(), 2.5), "examples 2.5: need a whole number"),
    # splits
    (lambda: partition.iid(10, 11, 0), r"11 clients, allowed 1\.\.10 \(one example each\) \(data.partition\)"),
    (lambda: partition.iid(10, 2.5, 0), r"2\.5 clients, allowed 1\.\.10"),
    (lambda: partition.iid(10, 2, -1), "seed -1: need a whole number >= 0"),
    (lambda: partition.per_group(10, 4, 1.5, 0), r"groups 1\.5: need a whole number >= 1"),
    (lambda: partition.per_group(10, 4, 3, 0), "4 clients in 3 equal groups"),
    (lambda: partition.hold_out_own(PART, 1.0, 0), r"local test fraction 1\.0, allowed 0 <= f < 1"),
    (lambda: partition.hold_out_own(PART, "half", 0), "local test fraction 'half': need a finite number"),
    (lambda: partition.first_clients(PART, 3), r"first 3 clients, allowed 1\.\.2, or 0 for all"),
    (lambda: partition.first_clients(PART, 1.5), r"first clients 1\.5: need a whole number"),
    (lambda: partition.shards(Y - 1, 3, 1, 0), r"labels -1\.\.1, allowed 0\.\.999 for 20 rows: renumber them"),
    (lambda: partition.shards(Y, 3, 1, 0, Y * 10**12), r"labels 0\.\.2000000000000, allowed 0\.\.999"),
    (lambda: partition.shards(Y, 0, 1, 0), r"0 clients, allowed 1\.\.20"),
    (lambda: partition.shards(Y, 3, 1.5, 0), r"classes per client 1\.5: need a whole number"),
    (lambda: partition.shards(Y.astype(str), 3, 1, 0), "labels of dtype <U21: a split by classes needs whole numbers"),
    (lambda: partition.dirichlet_per_class(Y * 2 - 1, 2, 0.5, 0), r"labels -1\.\.3, allowed"),
    (lambda: partition.dirichlet_per_class(Y * 0.1, 2, 0.5, 0), "labels of dtype float64: a split by classes"),
    (lambda: partition.dirichlet_per_class(Y[:, None], 2, 0.5, 0), r"labels of shape \(20, 1\): need one an example"),
    (lambda: partition.dirichlet_per_class(Y, 2, 0, 0), "Dirichlet concentration 0, allowed > 0"),
    (lambda: partition.dirichlet_per_class(Y, 2, np.inf, 0), "Dirichlet concentration inf: need a finite number"),
    (lambda: partition.dirichlet_per_class(Y, 2, 0.5, 0, least=11), "2 clients with 11 of 20 examples each: too many"),
    (lambda: partition.dirichlet_per_class(Y, 2, 0.5, 0, least=0), "least examples a client 0: need a whole number"),
    (lambda: partition.dirichlet_per_client(Y * 10**9, 2, 0.5, 0), r"labels 0\.\.2000000000, allowed 0\.\.999"),
    (lambda: partition.dirichlet_per_client(Y, 2, "x", 0), "Dirichlet concentration 'x': need a finite number"),
    (lambda: partition.natural(np.zeros((4, 2)), 0), r"client ids of shape \(4, 2\): need one an example"),
    (lambda: partition.natural(np.array([1, np.nan]), 0), "client ids of several kinds or NaN"),
    (lambda: partition.natural(np.array([1, "a"], object), 0), "client ids of several kinds or NaN"),
    (lambda: partition.natural(np.arange(4), 0), "no client has 2 examples; the largest has 1"),
    (lambda: levels.levels_fixed((), 3), r"proportions \(\): need some"),
    (lambda: levels.levels_fixed((0, 0), 3), r"proportions \(0, 0\): need one above 0"),
    (lambda: levels.levels_by_id((1, -1), 3), r"proportions \(1, -1\): -1: need a whole number"),
    (lambda: levels.levels_by_id((1,), 0), "clients 0: need a whole number >= 1"),
    # the population
    (lambda: pop(index=np.arange(20.0)), r"index of dtype float64: need whole numbers \(data.population\)"),
    (lambda: pop(index=np.arange(20).reshape(4, 5)), r"index of shape \(4, 5\): need one axis"),
    (lambda: pop(size=np.array([12.0, 8.0])), "sizes of dtype float64: need whole numbers"),
    (lambda: pop(size=np.array([22, -2])), r"1 clients hold no example \(first: client 1\)"),
    (lambda: pop(size=np.array([[12, 8]])), r"sizes of shape \(1, 2\): need one per client"),
    (lambda: pop(size=[[12], [8, 1]]), "sizes of uneven rows: need an array"),
    (lambda: pop(level=np.array([0, 2])), r"client 1 has level 2, allowed 0\.\.0; with several levels pass levels=3"),
    (lambda: pop(level=np.array([0, 0.5]), levels=2), "levels that are not whole numbers"),
    (lambda: pop(level=np.array(["a", "b"]), levels=2), "levels of dtype <U1: need whole numbers"),
    (lambda: pop(levels=0), "levels 0: need a whole number >= 1"),
    (lambda: pop(classes=2.5), r"classes 2\.5: need a whole number >= 1"),
    (lambda: pop(classes=np.ones(3, bool)), r"class table of shape \(3,\): need \[clients, classes\]"),
    (lambda: pop(y=3), r"x of shape \(20, 4\), labels of shape \(\): need rows"),
    (lambda: batches(pop(), 0), "batch size 0: need a whole number >= 1"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[f"{i}: {m[:40]}" for i, (_, m) in enumerate(WRONG)])
def test_wrong_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert LINE.fullmatch(str(caught.value))

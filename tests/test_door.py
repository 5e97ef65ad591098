"""The door of data: what is read as a person means it, and the one line for what is not."""

import json
import re
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hetfl_jax.data import levels, partition, sources
from hetfl_jax.data.door import (
    Admitted,
    admit,
    check_outputs,
    check_scaling,
    fingerprint,
    need_images,
    same_fingerprint,
    sample,
)
from hetfl_jax.data.partition import Partition
from hetfl_jax.data.population import batches, population
from hetfl_jax.data.sources import Source

LINE = re.compile(r"[^\n]{1,600} \((data|family)\.[a-z_]+(, data\.[a-z_]+)*\)")
quick = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


def flat(y, y_test=None, **more):
    """Four features a row under the given labels."""
    y_test = y if y_test is None else y_test
    return Source(np.zeros((len(y), 4), np.float32), y, np.zeros((len(y_test), 4), np.float32), y_test, **more)


def pictures(x, x_test=None, **more):
    x_test = x if x_test is None else x_test
    return Source(x, np.arange(len(x)) % 2, x_test, np.arange(len(x_test)) % 2, **more)


def read(y, y_test=None, **options):
    found = admit(flat(np.asarray(y), None if y_test is None else np.asarray(y_test)), **options)
    assert found.source.y_train.dtype == (np.float32 if options.get("regression") else np.int32)
    return found.source.y_train.tolist(), found.source.y_test.tolist(), found.labels_table


@pytest.mark.parametrize(
    ("given", "wanted", "table"),
    [
        (["dog", "cat", "dog"], [1, 0, 1], {"cat": 0, "dog": 1}),
        ([b"dog", b"cat"], [1, 0], {"cat": 0, "dog": 1}),
        (np.array(["dog", "cat"], object), [1, 0], {"cat": 0, "dog": 1}),
        (["10", "2", "0", "1"], [3, 2, 0, 1], {"0": 0, "1": 1, "2": 2, "10": 3}),  # not below 4 x 4 only for ten
        (["1", "2", "10"], [0, 1, 2], {"1": 0, "2": 1, "10": 2}),
        (["007", "7"], [0, 1], {"007": 0, "7": 1}),
        ([True, False, True], [1, 0, 1], None),
        ([-1, 1, -1], [0, 1, 0], {"-1": 0, "1": 1}),
        ([1, 2, 3], [0, 1, 2], {"1": 0, "2": 1, "3": 2}),
        ([0, 100, 3], [0, 2, 1], {"0": 0, "3": 1, "100": 2}),
        ([0, 7, 3], [0, 7, 3], None),
        (np.array([0, 1, 2], np.uint8), [0, 1, 2], None),
        (np.array([0, 1, 2], np.uint64), [0, 1, 2], None),
        (np.array([0.0, 1.0, 2.0]), [0, 1, 2], None),
        (np.array([0, 1, 2], np.float16), [0, 1, 2], None),
        (np.array([[2], [0], [1]]), [2, 0, 1], None),
        (np.array([["b"], ["a"]]), [1, 0], {"a": 0, "b": 1}),
        (np.eye(3)[[2, 0, 1]], [2, 0, 1], None),
        (np.eye(9, dtype=bool)[[8, 3]], [8, 3], None),
        (np.array([2, 1, 0], object), [2, 1, 0], None),
    ],
)
def test_labels_of_any_kind_mean_what_a_person_expects(given, wanted, table):
    if table == {"0": 0, "1": 1, "2": 2, "10": 3}:
        wanted, table = [10, 2, 0, 1], None  # texts that are numbers count as numbers: the largest is below 4 x 4
    assert read(given) == (wanted, wanted, table)
    assert table is None or json.loads(json.dumps(table)) == table


def test_all_sets_share_one_table_and_it_is_said():
    source = flat(np.array(["b", "c"]), np.array(["a", "b"]))
    source = source._replace(x_validation=source.x_train, y_validation=np.array(["d", "c"]))
    found = admit(source)
    assert found.source.y_train.tolist() == [1, 2]
    assert found.source.y_test.tolist() == [0, 1]
    assert found.source.y_validation.tolist() == [3, 2]
    assert found.notes == ["labels were renumbered to 0..3: 'a' -> 0, 'b' -> 1, 'c' -> 2, 'd' -> 3"]


def test_a_class_that_training_lacks_stays_known():
    assert read([0, 2], [1, 3]) == ([0, 2], [1, 3], None)
    assert read([0, 0, 2, 2], [0, 2]) == ([0, 0, 2, 2], [0, 2], None)


def test_a_net_with_fixed_outputs_keeps_the_labels_below():
    assert read([1, 26], classes=62) == ([1, 26], [1, 26], None)
    assert read([1, 62], classes=62)[0] == [0, 1]


def test_numbers_to_predict_stay_numbers_where_asked_for():
    assert read([0.25, -1.5], regression=True) == ([0.25, -1.5], [0.25, -1.5], None)
    assert read([[3], [5]], regression=True) == ([3.0, 5.0], [3.0, 5.0], None)
    assert read([True, False], regression=True)[0] == [1.0, 0.0]
    many = np.arange(100) * 1000.0
    assert "numbers to predict" in admit(flat(many)).notes[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int64, np.uint64])
def test_integers_are_pixels_whatever_their_width(dtype):
    x = np.arange(2 * 5 * 5).reshape(2, 5, 5) + 60
    found = admit(pictures(x.astype(dtype), images_of := x[:1].astype(np.int32)))
    assert found.source.x_train.dtype == found.source.x_test.dtype == np.uint8
    np.testing.assert_array_equal(found.source.x_train[..., 0], x)
    np.testing.assert_array_equal(found.source.x_test[..., 0], images_of)
    assert found.notes == []


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.float16, bool, np.int64])
def test_a_missing_channel_axis_is_added_for_any_kind(dtype):
    found = admit(pictures(np.ones((3, 6, 7), dtype)))
    assert found.source.x_train.shape == (3, 6, 7, 1)
    assert found.source.x_train.dtype == (np.float32 if np.issubdtype(dtype, np.floating) else np.uint8)


def test_images_of_bool_are_black_and_white():
    assert admit(pictures(np.array([[[True, False]]]))).source.x_train.ravel().tolist() == [255, 0]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_first_is_moved_and_said(channels):
    x = np.random.default_rng(0).integers(0, 256, (2, channels, 6, 5)).astype(np.uint8)
    found = admit(pictures(x))
    np.testing.assert_array_equal(found.source.x_train, x.transpose(0, 2, 3, 1))
    assert found.notes == [
        f"x_train has shape (2, {channels}, 6, 5): read as channels first and moved to (2, 6, 5, {channels})"
    ]


@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (2, 3, 3, 3), (2, 1, 28, 4), (2, 8, 8, 6)])
def test_channels_last_stays(shape):
    x = np.full(shape, 99, np.uint8)
    found = admit(pictures(x))
    assert found.source.x_train is x
    assert found.notes == []


def test_floats_of_images_are_judged_by_mean_and_std_where_there_are_some():
    x = np.linspace(0, 255, 50).reshape(2, 5, 5, 1)
    with pytest.raises(ValueError, match=r"x_train has floats of 0\.\.255: .* save 0\.\.255 as uint8"):
        admit(pictures(x))
    with pytest.raises(ValueError, match=r"x_train has floats of 0\.\.255"):
        admit(pictures(x), mean=(0.5,), std=(0.5,))
    np.testing.assert_allclose(admit(pictures(x), mean=(128,), std=(64,)).source.x_train, x, rtol=1e-6)
    for fine in (x / 255, (x - 128) / 64, x / 64):
        assert admit(pictures(fine)).source.x_train.dtype == np.float32
    assert "largest pixel is 16: integers mean 0..255" in admit(pictures(np.full((1, 5, 5), 16))).notes[0]


def test_flat_rows_are_features_and_stay_as_they_were_read_before():
    whole, wide = np.full((2, 9), 200, np.uint8), np.full((2, 9), 70_000)
    assert admit(pictures(whole)).source.x_train is whole
    assert admit(pictures(wide)).source.x_train.dtype == np.float32
    assert admit(pictures(wide)).source.x_train.max() == 70_000
    series = np.full((2, 9, 3), 70.0)
    assert admit(pictures(series), images=False).source.x_train.shape == (2, 9, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 9\), the net wants images .*: x.reshape\(-1, 3, 3, 1\)"):
        admit(pictures(whole), images=True)
    with pytest.raises(ValueError, match=r"x.reshape\(-1, 32, 32, 3\) \(family.net\)"):
        need_images(pictures(np.zeros((1, 3072))))
    with pytest.raises(ValueError, match=r"images \[M, H, W, C\] \(family.net\)"):
        need_images(pictures(np.zeros((1, 7))))


def test_token_ids_pass_unchanged():
    tokens = np.array([[900, 3, 900], [1, -1, -1]], np.int32)
    source = Source(tokens, tokens, tokens[:1], tokens[:1], np.array([0, 1]))
    found = admit(source)
    assert found == Admitted(source, None, [])
    assert found.source.x_train is tokens
    tags = np.array([[0, 5, 0], [1, -1, 1]])
    assert admit(Source(tokens, tags, tokens, tags)).source.y_train.tolist() == tags.tolist()
    one_hot = np.array([[0, 0, 1], [1, 0, 0]])
    assert admit(Source(tokens, one_hot, tokens, one_hot)).source.y_train.tolist() == [2, 0]


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_the_sets_that_come_along_pass_unchanged(name):
    source = sources.load(name, clients=20, seed=1)
    found = admit(source)
    assert found.labels_table is None
    assert found.notes == []
    for before, after in zip(source, found.source):
        assert before is None or (np.array_equal(before, after) and before.dtype == after.dtype)


def test_what_is_valid_is_not_copied():
    x, y = np.full((4, 3, 3, 1), 77, np.uint8), np.arange(4, dtype=np.int32)
    found = admit(Source(x, y, x, y)).source
    assert found.x_train is x
    np.testing.assert_array_equal(found.y_train, y)
    assert found.y_train.dtype == np.int32
    features = np.zeros((4, 2), np.float32)
    assert admit(Source(features, y, features, y)).source.x_train is features


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


def test_a_level_without_a_client_is_named():
    levels.check_levels(np.array([0, 1, 1]), 2, ("a", "b"))
    with pytest.raises(ValueError, match=r"no client has level a, the global one: a 0, b 0, e 4 clients") as caught:
        levels.check_levels(levels.levels_fixed((1, 2, 2), 4), 3, ("a", "b", "e"))
    assert LINE.fullmatch(str(caught.value))
    with pytest.raises(ValueError, match=r"no client has level b: a 1, b 0 clients"):
        levels.check_levels(np.array([0]), 2, ("a", "b"))


def test_an_endless_dirichlet_draw_says_so(monkeypatch):
    labels = np.repeat(np.arange(10), 500)
    for concentration in (0.001, 1e-300):
        monkeypatch.setattr(partition, "PATIENCE", 0.5)
        began = time.perf_counter()
        with pytest.raises(
            ValueError, match=r"no Dirichlet\(.*\) draw of \d+ gave 50 clients 10 examples each"
        ) as caught:
            partition.dirichlet_per_class(labels, 50, concentration, seed=0)
        assert time.perf_counter() - began < 5
        assert LINE.fullmatch(str(caught.value))
    few = partition.dirichlet_per_class(labels, 2, 0.001, seed=0, least=1)
    assert few.size.sum() == labels.size
    assert partition.dirichlet_per_class(labels, 1, 1e-300, seed=0).rows.tolist() == list(range(5000))
    assert partition.dirichlet_per_client(labels, 50, 1e-320, seed=0).size.tolist() == [100] * 50


def test_a_lower_minimum_finds_a_draw():
    labels = np.repeat(np.arange(10), 50)
    assert 0 < partition.dirichlet_per_class(labels, 20, 0.1, seed=0, least=1).size.min() < 10


def test_a_sample_keeps_its_training_rows_and_spreads_its_test_rows():
    x, y = np.arange(400)[:, None], np.repeat(np.arange(10), 40)
    source = Source(x, y, x, y, writer=np.arange(400))
    found = sample(source, 30)
    keep = np.random.default_rng(0).permutation(400)[:30]
    np.testing.assert_array_equal(found.x_train[:, 0], keep)
    np.testing.assert_array_equal(found.writer, keep)
    assert np.bincount(found.y_test).tolist() == [3] * 10
    assert (np.diff(found.x_test[:, 0]) > 0).all()
    np.testing.assert_array_equal(found.y_test, y[found.x_test[:, 0]])
    for first, second in zip(found, sample(source, 30)):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(found.x_test, sample(source, 30, seed=1).x_test)
    for whole in (400, 1000):
        np.testing.assert_array_equal(sample(source, whole).x_test, x)
    assert sample(source, 0) is source
    tokens = np.arange(60).reshape(20, 3)
    assert sample(Source(tokens, tokens, tokens, tokens), 7).x_test.shape == (7, 3)


def test_a_fingerprint_knows_other_data_and_another_split(tmp_path):
    source = admit(sources.load("digits")).source
    part = partition.iid(len(source.y_train), 5, seed=0)
    old = json.loads(json.dumps(fingerprint(source, part)))
    assert same_fingerprint(old, fingerprint(source, part)) == ""
    assert same_fingerprint({}, old) == ""
    again = sources.load("digits")
    other = fingerprint(again, partition.iid(len(source.y_train), 5, seed=1))
    assert same_fingerprint(old, other) == "partition.rows has other values in the same shape"
    for change, line in [
        ({"x_train": source.x_train[::-1]}, "x_train has other values in the same shape"),
        ({"x_test": source.x_test / np.float32(255)}, "x_test has another dtype: float32, was uint8"),
        ({"y_train": source.y_train[:-1]}, "y_train has another shape: [1436], was [1437]"),
        ({"y_train": np.roll(source.y_train, 1)}, "y_train has other values in the same shape"),
        ({"writer": source.y_train}, "writer is new"),
    ]:
        assert same_fingerprint(old, fingerprint(source._replace(**change), part)) == line
    counts = {"y_train": {"counts": {"0": 2, "1": 1}}}
    line = same_fingerprint(counts, {"y_train": {"counts": {"0": 1, "1": 2}}})
    assert line == "y_train has 1 rows of class 0, had 2"


KINDS = st.sampled_from([np.uint8, np.int8, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64, bool])


@st.composite
def labels_of(draw, rows):
    """Labels of any kind, most of them fit to use."""
    kind = draw(st.sampled_from(["text", "few", "any", "float", "one-hot", "column"]))
    if kind == "text":
        return np.array(draw(st.lists(st.text(max_size=4), min_size=rows, max_size=rows)), str)
    if kind == "one-hot":
        width = draw(st.integers(1, 5))
        picked = np.array(draw(st.lists(st.integers(0, width - 1), min_size=rows, max_size=rows)), int)
        return np.eye(width)[picked].astype(draw(KINDS))
    if kind == "any":
        return draw(hnp.arrays(draw(KINDS), rows))
    if kind == "float":
        return draw(hnp.arrays(np.float64, rows, elements=st.floats(-3, 3)))
    y = np.array(draw(st.lists(st.integers(-2, 12), min_size=rows, max_size=rows)), int)
    return y[:, None] if kind == "column" else y


@st.composite
def examples_of(draw, rows):
    shape = draw(st.sampled_from([(3,), (5, 6), (5, 5, 3), (3, 6, 6), (2, 3, 4, 1), ()]))
    dtype = draw(KINDS)
    fine = st.floats(0, 1, width=16) if np.issubdtype(dtype, np.floating) else None
    elements = fine if draw(st.booleans()) else st.integers(0, 127) if fine is None and dtype is not bool else None
    return draw(hnp.arrays(dtype, (rows, *shape), elements=elements))


@st.composite
def source_of(draw):
    rows = draw(st.integers(0, 8))
    more = draw(st.sampled_from([0, 0, 0, 1]))
    x, y = draw(examples_of(rows)), draw(labels_of(rows + more))
    test = draw(st.integers(0, rows))
    writer = draw(st.none() | hnp.arrays(st.sampled_from([np.int64, np.float32, "U2"]), st.integers(0, 9)))
    return Source(x, y, x[:test], y[:test], writer)


def one_line(call):
    """What the call returns, or ``None`` after its one line."""
    try:
        return call()
    except ValueError as error:
        line = str(error)
    assert LINE.fullmatch(line), line
    return None


@quick
@given(source_of(), st.sampled_from([None, True, False]), st.booleans())
def test_every_source_is_admitted_with_its_counts_or_refused_in_one_line(source, images, regression):
    found = one_line(lambda: admit(source, images=images, regression=regression))
    if found is None:
        return
    new, table = found.source, found.labels_table
    assert len(new.x_train) == len(new.y_train) == len(source.y_train) >= 1
    assert len(new.x_test) == len(new.y_test) == len(source.y_test) >= 1
    assert new.x_train.size == np.asarray(source.x_train).size
    assert new.x_train.dtype in (np.uint8, np.float32)
    assert np.isfinite(new.x_train).all()
    assert new.writer is None or new.writer.shape == new.y_train.shape
    assert all("\n" not in note for note in found.notes)
    if regression:
        assert new.y_train.dtype == np.float32
        return
    assert new.y_train.dtype == new.y_test.dtype == np.int32
    assert new.y_train.ndim == 1
    assert new.y_train.min() >= 0
    y = np.asarray(source.y_train)
    counts = np.unique(y.argmax(1) if y.ndim == 2 and y.shape[1] > 1 else y, return_counts=True)[1]
    assert sorted(np.unique(new.y_train, return_counts=True)[1].tolist()) == sorted(counts.tolist())
    assert (table is not None) == any("renumbered" in note for note in found.notes)
    if table is not None:
        assert sorted(table.values()) == list(range(len(table)))
    again = admit(new, images=False, classes=int(new.y_train.max()) + 1)
    assert again.source.y_train.tolist() == new.y_train.tolist()


@quick
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30).map(lambda y: np.array([0, *y])), KINDS)
def test_ordinary_labels_stay_exactly_as_they_are(y, dtype):
    if y.max() < 4 * np.unique(y).size and dtype is not bool:
        found = admit(flat(y.astype(dtype)))
        assert found.source.y_train.tolist() == y.tolist()
        assert found.labels_table is None


@quick
@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.integers(-1, 10**6)))
def test_sequences_are_never_renumbered(tokens):
    found = one_line(lambda: admit(Source(tokens, tokens, tokens, tokens)))
    assert found is None or (found.source.y_train is tokens and found.labels_table is None)
    assert found is not None or tokens.max() < 0


@quick
@given(
    st.sampled_from(["iid", "shards", "dirichlet_per_class", "dirichlet_per_client", "natural"]),
    hnp.arrays(st.sampled_from([np.int8, np.int64, np.float32, bool]), st.integers(0, 30)) | labels_of(12),
    st.integers(-1, 8),
    st.floats(-0.1, 3) | st.sampled_from([0.0, 1e-300, np.nan, np.inf]),
    st.integers(-1, 3),
)
def test_every_split_gives_each_row_once_or_one_line(kind, labels, clients, number, seed):
    calls = {
        "iid": lambda: partition.iid(len(labels), clients, seed),
        "shards": lambda: partition.shards(labels, clients, clients // 2, seed),
        "dirichlet_per_class": lambda: partition.dirichlet_per_class(labels, clients, number, seed),
        "dirichlet_per_client": lambda: partition.dirichlet_per_client(labels, clients, number, seed),
        "natural": lambda: partition.natural(labels, seed, min(number, 1)),
    }
    part = one_line(calls[kind])
    if part is None:
        return
    rows = part.rows.tolist() + ([] if part.test_index is None else part.test_index.tolist())
    assert len(set(rows)) == len(rows)
    assert all(0 <= row < len(labels) for row in rows)
    assert part.size.sum() == part.rows.size
    assert kind == "natural" or part.size.size == clients
    if kind.startswith("dirichlet"):
        assert part.size.min() >= 1


@quick
@given(
    hnp.arrays(st.sampled_from([np.int64, np.uint8, np.float32]), st.integers(0, 6)),
    hnp.arrays(st.sampled_from([np.int64, np.float32]), hnp.array_shapes(min_dims=1, max_dims=2, max_side=3))
    | st.lists(st.integers(-1, 4), max_size=4).map(lambda v: np.array(v, int)),
    st.none() | hnp.arrays(st.sampled_from([np.int64, np.float32]), st.integers(0, 4)),
    st.integers(-1, 3),
)
def test_every_population_has_its_sizes_or_one_line(index, size, level, levels):
    y = np.arange(300) % 3
    found = one_line(lambda: population(np.zeros((300, 1)), y, index, size, level=level, levels=levels))
    if found is not None:
        assert found.size.tolist() == size.tolist()
        assert found.rows.tolist() == index.tolist()
        assert level is None or found.level.tolist() == level.tolist()


@quick
@given(st.integers(1, 200), st.integers(0, 220), st.integers(0, 5), st.integers(1, 7))
def test_a_sample_is_spread_in_proportion(rows, examples, seed, classes):
    y = np.sort(np.arange(rows) % classes)
    x = np.arange(rows)[:, None]
    found = sample(Source(x, y, x, y), examples, seed)
    taken = min(examples, rows) if examples else rows
    assert len(found.y_test) == len(found.y_train) == taken
    assert (np.diff(found.x_test[:, 0]) > 0).all()
    share = np.bincount(y, minlength=classes) * taken / rows
    assert np.abs(np.bincount(found.y_test, minlength=classes) - share).max() < 1 + 1e-9

"""The door of data: what is read as a person means it, and the one line for what is not."""

import json
import time

import numpy as np
import pytest

from hetfl_jax.data import levels, partition, sources
from hetfl_jax.data.door import (
    Admitted,
    admit,
    fingerprint,
    need_images,
    same_fingerprint,
    sample,
)
from hetfl_jax.data.sources import Source
from tests.doors import LINE, flat, pictures


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

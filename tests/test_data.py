"""Sources, partitions and the population builder."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from hetfl_jax.data import door, partition, preprocess, sources
from hetfl_jax.data.partition import Partition
from hetfl_jax.data.population import batches, joined, population
from hetfl_jax.data.views import renamings
from tests.helpers import DATA, need


def clients(part: Partition):
    return np.split(part.rows, np.cumsum(part.size)[:-1])


def test_iid_is_equal_parts_without_repetition():
    part = partition.iid(103, 10, seed=0, test_examples=25)
    assert part.size.tolist() == [10] * 10
    assert len(set(part.rows.tolist())) == 100
    assert part.test_size.tolist() == [2] * 10


def test_shards_follow_the_official_rule():
    rng = np.random.default_rng(0)
    labels, test = rng.permutation(np.repeat(np.arange(10), 63)), rng.permutation(np.repeat(np.arange(10), 40))
    part = partition.shards(labels, 100, 2, seed=3, test_labels=test)
    assert set(part.classes.sum(1).tolist()) <= {1, 2}
    assert (part.classes.sum(0) <= 20).all()
    assert len(set(part.rows.tolist())) == part.rows.size
    # 63 rows of a class in 20 shards: three each, the three left over go to the first three shards, in dataset order
    order = {c: {row: i for i, row in enumerate(np.flatnonzero(labels == c))} for c in range(10)}
    for client, rows in enumerate(clients(part)):
        assert set(labels[rows].tolist()) == set(np.flatnonzero(part.classes[client]).tolist())
        for c in np.flatnonzero(part.classes[client]):
            places = sorted(order[c][row] for row in rows[labels[rows] == c])
            regular = [p for p in places if p < 60]
            assert regular == list(range(regular[0], regular[0] + 3))
            assert regular[0] % 3 == 0
            assert [p for p in places if p >= 60] == ([60 + regular[0] // 3] if regular[0] // 3 < 3 else [])
    for client, rows in enumerate(np.split(part.test_index, np.cumsum(part.test_size)[:-1])):
        assert set(test[rows].tolist()) == set(np.flatnonzero(part.classes[client]).tolist())


@pytest.mark.parametrize("kind", ["dirichlet_per_class", "dirichlet_per_client"])
def test_dirichlet_splits_are_skewed_by_their_concentration(kind):
    labels = np.repeat(np.arange(10), 200)
    split = getattr(partition, kind)
    share = {}
    for concentration in (0.1, 100.0):
        part = split(labels, 20, concentration, seed=1)
        assert len(set(part.rows.tolist())) == part.rows.size
        assert part.size.min() >= 10
        counts = partition.class_counts(labels, part)
        share[concentration] = (counts.max(1) / counts.sum(1)).mean()
    assert share[0.1] > 0.4 > 0.25 > share[100.0]
    if kind == "dirichlet_per_client":
        assert set(part.size.tolist()) == {100}


def test_natural_keeps_writers_apart_and_splits_off_their_tests():
    writer = np.array([5, 5, 5, 5, 5, 9, 9, 9, 2])
    part = partition.natural(writer, seed=0, test_fraction=0.4)
    assert part.size.tolist() == [3, 2]
    assert part.test_size.tolist() == [2, 1]
    assert [set(writer[rows].tolist()) for rows in clients(part)] == [{5}, {9}]
    assert not set(part.rows.tolist()) & set(part.test_index.tolist())


def test_a_partition_is_the_same_for_the_same_seed():
    for seed, same in ((4, True), (5, False)):
        first, second = partition.iid(50, 5, seed=4), partition.iid(50, 5, seed=seed)
        assert np.array_equal(first.rows, second.rows) is same


def test_a_million_clients_are_built_in_seconds():
    count = 1_000_000
    x, y = np.zeros((2 * count, 1), np.uint8), (np.arange(2 * count) % 10).astype(np.int32)
    began = time.perf_counter()
    part = partition.iid(2 * count, count, seed=0)
    pop = population(x, y, part.rows, part.size, classes=10)
    assert time.perf_counter() - began < 10
    assert pop.classes.sum(1).min() >= 1
    assert pop.offset[-1] == 2 * count - 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": [2, 0]}, r"1 clients hold no example \(first: client 1\)"),
        ({"size": [1, 2]}, "sizes sum to 3, but the index has 2 entries"),
        ({"index": [0, 7]}, r"index has rows 0\.\.7, allowed 0\.\.2"),
        ({"index": [-1, 0]}, r"index has rows -1\.\.0"),
        ({"y": [0, 1, -1]}, r"labels -1\.\.1, allowed 0\.\.1"),
        ({"y": [0.0, 1.0, 1.0], "classes": 2}, "labels of dtype float64: need integers where there are classes"),
        ({"y": [0, 1]}, "3 examples with 2 labels"),
        ({"level": [0, 2], "levels": 2}, r"client 1 has level 2, allowed 0\.\.1"),
    ],
)
def test_the_builder_refuses_what_jax_would_clamp(change, message):
    given = {"x": np.zeros((3, 2)), "y": [0, 1, 1], "index": [0, 2], "size": [1, 1]} | change
    arrays = {k: np.asarray(v) if k not in ("levels", "classes") else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        population(arrays.pop("x"), arrays.pop("y"), arrays.pop("index"), arrays.pop("size"), **arrays)


def test_batches_and_joined_cover_everything_once():
    pop = population(np.zeros((7, 1)), np.zeros(7, int), np.array([6, 0, 1, 2, 5]), np.array([2, 3]))
    cut = batches(pop, 2)
    assert sorted(cut.rows.tolist()) == [0, 1, 2, 5, 6]
    both = joined(pop, cut)
    last = both.rows[both.offset[-1] : both.offset[-1] + both.size[-1]]
    assert last.tolist() == cut.rows[4:5].tolist()


def test_batches_are_seen_as_their_owners_see_them():
    """Three clients of two views: every example once, in a batch of its owner's view."""
    views = renamings(1, np.array([[0, 1], [1, 0]]))
    y, size, view = np.arange(9) % 2, np.array([4, 2, 3]), np.array([1, 0, 1])
    pop = population(np.arange(9.0)[:, None], y, np.arange(9), size, classes=2, view=view, views=views)
    cut = batches(pop, 3)
    assert cut.size.tolist() == [2, 3, 3, 1]
    owner = {row: view[client] for row, client in enumerate(np.repeat(np.arange(3), size))}
    rows = np.split(np.asarray(cut.rows), np.asarray(cut.offset)[1:])
    assert sorted(np.concatenate(rows).tolist()) == list(range(9))
    for seen, part in zip(cut.view.tolist(), rows, strict=True):
        assert {owner[row] for row in part.tolist()} == {seen}


def test_images_of_floats_are_scaled_already():
    x = np.array([0, 51, 255], np.uint8).reshape(1, 3, 1, 1)
    prepare = preprocess.images([0.5], [0.25])
    scaled = jnp.asarray(x / 255.0, jnp.float32)
    np.testing.assert_allclose(prepare(jnp.asarray(x), None), prepare(scaled, None), atol=1e-6)


def test_normalisation_and_augmentation():
    x = jnp.arange(2 * 6 * 6, dtype=jnp.uint8).reshape(2, 6, 6, 1)
    still, moving = preprocess.images([0.5], [0.25]), preprocess.images([0.5], [0.25], "crop_flip", pad=2)
    np.testing.assert_allclose(still(x, None), (np.asarray(x) / 255 - 0.5) / 0.25, rtol=1e-5)
    np.testing.assert_array_equal(moving(x, None), still(x, None))
    black = float((0 - 0.5) / 0.25)
    padded = np.pad(np.asarray(still(x, None)), ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=black)
    windows = [padded[:, i : i + 6, j : j + 6][:, :, ::side] for i in range(5) for j in range(5) for side in (1, -1)]
    found = np.asarray(jax.jit(moving)(x, jax.random.key(0)))
    for example in range(2):
        assert any(np.allclose(found[example], w[example], atol=1e-5) for w in windows)
    cut = preprocess.images([0.5], [0.25], "window:4")
    flat = cut(x, None)
    assert float(flat.std()) < 0.2, "a pale image is not blown up"
    x = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, x.shape), 255, x).astype(jnp.uint8)
    for key in (None, jax.random.key(3)):
        small = np.asarray(cut(x, key))
        assert small.shape == (2, 4, 4, 1)
        np.testing.assert_allclose(small.mean((1, 2, 3)), 0, atol=1e-5)
        np.testing.assert_allclose(small.std((1, 2, 3)), 1, rtol=1e-5)
    middle = np.asarray(x)[:, 1:5, 1:5].astype(float)
    np.testing.assert_allclose(cut(x, None)[0], (middle[0] - middle[0].mean()) / middle[0].std(), atol=1e-5)
    with pytest.raises(ValueError, match="allowed windows inside"):
        preprocess.images([0.5], [0.25], "window:7")(x, None)
    with pytest.raises(ValueError, match="'rotate' is not one of none, flip, crop_flip"):
        preprocess.images([0.5], [0.5], "rotate")


def test_npz_source_and_what_it_says_when_something_is_missing(tmp_path, monkeypatch):
    arrays = {"x_train": np.zeros((4, 5, 5), np.uint8), "y_train": np.array([0, 1, 0, 1]),
              "x_test": np.zeros((2, 5, 5), np.uint8), "y_test": np.array([0, 1])}  # fmt: skip
    np.savez(tmp_path / "set.npz", **arrays)
    np.savez(tmp_path / "half.npz", x_train=arrays["x_train"])
    np.savez(tmp_path / "who.npz", writer=np.array([3, 3, 8, 8]))
    monkeypatch.setenv("HETFL_DATA", str(tmp_path))
    source = sources.load("npz:set.npz", writers="who.npz:writer")
    assert door.admit(source).source.x_train.shape == (4, 5, 5, 1)
    assert source.writer.tolist() == [3, 3, 8, 8]
    with pytest.raises(ValueError, match="half.npz has no array x_test, y_test, y_train"):
        sources.load("npz:half.npz")
    with pytest.raises(FileNotFoundError, match="no file none.npz here or in"):
        sources.load("npz:none.npz")
    with pytest.raises(ValueError, match="'csv:a' is not one of digits, synthetic"):
        sources.load("csv:a")


class Builder(tfds.core.GeneratorBasedBuilder):
    """A set of twelve images, written locally as array records."""

    VERSION = tfds.core.Version("1.0.0")
    name = "hetfl_tiny"

    def _info(self):
        image = tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8)  # Image needs TensorFlow to encode
        features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=3)})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, manager):
        return {"train": self._examples(9), "test": self._examples(3)}

    def _examples(self, count):
        for i in range(count):
            yield i, {"image": np.full((4, 4, 1), i, np.uint8), "label": i % 3}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.mark.filterwarnings("ignore")
def test_tfds_source_reads_array_records_without_tensorflow(tmp_path, monkeypatch):
    builder = Builder(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    monkeypatch.setattr(tfds, "data_source", lambda name, split, download: builder.as_data_source(split=split))
    source = sources.load("tfds:hetfl_tiny")
    assert source.x_train.shape == (9, 4, 4, 1)
    assert sorted(source.x_train[:, 0, 0, 0].tolist()) == list(range(9))
    assert (source.y_train == source.x_train[:, 0, 0, 0] % 3).all()


@pytest.mark.filterwarnings("ignore")
def test_tfds_source_reads_the_catalogue_through_mock_data():
    with tfds.testing.mock_data(num_examples=20):
        source = sources.load("tfds:mnist")
    assert source.x_train.shape == source.x_test.shape == (20, 28, 28, 1)
    assert source.x_train.dtype == np.uint8
    assert source.y_train.shape == (20,)


def test_a_tfds_set_that_is_not_prepared_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run `tfds build mnist --file_format=array_record` once"):
        sources.load("tfds:mnist")


def test_synthetic_is_label_skewed_and_seeded():
    source = sources.load("synthetic", clients=30, seed=2, alpha=1.0, beta=1.0, sigma=1.0)
    again = sources.load("synthetic", clients=30, seed=2, alpha=1.0, beta=1.0, sigma=1.0)
    np.testing.assert_array_equal(source.x_train, again.x_train)
    held = [len(set(source.y_train[source.writer == k].tolist())) for k in range(30)]
    assert 1 <= np.mean(held) < 5
    assert abs(len(source.y_test) / (len(source.y_test) + len(source.y_train)) - 0.1) < 0.02


def test_natural_split_of_real_writers():
    need("mnist_writers.npz")
    writer = np.load(DATA / "mnist_writers.npz")["writer_train"]
    part = partition.natural(writer, seed=0)
    assert part.size.size == 539
    assert part.size.sum() + part.test_size.sum() == 60_000
    assert len(set(np.concatenate([part.rows, part.test_index]).tolist())) == 60_000
